"""Faults at every commit point, from a seed: at what a controller writes to queue and files, and asks of its engine.

    faults = Faults(random.Random(7), {"crash-after": 0.02, "lost": 0.05})
    queue = FaultyQueue(MemoryQueue(), faults)
    with faulty_files(faults), faults.armed():
        controller.tick()       # may raise Crash: its process has ended there

A point is named by what is done there (`apply LAUNCHING`, `write fence`, `engine launch`), so that `struck` counts
which points were hit by which fault. The same seed strikes the same points.
"""

from __future__ import annotations

import errno
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from permed_compute import paths
from permed_compute.errors import PermedError, QueueError
from permed_compute.execution import context
from permed_compute.queue.port import Event, Job, Lease, Move, Queue
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

T = TypeVar("T")

WRITE = ("crash-before", "crash-after", "lost", "unanswered", "stall")
"""A change of the queue: its caller dies before or after it, the connection drops before it (nothing is stored) or with
the answer (it is stored and nobody is told), or its caller stops for so long that another one takes over."""
READ = ("crash-before", "lost")
CALL = ("crash-before", "crash-after", "lost", "unanswered", "late", "twice", "stall")
"""A call of the engine. late: it takes effect after the caller has given up waiting."""
FILE = ("crash-before", "crash-after", "full")
KINDS = tuple(dict.fromkeys((*WRITE, *READ, *CALL, *FILE)))


class Crash(BaseException):
    """The controller's process ends here, as `kill -9` ends it: no handler may catch it."""


class Faults:
    """What goes wrong where. `rates`: kind → probability at each point that knows it. Strikes only while armed."""

    def __init__(self, chance: random.Random, rates: Mapping[str, float]) -> None:
        self._chance, self._rates = chance, dict(rates)
        self._armed = False
        self.struck: Counter[tuple[str, str]] = Counter()
        """(point, kind) → how often."""
        self.passed: Counter[str] = Counter()
        """Point → how often it was passed while armed."""
        self.stall: Callable[[], None] = lambda: None
        """What happens elsewhere while a controller stands still."""

    @contextmanager
    def armed(self, on: bool = True) -> Iterator[None]:
        """From here to the end of the block faults strike (or do not)."""
        before, self._armed = self._armed, on
        try:
            yield
        finally:
            self._armed = before

    def strike(self, point: str, kinds: Sequence[str]) -> str:
        """The kind that strikes at this point now, or ''."""
        if not self._armed:
            return ""
        self.passed[point] += 1
        draw = self._chance.random()
        for kind in kinds:
            draw -= self._rates.get(kind, 0.0)
            if draw < 0:
                self.struck[point, kind] += 1
                return kind
        return ""

    def around(self, point: str, kinds: Sequence[str], call: Callable[[], T], error: PermedError) -> T:
        """The call, with whatever strikes at this point. `error` is what its caller sees of a lost one."""
        kind = self.strike(point, kinds)
        if kind == "stall":
            with self.armed(False):
                self.stall()
        if kind == "crash-before":
            raise Crash(point)
        if kind == "lost":
            raise error
        answer = call()
        if kind == "twice":
            answer = call()
        if kind == "crash-after":
            raise Crash(point)
        if kind == "unanswered":
            raise error
        return answer


class FaultyQueue:
    """A queue whose connection drops and whose callers die. See `queue.port.Queue`."""

    def __init__(self, queue: Queue, faults: Faults) -> None:
        self.sound = queue
        """The queue itself, for whoever looks from outside."""
        self._faults = faults

    def submit(self, specs: Sequence[JobSpec], *, owner: str, held: bool = False) -> list[Job]:
        return self._write("submit", lambda: self.sound.submit(specs, owner=owner, held=held))

    def apply(self, moves: Sequence[Move], *, lease: Lease | None = None) -> list[Job]:
        to = "+".join(sorted({move.to.value for move in moves}))
        return self._write(f"apply {to}", lambda: self.sound.apply(moves, lease=lease))

    def note(self, reason: str, *, actor: str, data: Mapping[str, Any], policy: str = "", job_id: str = "") -> Event:
        def call() -> Event:
            return self.sound.note(reason, actor=actor, data=data, policy=policy, job_id=job_id)

        return self._write(f"note {reason}", call)

    def acquire(self, holder: str, ttl_ms: int) -> Lease | None:
        return self._write("acquire", lambda: self.sound.acquire(holder, ttl_ms))

    def renew(self, lease: Lease, ttl_ms: int) -> Lease:
        return self._write("renew", lambda: self.sound.renew(lease, ttl_ms))

    def release(self, lease: Lease) -> None:
        self._write("release", lambda: self.sound.release(lease))

    def job(self, job_id: str) -> Job:
        return self._read("job", lambda: self.sound.job(job_id))

    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]:
        return self._read("jobs", lambda: self.sound.jobs(states=states, owner=owner, limit=limit))

    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        return self._read("events", lambda: self.sound.events(job_id=job_id, after=after, limit=limit))

    def head(self) -> tuple[int, str]:
        return self._read("head", self.sound.head)

    def backup(self, target: str, kept: Path | None = None) -> str:
        return self.sound.backup(target, kept)

    def close(self) -> None:
        self.sound.close()

    def _write(self, point: str, call: Callable[[], T]) -> T:
        return self._faults.around(point, WRITE, call, QueueError("The queue's database failed (as the test asked)."))

    def _read(self, point: str, call: Callable[[], T]) -> T:
        return self._faults.around(point, READ, call, QueueError("The queue's database failed (as the test asked)."))


@contextmanager
def faulty_files(faults: Faults) -> Iterator[None]:
    """Files that are published by rename (`paths.replacing`): the disk is full, or the writer dies beside them."""
    real = paths.replacing

    @contextmanager
    def replacing(path: Path) -> Iterator[Path]:
        kind = faults.strike(f"write {path.name}", FILE)
        if kind == "crash-before":
            raise Crash(path.name)
        with real(path) as new:
            yield new
            if kind == "full":  # found out while writing: the new file goes, the old one stays
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path.name)
        if kind == "crash-after":
            raise Crash(path.name)

    places = (paths, context)
    for module in places:
        module.replacing = replacing  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for module in places:
            module.replacing = real  # type: ignore[attr-defined]
