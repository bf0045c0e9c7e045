"""Who used what: a fold of the event log. Nothing increments a counter that is not derived from events.

`spells` turns events into what each attempt held and for how long; `table` groups them; `Decayed` is the running form
of the same for fair share. Amounts: thousandths of a core or device, MiB; times in ms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from fractions import Fraction
from typing import Any

from permed_compute.admission.billing import HOUR_MS, Ask, Tariff
from permed_compute.admission.policy import Policy, gpu_flavor
from permed_compute.admission.snapshot import Grant
from permed_compute.errors import NotFoundError
from permed_compute.queue.port import Event
from permed_compute.spec import JobSpec
from permed_compute.states import LIVE, JobState

_KEPT = frozenset({JobState.SUCCEEDED, JobState.PARTIAL})


@dataclass(frozen=True, slots=True)
class Spell:
    """One attempt's hold on resources that did not change: from `start` up to `end` (ms since 1970 UTC).

    `outcome`: succeeded, preempted, failed, cancelled, timed-out, lost, or live where it still holds them. `wasted` is
    how much of its time (ms) nothing was kept of: what a preempted or lost attempt did after its last checkpoint, all
    of one that failed.
    """

    job_id: str
    account: str
    band: str
    owner: str
    flavor: str
    start: int
    end: int
    workers: int
    nodes: int
    cpu_milli: int
    memory: int
    gpu_milli: int
    asked: int
    """The time limit (ms) of the attempt that it belongs to; 0 for a further spell of the same attempt."""
    outcome: str = "live"
    wasted: int = 0

    @property
    def ms(self) -> int:
        return self.end - self.start

    def within(self, since: int, until: int) -> Spell:
        """The part of it in that time."""
        start, end = max(self.start, since), min(self.end, until)
        wasted = max(0, end - max(start, self.end - self.wasted))
        return replace(self, start=start, end=max(start, end), wasted=wasted)


@dataclass(slots=True)
class _Open:
    spec: JobSpec
    owner: str
    grants: tuple[Grant, ...] = ()
    start: int = 0
    asked: int = 0
    kept_at: int = 0


def spells(events: Iterable[Event], spec_of: Callable[[str], JobSpec | None], *, until: int) -> list[Spell]:
    """What every attempt held, in order of its end; what still runs counts up to `until` (ms).

    `spec_of(job_id)` gives the job's spec; jobs that it does not know (None) are left out.
    """
    jobs: dict[str, _Open] = {}
    found: list[Spell] = []
    for event in events:
        if event.action == "SUBMITTED":
            spec = spec_of(event.job_id)
            if spec is not None:
                jobs[event.job_id] = _Open(spec, event.actor)
        elif event.action == "MOVED" and event.job_id in jobs:
            found += _moved(jobs[event.job_id], event)
    for job_id, job in jobs.items():
        if job.grants and until > job.start:
            found.append(_spell(job_id, job, until, "live"))
    return found


def _moved(job: _Open, event: Event) -> Iterator[Spell]:
    detail = event.data.get("detail")
    grants = tuple(Grant.from_row(row) for row in detail["grants"]) if detail and "grants" in detail else job.grants
    if event.after not in LIVE:
        if job.grants:
            yield replace(
                _spell(event.job_id, job, event.at, _outcome(event)), wasted=_wasted(job, event, detail or {})
            )
        job.grants = ()
        return
    if detail and "kept_at" in detail:
        job.kept_at = int(detail["kept_at"])
    if event.before not in LIVE:
        job.grants, job.start, job.kept_at = grants, event.at, event.at
        job.asked = job.spec.time_limit * 1000
    elif grants != job.grants:
        yield _spell(event.job_id, job, event.at, "resized")
        job.grants, job.start, job.asked = grants, event.at, 0


def _outcome(event: Event) -> str:
    if event.after == JobState.QUEUED:
        return "preempted" if event.before == JobState.PREEMPTING else "lost"
    return {"SUCCEEDED": "succeeded", "PARTIAL": "succeeded", "HELD": "preempted", "TIMED_OUT": "timed-out"}.get(
        event.after, event.after.lower()
    )


def _wasted(job: _Open, event: Event, detail: Mapping[str, Any]) -> int:
    """Work that was kept is not wasted: up to the last checkpoint that the log knows of."""
    if event.after in _KEPT:
        return 0
    kept_at = max(job.start, int(detail.get("kept_at", job.kept_at)))
    return max(0, event.at - kept_at)


def _spell(job_id: str, job: _Open, end: int, outcome: str) -> Spell:
    grants = job.grants
    return Spell(
        job_id, job.spec.account, job.spec.band.value, job.owner, grants[0].flavor, job.start, end, len(grants),
        len({grant.node for grant in grants}), sum(grant.cpu_milli for grant in grants),
        sum(grant.memory for grant in grants), sum(grant.gpu_milli for grant in grants), job.asked, outcome,
    )  # fmt: skip


# --------------------------------------------------------------------------------------------- the report

BY = ("sector", "region", "account", "flavor", "band", "owner", "month")
"""What usage can be grouped by."""


@dataclass(frozen=True, slots=True)
class Row:
    """Usage of one group. Hours; GPU-hours count whole devices; units are the site's billing, 0 without a tariff.

    requested: time limits of the attempts × what they held: what a site reserves at their start. wasted: GPU-hours (or
    CPU-hours, of work without a GPU) that nothing was kept of. borrowed: GPU-hours above the account's own quota;
    lent: GPU-hours of its quota that others used.
    """

    group: Mapping[str, str]
    jobs: int = 0
    attempts: int = 0
    gpu_hours: float = 0.0
    cpu_hours: float = 0.0
    requested_gpu_hours: float = 0.0
    requested_cpu_hours: float = 0.0
    wasted_preempted: float = 0.0
    wasted_failed: float = 0.0
    units: float = 0.0
    reserved_units: float = 0.0
    pool_gpu_hours: float = 0.0
    borrowed: float = 0.0
    lent: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        names = ("jobs", "attempts", *FIGURES)
        return {**self.group, **{name: getattr(self, name) for name in names}}


FIGURES = (
    "gpu_hours", "cpu_hours", "requested_gpu_hours", "requested_cpu_hours", "wasted_preempted", "wasted_failed",
    "units", "reserved_units", "pool_gpu_hours", "borrowed", "lent",
)  # fmt: skip


def table(
    found: Sequence[Spell], by: Sequence[str], *, policy: Policy | None = None, tariff: Tariff | None = None
) -> list[Row]:
    """Usage grouped by some of `BY`, largest first. Raises `NotFoundError` for an unknown grouping."""
    unknown = [name for name in by if name not in BY]
    if unknown:
        raise NotFoundError(f"Usage cannot be grouped by {unknown[0]!r}.", remedy=f"By: {', '.join(BY)}.")
    policy = policy or Policy()
    groups: dict[tuple[str, ...], _Sum] = {}
    for spell in found:
        for part in by_month(spell) if "month" in by else (spell,):
            key = tuple(_key(part, name, policy) for name in by)
            groups.setdefault(key, _Sum()).add(part, tariff)
    for key, amount, lent in _loans(found, by, policy):
        groups.setdefault(key, _Sum()).loan(amount, lent)
    rows = [each.row(dict(zip(by, key, strict=True))) for key, each in sorted(groups.items())]
    return sorted(rows, key=lambda row: (-row.gpu_hours, -row.cpu_hours))


def _key(spell: Spell, name: str, policy: Policy) -> str:
    if name in ("sector", "region"):
        fact = policy.fact(spell.account, name)
        steps = spell.account.split("/")
        return fact or (steps[0] if name == "sector" else "/".join(steps[:2]))
    if name == "month":
        return datetime.fromtimestamp(spell.start / 1000, UTC).strftime("%Y-%m")
    return str(getattr(spell, name))


def by_month(spell: Spell) -> Iterator[Spell]:
    """The spell cut at the first moment of each month (UTC); what was wasted is the end of it."""
    start, asked = spell.start, spell.asked
    while start < spell.end:
        at = datetime.fromtimestamp(start / 1000, UTC)
        following = datetime(at.year + at.month // 12, at.month % 12 + 1, 1, tzinfo=UTC)
        end = min(spell.end, int(following.timestamp()) * 1000)
        wasted = max(0, end - max(start, spell.end - spell.wasted))
        yield replace(spell, start=start, end=end, asked=asked, wasted=wasted)
        start, asked = end, 0


class _Sum:
    """One group, exact until it is shown."""

    def __init__(self) -> None:
        self.jobs: set[str] = set()
        self.attempts = 0
        self.milli_ms = dict.fromkeys(("gpu", "cpu", "asked_gpu", "asked_cpu", "preempted", "failed"), 0)
        self.units = self.reserved = self.pool = Fraction(0)
        self.loans = {False: 0, True: 0}

    def add(self, spell: Spell, tariff: Tariff | None) -> None:
        self.jobs.add(spell.job_id)
        self.attempts += bool(spell.asked)
        sums = self.milli_ms
        sums["gpu"] += spell.gpu_milli * spell.ms
        sums["cpu"] += spell.cpu_milli * spell.ms
        sums["asked_gpu"] += spell.gpu_milli * spell.asked
        sums["asked_cpu"] += spell.cpu_milli * spell.asked
        waste = "preempted" if spell.outcome in ("preempted", "lost") else "failed"
        sums[waste] += (spell.gpu_milli or spell.cpu_milli) * spell.wasted
        if tariff is not None:
            rate = tariff.rate(
                Ask(Fraction(spell.cpu_milli, 1000), spell.memory, Fraction(spell.gpu_milli, 1000), spell.nodes)
            )
            self.units += rate.units * spell.ms / HOUR_MS
            self.reserved += rate.units * spell.asked / HOUR_MS
            self.pool += rate.gpu_hours * spell.ms / HOUR_MS

    def loan(self, amount: int, lent: bool) -> None:
        self.loans[lent] += amount

    def row(self, group: Mapping[str, str]) -> Row:
        hours = {name: amount / 1000 / HOUR_MS for name, amount in self.milli_ms.items()}
        return Row(
            group, len(self.jobs), self.attempts, hours["gpu"], hours["cpu"], hours["asked_gpu"], hours["asked_cpu"],
            hours["preempted"], hours["failed"], float(self.units), float(self.reserved), float(self.pool),
            self.loans[False] / 1000 / HOUR_MS, self.loans[True] / 1000 / HOUR_MS,
        )  # fmt: skip


def _loans(found: Sequence[Spell], by: Sequence[str], policy: Policy) -> Iterator[tuple[tuple[str, ...], int, bool]]:
    """(group, thousandths × ms of GPUs, lent?) where the grouping names accounts and nothing finer than a flavor.

    At every moment: an account borrows what it uses above its nominal quota; what is borrowed of a flavor is lent by
    those who use less than theirs, in proportion to what they leave unused.
    """
    if not policy.accounts or not {"account", "sector", "region"} & set(by) or {"band", "owner", "month"} & set(by):
        return
    for flavor in sorted({spell.flavor for spell in found if spell.gpu_milli}):
        nominal = {
            account.name: account.quotas[gpu_flavor(flavor)].nominal
            for account in policy.accounts if gpu_flavor(flavor) in account.quotas
        }  # fmt: skip
        borrowed, lent = _integrate(found, flavor, nominal)
        for amounts, is_lent in ((borrowed, False), (lent, True)):
            for account, amount in amounts.items():
                like = Spell("", account, "", "", flavor, 0, 0, 0, 0, 0, 0, 0, 0)
                yield tuple(_key(like, name, policy) for name in by), amount, is_lent


def _integrate(
    found: Sequence[Spell], flavor: str, nominal: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, int]]:
    changes: list[tuple[int, str, int]] = []
    for spell in found:
        if spell.flavor == flavor and spell.gpu_milli:
            changes += [(spell.start, spell.account, spell.gpu_milli), (spell.end, spell.account, -spell.gpu_milli)]
    changes.sort(key=lambda change: change[0])
    used: dict[str, int] = dict.fromkeys(nominal, 0)
    borrowed, lent = dict.fromkeys(used, 0), dict.fromkeys(used, 0)
    since = changes[0][0] if changes else 0
    for at, account, amount in changes:
        if at > since:
            over = {name: use - nominal.get(name, 0) for name, use in used.items()}
            total = sum(more for more in over.values() if more > 0)
            spare = -sum(more for more in over.values() if more < 0)
            for name, more in over.items():
                if more > 0:
                    borrowed[name] = borrowed.get(name, 0) + more * (at - since)
                elif more < 0 and total:
                    lent[name] += min(total, spare) * -more * (at - since) // spare
            since = at
        used[account] = used.get(account, 0) + amount
    return borrowed, lent


# --------------------------------------------------------------------------------------------- for fair share

_ONE = 1 << 32


class Decayed:
    """Decayed usage by account and flavor, as `Snapshot.usage` wants it: thousandth-seconds (MiB-seconds), integers.

    Decay is applied once per epoch of the policy, at whole multiples of it since 1970, so that the figure depends on
    what was used and when, not on how often somebody looked. `hold` is told of every change of what is held, in order
    of time; two folds of the same events agree to the unit.
    """

    def __init__(self, policy: Policy, now: int) -> None:
        self._epoch = max(1, policy.epoch) * 1000
        self._keep = round(_ONE * 0.5 ** (policy.epoch / max(1, policy.half_life)))
        self._now = now
        self._rates: dict[str, dict[str, int]] = {}
        """Thousandths × charge in thousandths, of what is held now."""
        self._sums: dict[str, dict[str, int]] = {}
        """Thousandths × charge × ms."""

    def hold(self, account: str, amounts: Mapping[str, int], charge: int, now: int) -> None:
        """From now on so much more (less, with a negative charge) is held by the account."""
        self._advance(now)
        rates, sums = self._rates.setdefault(account, {}), self._sums.setdefault(account, {})
        for flavor, amount in amounts.items():
            if amount:
                rates[flavor] = rates.get(flavor, 0) + amount * charge
                sums.setdefault(flavor, 0)

    def at(self, now: int) -> dict[str, dict[str, int]]:
        """The usage up to now."""
        self._advance(now)
        return {
            account: {flavor: amount // 1_000_000 for flavor, amount in sums.items()}
            for account, sums in self._sums.items()
        }

    def peek(self, now: int) -> dict[str, dict[str, int]]:
        """The same without moving on: looking leaves no trace, so that a replay need not look as often."""
        copy = Decayed.__new__(Decayed)
        copy._epoch, copy._keep, copy._now, copy._rates = self._epoch, self._keep, self._now, self._rates
        copy._sums = {account: dict(sums) for account, sums in self._sums.items()}
        return copy.at(now)

    def under(self, policy: Policy, now: int) -> Decayed:
        """What was used so far, decayed from now on as this policy says."""
        self._advance(now)
        made = Decayed(policy, now)
        made._rates, made._sums = self._rates, self._sums
        return made

    def _advance(self, now: int) -> None:
        while (boundary := (self._now // self._epoch + 1) * self._epoch) <= now:
            self._accrue(boundary)
            for sums in self._sums.values():
                for flavor, amount in sums.items():
                    sums[flavor] = amount * self._keep >> 32
        self._accrue(now)

    def _accrue(self, now: int) -> None:
        ms = now - self._now
        if ms > 0:
            for account, rates in self._rates.items():
                sums = self._sums[account]
                for flavor, rate in rates.items():
                    if rate:
                        sums[flavor] += rate * ms
            self._now = now
