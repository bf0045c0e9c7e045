"""`decide(snapshot, policy, now) -> Plan`: pure, deterministic, integers only; no I/O, no clock, no randomness.

The numbered steps are the design document. Steps 5 to 7 are taken job by job, in the order of step 4: whoever does
not fit may preempt where policy allows, else gets a reserved start while there are any, before the next one is asked.

The cost follows what can change, not what waits: jobs of one kind stand in one group, one failed representative parks
its like (a group may delay, never admit), and within a decision free capacity only shrinks, so that a need that found
no room is not asked again.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import chain, islice
from operator import attrgetter
from typing import Any

from permed_compute.admission.fairshare import FairQueue, Group, Kind, Levels, grouped, levels
from permed_compute.admission.placement import Cluster, held_until
from permed_compute.admission.policy import CPU, Policy
from permed_compute.admission.preemption import Room, Victim, draining, make_room
from permed_compute.admission.quota import Tree, in_force, wanted_by
from permed_compute.admission.snapshot import (
    ANY_GPU,
    Admission,
    Grant,
    Need,
    Plan,
    Preemption,
    Promise,
    Reason,
    Reservation,
    Resize,
    Snapshot,
    Start,
    Waiting,
    Waits,
    used_by,
)
from permed_compute.states import ENDED, JobState

_BLOCKERS = 8
"""A reason names at most so many jobs."""
_PREEMPTORS = 16
"""So many jobs may find victims in one decision, each among all that runs; the next decision follows at once."""
_IN_VAIN = 4
"""Whoever looks and finds none counts as so many."""


@dataclass(slots=True)
class _Kept:
    """A reserved start's hold on quotas: at `at`, so much is left beside it; it borrows at so many levels."""

    job_id: str
    account: str
    at: int
    left: dict[str, int]
    borrows: int


def decide(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
    """Which queued jobs start now and where, which live ones give way, and one reason for each that still waits.

    `now` is ms since 1970 UTC. A job gets `workers_min` together or nothing; further workers up to `workers_max` go
    where they fit and the quota allows.
    """
    # Tens of thousands of small objects without a cycle: the collector would look at all of them, several times.
    collecting = gc.isenabled()
    gc.disable()
    try:
        return _Decision(snapshot, policy, now).run()
    finally:
        if collecting:
            gc.enable()


class _Decision:
    def __init__(self, snapshot: Snapshot, policy: Policy, now: int) -> None:
        self.snapshot, self.policy, self.now = snapshot, policy, now
        self.waits: dict[str, Reason] = {}
        self.admissions: list[Admission] = []
        self.preemptions: list[Preemption] = []
        self.promises: list[Promise] = []
        self.resizes: list[Resize] = []
        self.starts: list[Start] = []
        self.full: dict[str, list[Need]] = {}
        """By flavor, needs that found no room even where no reservation stood in the way."""
        self.short: dict[tuple[str, str], tuple[int, Reason]] = {}
        """(account, flavor) → the least amount that its quota did not allow, and why."""
        self.holding: dict[str, tuple[str, ...]] = {}
        self.figures: dict[Need, dict[str, Any]] = {}
        self.competing: set[Need] = set()
        """What those need that wait and would use capacity if they could."""
        self.given_up: set[str] = set()
        """Live jobs that this decision stops or shrinks."""
        self.tries = _PREEMPTORS
        """How much looking for victims is left: each time at everything that runs."""
        self.below: dict[int, list[Reservation]] = {}
        """Live jobs of an account and those below it, soonest end first."""
        self.just_used: dict[tuple[int, str], list[str]] = {}
        """The same of what this decision starts."""
        self.quota_kept: list[_Kept] = []
        """Of the quotas, for reserved starts."""

    def run(self) -> Plan:
        snapshot, policy, now = self.snapshot, self.policy, self.now
        # 1. Validity and holds: dependencies, back-off, frozen and unknown accounts.
        self.tree = Tree(policy, now)
        valid = self._ready()

        # 2. What is reserved and what is free: derived from live reservations and promises alone.
        self.cluster = Cluster(snapshot.nodes, snapshot.drained, snapshot.windows)
        for job in snapshot.live:
            self.cluster.hold(job.grants, held_until(job, now))
            self.tree.add(job.account, job.uses)
        self.holders = sorted(snapshot.live, key=attrgetter("ends_by"))

        # 3. Reclaim: what a lowered quota no longer covers, once the stated delay is over. Before promises are kept:
        # on a full cluster they and their victims together are more than the quota.
        self._drain_quotas()
        ready = self._promised(valid)

        # 4. Order: priority band, then slack (clinical), fair share, and within an account submission + expected time.
        shares = levels(policy, self.tree, snapshot.usage, snapshot.live, now)
        groups = grouped(ready, policy, now)
        self.elders = self._elders(groups.values())
        for band in policy.bands:
            self._band([group for group in groups.values() if group.band is band], shares)
        for group in groups.values():
            for passed in group.passed_over:
                self._wait(passed, group.reason)

        # 8. Reasons for all that still wait, in order of submission; what nobody else wanted is charged little.
        if policy.grows:
            self._grow()
        return Plan(
            policy.version, tuple(self._charged()), Waits(snapshot.waiting, self.waits), tuple(self.preemptions),
            tuple(self.promises), tuple(self.resizes), tuple(self.starts),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- 1

    def _ready(self) -> list[Waiting]:
        closed: dict[str, Reason | None] = {}
        ready: list[Waiting] = []
        now = self.now
        for job in self.snapshot.waiting:
            if job.account not in closed:
                closed[job.account] = self._closed(job.account)
            reason = closed[job.account]
            if job.dependencies or job.not_before > now:
                reason = _hold(job, now) or reason
            if reason is None:
                ready.append(job)
            else:
                self._wait(job, reason)
        return ready

    def _closed(self, name: str) -> Reason | None:
        """Why nothing of this account may start."""
        accounts = self.policy.accounts
        if accounts and name not in self.tree.number:
            return Reason("unknown-account", (), {"account": name})
        path = [accounts[place] for place in self.tree.path(self.tree.number[name])[:-1]] if accounts else []
        for account in path:
            if not in_force(account, self.now):
                return Reason("account-not-in-force", (), {
                    "account": account.name, "from": account.effective_from, "until": account.effective_until,
                })  # fmt: skip
        for frozen in self.snapshot.frozen:
            if name == frozen or name.startswith(frozen + "/") or any(a.name == frozen for a in path):
                return Reason("frozen", (), {"account": frozen})
        return None

    # ------------------------------------------------------------------------------------- 2

    def _promised(self, ready: list[Waiting]) -> list[Waiting]:
        """Start who has capacity promised to it and free; keep the others' promises from everybody else."""
        rest: list[Waiting] = []
        promised: list[Waiting] = []
        for job in ready:
            kept = job.promised and all(grant.node in self.cluster.rooms for grant in job.promised)
            (promised if kept else rest).append(job)
        for job in promised:
            allowed = self._quota_is_free(job)
            if not allowed and all(held.stoppable for held in self.holders):
                rest.append(job)  # nobody is about to give back what it lacks: the quota was lowered since
                continue
            free = allowed and all(self._is_free(job, grant) for grant in job.promised)
            until = self.now + job.time_limit * 1000 + self.snapshot.grace_ms
            self.cluster.hold(job.promised, until)
            self.tree.add(job.account, used_by(job.promised))
            if free and not self._stands_in_the_way(job):
                why = self._why(job.need, job.promised[0].flavor)
                self.admissions.append(Admission(job.job_id, job.version, job.promised, why, "promised"))
            else:
                nodes = {grant.node for grant in job.promised}
                going = tuple(h.job_id for h in self.holders if any(grant.node in nodes for grant in h.grants))
                self._wait(job, Reason("preempting", going[:_BLOCKERS]))
        return sorted(rest, key=attrgetter("seq"))

    def _quota_is_free(self, job: Waiting) -> bool:
        """A victim uses its quota until it has ended: with other devices free, the preemptor could come before that."""
        account = self.tree.number.get(job.account)
        return account is None or all(
            self.tree.flavors[name].available(account) >= amount
            for name, amount in used_by(job.promised).items()
            if amount and name in self.tree.flavors
        )

    def _is_free(self, job: Waiting, grant: Grant) -> bool:
        room = self.cluster.rooms[grant.node]
        same = [other for other in job.promised if other.node == grant.node]
        if sum(g.cpu_milli for g in same) > room.cpu or sum(g.memory for g in same) > room.memory:
            return False
        free = {gpu.index: left for gpu, left in zip(room.node.gpus, room.gpus, strict=True)}
        for other in same:
            for index in other.devices:
                free[index] = free.get(index, 0) - min(1000, other.gpu_milli)
        return all(left >= 0 for index, left in free.items() if any(index in g.devices for g in same))

    def _stands_in_the_way(self, job: Waiting) -> bool:
        """Drained and closed nodes take nothing new, not even what was promised."""
        until = self.now + job.time_limit * 1000
        rooms = [self.cluster.rooms[grant.node] for grant in job.promised]
        return any(room.closed or room.shut(job.account, self.now, until) for room in rooms)

    # ------------------------------------------------------------------------------------- 3

    def _drain_quotas(self) -> None:
        if not self.snapshot.policy_since or self.now < self.snapshot.policy_since + 1000 * self.policy.drain_after:
            return
        for job, lost in draining(self.snapshot.live, self.tree, self.policy, self.now):
            self.preemptions.append(Preemption(job.job_id, job.version, "", "quota-lowered", lost))
            self._going(job)

    def _going(self, job: Reservation) -> None:
        """It holds what it holds until its grace is over."""
        self.given_up.add(job.job_id)
        self.cluster.hold(job.grants, held_until(job, self.now), -1)
        self.cluster.hold(job.grants, self.now + self.snapshot.grace_ms)

    # ------------------------------------------------------------------------------------- 5, 6, 7

    def _band(self, groups: list[Group], shares: Levels) -> None:
        """One band in fair order; once no reserved start is left, only those that could start are asked."""
        queue = FairQueue(groups, self.policy, self.tree, shares, self.now)
        while self._may_reserve() and (group := queue.top()) is not None:
            self._next(group, queue, shares)
        rest = [group for group in groups if group.next < len(group.jobs)]
        able = [group for group in rest if self._could(group)]
        queue = FairQueue(able, self.policy, self.tree, shares, self.now)
        while (group := queue.top()) is not None:
            self._next(group, queue, shares)

    def _may_reserve(self) -> bool:
        return len(self.starts) < self.policy.backfill_depth

    def _elders(self, groups: Iterable[Group]) -> set[Kind]:
        """The kinds of each account's oldest job that has waited long enough for a reserved start of its own."""
        oldest: dict[str, Waiting] = {}
        for group in groups:
            job = group.jobs[0]
            if job.account not in oldest or job.seq < oldest[job.account].seq:
                oldest[job.account] = job
        old = [job for job in oldest.values() if self.now - job.submitted_at >= 1000 * self.policy.ageing]
        old.sort(key=lambda job: job.seq)
        return {job.kind for job in old[: self.policy.backfill_depth]}

    def _could(self, group: Group) -> bool:
        """A quick look whether the head of a group could start now; parks the group where it could not."""
        if group.kind in self.elders:
            return True
        job, need = group.jobs[group.next], group.need
        outcome: Reason | None = None
        for flavor in self.cluster.meanings(need):
            if not self.cluster.capable(need, flavor):
                continue
            short = self._short_of_quota(job.account, need, flavor) if self.tree.number else None
            if short is None:
                if not self._is_full(need, flavor):
                    return True
                short = Reason("capacity", self._capacity_holders(flavor), self._needs(need))
            outcome = short
        self._park(group, outcome or self._never(need))
        return False

    def _is_full(self, need: Need, flavor: str) -> bool:
        """Has a need found no room that was no more than this one? Free capacity only shrinks in a decision."""
        for failed in self.full.get(flavor, ()):
            if (
                failed.workers_min <= need.workers_min and failed.cpu <= need.cpu and failed.memory <= need.memory
                and (flavor == CPU or _no_easier(need, failed))
            ):  # fmt: skip
                return True
        return False

    def _short_of_quota(self, account: str, need: Need, flavor: str) -> Reason | None:
        """Why the quota does not allow the least workers now, or None."""
        wanted = wanted_by(need, flavor, need.workers_min)
        for name, amount in wanted.items():
            if not amount or name not in self.tree.flavors:
                continue
            known = self.short.get((account, name))
            if known is not None and amount >= known[0]:
                return known[1]
            if self.tree.flavors[name].available(self.tree.number[account]) < amount:
                code = "quota" if self.tree.ever(account, {name: amount}) else "never-quota"
                blockers = self._quota_holders(account, name) if code == "quota" else ()
                numbers = {"wants": amount, **self.tree.limit_of(account, name)}
                reason = Reason(code, blockers, numbers)
                if code == "quota":
                    self.short[account, name] = (amount, reason)
                return reason
        return None

    def _next(self, group: Group, queue: FairQueue, shares: Levels) -> None:
        """Deal with the job whose turn it is."""
        job = group.jobs[group.next]
        need = job.need
        # 5. Admit what fits.
        outcome = self._admit(job, need)
        if isinstance(outcome, Admission):
            self.admissions.append(outcome)
            group.next += 1
            self._started(job, outcome.grants, shares)
            queue.again()
            return
        # 7. Preempt where policy allows; what is freed belongs to the preemptor.
        room = self._preempt(job, need) if outcome.code in ("capacity", "quota", "behind") else None
        if room is not None:
            self._promise(job, room)
            group.next += 1
            self._started(job, room.grants, shares)
            queue.again()
            return
        # 6. A reserved start for the first K that wait for room, and for the oldest beyond them.
        own = outcome.numbers.get("what") == "quota"  # it fits, but its turn comes after one that has a start already
        if outcome.code in ("capacity", "behind", "quota") and not own and self._reserve(job, need, outcome):
            group.next += 1
            self._penalize(job, need, shares)
            queue.again()
        elif outcome.numbers.get("shorter"):
            # Backfill may still take its like with a shorter time limit.
            group.most, group.reason = job.time_limit, outcome
            queue.again()
        else:
            self._park(group, outcome)
            queue.drop()

    def _admit(self, job: Waiting, need: Need) -> Admission | Reason:
        now, account = self.now, job.account
        until = now + job.time_limit * 1000 + self.snapshot.grace_ms
        short: Reason | None = None
        for flavor in self.cluster.meanings(need):
            if not self.cluster.capable(need, flavor):
                continue
            most = need.workers_max
            if self.tree.number:
                outcome = self._short_of_quota(account, need, flavor)
                if outcome is not None:
                    short = outcome if short is None or outcome.code == "quota" else short
                    continue
                ahead = self._delays(job, need, flavor, until)
                if ahead:
                    short = Reason("behind", (ahead,), {"what": "quota", "shorter": True})
                    continue
                if most > 1:
                    most, _ = self.tree.workers(account, wanted_by(need, flavor), most)
            placed = self._find(job, need, flavor, most, until)
            if isinstance(placed, tuple):
                return self._admission(job, need, flavor, placed)
            short = placed
        return short or self._never(need)

    def _find(
        self, job: Waiting, need: Need, flavor: str, most: int, until: int
    ) -> tuple[Grant, ...] | Reason:  # fmt: skip
        """Grants, or why there are none of this flavor."""
        account = job.account
        if not self._is_full(need, flavor):
            placed = self.cluster.place(need, flavor, most, account, self.now, until)
            if placed:
                return placed
            bare = not (self.cluster.planned or self.snapshot.windows)
            if not bare and self.cluster.place(need, flavor, most, account, self.now, until, beside=False):
                return self._beside()
            self.full.setdefault(flavor, []).append(need)
        return Reason("capacity", self._capacity_holders(flavor), self._needs(need))

    def _beside(self) -> Reason:
        """It fits but for a reserved start that it would delay, or a window."""
        windows = sorted({w.name for room in self.cluster.rooms.values() for w in room.windows})
        starts = tuple(dict.fromkeys(claim.job_id for claim in self.cluster.planned))
        if windows and not starts:
            ends = min(w.end for w in self.snapshot.windows)
            return Reason("window", (), {"windows": windows, "ends": ends, "shorter": True})
        return Reason("behind", starts[:_BLOCKERS], {"what": "nodes", "shorter": True})

    def _admission(self, job: Waiting, need: Need, flavor: str, grants: tuple[Grant, ...]) -> Admission:
        nodes = {grant.node for grant in grants}
        passed = tuple(dict.fromkeys(claim.job_id for claim in self.cluster.planned if claim.grant.node in nodes))
        reason = "backfilled" if passed else "admitted"
        return Admission(job.job_id, job.version, grants, self._why(need, flavor), reason, passed)

    def _started(self, job: Waiting, grants: tuple[Grant, ...], shares: Levels) -> None:
        until = self.now + job.time_limit * 1000 + self.snapshot.grace_ms
        amounts = used_by(grants)
        self.cluster.hold(grants, until)
        self.tree.add(job.account, amounts)
        for kept in self.quota_kept:
            if until > kept.at:
                for name in kept.left:
                    kept.left[name] -= amounts.get(name, 0)
        for above in self.tree.path(self.tree.number.get(job.account, -1)):
            for name in amounts:
                self.just_used.setdefault((above, name), []).append(job.job_id)
        shares.add(job.account, shares.penalty(amounts, self.policy.entry_penalty))

    def _penalize(self, job: Waiting, need: Need, shares: Levels) -> None:
        """A reserved start counts like a start, so that one account does not take all of them."""
        flavors = self.cluster.meanings(need)
        amounts = wanted_by(need, flavors[0], need.workers_min)
        shares.add(job.account, shares.penalty(amounts, self.policy.entry_penalty))

    # ------------------------------------------------------------------------------------- quota

    def _quota_frees(self, account: str, need: Need, flavor: str) -> tuple[int, dict[str, int], int] | None:
        """When the quotas allow the least workers, by the ends of what runs; what is then left beside them, and at how
        many levels they would then borrow."""
        wanted = wanted_by(need, flavor, need.workers_min)
        governed = [name for name, amount in wanted.items() if amount and name in self.tree.flavors]
        place = self.tree.number[account]
        left = {name: self.tree.flavors[name].available(place) - wanted[name] for name in governed}
        at, gone = self.now, []
        for held in self.holders:
            if all(amount >= 0 for amount in left.values()):
                break
            if any(left[name] < 0 and held.uses.get(name) for name in governed):
                self.tree.remove(held.account, held.uses)
                gone.append(held)
                at = held_until(held, self.now)
                left = {name: self.tree.flavors[name].available(place) - wanted[name] for name in governed}
        borrows = self.tree.borrows(account, wanted)
        for held in gone:
            self.tree.add(held.account, held.uses)
        return (at, left, borrows) if all(amount >= 0 for amount in left.values()) else None

    def _delays(self, job: Waiting, need: Need, flavor: str, until: int) -> str:
        """The reserved job whose quota this one would still hold at its start. Whoever stays within its guarantee
        delays only who does so too."""
        wanted = wanted_by(need, flavor, need.workers_min)
        borrows: int | None = None
        for kept in self.quota_kept:
            if until <= kept.at or all(kept.left.get(name, amount) >= amount for name, amount in wanted.items()):
                continue
            if borrows is None:
                borrows = self.tree.borrows(job.account, wanted)
            if borrows >= kept.borrows or job.account == kept.account:
                return kept.job_id
        return ""

    def _quota_holders(self, account: str, flavor: str) -> tuple[str, ...]:
        """Who uses what the account waits for: all in the branch whose limit it is, soonest end first."""
        place = self.tree.limiting(self.tree.number[account], flavor)
        if not self.below:
            for held in self.holders:
                for above in self.tree.path(self.tree.number.get(held.account, -1)):
                    self.below.setdefault(above, []).append(held)
        users = (held.job_id for held in self.below.get(place, ()) if flavor in held.uses)
        return tuple(islice(users, _BLOCKERS)) or tuple(self.just_used.get((place, flavor), ())[:_BLOCKERS])

    # ------------------------------------------------------------------------------------- 7

    def _preempt(self, job: Waiting, need: Need) -> Room | None:
        if not self.policy.accounts or self.tries <= 0:
            return None
        live = [held for held in self.snapshot.live if held.job_id not in self.given_up]
        room = make_room(job, need, live, self.cluster, self.tree, self.policy, self.now, self.snapshot.grace_ms)
        self.tries -= _IN_VAIN if room is None else 1
        return room

    def _promise(self, job: Waiting, room: Room) -> None:
        for victim in room.victims:
            self._evict(victim, job)
        going = tuple(victim.job.job_id for victim in room.victims)
        self.promises.append(Promise(job.job_id, job.version, room.grants, going))
        self._wait(job, Reason("preempting", going[:_BLOCKERS]))

    def _evict(self, victim: Victim, job: Waiting) -> None:
        held = victim.job
        if victim.keeps:
            self.given_up.add(held.job_id)
            kept = held.grants[: victim.keeps]
            self.resizes.append(Resize(held.job_id, held.version, kept, job.job_id))
            self.cluster.hold(victim.grants, held_until(held, self.now), -1)
            self.cluster.hold(victim.grants, self.now + self.snapshot.grace_ms)
        else:
            self.preemptions.append(
                Preemption(held.job_id, held.version, job.job_id, victim.reason, victim.lost_ms)
            )  # fmt: skip
            self._going(held)

    # ------------------------------------------------------------------------------------- 6

    def _reserve(self, job: Waiting, need: Need, outcome: Reason) -> bool:
        """A reserved start: the earliest at which the job fits beside all that were reserved before it."""
        beyond = not self._may_reserve()
        if beyond:
            if job.kind not in self.elders:
                return False
            self.elders.discard(job.kind)
        length = job.time_limit * 1000 + self.snapshot.grace_ms
        best: tuple[int, tuple[Grant, ...], dict[str, int], int] | None = None
        for flavor in self.cluster.meanings(need):
            frees = self._quota_frees(job.account, need, flavor) if self.tree.number else (self.now, {}, 0)
            if frees is None:
                continue
            found = self.cluster.earliest(need, flavor, need.workers_max, job.account, frees[0], length)
            if found is not None and (best is None or found[0] < best[0]):
                best = (*found, frees[1], frees[2])
        if best is None:
            return False
        at, grants, left, borrows = best
        self.cluster.claim(job.job_id, grants, at, at + length)
        if left:
            self.quota_kept.append(_Kept(job.job_id, job.account, at, left, borrows))
        self.starts.append(Start(job.job_id, at, at + length, grants))
        nodes = {grant.node for grant in grants}
        before = [h.job_id for h in self.holders if h.ends_by <= at and any(g.node in nodes for g in h.grants)]
        blockers = (tuple(before[-_BLOCKERS:]) if outcome.code == "capacity" else ()) or outcome.blockers
        self._wait(job, replace(outcome, blockers=blockers, numbers={**outcome.numbers, "starts_by": at}))
        return True

    def _grow(self) -> None:
        """Running elastic jobs take what nobody waits for: each at least twice what it has, and not before its minimum
        run time, because it is started anew for it where attempts cannot be resized. Protected bands are not."""
        wanted = self._wanted()
        for held in self.snapshot.live:
            more = held.workers_max - len(held.grants)
            if not held.stoppable or more < len(held.grants) or not held.grants or held.job_id in self.given_up:
                continue
            if self.policy.rules[held.band].protected or self.now - held.started_at < 1000 * self.policy.min_runtime:
                continue
            each = held.grants[0]
            if {CPU if not each.gpu_milli else each.flavor} & wanted:
                continue
            need = Need(1, more, each.cpu_milli, each.memory, each.gpu_milli, 0, (each.flavor,))
            most = more
            if held.account in self.tree.number:
                most, _ = self.tree.workers(held.account, wanted_by(need, each.flavor), more)
            placed = self.cluster.place(need, each.flavor, most, held.account, self.now, held.ends_by) if most else None
            if placed and len(placed) >= len(held.grants):
                self.cluster.hold(placed, held.ends_by)
                self.tree.add(held.account, used_by(placed))
                self.resizes.append(Resize(held.job_id, held.version, (*held.grants, *placed)))

    # ------------------------------------------------------------------------------------- 8

    def _wait(self, job: Waiting, reason: Reason) -> None:
        if reason.code in _COMPETES:
            self.competing.add(job.need)
        self.waits[job.job_id] = reason

    def _park(self, group: Group, reason: Reason) -> None:
        if reason.code in _COMPETES:
            self.competing.add(group.need)
        self.waits.update(dict.fromkeys([job.job_id for job in group.jobs[group.next :]], reason))
        group.next = len(group.jobs)

    def _capacity_holders(self, flavor: str) -> tuple[str, ...]:
        """Who holds what a job of this flavor waits for, soonest end first."""
        if flavor not in self.holding:
            here = {room.node.name for room in self.cluster.rooms.values() if _offers(room.node.gpus, flavor)}
            ends = (held.job_id for held in self.holders if any(grant.node in here for grant in held.grants))
            new = (new.job_id for new in self.admissions if any(grant.node in here for grant in new.grants))
            self.holding[flavor] = tuple(islice(chain(ends, new), _BLOCKERS))
        return self.holding[flavor]

    def _needs(self, need: Need) -> dict[str, Any]:
        if need not in self.figures:
            self.figures[need] = _figures(need)
        return self.figures[need]

    def _wanted(self) -> set[str]:
        """Flavors that somebody still waits for."""
        wishes = {need.flavors: need for need in self.competing}
        return {flavor for need in wishes.values() for flavor in self.cluster.meanings(need)}

    def _charged(self) -> Iterable[Admission]:
        """Use of capacity that nobody else wanted counts little."""
        if not self.policy.accounts:
            return self.admissions
        wanted = self._wanted()
        idle = self.policy.idle_charge
        return [
            new if new.grants[0].flavor in wanted else replace(new, charge=idle) for new in self.admissions
        ]  # fmt: skip

    def _why(self, need: Need, flavor: str) -> str:
        """Why this device: a sentence for the manifest."""
        if not need.gpu:
            return "CPU: the job asks for no GPU."
        wishes, first = ", ".join(need.flavors), need.flavors[0]
        if flavor == CPU:
            there = ", ".join(self.cluster.gpu_flavors)
            reason = f"the GPUs here are {there}, none of them free or wanted" if there else "there is no GPU here"
            return f"CPU: the job prefers [{wishes}] and allows CPU; {reason}."
        if flavor == first or first == ANY_GPU:
            return f"{flavor}: the job's first choice of [{wishes}] was free."
        return f"{flavor}: the first of [{wishes}] that was free."

    def _never(self, need: Need) -> Reason:
        nodes = [room.node for room in self.cluster.rooms.values()]
        numbers = {
            **_figures(need), "wants": list(need.flavors), "gpus_here": list(self.cluster.gpu_flavors),
            "largest_cpu_milli": max((node.cpu_milli for node in nodes), default=0),
            "largest_memory": max((node.memory for node in nodes), default=0),
        }  # fmt: skip
        if self.snapshot.drained:
            whole = Cluster(self.snapshot.nodes)
            if any(whole.capable(need, flavor) for flavor in whole.meanings(need)):
                return Reason("drained", (), {**numbers, "nodes": list(self.snapshot.drained)})
        known = any(flavor == CPU or flavor in self.cluster.gpu_flavors for flavor in self.cluster.meanings(need))
        return Reason("never-fits" if known else "no-such-device", (), numbers)


_COMPETES = frozenset({"capacity", "quota", "behind", "preempting", "window"})
"""Reasons of jobs that would use capacity if they could."""


def _figures(need: Need) -> dict[str, Any]:
    return {"workers": need.workers_min, "cpu_milli": need.cpu, "memory": need.memory, "gpu_milli": need.gpu}


def _no_easier(need: Need, failed: Need) -> bool:
    """Its GPUs: as many or more, of as much memory or more, each as large a share or larger."""
    return failed.gpu_memory <= need.gpu_memory and failed.devices <= need.devices and failed.device <= need.device


def _offers(gpus: Iterable[Any], flavor: str) -> bool:
    return flavor == CPU or any(gpu.flavor == flavor for gpu in gpus)


def _hold(job: Waiting, now: int) -> Reason | None:
    unmet = [dependency for dependency in job.dependencies if dependency.state is not JobState.SUCCEEDED]
    if unmet:
        ended = [dependency for dependency in unmet if dependency.state in ENDED]
        code = "dependency-failed" if ended else "dependency"
        return Reason(code, tuple(dependency.job_id for dependency in ended or unmet))
    if job.not_before > now and not job.promised:  # its pause was over when it was promised; a clock was set back
        return Reason("back-off", (), {"not_before": job.not_before})
    return None
