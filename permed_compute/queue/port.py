"""The queue's interface: jobs, moves and the hash-chained event log.

Every change is one transaction: new state + event. `memory.py` and `sql.py` implement it, and both pass
`permed_compute.testing.queue.QueueConformance`. Frozen early: admission, execution and the CLI stand on it.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from permed_compute.spec import JobSpec
from permed_compute.states import JobState

Clock = Callable[[], int]
"""Milliseconds since 1970-01-01 UTC. Injected, so that tests and the simulator move time themselves."""


def wall_clock() -> int:
    return time.time_ns() // 1_000_000


_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # Crockford base 32, lower case
_SHIFTS = range(75, -1, -5)


def new_id(now: int) -> str:
    """A job id: 9 characters of time (ms), 7 of chance; sorts by submission and names nobody."""
    return new_ids(now, 1)[0]


def new_ids(now: int, count: int) -> list[str]:
    """`count` ids that follow each other, so that an array's never clash and sort by index."""
    first = (now << 35) + secrets.randbelow((1 << 35) - count + 1)
    return ["".join([_ALPHABET[(value >> shift) & 31] for shift in _SHIFTS]) for value in range(first, first + count)]


@dataclass(frozen=True, slots=True)
class Job:
    """One job as the queue holds it.

    `version` rises by one with every change and is what compare-and-set compares. `attempt` is the fencing number of
    the newest attempt, 0 before the first. `detail` is JSON: the allocation, the last reason's blockers, counts.
    Times are milliseconds since 1970 UTC.
    """

    id: str
    spec: JobSpec
    state: JobState
    version: int
    seq: int
    """Order of submission: the event number of SUBMITTED."""
    owner: str
    attempt: int
    reason: str
    submitted_at: int
    changed_at: int
    started_at: int
    """When the present attempt began to run, 0 before."""
    array_id: str = ""
    array_index: int = -1
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Move:
    """One change that somebody wants: applied only while the job still has `version`."""

    job_id: str
    version: int
    to: JobState
    reason: str
    """Code of the closed list in `admission.explain` or `execution.failure`, e.g. `admitted`, `cancelled-by-user`."""
    actor: str
    policy: str = ""
    """Version of the policy that decided, where one did."""
    attempt: int | None = None
    started_at: int | None = None
    detail: Mapping[str, Any] | None = None
    """Replaces the job's detail where given."""


@dataclass(frozen=True, slots=True)
class Event:
    """One record of the log. `hash` = SHA-256 over `previous` and the record's canonical JSON (queue/events.py)."""

    seq: int
    at: int
    job_id: str
    actor: str
    action: str
    """SUBMITTED, MOVED, or NOTED for what concerns no job's state (policy applied, lease taken)."""
    before: str
    after: str
    reason: str
    policy: str
    data: Mapping[str, Any]
    previous: str
    hash: str


@dataclass(frozen=True, slots=True)
class Lease:
    """Leadership of a queue: its holder is the one controller until `expires_at` (ms)."""

    epoch: int
    holder: str
    expires_at: int


class Queue(Protocol):
    """Durable jobs. Every method is safe to call from several threads."""

    def submit(self, specs: Sequence[JobSpec], *, owner: str, held: bool = False) -> list[Job]:
        """Store the jobs (an array becomes one job per element), one SUBMITTED event each, in one transaction.

        When this returns, no crash loses them.
        """
        ...

    def job(self, job_id: str) -> Job:
        """The job, or `NotFoundError`. A unique prefix of at least 4 characters will do."""
        ...

    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]:
        """Jobs in order of submission; with `limit`, the newest that many (still oldest first)."""
        ...

    def apply(self, moves: Sequence[Move], *, lease: Lease | None = None) -> list[Job]:
        """Make all moves and their events in one transaction, or none.

        Raises `StaleError` where a version differs, `StateError` where the table forbids a move, `LeaseLostError`
        where `lease` is given and no longer the newest.
        """
        ...

    def note(self, reason: str, *, actor: str, data: Mapping[str, Any], policy: str = "", job_id: str = "") -> Event:
        """Append a NOTED event."""
        ...

    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        """Events with seq > `after`, oldest first."""
        ...

    def head(self) -> tuple[int, str]:
        """(seq, hash) of the newest event; (0, 64 zeros) of an empty log."""
        ...

    def acquire(self, holder: str, ttl_ms: int) -> Lease | None:
        """Take the lease (epoch + 1) if it is free, expired or already this holder's; else None."""
        ...

    def renew(self, lease: Lease, ttl_ms: int) -> Lease:
        """Extend it. Raises `LeaseLostError`."""
        ...

    def release(self, lease: Lease) -> None:
        """Give it back; nothing happens where it was lost already."""
        ...

    def backup(self, target: str, kept: Path | None = None) -> str:
        """A consistent copy while jobs run; returns what was written and where.

        kept: folder of JSON documents that the log names by digest; they travel in the same file.
        """
        ...

    def close(self) -> None: ...
