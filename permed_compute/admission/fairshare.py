"""Who goes next: the sibling with the least decayed usage for its weight, all the way down the tree; then age.

Slurm's Fair Tree, from its published description (slurm.schedmd.com/fair_tree.html): siblings are ranked by usage over
shares, and where siblings tie their children are merged and ranked together. That is the lexicographic order of the
levels along each account's path, which nested heaps hold: a start changes one path, not the whole order.

An *entry penalty* counts a start at once, so that a burst does not outrun the accounting (Kueue, admission fair
sharing), and use of capacity that nobody else wanted counts little (KAI). Integers only: kueue PR #6994 shows what
floats do here.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

from permed_compute.admission.policy import Policy
from permed_compute.admission.quota import Tree, wanted_by
from permed_compute.admission.snapshot import NEVER, Reservation, Waiting
from permed_compute.spec import Band

_SCALE = 1000
_WEIGHTLESS = 1 << 40
"""What a weight of zero multiplies usage by: such an account goes after all that have one."""

Kind = str
Amounts = Mapping[str, int]


class Levels:
    """Decayed usage over weight of every account, with what starts now counted at once."""

    def __init__(self, policy: Policy, tree: Tree) -> None:
        self._policy = policy
        self._tree = tree
        self._factors: dict[tuple[int, str], tuple[int, int]] = {}
        self.level = [0] * len(tree.names)
        self.own = [0] * len(tree.names)
        """Of what the account's own jobs use, beside the accounts below it."""

    def _factor(self, place: int, flavor: str) -> tuple[int, int]:
        """What an amount is multiplied with, and divided by."""
        if (place, flavor) not in self._factors:
            self._factors[place, flavor] = self._of(place, flavor)
        return self._factors[place, flavor]

    def _of(self, place: int, flavor: str) -> tuple[int, int]:
        quota = self._policy.accounts[place].quotas.get(flavor) if place != self._tree.root else None
        weight = 1 if quota is None else quota.weight
        charge = self._policy.charge(flavor) * _SCALE
        return (charge, weight) if weight > 0 else (charge * _WEIGHTLESS, 1)

    def add(self, account: str, amounts: Amounts) -> None:
        """Thousandth-seconds used by an account: counts for it and all above it."""
        first = self._tree.number.get(account)
        if first is None:
            return
        for place in self._tree.path(first):
            total = 0
            for flavor, amount in amounts.items():
                if amount:
                    charge, weight = self._factor(place, flavor)
                    total += amount * charge // weight
            self.level[place] += total
            if place == first:
                self.own[place] += total

    def penalty(self, amounts: Amounts, seconds: int) -> dict[str, int]:
        return {flavor: amount * seconds for flavor, amount in amounts.items()}


def levels(policy: Policy, tree: Tree, usage: Mapping[str, Amounts], live: Iterable[Reservation], now: int) -> Levels:
    """The levels before this decision: decayed usage, and what is left of the entry penalty of what has just begun."""
    made = Levels(policy, tree)
    for account, amounts in usage.items():
        made.add(account, amounts)
    for job in live:
        left = policy.entry_penalty - max(0, now - job.started_at) // 1000
        if left > 0 and job.account in tree.number:
            made.add(job.account, made.penalty(job.uses, left * job.charge // 1000))
    return made


class Group:
    """The waiting jobs of one kind, in the order in which they start."""

    __slots__ = ("account", "band", "jobs", "kind", "most", "need", "next", "passed_over", "reason")

    def __init__(self, kind: Kind, jobs: list[Waiting]) -> None:
        self.kind = kind
        self.account: str = jobs[0].account
        self.band: Band = jobs[0].band
        self.need = jobs[0].need
        self.jobs = jobs
        self.next = 0
        self.most = NEVER
        """Jobs with a time limit of so many seconds or more would delay a reserved start."""
        self.reason: Any = None
        self.passed_over: list[Waiting] = []

    def head(self) -> Waiting | None:
        """The next job that might start; those that would delay a reserved start are laid aside."""
        while self.next < len(self.jobs):
            job = self.jobs[self.next]
            if job.time_limit < self.most:
                return job
            self.passed_over.append(job)
            self.next += 1
        return None


def grouped(jobs: Iterable[Waiting], policy: Policy, now: int) -> dict[Kind, Group]:
    """By kind; the clinical band by slack (deadline − now − remaining time), everything else by its turn."""
    found: dict[Kind, list[Waiting]] = {}
    for job in sorted(jobs, key=attrgetter("seq")):
        kind = job.kind
        if kind in found:
            found[kind].append(job)
        else:
            found[kind] = [job]
    for group in found.values():
        if group[0].band is Band.CLINICAL and any(job.deadline for job in group):
            group.sort(key=lambda job: (slack(job, now), job.seq))
        elif len(group) > 1 and policy.short_first:
            group.sort(key=lambda job: turn(job, policy, now))
    return {kind: Group(kind, group) for kind, group in found.items()}


def turn(job: Waiting, policy: Policy, now: int) -> int:
    """Whose turn it is within an account, the least first: submission (ms), later by the expected run time.

    Short jobs wait little for long ones, and a long one waits no more than its own length for later ones: nobody
    starves. Whoever has waited `ageing` goes before all who have not, in order of submission.
    """
    if now - job.submitted_at >= 1000 * policy.ageing:
        return job.submitted_at - NEVER
    return job.submitted_at + policy.short_first * (job.estimate or job.time_limit)


def slack(job: Waiting, now: int) -> int:
    """ms that the job can still wait; `NEVER` without a deadline."""
    if not job.deadline:
        return NEVER
    return job.deadline - now - 1000 * (job.estimate or job.time_limit)


class _Branch:
    """An account with something waiting in or below it.

    Entries: (levels at which it borrows, slack, level, what decides among equals, number, child): an account whose next
    job stays within its guarantee goes before one that borrows, the clinical band by slack, then fair share.
    """

    __slots__ = ("heap", "levels", "place")

    def __init__(self, place: int, levels: list[int]) -> None:
        self.place = place
        self.levels = levels
        self.heap: list[tuple[Any, ...]] = []


class FairQueue:
    """One band's groups in fair order. `top` names the group whose head goes next; then `again` or `drop`."""

    def __init__(self, groups: Iterable[Group], policy: Policy, tree: Tree, shares: Levels, now: int) -> None:
        self._policy = policy
        self._tree = tree
        self._shares = shares
        self._now = now
        self._count = 0
        self._root = _Branch(-1, [])
        self._branches: dict[tuple[int, bool], _Branch] = {(-1, False): self._root}
        for group in groups:
            place = tree.number.get(group.account, -1)
            branch = self._branch(place, own=place in tree.inner)
            entry = self._group_entry(group)
            if entry is not None:
                branch.heap.append(entry)
        self._heapify(self._root)

    def _branch(self, place: int, *, own: bool = False) -> _Branch:
        """An account's branch. `own`: the one of its own jobs, which stands among the accounts below it."""
        if (place, own) not in self._branches:
            above = self._branch(place) if own else self._branch(self._tree.parents[place])
            levels = self._shares.own if own else self._shares.level
            branch = self._branches[place, own] = _Branch(place, levels)
            above.heap.append((0, 0, 0, (), self._number(), branch))
        return self._branches[place, own]

    def _number(self) -> int:
        self._count += 1
        return self._count

    def _group_entry(self, group: Group) -> tuple[Any, ...] | None:
        head = group.head()
        if head is None:
            return None
        urgency = slack(head, self._now) if group.band is Band.CLINICAL else 0
        return (0, urgency, 0, (turn(head, self._policy, self._now), head.seq), self._number(), group)

    def _borrows(self, group: Group) -> int:
        if not self._tree.number:
            return 0
        need = group.need
        return self._tree.borrows(group.account, wanted_by(need, need.flavors[0], need.workers_min))

    def _heapify(self, branch: _Branch) -> None:
        kept = []
        for entry in branch.heap:
            child = entry[5]
            if isinstance(child, _Branch):
                self._heapify(child)
                if child.heap:
                    kept.append(self._branch_entry(child, entry[4]))
            else:
                kept.append(entry)
        heapq.heapify(kept)
        branch.heap = kept

    def _branch_entry(self, child: _Branch, number: int) -> tuple[Any, ...]:
        first = child.heap[0]
        borrows = first[0] if isinstance(first[5], _Branch) else self._borrows(first[5])
        return (borrows, first[1], child.levels[child.place], first[:4], number, child)

    def top(self) -> Group | None:
        """The group whose turn it is, or None. What has begun to borrow since it was queued goes back first."""
        while True:
            branch, borrows = self._root, -1
            while branch.heap and isinstance(branch.heap[0][5], _Branch):
                borrows, branch = branch.heap[0][0], branch.heap[0][5]
            if not branch.heap:
                return None
            group: Group = branch.heap[0][5]
            if branch is self._root or self._borrows(group) == borrows:
                return group
            self._settle(self._root)

    def again(self) -> None:
        """The top group's head has been dealt with (`group.next` moved on, levels changed): put its path in order."""
        self._settle(self._root)

    def drop(self) -> None:
        """Nothing more of the top group can start."""
        self._settle(self._root, drop=True)

    def _settle(self, branch: _Branch, *, drop: bool = False) -> None:
        child = branch.heap[0][5]
        if isinstance(child, _Branch):
            self._settle(child, drop=drop)
            entry = self._branch_entry(child, branch.heap[0][4]) if child.heap else None
        else:
            entry = None if drop else self._group_entry(child)
        if entry is None:
            heapq.heappop(branch.heap)
        else:
            heapq.heapreplace(branch.heap, entry)
