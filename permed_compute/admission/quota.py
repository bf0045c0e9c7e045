"""The quota tree: who may use how much of a flavor, by lending and borrowing between accounts.

Kueue's arithmetic (kubernetes-sigs/kueue, pkg/cache/resource_node.go): `local = max(0, subtree_quota − lending_limit)`
is invisible to the parent, the rest pools upward, only usage past `local` bubbles up, and
`available = max(0, local − usage) + min(pooled_in_parent − used_in_parent + borrowing_limit, available(parent))`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from permed_compute.admission.policy import CPU, MEMORY, Account, Policy, gpu_flavor
from permed_compute.admission.snapshot import Need, used_by

__all__ = ["UNLIMITED", "Amounts", "Tree", "in_force", "used_by", "wanted_by"]

UNLIMITED = 1 << 60

Amounts = Mapping[str, int]


def wanted_by(need: Need, flavor: str, workers: int = 1) -> dict[str, int]:
    """The same for workers that are not placed yet."""
    amounts = {CPU: need.cpu * workers, MEMORY: need.memory * workers}
    if flavor != CPU:
        amounts[gpu_flavor(flavor)] = need.gpu * workers
    return amounts


@dataclass(slots=True)
class _Flavor:
    """One flavor's figures by account number. `stored`: what of the subtree quota pools in the parent."""

    subtree: list[int]
    local: list[int]
    borrow: list[int]
    used: list[int]
    tree: Tree

    def add(self, account: int, amount: int) -> None:
        while account >= 0 and amount > 0:
            room = self.local[account] - self.used[account]
            self.used[account] += amount
            if room > 0:
                amount -= room
            account = self.tree.parents[account]

    def remove(self, account: int, amount: int) -> None:
        while account >= 0 and amount > 0:
            above = self.used[account] - self.local[account]
            self.used[account] -= amount
            amount = min(amount, above)
            account = self.tree.parents[account]

    def available(self, account: int) -> int:
        parent = self.tree.parents[account]
        if parent < 0:
            return self.subtree[account] - self.used[account]
        above = self.available(parent)
        borrow = self.borrow[account]
        if borrow < UNLIMITED:
            stored = self.subtree[account] - self.local[account]
            above = min(stored - max(0, self.used[account] - self.local[account]) + borrow, above)
        return max(0, self.local[account] - self.used[account]) + above

    def excess(self, account: int) -> int:
        """How much more is in use than this account may ever use itself: 0 unless a quota was lowered under it."""
        parent, limit = self.tree.parents[account], self.borrow[account]
        if parent < 0:
            limit = 0
        if limit >= UNLIMITED:
            return 0
        return max(0, self.used[account] - self.subtree[account] - limit)


class Tree:
    """A policy's accounts at one moment, and what they use. Flavors that no quota names are not limited.

    All top accounts stand below one root, the pool: what a sector does not use, another may borrow.
    """

    def __init__(self, policy: Policy, now: int = 0) -> None:
        accounts = policy.accounts
        self.number = {account.name: place for place, account in enumerate(accounts)}
        self.root = len(accounts)
        self.names = [*(account.name for account in accounts), "the pool"]
        self.parents = [*(self.number.get(account.parent, self.root) for account in accounts), -1]
        self.inner = set(self.parents)
        """Accounts with others below them."""
        self.min_runtime = [*(account.min_runtime for account in accounts), None]
        self._default_runtime = policy.min_runtime
        named = {flavor for account in accounts for flavor in account.quotas}
        self.depth_first = self._bottom_up()
        self.flavors = {flavor: self._flavor(flavor, accounts, now) for flavor in sorted(named)}
        self._paths: dict[int, tuple[int, ...]] = {}

    def _bottom_up(self) -> list[int]:
        depth = [0] * len(self.parents)
        for place in range(len(self.parents)):
            above = self.parents[place]
            while above >= 0:
                depth[place] += 1
                above = self.parents[above]
        return sorted(range(len(self.parents)), key=lambda place: -depth[place])

    def _flavor(self, name: str, accounts: tuple[Account, ...], now: int) -> _Flavor:
        size = len(self.names)
        subtree, local, borrow = [0] * size, [0] * size, [UNLIMITED] * size
        for place in self.depth_first:
            if place == self.root:
                continue
            account = accounts[place]
            quota = account.quotas.get(name)
            if quota is not None and in_force(account, now):
                subtree[place] += quota.nominal
            if quota is not None and quota.borrowing_limit is not None:
                borrow[place] = quota.borrowing_limit
            if quota is not None and quota.lending_limit is not None:
                local[place] = max(0, subtree[place] - quota.lending_limit)
            subtree[self.parents[place]] += subtree[place] - local[place]
        return _Flavor(subtree, local, borrow, [0] * size, self)

    # ------------------------------------------------------------------------------------- usage

    def add(self, account: str, amounts: Amounts) -> None:
        place = self.number.get(account)
        if place is not None:
            for flavor, amount in amounts.items():
                if flavor in self.flavors:
                    self.flavors[flavor].add(place, amount)

    def remove(self, account: str, amounts: Amounts) -> None:
        place = self.number.get(account)
        if place is not None:
            for flavor, amount in amounts.items():
                if flavor in self.flavors:
                    self.flavors[flavor].remove(place, amount)

    def workers(self, account: str, per_worker: Amounts, most: int) -> tuple[int, str]:
        """How many workers the quotas allow now, at most `most`, and the flavor that limits them ('' for none)."""
        limiting = ""
        place = self.number[account]
        for flavor, amount in per_worker.items():
            if amount and flavor in self.flavors:
                allowed = self.flavors[flavor].available(place) // amount
                if allowed < most:
                    most, limiting = max(0, allowed), flavor
        return most, limiting

    def borrows(self, account: str, amounts: Amounts) -> int:
        """At how many levels below the pool the account would use more than the quota there, with these amounts."""
        place = self.number.get(account)
        if place is None:
            return 0
        return sum(
            any(
                amount and flavor in self.flavors
                and self.flavors[flavor].used[above] + amount > self.flavors[flavor].subtree[above]
                for flavor, amount in amounts.items()
            )
            for above in self.path(place)[:-1]
        )  # fmt: skip

    def ever(self, account: str, amounts: Amounts) -> bool:
        """Could the account use so much if nobody used anything?"""
        place = self.number[account]
        for flavor, amount in amounts.items():
            if amount and flavor in self.flavors:
                figures = self.flavors[flavor]
                kept, figures.used = figures.used, [0] * len(self.names)
                possible = figures.available(place)
                figures.used = kept
                if possible < amount:
                    return False
        return True

    def limit_of(self, account: str, flavor: str) -> dict[str, int | str]:
        """The figures that a sentence about a full quota needs: of the nearest account above that has run out."""
        figures, place = self.flavors[flavor], self.number[account]
        limiting = self.limiting(place, flavor)
        borrow = figures.borrow[limiting]
        return {
            "account": self.names[limiting], "flavor": flavor, "used": figures.used[limiting],
            "quota": figures.subtree[limiting], "available": figures.available(place),
            "borrowing_limit": -1 if borrow >= UNLIMITED else borrow,
        }  # fmt: skip

    def limiting(self, place: int, flavor: str) -> int:
        """The lowest account on the path that would have no more even if those above it had; at last the pool."""
        figures = self.flavors[flavor]
        left = figures.available(place)
        for above in self.path(place)[:-1]:
            if figures.borrow[above] < UNLIMITED:
                ceiling = figures.subtree[above] + figures.borrow[above] - figures.used[above]
                if ceiling <= left:
                    return above
        return self.root

    # ------------------------------------------------------------------------------------- relations

    def path(self, place: int) -> tuple[int, ...]:
        """The account's number and those above it."""
        if place not in self._paths:
            found, above = [], place
            while above >= 0:
                found.append(above)
                above = self.parents[above]
            self._paths[place] = tuple(found)
        return self._paths[place]

    def below_common(self, mine: int, other: int) -> tuple[int, int]:
        """The two accounts' ancestors just below their lowest common one (-1: one stands on the other's path)."""
        if mine == other:
            return -1, -1
        ours, theirs = self.path(mine)[::-1], self.path(other)[::-1]
        depth = 0
        while depth < len(ours) and depth < len(theirs) and ours[depth] == theirs[depth]:
            depth += 1
        return (
            ours[depth] if depth < len(ours) else -1,
            theirs[depth] if depth < len(theirs) else -1,
        )

    def runtime(self, place: int) -> int:
        """The minimum run time that this account grants, in seconds: its own, else of the nearest above it."""
        for above in self.path(place):
            own = self.min_runtime[above]
            if own is not None:
                return own
        return self._default_runtime


def in_force(account: Account, now: int) -> bool:
    """Do the account's dates include this moment?"""
    return account.effective_from <= now and (not account.effective_until or now < account.effective_until)
