"""What one transaction changes, planned before anything is written: the rules that every queue shares.

A `Draft` stands on the queue's state inside a transaction (its tip, its lease, its jobs). Each method adds its whole
change, jobs and events together, or raises and adds nothing, so that many calls can share one commit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from permed_compute.errors import LeaseLostError, NotFoundError, StaleError, StateError
from permed_compute.queue.events import Tip, chained, plain
from permed_compute.queue.port import Event, Job, Lease, Move, new_ids
from permed_compute.spec import JobSpec
from permed_compute.states import AWAITING_FILES, JobState, check_move

LEAST_PREFIX = 4
"""Characters of a job id that `job()` needs at least."""


@dataclass(frozen=True, slots=True)
class Order:
    """A spec made ready by the submitting thread: its canonical text, its digest, and its array's elements."""

    spec: JobSpec
    text: str
    digest: str
    elements: tuple[JobSpec, ...]

    @classmethod
    def of(cls, spec: JobSpec) -> Order:
        elements = tuple(spec.element(index) for index in range(len(spec.array)))
        text = spec.canonical()
        return cls(spec, text, hashlib.sha256(text.encode()).hexdigest(), elements)  # = spec.digest()


class Draft:
    """Changes planned and not yet written.

    `lease` reads the store's lease, and is asked only where a call needs it; `find` looks a job up in the store and
    returns None where there is none.
    """

    def __init__(self, tip: Tip, lease: Callable[[], Lease | None], find: Callable[[str], Job | None]) -> None:
        self.tip = tip
        self.lease_changed = False
        self.orders: dict[str, Order] = {}
        self.added: dict[str, tuple[Job, str]] = {}
        """New jobs, each with the digest of its spec."""
        self.moved: dict[str, Job] = {}
        self.events: list[Event] = []
        self._find = find
        self._read_lease = lease

    @cached_property
    def lease(self) -> Lease | None:
        """The newest lease, with what this draft changes."""
        return self._read_lease()

    def submit(self, orders: Sequence[Order], *, owner: str, held: bool, now: int) -> list[Job]:
        tip, added, events = self.tip, [], []
        for order in orders:
            state, reason = _first(order.spec, held)
            array_id = new_ids(now, 1)[0] if order.elements else ""
            specs = order.elements or (order.spec,)
            for index, (job_id, spec) in enumerate(zip(new_ids(now, len(specs)), specs, strict=True)):
                data: dict[str, Any] = {"spec": order.digest}
                if array_id:
                    data |= {"array_id": array_id, "array_index": index}
                event = chained(
                    tip, at=now, job_id=job_id, actor=owner, action="SUBMITTED", before="", after=state.value,
                    reason=reason, policy="", data=data,
                )  # fmt: skip
                job = Job(
                    job_id, spec, state, 1, event.seq, owner, 0, reason, now, now, 0,
                    array_id, index if array_id else -1,
                )  # fmt: skip
                tip = Tip(event.seq, event.hash)
                added.append((job, order.digest))
                events.append(event)
        self.orders.update((order.digest, order) for order in orders)
        self.added.update((row[0].id, row) for row in added)
        self._append(events)
        return [job for job, _ in added]

    def apply(self, moves: Sequence[Move], *, lease: Lease | None, now: int) -> list[Job]:
        if lease is not None:
            self._check_lease(lease)
        tip, changed, jobs, events = self.tip, dict[str, Job](), [], []
        for move in moves:
            before = changed.get(move.job_id) or self._job(move.job_id)
            job = moved(before, move, now)
            event = chained(
                tip, at=now, job_id=job.id, actor=move.actor, action="MOVED", before=before.state.value,
                after=job.state.value, reason=move.reason, policy=move.policy, data=_change(job, move),
            )  # fmt: skip
            tip = Tip(event.seq, event.hash)
            changed[job.id] = job
            jobs.append(job)
            events.append(event)
        self.moved.update(changed)
        self._append(events)
        return jobs

    def note(
        self, reason: str, *, actor: str, data: Mapping[str, Any], now: int, policy: str = "", job_id: str = ""
    ) -> Event:
        event = chained(
            self.tip, at=now, job_id=job_id, actor=actor, action="NOTED", before="", after="", reason=reason,
            policy=policy, data=plain(data),
        )  # fmt: skip
        self._append([event])
        return event

    def acquire(self, holder: str, ttl_ms: int, *, now: int) -> Lease | None:
        present = self.lease
        if present is not None and present.holder not in ("", holder) and present.expires_at > now:
            return None
        lease = Lease((present.epoch if present else 0) + 1, holder, now + ttl_ms)
        self.note("lease-taken", actor=holder, data={"epoch": lease.epoch}, now=now)
        self.lease, self.lease_changed = lease, True
        return lease

    def renew(self, lease: Lease, ttl_ms: int, *, now: int) -> Lease:
        self._check_lease(lease)
        renewed = replace(lease, expires_at=now + ttl_ms)
        self.lease, self.lease_changed = renewed, True
        return renewed

    def release(self, lease: Lease, *, now: int) -> None:
        if self.lease is None or (self.lease.epoch, self.lease.holder) != (lease.epoch, lease.holder):
            return
        self.note("lease-released", actor=lease.holder, data={"epoch": lease.epoch}, now=now)
        self.lease, self.lease_changed = Lease(lease.epoch, "", 0), True

    def _append(self, events: list[Event]) -> None:
        self.events += events
        if events:
            self.tip = Tip(events[-1].seq, events[-1].hash)

    def _job(self, job_id: str) -> Job:
        if job_id in self.moved:
            return self.moved[job_id]
        job = self.added[job_id][0] if job_id in self.added else self._find(job_id)
        if job is None:
            raise NotFoundError(f"There is no job {job_id}.")
        return job

    def _check_lease(self, lease: Lease) -> None:
        newest = self.lease
        if newest is None or (newest.epoch, newest.holder) != (lease.epoch, lease.holder):
            raise LeaseLostError(
                f"Lease {lease.epoch} of {lease.holder} is no longer the newest.",
                remedy="Another controller leads this queue now; this one stops.",
            )


def _first(spec: JobSpec, held: bool) -> tuple[JobState, str]:
    """State and reason of a new job. Whether its files have come in the queue cannot know."""
    if held:
        return JobState.HELD, "held-by-user"
    return (JobState.HELD, AWAITING_FILES) if spec.transfers else (JobState.QUEUED, "submitted")


def moved(job: Job, move: Move, now: int) -> Job:
    """The job after the move. Raises `StaleError`, or `StateError` where the table forbids it."""
    if job.version != move.version:
        raise StaleError(
            f"Job {job.id} is at version {job.version} ({job.state}), not {move.version}: somebody else moved it first."
        )
    check_move(job.state, move.to)
    if move.attempt is not None and move.attempt < job.attempt:
        raise StateError(f"Job {job.id} is at attempt {job.attempt}; attempt {move.attempt} is fenced off.")
    return replace(
        job,
        state=move.to,
        version=job.version + 1,
        attempt=job.attempt if move.attempt is None else move.attempt,
        reason=move.reason,
        changed_at=now,
        started_at=job.started_at if move.started_at is None else move.started_at,
        detail=job.detail if move.detail is None else plain(move.detail),
    )


def _change(job: Job, move: Move) -> dict[str, Any]:
    """What the event must say beside the states, so that folding the log gives every job as it is."""
    data: dict[str, Any] = {"version": job.version}
    if move.attempt is not None:
        data["attempt"] = job.attempt
    if move.started_at is not None:
        data["started_at"] = job.started_at
    if move.detail is not None:
        data["detail"] = job.detail
    return data


def no_such_job(job_id: str, matches: int = 0) -> NotFoundError:
    """The error of `Queue.job`."""
    if matches:
        return NotFoundError(f"Several jobs begin with {job_id!r}.", remedy="Write more of the id.")
    short = f"Write at least {LEAST_PREFIX} characters of the id." if len(job_id) < LEAST_PREFIX else ""
    return NotFoundError(f"There is no job {job_id!r}.", remedy=short or "`permed jobs` lists them.")
