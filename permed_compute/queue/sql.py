"""The durable queue: SQLAlchemy Core on SQLite or PostgreSQL, one writer thread, group commit.

Calls that change something are handed to the writer thread, which folds all that wait into one transaction: one
fsync for many callers. Each call keeps its own all-or-nothing and its own answer (`transition.Draft`), and returns
only after the COMMIT that holds its change. Reads go their own way on their own connections.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

import sqlalchemy as sa

from permed_compute.errors import QueueError
from permed_compute.queue import backup, bulk, schema
from permed_compute.queue.events import START, Anchor, Tip, canonical
from permed_compute.queue.port import Clock, Event, Job, Lease, Move, wall_clock
from permed_compute.queue.transition import LEAST_PREFIX, Draft, Order, no_such_job
from permed_compute.spec import JobSpec, from_json
from permed_compute.states import JobState

T = TypeVar("T")

_CALLS_PER_COMMIT = 512
_KEYS_PER_QUERY = 500
"""SQLite takes at least 999 parameters; PostgreSQL plans a list of this size quickly."""

_TIP = sa.select(schema.events.c.seq, schema.events.c.hash).order_by(schema.events.c.seq.desc()).limit(1)
_JOBS = sa.select(schema.jobs)


class _Call:
    """One change that a caller waits for. A bare lock is the cheapest way to wait in Python."""

    __slots__ = ("answer", "done", "error", "moves", "plan")

    def __init__(self, plan: Callable[[Draft], Any], moves: Sequence[Move]) -> None:
        self.plan = plan
        self.moves = moves
        self.answer: Any = None
        self.error: BaseException | None = None
        self.done = threading.Lock()
        self.done.acquire()


class SqlQueue:
    """See `port.Queue`. `anchor`, where given, follows every commit (events.py).

    Opening upgrades an older database in place. Raises `QueueError`: unreachable, newer than this code, or SQLite on
    a network file system.
    """

    def __init__(self, url: str | sa.URL, clock: Clock = wall_clock, anchor: Anchor | None = None) -> None:
        self._clock = clock
        self._anchor = anchor
        self._engine = schema.engine_for(url)
        self._specs = _Specs()
        with _database(), self._engine.connect() as connection, schema.writing(connection).begin():
            schema.upgrade(connection)
        if anchor is not None:
            anchor.begin(self)
        self._inbox: SimpleQueue[_Call | None] = SimpleQueue()
        self._gate = threading.Lock()
        self._closed = False
        with _database():
            self._connection = schema.writing(self._engine.connect())
        self._writer = threading.Thread(target=self._write, name="permed-queue-writer", daemon=True)
        self._writer.start()

    # ------------------------------------------------------------------------------------- changes

    def submit(self, specs: Sequence[JobSpec], *, owner: str, held: bool = False) -> list[Job]:
        orders = [Order.of(spec) for spec in specs]
        return self._change(lambda draft: draft.submit(orders, owner=owner, held=held, now=self._clock()))

    def apply(self, moves: Sequence[Move], *, lease: Lease | None = None) -> list[Job]:
        return self._change(lambda draft: draft.apply(moves, lease=lease, now=self._clock()), moves)

    def note(self, reason: str, *, actor: str, data: Mapping[str, Any], policy: str = "", job_id: str = "") -> Event:
        def plan(draft: Draft) -> Event:
            return draft.note(reason, actor=actor, data=data, now=self._clock(), policy=policy, job_id=job_id)

        return self._change(plan)

    def acquire(self, holder: str, ttl_ms: int) -> Lease | None:
        return self._change(lambda draft: draft.acquire(holder, ttl_ms, now=self._clock()))

    def renew(self, lease: Lease, ttl_ms: int) -> Lease:
        return self._change(lambda draft: draft.renew(lease, ttl_ms, now=self._clock()))

    def release(self, lease: Lease) -> None:
        self._change(lambda draft: draft.release(lease, now=self._clock()))

    def _change(self, plan: Callable[[Draft], T], moves: Sequence[Move] = ()) -> T:
        call = _Call(plan, moves)
        with self._gate:  # nothing may enter the inbox behind the writer's last look
            if self._closed:
                raise QueueError("The queue is closed.")
            self._inbox.put(call)
        call.done.acquire()
        if call.error is not None:
            raise call.error
        return call.answer

    # ------------------------------------------------------------------------------------- the writer thread

    def _write(self) -> None:
        closing = False
        while not closing:
            calls, closing = self._waiting()
            self._commit(self._connection, calls)

    def _waiting(self) -> tuple[list[_Call], bool]:
        """What waits now, at least one call; True where `close` has been called."""
        calls: list[_Call] = []
        call = self._inbox.get()
        try:
            while call is not None and len(calls) < _CALLS_PER_COMMIT:
                calls.append(call)
                call = self._inbox.get_nowait()
        except Empty:
            return calls, False
        if call is not None:
            calls.append(call)
        return calls, call is None

    def _commit(self, connection: sa.Connection, calls: list[_Call]) -> None:
        """All calls in one transaction. Where the database refuses it for what one of them holds, each alone, so that
        only the culprit fails; where it could not be reached, all once more over a new connection."""
        if not calls:
            return
        try:
            self._transact(connection, calls)
        except _NotCommittedError as first:
            for group in [calls] if first.concerns_all else [[call] for call in calls]:
                try:
                    self._transact(connection, group)
                except _NotCommittedError as error:
                    for call in group:
                        call.error = error.cause
                        call.done.release()

    def _transact(self, connection: sa.Connection, calls: list[_Call]) -> None:
        """Plan every call, write what they change, commit, and only then answer."""
        try:
            transaction = connection.begin()
            draft = self._draft(connection, calls)
            for call in calls:
                call.error = None
                try:
                    call.answer = call.plan(draft)
                except Exception as error:  # noqa: BLE001 - belongs to that caller, who raises it
                    call.error = error
            self._write_draft(connection, draft)
        except Exception as error:  # the writer thread must outlive whatever the database does
            _roll_back(connection)
            raise _NotCommittedError(error) from error
        try:
            transaction.commit()
        except Exception as error:  # noqa: BLE001 - as above; it may have been committed, so nobody tries again
            _roll_back(connection)
            for call in calls:
                call.error = _queue_error(error)
        else:
            for order in draft.orders.values():
                self._specs.keep(order)
            if self._anchor is not None and draft.events:
                self._anchor.advance(draft.tip)
        for call in calls:
            call.done.release()

    def _draft(self, connection: sa.Connection, calls: Sequence[_Call]) -> Draft:
        ids = {move.job_id for call in calls for move in call.moves}
        found = {job.id: job for job in self._by(connection, schema.jobs.c.id, ids)} if ids else {}
        tip = connection.execute(_TIP).one_or_none()

        def lease() -> Lease | None:
            row = connection.execute(sa.select(schema.lease)).one_or_none()
            return Lease(*row) if row else None

        return Draft(Tip(*tip) if tip else START, lease, found.get)

    def _write_draft(self, connection: sa.Connection, draft: Draft) -> None:
        known = self._specs.held(draft.orders)
        rows = {
            schema.specs: [{"digest": key, "text": o.text} for key, o in draft.orders.items() if key not in known],
            schema.jobs: [_job_values(*row) for row in draft.added.values()],
            schema.events: [_event_values(event) for event in draft.events],
        }
        if draft.lease_changed and draft.lease is not None:
            connection.execute(sa.delete(schema.lease))
            rows[schema.lease] = [asdict(draft.lease)]
        bulk.insert(connection, rows)
        bulk.update(connection, schema.jobs, "id", [_moved_values(job) for job in draft.moved.values()])

    # ------------------------------------------------------------------------------------- reads

    def job(self, job_id: str) -> Job:
        column = schema.jobs.c.id
        if not (job_id.isascii() and job_id.isalnum()):
            raise no_such_job(job_id)
        with self._reading() as connection:
            found = self._built(connection, connection.execute(_JOBS.where(column == job_id)))
            if not found and len(job_id) >= LEAST_PREFIX:
                behind = job_id[:-1] + chr(ord(job_id[-1]) + 1)
                query = _JOBS.where(column >= job_id, column < behind).limit(2)
                found = self._built(connection, connection.execute(query))
        if len(found) != 1:
            raise no_such_job(job_id, len(found))
        return found[0]

    def jobs(
        self, *, states: Iterable[JobState] | None = None, owner: str | None = None, limit: int | None = None
    ) -> list[Job]:
        query, seq = _JOBS, schema.jobs.c.seq
        if states is not None:
            query = query.where(schema.jobs.c.state.in_([state.value for state in states]))
        if owner is not None:
            query = query.where(schema.jobs.c.owner == owner)
        query = query.order_by(seq) if limit is None else query.order_by(seq.desc()).limit(limit)
        with self._reading() as connection:
            found = self._built(connection, connection.execute(query))
        return found if limit is None else found[::-1]

    def events(self, *, job_id: str | None = None, after: int = 0, limit: int | None = None) -> list[Event]:
        query = sa.select(schema.events).where(schema.events.c.seq > after).order_by(schema.events.c.seq)
        if job_id is not None:
            query = query.where(schema.events.c.job_id == job_id)
        if limit is not None:
            query = query.limit(limit)
        with self._reading() as connection:
            return [_event(row) for row in connection.execute(query)]

    def head(self) -> tuple[int, str]:
        with self._reading() as connection:
            row = connection.execute(_TIP).one_or_none()
        return (row[0], row[1]) if row else (START.seq, START.hash)

    @contextmanager
    def _reading(self) -> Iterator[sa.Connection]:
        with _database(), self._engine.connect() as connection:
            yield connection

    def _by(self, connection: sa.Connection, column: sa.Column[Any], keys: Iterable[str]) -> Iterator[Job]:
        for page in _pages(sorted(keys)):
            yield from self._built(connection, connection.execute(_JOBS.where(column.in_(page))))

    def _built(self, connection: sa.Connection, result: sa.CursorResult[Any]) -> list[Job]:
        rows = result.all()
        parents = self._specs.held({row.spec for row in rows})
        for page in _pages(sorted({row.spec for row in rows} - parents.keys())):
            query = sa.select(schema.specs).where(schema.specs.c.digest.in_(page))
            parents |= {row.digest: from_json(row.text) for row in connection.execute(query)}
        return [_job(row, self._specs.element(row.spec, row.array_index, parents[row.spec])) for row in rows]

    # ------------------------------------------------------------------------------------- keeping it

    def backup(self, target: str, kept: Path | None = None) -> str:
        with _database():
            return backup.write(self._engine, target, kept)

    def close(self) -> None:
        """Commit what waits, then stop. Later calls raise `QueueError`."""
        with self._gate:
            if self._closed:
                return
            self._closed = True
            self._inbox.put(None)
        self._writer.join()
        self._connection.close()
        if self._anchor is not None:
            self._anchor.close()
        self._engine.dispose()


class _Specs:
    """Specs by digest, and arrays' elements: the ones used last. What is here is in the database."""

    def __init__(self, limit: int = 20_000) -> None:
        self._limit = limit
        self._held: OrderedDict[tuple[str, int], JobSpec] = OrderedDict()
        self._lock = threading.Lock()

    def held(self, digests: Iterable[str]) -> dict[str, JobSpec]:
        """Those of the specs that are here."""
        with self._lock:
            return {digest: self._held[digest, -1] for digest in digests if (digest, -1) in self._held}

    def keep(self, order: Order) -> None:
        with self._lock:
            for index, spec in enumerate(order.elements):
                self._put((order.digest, index), spec)
            self._put((order.digest, -1), order.spec)

    def element(self, digest: str, index: int, parent: JobSpec) -> JobSpec:
        """The spec of an array's element, or of a single job (index -1)."""
        key = (digest, index)
        with self._lock:
            spec = self._held.get(key) or (parent.element(index) if index >= 0 else parent)
            self._put(key, spec)
            return spec

    def _put(self, key: tuple[str, int], spec: JobSpec) -> None:
        self._held[key] = spec
        self._held.move_to_end(key)
        while len(self._held) > self._limit:
            self._held.popitem(last=False)


# --------------------------------------------------------------------------------------------- rows


def _job(row: Any, spec: JobSpec) -> Job:
    return Job(
        row.id, spec, JobState(row.state), row.version, row.seq, row.owner, row.attempt, row.reason, row.submitted_at,
        row.changed_at, row.started_at, row.array_id, row.array_index, json.loads(row.detail),
    )  # fmt: skip


def _job_values(job: Job, digest: str) -> dict[str, Any]:
    return {
        "seq": job.seq, "id": job.id, "spec": digest, "array_id": job.array_id, "array_index": job.array_index,
        "state": job.state.value, "version": job.version, "owner": job.owner, "attempt": job.attempt,
        "reason": job.reason, "submitted_at": job.submitted_at, "changed_at": job.changed_at,
        "started_at": job.started_at, "detail": canonical(job.detail) if job.detail else "{}",
    }  # fmt: skip


def _moved_values(job: Job) -> dict[str, Any]:
    return {
        "id": job.id, "state": job.state.value, "version": job.version, "attempt": job.attempt, "reason": job.reason,
        "changed_at": job.changed_at, "started_at": job.started_at,
        "detail": canonical(job.detail) if job.detail else "{}",
    }  # fmt: skip


def _event(row: Any) -> Event:
    return Event(
        row.seq, row.at, row.job_id, row.actor, row.action, row.before, row.after, row.reason, row.policy,
        json.loads(row.data), row.previous, row.hash,
    )  # fmt: skip


def _event_values(event: Event) -> dict[str, Any]:
    return {
        "seq": event.seq, "at": event.at, "job_id": event.job_id, "actor": event.actor, "action": event.action,
        "before": event.before, "after": event.after, "reason": event.reason, "policy": event.policy,
        "data": canonical(event.data), "previous": event.previous, "hash": event.hash,
    }  # fmt: skip


def _pages(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    for start in range(0, len(keys), _KEYS_PER_QUERY):
        yield keys[start : start + _KEYS_PER_QUERY]


# --------------------------------------------------------------------------------------------- errors


class _NotCommittedError(Exception):
    """The transaction failed before its COMMIT: nothing of it is in the database."""

    def __init__(self, error: Exception) -> None:
        super().__init__(error)
        self.cause = _queue_error(error)
        self.concerns_all = isinstance(error, sa.exc.OperationalError)
        """The connection, the disk, a lock: not what one call wanted to write."""


@contextmanager
def _database() -> Iterator[None]:
    """Database errors as `QueueError`."""
    try:
        yield
    except sa.exc.SQLAlchemyError as error:
        raise _queue_error(error) from error


def _queue_error(error: Exception) -> QueueError:
    if isinstance(error, QueueError):
        return error
    # A driver's full message may carry values of the row: only PostgreSQL's primary message, or SQLite's short one.
    original = getattr(error, "orig", None) or error
    primary = getattr(getattr(original, "diag", None), "message_primary", None)
    what = (str(primary or original).strip().splitlines() or [""])[0]
    return QueueError(
        f"The queue's database failed ({type(original).__name__}: {what}).",
        remedy="Nothing of this call is stored unless the failure came while committing; `permed doctor` looks closer.",
    )


def _roll_back(connection: sa.Connection) -> None:
    try:
        connection.rollback()
    except sa.exc.SQLAlchemyError:
        connection.invalidate()
