"""Whose work makes room for whom, and how little of it: victims in order, removed until the job fits, then filled back.

Who may preempt whom is an order without circles, so that a victim never evicts its evictor at unchanged inputs:
* a band that is always preemptible (`opportunistic`) gives way to any higher one that reclaims or preempts, and itself
  takes nothing;
* within one account a band that preempts lower ones takes from them, never the reverse;
* between accounts: only what the victim's branch borrows (it uses more than its quota), and only while the preemptor's
  branch, with the job, stays within its own quota; both judged just below the accounts' lowest common ancestor.

The minimum run time is that of the victim's branch just below the common ancestor (KAI). Victims: smaller first what
costs nothing (an elastic job's further workers), then other branches, lower bands, least work lost since the last
checkpoint, newest. Removed greedily until the job fits, then filled back in reverse (Kueue).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from permed_compute.admission.placement import Cluster, held_until
from permed_compute.admission.policy import Policy
from permed_compute.admission.quota import Tree, wanted_by
from permed_compute.admission.snapshot import Grant, Need, Reservation, Waiting, used_by
from permed_compute.spec import Band


@dataclass(frozen=True, slots=True)
class Victim:
    """What one live job would give up: all that it holds, or (`keeps` > 0) an elastic job's further workers."""

    job: Reservation
    grants: tuple[Grant, ...]
    keeps: int
    reason: str
    lost_ms: int


@dataclass(frozen=True, slots=True)
class Room:
    """What preemption makes: these victims, and where the job goes once they are gone."""

    victims: tuple[Victim, ...]
    grants: tuple[Grant, ...]


def make_room(
    job: Waiting, need: Need, live: Iterable[Reservation], cluster: Cluster, tree: Tree, policy: Policy, now: int,
    grace_ms: int,
) -> Room | None:  # fmt: skip
    """The victims that let the job start, or None where policy allows none that would. Leaves cluster and tree as
    they were."""
    rule = policy.rules[job.band]
    if not (rule.reclaims or rule.preempts_lower):
        return None
    running = [each for each in live if each.stoppable]
    for flavor in cluster.meanings(need):
        if cluster.capable(need, flavor):
            search = _Search(job, need, flavor, cluster, tree, policy, now, grace_ms)
            with cluster.what_if():
                found = search.run(running)
            if found is not None:
                return found
    return None


class _Search:
    def __init__(
        self, job: Waiting, need: Need, flavor: str, cluster: Cluster, tree: Tree, policy: Policy, now: int,
        grace_ms: int,
    ) -> None:  # fmt: skip
        self.job, self.need, self.flavor = job, need, flavor
        self.cluster, self.tree, self.policy, self.now = cluster, tree, policy, now
        self.until = now + job.time_limit * 1000 + grace_ms
        self.mine = tree.number[job.account]
        self.per_worker = wanted_by(need, flavor)
        self.rank = {band: place for place, band in enumerate(policy.bands)}
        self._within: dict[int, bool] = {}
        self._reasons: dict[tuple[int, Band], str] = {}
        self._shrunk: set[str] = set()
        self._given: dict[int, tuple[Grant, ...]] = {}
        """What each victim, by its id, has given up in the what-if as it stands."""

    def run(self, live: Iterable[Reservation]) -> Room | None:
        victims = [victim for each in live if (victim := self._victim(each)) is not None]
        victims = sorted([*self._shrinking(victims), *victims], key=self._order)
        taken: list[Victim] = []
        try:
            found = self._remove(victims, taken)
            return None if found is None else self._fill_back(taken, found)
        finally:
            for victim in reversed(taken):
                self._restore(victim)

    def _remove(self, victims: list[Victim], taken: list[Victim]) -> tuple[Grant, ...] | None:
        least = self.need.workers_min
        rooms = self.cluster.rooms
        counts = {name: room.count(self.need, self.flavor, least) for name, room in rooms.items() if not room.closed}
        total = sum(counts.values())
        for victim in victims:
            self._give_up(victim)
            taken.append(victim)
            for name in {grant.node for grant in victim.grants} & counts.keys():
                total -= counts[name]
                counts[name] = rooms[name].count(self.need, self.flavor, least)
                total += counts[name]
            if total >= least and (found := self._fits()):
                return found
        return None

    def _fill_back(self, taken: list[Victim], found: tuple[Grant, ...]) -> Room:
        for victim in reversed(taken[:-1]):
            if victim.keeps and any(other.job is victim.job and not other.keeps for other in taken):
                continue  # its job is stopped anyway
            self._restore(victim)
            taken.remove(victim)
            again = self._fits()
            if again is None:
                self._give_up(victim)
                taken.append(victim)
            else:
                found = again
        stopped = {victim.job.job_id for victim in taken if not victim.keeps}
        chosen = [victim for victim in taken if not victim.keeps or victim.job.job_id not in stopped]
        return Room(tuple(sorted(chosen, key=self._order)), found)

    # ------------------------------------------------------------------------------------- who

    def _victim(self, other: Reservation) -> Victim | None:
        theirs = self.tree.number.get(other.account)
        if theirs is None:
            return None
        key = (theirs, other.band)
        if key not in self._reasons:
            self._reasons[key] = self._reason(other, theirs)
        reason = self._reasons[key]
        if not reason or not self._useful(other):
            return None
        if reason != "opportunistic" and self.now - other.started_at < 1000 * self._runtime(theirs):
            return None
        lost = max(0, self.now - max(other.kept_at, other.started_at)) * len(other.grants)
        return Victim(other, other.grants, 0, reason, lost)

    def _useful(self, other: Reservation) -> bool:
        """Does it hold anything of what the job needs?"""
        held = other.uses
        return any(amount and held.get(flavor) for flavor, amount in self.per_worker.items())

    def _reason(self, other: Reservation, theirs: int) -> str:
        rule, its = self.policy.rules[self.job.band], self.policy.rules[other.band]
        higher = self.rank[self.job.band] < self.rank[other.band]
        if its.protected and not higher:
            return ""
        if its.always_preemptible and higher:
            return "opportunistic"
        if theirs == self.mine:
            return "higher-band" if higher and rule.preempts_lower else ""
        if not rule.reclaims or self.rank[self.job.band] > self.rank[other.band]:
            return ""
        ours_below, theirs_below = self.tree.below_common(self.mine, theirs)
        if ours_below < 0 or theirs_below < 0:
            return ""
        return "reclaimed" if self._borrows(theirs_below) and self._stays_within(ours_below) else ""

    def _borrows(self, place: int) -> bool:
        return any(
            amount and flavor in self.tree.flavors
            and self.tree.flavors[flavor].used[place] > self.tree.flavors[flavor].subtree[place]
            for flavor, amount in self.per_worker.items()
        )  # fmt: skip

    def _stays_within(self, place: int) -> bool:
        if place not in self._within:
            least = self.need.workers_min
            self._within[place] = all(
                self.tree.flavors[flavor].used[place] + amount * least <= self.tree.flavors[flavor].subtree[place]
                for flavor, amount in self.per_worker.items()
                if amount and flavor in self.tree.flavors
            )
        return self._within[place]

    def _runtime(self, theirs: int) -> int:
        if theirs == self.mine:
            return self.tree.runtime(theirs)
        _, below = self.tree.below_common(self.mine, theirs)
        return self.tree.runtime(below if below >= 0 else theirs)

    def _shrinking(self, victims: list[Victim]) -> list[Victim]:
        """What elastic jobs among them can spare without being stopped for good."""
        return [
            Victim(each.job, each.grants[each.job.workers_min :], each.job.workers_min, "shrunk", 0)
            for each in victims
            if each.job.workers_max and len(each.grants) > each.job.workers_min
        ]

    def _order(self, victim: Victim) -> tuple[object, ...]:
        theirs = self.tree.number[victim.job.account]
        return (
            not victim.keeps, theirs == self.mine, -self.rank[victim.job.band], victim.lost_ms,
            -victim.job.started_at,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------- what if

    def _give_up(self, victim: Victim) -> None:
        grants = victim.grants
        if victim.keeps:
            self._shrunk.add(victim.job.job_id)
        elif victim.job.job_id in self._shrunk:
            grants = grants[: victim.job.workers_min]  # its further workers have gone before
        self._given[id(victim)] = grants
        self.cluster.hold(grants, held_until(victim.job, self.now), -1)
        self.tree.remove(victim.job.account, used_by(grants))

    def _restore(self, victim: Victim) -> None:
        grants = self._given.pop(id(victim))
        if victim.keeps:
            self._shrunk.discard(victim.job.job_id)
        self.cluster.hold(grants, held_until(victim.job, self.now))
        self.tree.add(victim.job.account, used_by(grants))

    def _fits(self) -> tuple[Grant, ...] | None:
        need = self.need
        allowed, _ = self.tree.workers(self.job.account, self.per_worker, need.workers_min)
        if allowed < need.workers_min:
            return None
        return self.cluster.place(need, self.flavor, need.workers_min, self.job.account, self.now, self.until)


def draining(
    live: Sequence[Reservation], tree: Tree, policy: Policy, now: int
) -> list[tuple[Reservation, int]]:  # fmt: skip
    """What is stopped because a quota was lowered under it, with the work lost (ms): least first, only the excess.

    What is stopping already counts as gone, or another would be stopped for it at each decision of its grace. The tree
    stays as it was: whoever is stopped holds its quota until it has ended. Protected bands run to their end.
    """
    if not any(figures.excess(place) for figures in tree.flavors.values() for place in range(len(tree.names))):
        return []
    going = [job for job in live if not job.stoppable]
    for job in going:
        tree.remove(job.account, job.uses)
    rank = {band: place for place, band in enumerate(policy.bands)}
    running = [
        job for job in live if job.stoppable and job.account in tree.number and not policy.rules[job.band].protected
    ]
    lost = {job.job_id: max(0, now - max(job.kept_at, job.started_at)) * len(job.grants) for job in running}
    running.sort(key=lambda job: (-rank[job.band], lost[job.job_id], -job.started_at))
    chosen: list[tuple[Reservation, int]] = []
    for job in running:
        used = job.uses
        path = tree.path(tree.number[job.account])
        if any(
            used.get(flavor) and any(figures.excess(place) for place in path)
            for flavor, figures in tree.flavors.items()
        ):  # fmt: skip
            tree.remove(job.account, used)
            chosen.append((job, lost[job.job_id]))
    for job in (*going, *(job for job, _ in chosen)):
        tree.add(job.account, job.uses)
    return chosen
