"""What is free on which node, now and later, and where a job's workers go. Integers; devices one by one, never sums.

A `Room` is one node's free cores, memory and devices. Live jobs leave it at their `ends_by` (`releases`); reserved
starts take of it from their start to their end (`claims`); windows close it for a while. Without claims and windows
what is free now stays free, so that only the few rooms that have some are looked at over time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import NamedTuple

from permed_compute.admission.snapshot import ANY_GPU, CPU, NEVER, Grant, Need, Node, Reservation, Window


class Claim(NamedTuple):
    """A reserved start's hold on a node."""

    start: int
    end: int
    grant: Grant
    job_id: str


class Room:
    """What is left of one node; may be negative where somebody's promise stands on what a victim still holds."""

    __slots__ = (
        "claims", "closed", "cpu", "gpus", "kinds", "least", "left", "memory", "node", "place", "releases", "slots",
        "states", "times", "whole", "windows",
    )  # fmt: skip

    def __init__(self, node: Node, place: int) -> None:
        self.node = node
        self.place = place
        self.cpu = node.cpu_milli
        self.memory = node.memory
        self.gpus = [1000] * len(node.gpus)
        self.slots = {gpu.index: slot for slot, gpu in enumerate(node.gpus)}
        self.kinds = [gpu.flavor for gpu in node.gpus]
        """The flavor of each device."""
        self.whole: dict[str, int] = {}
        """By flavor, devices of which nothing is taken."""
        self.left: dict[str, int] = {}
        """By flavor, thousandths that are free."""
        self.least: dict[str, int] = {}
        """By flavor, the memory of the smallest device."""
        for gpu in node.gpus:
            self.whole[gpu.flavor] = self.whole.get(gpu.flavor, 0) + 1
            self.left[gpu.flavor] = self.left.get(gpu.flavor, 0) + 1000
            self.least[gpu.flavor] = min(self.least.get(gpu.flavor, gpu.memory), gpu.memory)
        self.closed = False
        self.states: list[tuple[int, bool, Room]] | None = None
        """What is free over time (`_through_time`); None: to be found again."""
        self.times: list[int] = []
        self.claims: list[Claim] = []
        self.releases: list[tuple[int, Grant]] = []
        self.windows: list[Window] = []

    def take(self, grant: Grant, sign: int = 1) -> None:
        self.cpu -= sign * grant.cpu_milli
        self.memory -= sign * grant.memory
        if grant.devices:
            each = sign * min(1000, grant.gpu_milli)
            slots, gpus = self.slots, self.gpus
            for index in grant.devices:
                if index in slots:
                    slot = slots[index]
                    flavor, before = self.kinds[slot], gpus[slot]
                    gpus[slot] = after = before - each
                    self.left[flavor] -= each
                    self.whole[flavor] += (after >= 1000) - (before >= 1000)

    def later(self, start: int, end: int) -> Room:
        """The least that is free at every moment of [start, end): at its start, or when a claim begins within it."""
        if not self.claims and not self.releases:
            return self
        if self.states is None:
            self.states = self._through_time()
            self.times = [at for at, _, _ in self.states]
        place = bisect_right(self.times, start)
        first = self.states[place - 1][2] if place else self
        least: Room | None = None
        for at, claimed, then in self.states[place:] if self.claims else ():
            if at >= end:
                break
            if claimed:
                least = least or first._copy()
                least._lower_to(then)
        return least or first

    def _through_time(self) -> list[tuple[int, bool, Room]]:
        """(when, does a claim begin, what is free from then on), for everything that ends or begins."""
        changes = [
            *((at, 0, grant) for at, grant in self.releases),
            *((claim.end, 1, claim.grant) for claim in self.claims),
            *((claim.start, 2, claim.grant) for claim in self.claims),
        ]
        changes.sort(key=lambda change: change[:2])
        states, now = [], self
        for at, kind, grant in changes:
            now = now._copy()
            now.take(grant, 1 if kind == 2 else -1)
            states.append((at, kind == 2, now))
        return states

    def _copy(self) -> Room:
        copy = Room.__new__(Room)
        copy.node, copy.place, copy.slots = self.node, self.place, self.slots
        copy.kinds, copy.least = self.kinds, self.least
        copy.cpu, copy.memory, copy.gpus = self.cpu, self.memory, self.gpus.copy()
        copy.whole, copy.left = self.whole.copy(), self.left.copy()
        return copy

    def _lower_to(self, other: Room) -> None:
        self.cpu = min(self.cpu, other.cpu)
        self.memory = min(self.memory, other.memory)
        for slot, its in enumerate(other.gpus):
            mine = self.gpus[slot]
            if its < mine:
                flavor = self.kinds[slot]
                self.gpus[slot] = its
                self.left[flavor] -= mine - its
                self.whole[flavor] -= (mine >= 1000) - (its >= 1000)

    def claimed(self, start: int, end: int) -> bool:
        """Does a reserved start fall into [start, end)?"""
        return any(claim.start < end and claim.end > start for claim in self.claims)

    def shut(self, account: str, start: int, end: int) -> Window | None:
        """The window that keeps this account's work off the node in [start, end)."""
        for window in self.windows:
            if window.start < end and window.end > start and not _within(account, window.accounts):
                return window
        return None

    def count(self, need: Need, flavor: str, most: int) -> int:
        """How many of the workers fit into what is free, at most `most`."""
        _, _, cpu, memory, gpu, gpu_memory, _ = need
        fits = self.cpu // cpu
        if memory and (others := self.memory // memory) < fits:
            fits = others
        if flavor != CPU and fits > 0:
            if gpu >= 1000 and gpu_memory <= self.least.get(flavor, 0):
                others = self.whole.get(flavor, 0) // (gpu // 1000)
            else:
                others = self._devices(need, flavor)
            if others < fits:
                fits = others
        if most < fits:
            fits = most
        return fits if fits > 0 else 0

    def _devices(self, need: Need, flavor: str) -> int:
        """The same by devices alone, looked at one by one."""
        fits, each = 0, need.device
        for gpu, free in zip(self.node.gpus, self.gpus, strict=True):
            if free >= each and gpu.flavor == flavor and gpu.memory >= need.gpu_memory:
                fits += free // each
        return fits // need.devices

    def grants(self, need: Need, flavor: str, count: int) -> list[Grant]:
        """Grants for `count` workers that fit; a share of a GPU goes to the fullest that has room."""
        name = self.node.name
        if flavor == CPU:
            return [Grant(name, need.cpu, need.memory, 0, CPU)] * count
        each, free, made = need.device, list(self.gpus), []
        for _ in range(count):
            slots = [
                slot
                for slot, gpu in enumerate(self.node.gpus)
                if free[slot] >= each and gpu.flavor == flavor and gpu.memory >= need.gpu_memory
            ]
            slots.sort(key=lambda slot: (free[slot], self.node.gpus[slot].index))
            chosen = slots[: need.devices]
            for slot in chosen:
                free[slot] -= each
            devices = tuple(self.node.gpus[slot].index for slot in chosen)
            made.append(Grant(name, need.cpu, need.memory, need.gpu, flavor, devices))
        return made


def _within(account: str, accounts: Iterable[str]) -> bool:
    return any(account == above or account.startswith(above + "/") for above in accounts)


class Cluster:
    """All rooms, and an index of those that have anything free of a flavor."""

    def __init__(self, nodes: tuple[Node, ...], drained: Iterable[str] = (), windows: Iterable[Window] = ()) -> None:
        self.rooms = {node.name: Room(node, place) for place, node in enumerate(nodes)}
        for name in drained:
            if name in self.rooms:
                self.rooms[name].closed = True
        for window in windows:
            for name in window.nodes:
                if name in self.rooms:
                    self.rooms[name].windows.append(window)
        self.gpu_flavors = tuple(sorted({gpu.flavor for node in nodes for gpu in node.gpus}))
        self._here: dict[str, list[Room]] = {flavor: [] for flavor in (CPU, *self.gpu_flavors)}
        # Work without a GPU goes to nodes without one first.
        for room in sorted(self.rooms.values(), key=lambda room: (bool(room.node.gpus), room.place)):
            if not room.closed:
                self._here[CPU].append(room)
                for flavor in dict.fromkeys(gpu.flavor for gpu in room.node.gpus):
                    self._here[flavor].append(room)
        self._changed: list[Room] = []
        """Every room that was given something or back, in order."""
        self._fits: dict[tuple[Need, str, int], _Fits] = {}
        self._first: dict[tuple[int, int], int] = {}
        """(cores, memory) → how many of the rooms without a GPU, then with one, have no room for that."""
        self._capable: dict[Need, dict[str, bool]] = {}
        self._shapes: dict[str, list[tuple[Room, int]]] = {}
        self._releases: list[tuple[int, str, Grant]] | None = None
        self.planned: list[Claim] = []

    # ------------------------------------------------------------------------------------- filling it

    def hold(self, grants: Iterable[Grant], until: int, sign: int = 1) -> None:
        """What a live or just admitted job holds until then at the latest; `sign` -1 gives it back."""
        for grant in grants:
            room = self.rooms.get(grant.node)
            if room is None:  # a node that is gone still has its reservations until they are confirmed ended
                continue
            room.take(grant, sign)
            room.states = None
            self._changed.append(room)
            if sign > 0:
                room.releases.append((until, grant))
            else:
                room.releases.remove((until, grant))
                self._first.clear()
        self._releases = None

    def close(self, name: str) -> None:
        """Nothing new is placed on this node."""
        self.rooms[name].closed = True
        self._changed.append(self.rooms[name])

    def open(self, name: str) -> None:
        self.rooms[name].closed = False
        self._changed.append(self.rooms[name])
        self._first.clear()

    @contextmanager
    def what_if(self) -> Iterator[None]:
        """Whatever is held or given back inside is undone again by the caller: the order of ends stays as it was."""
        kept = self._releases
        yield
        self._releases = kept

    def claim(self, job_id: str, grants: Iterable[Grant], start: int, end: int) -> None:
        """Reserve a later start."""
        for grant in grants:
            claim = Claim(start, end, grant, job_id)
            room = self.rooms[grant.node]
            room.claims.append(claim)
            room.states = None
            self.planned.append(claim)

    # ------------------------------------------------------------------------------------- asking it

    def meanings(self, need: Need) -> list[str]:
        """The flavors that a wish stands for, in the job's order; `gpu` is every kind that is here."""
        out: dict[str, None] = {}
        for wanted in need.flavors:
            for flavor in self.gpu_flavors if wanted == ANY_GPU else (wanted,):
                out.setdefault(flavor)
        return list(out)

    def capable(self, need: Need, flavor: str) -> bool:
        """Could the nodes that are not drained hold the least workers if they were empty?"""
        known = self._capable.setdefault(need, {})
        if flavor not in known:
            left = need.workers_min
            for empty, number in self._empty(flavor):
                left -= number * empty.count(need, flavor, need.workers_max)
            known[flavor] = left <= 0
        return known[flavor]

    def _empty(self, flavor: str) -> list[tuple[Room, int]]:
        """One empty room per sort of node, and how many there are."""
        if flavor not in self._shapes:
            sorts: dict[tuple[object, ...], int] = {}
            first: dict[tuple[object, ...], Node] = {}
            for room in self._here.get(flavor, ()):
                shape = (room.node.cpu_milli, room.node.memory, room.node.gpus)
                sorts[shape] = sorts.get(shape, 0) + 1
                first.setdefault(shape, room.node)
            self._shapes[flavor] = [(Room(first[shape], 0), number) for shape, number in sorts.items()]
        return self._shapes[flavor]

    def place(
        self, need: Need, flavor: str, most: int, account: str, start: int, end: int, *, beside: bool = True
    ) -> tuple[Grant, ...] | None:
        """Grants for `workers_min` to `most` workers from now on, on as few nodes as possible, or None.

        `beside`: so that no reserved start is delayed and no window entered.
        """
        first = most == 1 and flavor == CPU
        offers: list[tuple[int, Room, Room]] = []
        for room, count in self._first_fits(need) if first else self.fits(need, flavor, most).items():
            seen = room
            if beside and (room.claims or room.windows):
                if room.windows and room.shut(account, start, end):
                    continue
                if room.claimed(start, end):
                    seen = room.later(start, end)
                    count = seen.count(need, flavor, most)
            if count:
                offers.append((count, room, seen))
                if first:
                    break  # the first that fits will do
        return _chosen(offers, need, flavor, most)

    def fits(self, need: Need, flavor: str, most: int) -> dict[Room, int]:
        """How many of the workers, at most `most`, fit into each room that has room for any now."""
        key = (need, flavor, most)
        if key not in self._fits:
            self._fits[key] = _Fits(need, flavor, most, self._here.get(flavor, ()), len(self._changed))
        return self._fits[key].after(self._changed)

    def _first_fits(self, need: Need) -> Iterator[tuple[Room, int]]:
        """Rooms with place for one worker without a GPU, in order: those that have none are not asked again."""
        rooms, key = self._here[CPU], (need.cpu, need.memory)
        empty = True
        for place in range(self._first.get(key, 0), len(rooms)):
            room = rooms[place]
            if not room.closed and room.count(need, CPU, 1):
                empty = False
                yield room, 1
            elif empty:
                self._first[key] = place + 1

    def releases(self) -> list[tuple[int, str, Grant]]:
        """(when, node, what) of everything that ends, soonest first."""
        if self._releases is None:
            found = [(at, name, grant) for name, room in self.rooms.items() for at, grant in room.releases]
            self._releases = sorted(found, key=lambda each: (each[0], self.rooms[each[1]].place))
        return self._releases

    def earliest(
        self, need: Need, flavor: str, most: int, account: str, now: int, length: int
    ) -> tuple[int, tuple[Grant, ...]] | None:
        """The first moment from `now` on at which the least workers fit for `length` ms, and where.

        A sweep over what ends: only the room in which something ends is counted again, so that the cost follows the
        number of ends until it fits. A room that a reserved start has entered meanwhile is found out by the exact
        check that precedes the answer.
        """
        if not self.capable(need, flavor):
            return None
        rooms = [room for room in self._here.get(flavor, ()) if not room.closed]
        sweep = _Sweep(rooms, need, flavor, most, account, length)
        sweep.begin(now, self.fits(need, flavor, most))
        ends = sorted({(claim.end, claim.grant.node) for claim in self.planned} | {
            (window.end, room.node.name) for room in rooms for window in room.windows
        })  # fmt: skip
        looked = False
        for at, name, grant in chain(_merged(self.releases(), ends), [(NEVER, "", None)]):
            if at > now and not looked:  # once all that ends by then has ended
                looked = True
                sweep.settle(now)
                if sweep.total >= need.workers_min and (found := sweep.grants(now)):
                    return now, found
            if at >= NEVER:
                return None
            if at <= now:
                sweep.release(self.rooms[name], grant)
                continue
            sweep.ended(self.rooms[name], grant, at)
            if sweep.total >= need.workers_min and (found := sweep.grants(at)):
                return at, found
        return None


class _Fits:
    """How many workers of one need fit into each room, counted again only where something changed."""

    __slots__ = ("_known", "_need", "_rooms", "counts")

    def __init__(self, need: Need, flavor: str, most: int, rooms: Iterable[Room], known: int) -> None:
        self._need = (need, flavor, most)
        self._rooms = frozenset(rooms)
        self._known = known
        self.counts = {room: count for room in rooms if not room.closed and (count := room.count(need, flavor, most))}

    def after(self, changed: list[Room]) -> dict[Room, int]:
        """The counts once these rooms have changed; the first `_known` of them it has seen."""
        if self._known < len(changed):
            for room in dict.fromkeys(changed[self._known :]):
                count = 0 if room.closed or room not in self._rooms else room.count(*self._need)
                if count:
                    self.counts[room] = count
                else:
                    self.counts.pop(room, None)
            self._known = len(changed)
        return self.counts


class _Sweep:
    """How many workers fit into each room for `length` ms, as one job after another ends."""

    def __init__(
        self, rooms: list[Room], need: Need, flavor: str, most: int, account: str, length: int
    ) -> None:  # fmt: skip
        self._need, self._flavor, self._most = need, flavor, most
        self._account, self._length = account, length
        self._copies: dict[Room, Room] = {}
        self.counts = dict.fromkeys(rooms, 0)
        self.total = 0
        self._timed = [room for room in rooms if room.claims or room.windows]
        """Where more than what ends changes what is free."""

    def begin(self, now: int, fits: dict[Room, int]) -> None:
        """All rooms, as they are now."""
        self.counts.update(fits)
        self.total = sum(fits.values())
        self.recount(now)

    def recount(self, at: int) -> None:
        """All rooms, exactly as they are then: the others were counted when something in them ended."""
        for room in self._timed:
            self._again(room, at)

    def release(self, room: Room, grant: Grant | None) -> None:
        """A job has ended there; it is counted later."""
        if grant is not None and room in self.counts:
            copy = self._copies.get(room)
            if copy is None:
                copy = self._copies[room] = room._copy()
            copy.take(grant, -1)

    def settle(self, now: int) -> None:
        """Count what has been released up to now."""
        for room in self._copies:
            self._again(room, now)

    def ended(self, room: Room, grant: Grant | None, at: int) -> None:
        """A job, a reserved start or a window has ended there."""
        if room not in self.counts:
            return
        self.release(room, grant)
        if grant is None or self.counts[room] < self._most:
            self._again(room, at)

    def _again(self, room: Room, at: int) -> None:
        self.total -= self.counts[room]
        self.counts[room] = self._count(room, at)
        self.total += self.counts[room]

    def grants(self, at: int) -> tuple[Grant, ...] | None:
        """Where the least workers would be from then on; None where a reserved start has come in between."""
        self.recount(at)
        if self.total < self._need.workers_min:
            return None
        offers = [(count, room, self._seen(room, at)) for room, count in self.counts.items() if count]
        # A reserved start keeps the least that it needs; growing beyond is for when it starts.
        return _chosen(offers, self._need, self._flavor, self._need.workers_min)

    def _count(self, room: Room, at: int) -> int:
        if room.windows and room.shut(self._account, at, at + self._length):
            return 0
        return self._seen(room, at).count(self._need, self._flavor, self._most)

    def _seen(self, room: Room, at: int) -> Room:
        return room.later(at, at + self._length) if room.claims else self._copies.get(room, room)


def _chosen(
    offers: list[tuple[int, Room, Room]], need: Need, flavor: str, most: int
) -> tuple[Grant, ...] | None:  # fmt: skip
    """All on one node where one has room (the fullest such), else on as few as possible."""
    whole = [offer for offer in offers if offer[0] >= most]
    if whole:
        _, _, best = min([(_spare(seen, flavor), room.place, seen) for _, room, seen in whole])
        return tuple(best.grants(need, flavor, most))
    if sum(offer[0] for offer in offers) < need.workers_min:
        return None
    offers.sort(key=lambda offer: (-offer[0], offer[1].place))
    grants: list[Grant] = []
    for count, _, seen in offers:
        grants += seen.grants(need, flavor, min(count, most - len(grants)))
        if len(grants) >= most:
            break
    return tuple(grants)


def _spare(room: Room, flavor: str) -> tuple[int, int]:
    """What a node has left: the least is filled first, so that whole nodes stay free for gangs."""
    return (sum(room.left.values()) if flavor == CPU else room.left.get(flavor, 0), room.cpu)


def _merged(
    releases: list[tuple[int, str, Grant]], ends: list[tuple[int, str]]
) -> Iterator[tuple[int, str, Grant | None]]:  # fmt: skip
    """Both in order of time: (when, node, what is released); the end of a claim or window releases nothing."""
    place = 0
    for at, name, grant in releases:
        while place < len(ends) and ends[place][0] < at:
            yield (*ends[place], None)
            place += 1
        yield at, name, grant
    for end in ends[place:]:
        yield (*end, None)


def held_until(live: Reservation, now: int) -> int:
    """When it will have ended; one that is over its time is awaited from moment to moment."""
    return max(live.ends_by, now + 1000)
