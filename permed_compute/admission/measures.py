"""What a simulated run says about a policy: waits, completion times, use, waste, fairness. Plain numbers.

Sources: Jain, Chiu & Hawe (1984) for the index; finish-time fairness ρ after Mahajan et al. (Themis, NSDI 2020), per
account; floors and lending as `docs/simulation.md` defines them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from permed_compute.admission.policy import Policy
from permed_compute.admission.simulate import Outcome, Record


def quantile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed; 0 of nothing."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * percent // 100) - 1)] if ordered else 0.0


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def jain(values: Iterable[float]) -> float:
    """(Σx)² ÷ (n Σx²): 1 where all are equal, 1/n where one has everything; 1 of nothing."""
    found = list(values)
    squares = sum(value * value for value in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


@dataclass(frozen=True, slots=True)
class Group:
    """One band, region, sector or account. Seconds; `service` and `entitled` in hours of the measured resource."""

    name: str
    jobs: int
    ended: int
    wait_mean: float
    wait_p50: float
    wait_p99: float
    completion_mean: float
    service: float
    wasted: float


def summary(outcome: Outcome, policy: Policy | None = None) -> dict[str, Any]:
    """Every figure of one run, JSON-able and the same to the byte for the same run.

    `policy` names sectors, regions and floors, where the simulated rule itself knows none.
    """
    records = outcome.records
    done = [record.completion / 1000 for record in records if record.completion >= 0]
    waits = [record.wait / 1000 for record in records if record.wait >= 0]
    held = sum(record.held for record in records)
    lost = sum(record.lost for record in records)
    useful = sum(record.need for record in records if record.outcome == "SUCCEEDED")
    due = [record for record in records if record.job.deadline]
    missed = [record for record in due if not 0 <= record.end <= record.job.deadline]
    known = policy if policy is not None else Policy()
    span = outcome.capacity * max(1, outcome.horizon)
    return {
        "trace": outcome.trace, "policy": outcome.policy, "measured": outcome.measured,
        "jobs": len(records), "ended": len(done),
        "unfinished": sum(record.outcome in ("waiting", "running") for record in records),
        "completion_mean_s": _round(mean(done)), "completion_p50_s": _round(quantile(done, 50)),
        "completion_p99_s": _round(quantile(done, 99)),
        "wait_mean_s": _round(mean(waits)), "wait_p50_s": _round(quantile(waits, 50)),
        "wait_p99_s": _round(quantile(waits, 99)),
        "utilisation": _round(outcome.busy / span), "makespan_s": outcome.makespan // 1000,
        "goodput": _round(useful / held if held else 0.0), "waste": _round(lost / held if held else 0.0),
        "preemptions": sum(record.preempted for record in records),
        "deadlines": len(due), "deadlines_missed": len(missed),
        "queue_mean": _round(_over_time(outcome, lambda sample: sample.waiting)),
        "queue_p50": _round(_median_over_time(outcome)),
        **_lending(outcome, known), **_floors(outcome, known),
        "jain_regions": _round(jain(_satisfaction(records, known, "region"))),
        "jain_sectors": _round(jain(_satisfaction(records, known, "sector"))),
        "rho": finish_time_fairness(outcome, known),
        "groups": {
            by: [_shown(group) for group in groups(records, key)] for by, key in keys(known).items()
        },
        "cycles": outcome.cycles, "commits": outcome.commits, "faults": dict(outcome.faults),
    }  # fmt: skip


def _round(value: float) -> float:
    return round(value, 6)


def keys(policy: Policy) -> dict[str, Callable[[Record], str]]:
    """How jobs are grouped: by band, sector, region, account and kind."""
    facts = {which: {a.name: policy.fact(a.name, which) for a in policy.accounts} for which in ("sector", "region")}

    def fact(which: str, record: Record) -> str:
        steps = record.job.account.split("/")
        return facts[which].get(record.job.account) or (steps[0] if which == "sector" else "/".join(steps[:2]))

    return {
        "band": lambda record: record.job.band.value, "sector": lambda record: fact("sector", record),
        "region": lambda record: fact("region", record), "account": lambda record: record.job.account,
        "kind": lambda record: record.job.kind or "all",
    }  # fmt: skip


def groups(records: Iterable[Record], key: Callable[[Record], str]) -> list[Group]:
    """The records by key, in the order of the names."""
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(key(record), []).append(record)
    return [_group(name, members) for name, members in sorted(found.items())]


def _group(name: str, members: list[Record]) -> Group:
    waits = [record.wait / 1000 for record in members if record.wait >= 0]
    done = [record.completion / 1000 for record in members if record.completion >= 0]
    hour = 3_600_000 * 1000
    return Group(
        name, len(members), len(done), mean(waits), quantile(waits, 50), quantile(waits, 99), mean(done),
        sum(record.held for record in members) / hour, sum(record.lost for record in members) / hour,
    )  # fmt: skip


def _shown(group: Group) -> dict[str, Any]:
    return {
        name: _round(value) if isinstance(value, float) else value
        for name in Group.__slots__
        for value in (getattr(group, name),)
    }


def series(outcome: Outcome, points: int = 240) -> dict[str, list[float]]:
    """Queue length and share of the pool in use, as means of equal spans up to the last submission (hours)."""
    span = max(1, -(-max(1, outcome.horizon) // points))
    sums = [[0.0, 0.0, 0.0] for _ in range(points)]
    for sample, following in zip(outcome.samples, outcome.samples[1:], strict=False):
        at, end = sample.at, min(following.at, outcome.horizon)
        while at < end:
            place = min(points - 1, at // span)
            until = min(end, (place + 1) * span) if place < points - 1 else end
            weight = until - at
            each = sums[place]
            each[0] += weight
            each[1] += sample.waiting * weight
            each[2] += sample.busy / max(1, sample.capacity) * weight
            at = until
    return {
        "hours": [_round(place * span / 3_600_000) for place in range(points)],
        "waiting": [_round(waiting / weight) if weight else 0.0 for weight, waiting, _ in sums],
        "busy": [_round(busy / weight) if weight else 0.0 for weight, _, busy in sums],
    }


def shifts(before: Mapping[str, Any], after: Mapping[str, Any], by: str) -> list[dict[str, Any]]:
    """Who gains and who loses: per group, waits and completion times in two runs; those that change most first."""
    then = {row["name"]: row for row in before["groups"][by]}
    rows = []
    for row in after["groups"][by]:
        was = then.get(row["name"])
        if was is not None:
            change = row["completion_mean"] - was["completion_mean"]
            rows.append({
                "by": by, "name": row["name"], "jobs": row["jobs"], "wait_before_s": was["wait_mean"],
                "wait_after_s": row["wait_mean"], "completion_before_s": was["completion_mean"],
                "completion_after_s": row["completion_mean"], "change_s": _round(change),
            })  # fmt: skip
    return sorted(rows, key=lambda row: (-abs(row["change_s"]), row["name"]))


# --------------------------------------------------------------------------------------------- over time


def _over_time(outcome: Outcome, value: Callable[[Any], float]) -> float:
    """Mean over time until the last submission, each sample standing until the next."""
    total = weight = 0.0
    for sample, following in zip(outcome.samples, outcome.samples[1:], strict=False):
        if sample.at >= outcome.horizon:
            break
        span = min(following.at, outcome.horizon) - sample.at
        total, weight = total + value(sample) * span, weight + span
    return total / weight if weight else 0.0


def _median_over_time(outcome: Outcome) -> float:
    spans = sorted(
        (sample.waiting, min(following.at, outcome.horizon) - sample.at)
        for sample, following in zip(outcome.samples, outcome.samples[1:], strict=False)
        if sample.at < outcome.horizon
    )
    half = sum(span for _, span in spans) / 2
    for waiting, span in spans:
        half -= span
        if half <= 0:
            return float(waiting)
    return 0.0


def nominal(policy: Policy) -> dict[str, int]:
    """Account → its own guaranteed GPUs, in thousandths, over all GPU flavors."""
    floors = {
        account.name: sum(quota.nominal for flavor, quota in account.quotas.items() if flavor.startswith("gpu:"))
        for account in policy.accounts
    }
    return {name: floor for name, floor in floors.items() if floor}


def _lending(outcome: Outcome, policy: Policy) -> dict[str, float]:
    """What became of capacity that its owner did not use while somebody waited, after each decision.

    lent: share of it, as far as it could be placed, that somebody else uses; unplaceable: share of all capacity that
    is free while jobs wait and on which none of them fits as it lies (fragmentation).
    """
    floors = nominal(policy)
    lent = idle = scattered = waiting_time = 0.0
    for sample, following in zip(outcome.samples, outcome.samples[1:], strict=False):
        span = min(following.at, outcome.horizon) - sample.at
        if span <= 0 or not sample.waiting or sample.at >= outcome.horizon:
            continue
        waiting_time += sample.capacity * span
        scattered += max(0, sample.capacity - sample.busy - sample.placeable) * span
        if floors:
            borrowed = sum(max(0, use - floors.get(name, 0)) for name, use in sample.used.items())
            unused = sum(max(0, floor - sample.used.get(name, 0)) for name, floor in floors.items())
            lent += min(borrowed, borrowed + unused) * span
            idle += min(unused, sample.placeable) * span
    return {
        "idle_lent": _round(lent / (lent + idle) if lent + idle else 1.0),
        "fragmentation": _round(scattered / waiting_time if waiting_time else 0.0),
    }


def _floors(outcome: Outcome, policy: Policy) -> dict[str, Any]:
    """How long an account whose waiting demand lay within its floor went without it, at most and in all.

    Short by: min(floor, used + asked for) − used − the largest job it waits with; the clock runs while that is > 0.
    """
    floors = nominal(policy)
    since: dict[str, int] = {}
    longest = missing = 0
    for sample, following in zip(outcome.samples, outcome.samples[1:], strict=False):
        for name, floor in floors.items():
            used, asked = sample.used.get(name, 0), sample.asked.get(name, 0)
            short = min(floor, used + asked) - used - sample.largest.get(name, 0)
            if short > 0:
                longest = max(longest, following.at - since.setdefault(name, sample.at))
                missing += short * (following.at - sample.at)
            else:
                since.pop(name, None)
    return {"floor_longest_s": longest / 1000, "floor_missing_gpu_h": _round(missing / 1000 / 3_600_000)}


# --------------------------------------------------------------------------------------------- fairness


def _satisfaction(records: Iterable[Record], policy: Policy, which: str) -> list[float]:
    """Per region or sector: useful time ÷ time from submission to end, mean over its jobs (1: nobody ever waited)."""
    key = keys(policy)[which]
    found: dict[str, list[float]] = {}
    for record in records:
        if record.completion >= 0:
            wide = record.job.work * record.job.workers_min / record.job.workers_max
            found.setdefault(key(record), []).append(min(1.0, wide / max(1, record.completion)))
    return [mean(values) for _, values in sorted(found.items())]


def service(
    outcome: Outcome, key: Callable[[Record], str], window: tuple[int, int], floors: Mapping[str, int]
) -> dict[str, float]:
    """Demand-weighted service in a window (ms): what each group got ÷ the smaller of what it asked for by then and its
    entitlement (floor × window). Above 1: it had more than its share because others left it."""
    start, end = window
    got: dict[str, float] = dict.fromkeys(floors, 0.0)
    asked: dict[str, float] = dict.fromkeys(floors, 0.0)
    for record in outcome.records:
        name = key(record)
        if record.job.submit < end:
            asked[name] = asked.get(name, 0.0) + record.need
        if record.first_start >= 0 and record.held:
            last = record.end if record.end >= 0 else outcome.makespan
            inside = max(0, min(end, last) - max(start, record.first_start))
            got[name] = got.get(name, 0.0) + record.held * inside / max(1, last - record.first_start)
    return {name: got[name] / max(1.0, min(asked[name], floors[name] * (end - start))) for name in sorted(floors)}


def finish_time_fairness(outcome: Outcome, policy: Policy) -> dict[str, float]:
    """ρ per account: mean completion time here ÷ mean completion time with its floor alone, first come first served.

    Below 1 sharing pays. Accounts without a floor, and jobs larger than it, are left out.
    """
    result = {}
    for name, floor in sorted(nominal(policy).items()):
        mine = [r for r in outcome.records if r.job.account == name and r.completion >= 0]
        mine = [r for r in mine if 0 < r.job.workers_min * r.job.gpu_milli <= floor]
        if mine:
            alone = _alone(mine, floor)
            result[name] = _round(mean([r.completion for r in mine]) / max(1.0, mean(alone)))
    return result


def _alone(records: Sequence[Record], floor: int) -> list[float]:
    free, ends, clock, times = floor, list[tuple[int, int]](), 0, []
    for record in records:
        job = record.job
        workers = min(job.workers_max, floor // job.gpu_milli)
        need = workers * job.gpu_milli
        clock = max(clock, job.submit)
        while ends and (ends[0][0] <= clock or free < need):
            at, back = heapq.heappop(ends)
            clock, free = max(clock, at), free + back
        end = clock + job.work * job.workers_min // workers
        heapq.heappush(ends, (end, need))
        free -= need
        times.append(float(end - job.submit))
    return times
