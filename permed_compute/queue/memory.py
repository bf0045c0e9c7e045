"""The queue in memory: the same rules, nothing durable. For tests and the simulator."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from permed_compute.errors import QueueError
from permed_compute.queue.events import START, Tip
from permed_compute.queue.port import Clock, Event, Job, Lease, Move, wall_clock
from permed_compute.queue.transition import LEAST_PREFIX, Draft, Order, no_such_job
from permed_compute.spec import JobSpec
from permed_compute.states import JobState


class MemoryQueue:
    """See `port.Queue`."""

    def __init__(self, clock: Clock = wall_clock) -> None:
        self._clock = clock
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        self._events: list[Event] = []
        self._tip = START
        self._lease: Lease | None = None

    def submit(self, specs: Sequence[JobSpec], *, owner: str, held: bool = False) -> list[Job]:
        orders = [Order.of(spec) for spec in specs]
        with self._lock:
            draft = self._draft()
            jobs = draft.submit(orders, owner=owner, held=held, now=self._clock())
            self._keep(draft)
            return jobs

    def job(self, job_id: str) -> Job:
        with self._lock:
            if job_id in self._jobs:
                return self._jobs[job_id]
            found = [job for job in self._jobs.values() if job.id.startswith(job_id)]
        if len(job_id) < LEAST_PREFIX or len(found) != 1:
            raise no_such_job(job_id, len(found) if len(job_id) >= LEAST_PREFIX else 0)
        return found[0]

    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]:
        wanted = None if states is None else frozenset(states)
        with self._lock:
            found = [
                job
                for job in self._jobs.values()
                if (wanted is None or job.state in wanted) and (owner is None or job.owner == owner)
            ]
        return found if limit is None else found[max(0, len(found) - limit) :]

    def apply(self, moves: Sequence[Move], *, lease: Lease | None = None) -> list[Job]:
        with self._lock:
            draft = self._draft()
            jobs = draft.apply(moves, lease=lease, now=self._clock())
            self._keep(draft)
            return jobs

    def note(self, reason: str, *, actor: str, data: Mapping[str, Any], policy: str = "", job_id: str = "") -> Event:
        with self._lock:
            draft = self._draft()
            event = draft.note(reason, actor=actor, data=data, now=self._clock(), policy=policy, job_id=job_id)
            self._keep(draft)
            return event

    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        with self._lock:
            later = self._events[max(0, after) :]  # event n stands at n - 1
        found = [event for event in later if job_id is None or event.job_id == job_id]
        return found if limit is None else found[:limit]

    def head(self) -> tuple[int, str]:
        return self._tip.seq, self._tip.hash

    def acquire(self, holder: str, ttl_ms: int) -> Lease | None:
        with self._lock:
            draft = self._draft()
            lease = draft.acquire(holder, ttl_ms, now=self._clock())
            self._keep(draft)
            return lease

    def renew(self, lease: Lease, ttl_ms: int) -> Lease:
        with self._lock:
            draft = self._draft()
            renewed = draft.renew(lease, ttl_ms, now=self._clock())
            self._keep(draft)
            return renewed

    def release(self, lease: Lease) -> None:
        with self._lock:
            draft = self._draft()
            draft.release(lease, now=self._clock())
            self._keep(draft)

    def backup(self, target: str, kept: Path | None = None) -> str:
        raise QueueError("A queue in memory has nothing to back up.", remedy="Use a SQLite or PostgreSQL queue.")

    def close(self) -> None:
        """Nothing is held."""

    def _draft(self) -> Draft:
        return Draft(self._tip, lambda: self._lease, self._jobs.get)

    def _keep(self, draft: Draft) -> None:
        self._jobs.update((job_id, job) for job_id, (job, _) in draft.added.items())
        self._jobs.update(draft.moved)
        self._events += draft.events
        self._tip = Tip(*draft.tip)
        if draft.lease_changed:
            self._lease = draft.lease
