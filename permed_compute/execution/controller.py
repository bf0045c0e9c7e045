"""The controller: watch, decide, launch. One per queue, by lease; everything it does is a move in the queue.

It keeps nothing in memory that it could not read again: after `kill -9` the next controller looks at the queue, the
attempts' folders and the engine, adopts what still runs, and never launches an attempt that may be alive.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

from permed_compute.admission.commit import clean, moves_of, stopping_instead
from permed_compute.admission.decide import decide
from permed_compute.admission.demand import demand
from permed_compute.admission.fold import Picture, node_row
from permed_compute.admission.snapshot import Node, Plan, Policy, grants_of, open_questions
from permed_compute.errors import (
    EngineError,
    LeaseLostError,
    ModelRefusedError,
    PermedError,
    PermissionDeniedError,
    QueueError,
    StaleError,
)
from permed_compute.execution import failure, records
from permed_compute.execution.context import fenced_off, raise_fence
from permed_compute.execution.delegated import Delegated, EngineAwayError, pauses
from permed_compute.execution.port import Attempt, Executor, Liveness, Scaling
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.queue.port import Clock, Job, Lease, Move, Queue, wall_clock
from permed_compute.settings import Settings
from permed_compute.spec import Purpose
from permed_compute.states import AWAITING_FILES, ENDED, LIVE, JobState
from permed_compute.storage import checkpoints
from permed_compute.transfer import receipts

log = logging.getLogger(__name__)

_ASK_ENGINE_MS = 2_000
"""An attempt is asked after at most this often."""
_QUIET_MS = 5_000
"""An attempt that shows no sign of life for this long is asked after (it beats every 2 s)."""
_LOOK_AGAIN_MS = 2_000
"""Nodes come and go without an event: a decision that started nothing is taken again after this."""
_CHECKPOINT_LOOK_MS = 30_000
"""The log learns of a newer checkpoint at most this often per job; only preemption needs to know."""
_POLL_S = 0.1
_LONGEST_PAUSE_S = 5.0
"""Between two rounds that failed."""
_LEAST_S = 0.02
"""Between two rounds at least, so that a burst of submissions is looked at together."""


class Announce(Protocol):
    """Told once of every job that is about to end, before its move: what it does must bear being done twice."""

    def __call__(self, job: Job, state: JobState, exit_record: Mapping[str, Any] | None) -> None: ...


class Clear(Protocol):
    """May this job's model be used? Returns the digest that was cleared, '' where none is used for care; raises
    `ModelRefusedError`. Asked at every launch."""

    def __call__(self, job: Job, actor: str) -> str: ...


def _no_gate(job: Job, actor: str) -> str:
    if job.spec.purpose is Purpose.CARE:
        raise ModelRefusedError("This controller has no register of models.", rule="model-unvalidated")
    return ""


def _nobody(job: Job, state: JobState, exit_record: Mapping[str, Any] | None) -> None:
    return None


@dataclass(slots=True)
class Controller:
    """Runs the queue's jobs on one executor."""

    queue: Queue
    executor: Executor
    home: HomePaths
    settings: Settings
    clock: Clock = wall_clock
    announce: Announce = _nobody
    clear: Clear = _no_gate
    picture: Picture | None = None
    """The folded log, where others of this process look at it too."""
    policy: Policy = field(default_factory=Policy)
    """The one in force at the last decision: newest of the log, else open."""
    lease: Lease | None = None
    _noted_nodes: tuple[Node, ...] | None = None
    _looked_for_checkpoint: dict[str, int] = field(default_factory=dict)
    _checkpoint_at: dict[str, int] = field(default_factory=dict)
    _wake: threading.Event = field(default_factory=threading.Event)
    _launched: set[str] = field(default_factory=set)
    _asked: dict[str, int] = field(default_factory=dict)
    _troubles: dict[str, str] = field(default_factory=dict)
    """What kept a job's last step from being taken, so that the log says it once."""
    _live_at: tuple[int, list[Job]] = field(default_factory=lambda: (-1, []))
    """The log's head, and the jobs that live as of then."""
    _settled_at: int = -1
    _look_again_at: int = 0

    @property
    def name(self) -> str:
        return f"controller-{socket.gethostname()}-{os.getpid()}"

    @property
    def holder(self) -> str:
        """Whose lease it is: this home's, not this process's. The home's lock admits one process, so that a restarted
        controller need not wait for the lease of the one whose death freed the lock."""
        home = hashlib.sha256(str(self.home.root.resolve()).encode()).hexdigest()[:16]
        return f"{socket.gethostname()}:{home}"

    # ------------------------------------------------------------------------------------- the loop

    def lead(self) -> None:
        """Take the queue's lease. Raises `LeaseLostError` while another controller holds it."""
        self.lease = self.queue.acquire(self.holder, self.settings.lease * 1000)
        if self.lease is None:
            raise LeaseLostError(
                "Another controller leads this queue.",
                remedy=f"Stop it, or wait {self.settings.lease} s if it has died.",
            )

    def run(self, until: Callable[[], bool]) -> None:
        """Tick until `until()` is true. Raises `LeaseLostError` when another controller has taken over.

        A database, engine or disk that fails for a while is asked again; at the very first round that is an error.
        """
        if self.lease is None:
            self.lead()
        worked, failures = False, 0
        while not until():
            began = time.monotonic()
            try:
                busy, worked, failures = self.tick(), True, 0
            except LeaseLostError:
                raise
            except (QueueError, EngineError, OSError) as error:
                if not worked:
                    raise
                busy, failures = False, failures + 1
                log.warning("looking again in a moment: %s", error)
                time.sleep(min(_LONGEST_PAUSE_S, _POLL_S * 2**failures))
            # Half of the time at most: each submission wakes us, and looking at all must not keep the next one waiting.
            time.sleep(max(_LEAST_S, time.monotonic() - began))
            self._wake.wait(0.0 if busy else _POLL_S)
            self._wake.clear()

    def wake(self) -> None:
        """Look again now: something was submitted or cancelled."""
        self._wake.set()

    def tick(self) -> bool:
        """One round. Returns True where something moved, so that the next round should not wait."""
        # 1. Still the one controller? Writing without the lease is what the fencing numbers would have to catch.
        self._renew()
        # 2. What became of what lives.
        live = self._live()
        if isinstance(self.executor, Delegated):
            self.executor.expect(self._unsent(live))
        moved = [self._unless_stale(self._watch, job) for job in live]
        # 3. What starts now: a pure decision on a snapshot, committed by compare-and-set or dropped.
        moved.append(self._admit())
        # 4. Launch what is reserved: intent first, then the engine.
        reserved = [job for job in self._live() if job.state is JobState.RESERVED]
        moved += [self._unless_stale(self._launch, job) for job in reserved]
        return any(moved)

    def _live(self) -> list[Job]:
        """The jobs that live, read anew only where the log has grown: it is asked five times a second, for hours."""
        head = self.queue.head()[0]  # first: what changes from here on is read once more
        if head != self._live_at[0]:
            self._live_at = head, self.queue.jobs(states=LIVE)
        return self._live_at[1]

    def _unless_stale(self, step: Callable[[Job], bool], job: Job) -> bool:
        """A step on one job; where a user moved the job at the same moment, the next round sees it anew.

        What fails for one job (its folder, its node, a move that the table forbids) must not keep the others waiting.
        """
        self._renew()
        try:
            return step(job)
        except (LeaseLostError, QueueError):
            raise
        except StaleError:
            return True
        except (PermedError, OSError) as error:
            if self._troubles.get(job.id) != str(error):
                log.exception("job %s cannot go on for now", job.id)
            self._troubles[job.id] = str(error)
            return False

    def interrupt(self, grace_s: float) -> list[Job]:
        """Ask everything that lives to stop, wait, end what does not, and hold the jobs; returns them."""
        for job in self.queue.jobs(states=LIVE):
            self._begin_stop(job, "interrupted")
        end = self.clock() + int(grace_s * 1000)
        while self.queue.jobs(states=LIVE) and self.clock() < end + 20_000:
            for job in self.queue.jobs(states=LIVE):
                self._unless_stale(lambda live: self._watch(live, int(grace_s * 1000)), job)
            time.sleep(_POLL_S)
        return self.queue.jobs(states={JobState.HELD})

    def close(self) -> None:
        """Give the lease back. The executor is closed by whoever made it."""
        if self.lease is not None:
            self.queue.release(self.lease)
            self.lease = None

    def _renew(self) -> None:
        if self.lease is None:
            raise LeaseLostError("This controller holds no lease.")
        if self.lease.expires_at - self.clock() < self.settings.lease * 500:
            self.lease = self.queue.renew(self.lease, self.settings.lease * 1000)

    # ------------------------------------------------------------------------------------- decide

    def _admit(self) -> bool:
        head, now = self.queue.head()[0], self.clock()
        if head == self._settled_at and self._look_again_at - _LOOK_AGAIN_MS <= now < self._look_again_at:
            return False  # no event since a decision that started nothing: the same snapshot decides the same
        self._note_nodes()
        snapshot, self.policy, jobs = self._seen().see(now)
        plan = stopping_instead(decide(snapshot, self.policy, now)) if open_questions(snapshot) else Plan("")
        if isinstance(self.executor, Scaling):
            self.executor.want(partial(demand, snapshot, self.policy, plan, now))
        if not (plan.admissions or plan.preemptions or plan.promises):
            due = [job.not_before for job in snapshot.waiting if job.not_before > now]
            due += [job.deadline for job in snapshot.waiting if job.deadline > now]
            self._settled_at, self._look_again_at = snapshot.seq, min([*due, now + _LOOK_AGAIN_MS])
            return False
        self._commit(decided(moves_of(plan, jobs.__getitem__, actor=self.name), plan, snapshot.seq, now), plan)
        return True

    def _seen(self) -> Picture:
        if self.picture is None:
            self.picture = Picture(self.queue, grace_ms=self.settings.grace * 1000)
        return self.picture

    def _note_nodes(self) -> None:
        """What there is to reserve belongs into the log: without it no decision could be taken again."""
        nodes = self.executor.nodes()
        if nodes == self._noted_nodes:
            return
        state = self._seen().look()
        if nodes != state.nodes or state.grace_ms != self.settings.grace * 1000:
            rows = [node_row(node) for node in nodes]
            self.queue.note("nodes", actor=self.name, data={"nodes": rows, "grace_ms": self.settings.grace * 1000})
        self._noted_nodes = nodes

    def _commit(self, moves: list[Move], plan: Plan) -> None:
        """All at once. Where somebody moved one of the jobs meanwhile, once more without it and what hangs on it."""
        try:
            self.queue.apply(moves, lease=self.lease)
            return
        except LeaseLostError:
            raise
        except StaleError:
            log.info("a job of the plan has changed")
        jobs = self._seen().look().jobs
        gone = {move.job_id for move in moves if jobs[move.job_id].version != move.version}
        for promise in plan.promises:  # a preemptor and its victims move together or not at all
            together = {promise.job_id, *promise.victims}
            if together & gone:
                gone |= together
        try:
            self.queue.apply([move for move in moves if move.job_id not in gone], lease=self.lease)
        except LeaseLostError:
            raise
        except StaleError:
            log.info("plan dropped")

    # ------------------------------------------------------------------------------------- launch

    def _launch(self, job: Job) -> bool:
        if receipts.missing(job.spec, self.home.transfers):  # removed since
            self._move(job, JobState.HELD, AWAITING_FILES, detail=_without_grants(job))
            return True
        try:
            attempt = replace(self._located(job), model=self.clear(job, self.name))
        except PermissionDeniedError as error:
            return self._refuse(job, error)
        if attempt.paths.root.exists():  # of a launch that was withdrawn before anything ran
            attempt.paths.exit.unlink(missing_ok=True)
            attempt.paths.stop.unlink(missing_ok=True)
        attempt.write()
        raise_fence(attempt.paths)
        job = self._move(job, JobState.LAUNCHING, "launching", attempt=attempt.number, started_at=0)
        # An engine that places by itself is asked in the next round, when the intents of a whole array are there.
        return isinstance(self.executor, Delegated) or self._start(job, attempt)

    def _unsent(self, live: Iterable[Job]) -> dict[str, list[Attempt]]:
        """The elements of arrays whose intent is there and that this process has not launched, by array."""
        found: dict[str, list[Attempt]] = {}
        for job in live:
            attempt = self._attempt(job, job.attempt)
            if job.state is JobState.LAUNCHING and job.array_id and attempt.name not in self._launched:
                found.setdefault(job.array_id, []).append(Attempt.read(attempt.paths) or attempt)
        return found

    def _refuse(self, job: Job, error: PermissionDeniedError) -> bool:
        """What was cleared at submission no longer is: the job gives its place back and fails, in one transaction."""
        remedy = f"{error.remedy} Then: permed resume {job.id}".strip()
        told = {**_without_grants(job), "sentence": error.message, "remedy": remedy}
        back = Move(job.id, job.version, JobState.QUEUED, error.code, self.name, self.policy.version, detail=told)
        self.queue.apply([back, replace(back, version=job.version + 1, to=JobState.FAILED)], lease=self.lease)
        return True

    def _start(self, job: Job, attempt: Attempt) -> bool:
        self._launched.add(attempt.name)
        if fenced_off(attempt.paths):  # it was given up, and its end not confirmed yet
            return self._lost(job, attempt, "launch-failed")
        try:
            self.executor.launch(attempt)
        except EngineAwayError as error:  # nothing was refused: the next round asks again, for days if need be
            log.info("launch of %s waits: %s", attempt.name, error.message)
            self._launched.discard(attempt.name)
            return False
        except EngineError as error:
            log.warning("launch of %s failed: %s", attempt.name, error.message)
            self._lost(job, attempt, "launch-failed", said=error.message)
        return True

    def _attempt(self, job: Job, number: int) -> Attempt:
        paths = self.home.job(job.id).attempt(number)
        grants = grants_of(job)
        why = str(job.detail.get("why", ""))
        return Attempt(job.id, number, job.spec, grants, why, self.home.root, paths, self.policy.version)

    def _located(self, job: Job) -> Attempt:
        """The job's next attempt, received sets as folders. Raises `PermissionDeniedError` for too sensitive ones."""
        attempt = self._attempt(job, job.attempt + 1)
        if not job.spec.transfers:
            return attempt
        spec = receipts.located(job.spec, self.home.transfers)
        sets = receipts.references(job.spec, self.home.transfers)
        return replace(attempt, spec=spec, submitted=job.spec.digest(), sets=sets)

    # ------------------------------------------------------------------------------------- watch

    def _watch(self, job: Job, grace_ms: int | None = None) -> bool:
        """Look at one live attempt; returns True where its job moved."""
        if job.state is JobState.RESERVED:
            return False
        attempt = self._attempt(job, job.attempt)
        if job.state is JobState.LAUNCHING and records.last_sign(attempt.paths.root):
            job = self._move(job, JobState.RUNNING, "started", started_at=self.clock())
        exit_record = read_json(attempt.paths.exit)
        if exit_record is not None:
            return self._settle(job, attempt, exit_record)
        if job.state in (JobState.CANCELLING, JobState.PREEMPTING):
            return self._stopping(job, attempt, self.settings.grace * 1000 if grace_ms is None else grace_ms)
        if job.state is JobState.LAUNCHING:
            return self._launching(job, attempt)
        if job.state is JobState.RUNNING and self.policy.accounts:
            self._note_checkpoint(job, attempt)
        if job.state is JobState.RUNNING and self._over_time(job):
            return self._out_of_time(job, attempt)
        return self._ask_engine(job, attempt)

    def _launching(self, job: Job, attempt: Attempt) -> bool:
        if attempt.name not in self._launched:
            # An earlier controller wrote the intent; whether it launched nobody knows. Launching is idempotent.
            return self._start(job, Attempt.read(attempt.paths) or attempt)
        return self._ask_engine(job, attempt)

    def _note_checkpoint(self, job: Job, attempt: Attempt) -> None:
        """How much work stopping this job would lose: preemption takes from whom it costs least."""
        now = self.clock()
        if now - self._looked_for_checkpoint.get(job.id, 0) < _CHECKPOINT_LOOK_MS:
            return
        self._looked_for_checkpoint[job.id] = now
        at = checkpoints.written_at(attempt.paths.job.state)
        if at > job.started_at and at > self._checkpoint_at.get(job.id, 0):
            self._checkpoint_at[job.id] = at
            self.queue.note("checkpoint", actor=self.name, data={"at": at}, job_id=job.id)

    def _ask_engine(self, job: Job, attempt: Attempt) -> bool:
        now = self.clock()
        # Where a clock was set back, the last sign is to come: as far off as that, it says nothing.
        quiet = abs(now - max(records.last_sign(attempt.paths.root), job.changed_at))
        if job.state is not JobState.UNKNOWN and quiet < _QUIET_MS:
            return False
        if 0 <= now - self._asked.get(attempt.name, 0) < _ASK_ENGINE_MS:
            return False
        self._asked[attempt.name] = now
        liveness = self.executor.liveness(attempt)
        if liveness is Liveness.GONE:
            # The exit record may have been written between our two looks.
            exit_record = read_json(attempt.paths.exit)
            if exit_record is not None:
                return self._settle(job, attempt, exit_record)
            return self._gone(job, attempt, self._how_lost(attempt))
        if liveness is Liveness.UNKNOWN and job.state is JobState.RUNNING and quiet >= self.settings.heartbeat * 1000:
            self._move(job, JobState.UNKNOWN, "engine-silent", detail=_said(job, "The engine does not answer."))
            return True
        if liveness is Liveness.ALIVE and job.state is JobState.UNKNOWN:
            self._move(job, JobState.RUNNING, "engine-answers")
            return True
        return False

    def _gone(self, job: Job, attempt: Attempt, how: str) -> bool:
        """Without an exit record: lost, or ended by an engine that keeps the time limits."""
        if how != "time-limit" or job.state is JobState.LAUNCHING:
            return self._lost(job, attempt, how)
        if job.state is JobState.UNKNOWN:
            job = self._move(job, JobState.RUNNING, "engine-answers")
        return self._timed_out(job, attempt)

    def _over_time(self, job: Job) -> bool:
        if isinstance(self.executor, Delegated):
            return False
        return bool(job.started_at) and self.clock() - job.started_at > job.spec.time_limit * 1000

    def _out_of_time(self, job: Job, attempt: Attempt) -> bool:
        if not attempt.paths.stop.exists():
            write_json(attempt.paths.stop, {"reason": "time-limit", "at": self.clock()})
            return False
        asked = read_json(attempt.paths.stop) or {}
        if int(asked.get("at", 0)) > self.clock():  # a clock was set back: its grace begins anew
            write_json(attempt.paths.stop, {**asked, "at": self.clock()})
        grace_is_over = self.clock() - int(asked.get("at", 0)) >= self.settings.grace * 1000
        if not grace_is_over or not self._end(attempt):
            return False
        return self._timed_out(job, attempt)

    def _timed_out(self, job: Job, attempt: Attempt) -> bool:
        """A long training is a chain of attempts, each within the limit, as long as each gets further."""
        times = int(job.detail.get("continued", 0)) + int((read_json(attempt.paths.stop) or {}).get("continued", 0))
        if times < job.spec.continuations and self._progressed(attempt):
            detail = {**_without_grants(job), "continued": times + 1}
            self._move(job, JobState.QUEUED, "continued", detail=detail)
            return True
        return self._end_job(job, attempt, JobState.TIMED_OUT, "time-limit", None)

    # ------------------------------------------------------------------------------------- stop

    def _begin_stop(self, job: Job, reason: str) -> None:
        """PREEMPTING, or back to HELD where nothing runs yet."""
        try:
            if job.state is JobState.RESERVED:
                self._move(job, JobState.HELD, reason, detail=_without_grants(job))
            elif job.state in (JobState.LAUNCHING, JobState.RUNNING):
                self._move(job, JobState.PREEMPTING, reason)
        except StaleError:
            log.info("job %s moved by itself", job.id)

    def _stopping(self, job: Job, attempt: Attempt, grace_ms: int) -> bool:
        if not attempt.paths.stop.exists() or pauses(attempt.paths):
            write_json(attempt.paths.stop, {"reason": job.reason, "at": self.clock()})
        if isinstance(self.executor, Delegated) and not records.last_sign(attempt.paths.root):
            grace_ms = 0  # it waits in the engine's queue: there is nothing to keep
        gone = self.clock() - job.changed_at >= grace_ms or self.executor.liveness(attempt) is Liveness.GONE
        if not gone or not self._end(attempt):
            return False
        exit_record = read_json(attempt.paths.exit)
        if exit_record is not None:
            return self._settle(job, attempt, exit_record)
        return self._stopped(job, attempt)

    def _stopped(self, job: Job, attempt: Attempt) -> bool:
        """The attempt is confirmed gone, as asked."""
        if job.state is JobState.CANCELLING:
            return self._end_job(job, attempt, JobState.CANCELLED, "cancelled-by-user", None)
        if job.state is JobState.PREEMPTING:
            held = job.reason == "interrupted"
            to, reason = (JobState.HELD, job.reason) if held else (JobState.QUEUED, "preempted")
            self._move(job, to, reason, detail=_without_grants(job))
            return True
        why = (read_json(attempt.paths.stop) or {}).get("reason")
        if why != "time-limit":  # its executor was closed under it: it goes on where it stopped
            self._move(job, JobState.QUEUED, "executor-closed", detail=_without_grants(job))
            return True
        return self._timed_out(job, attempt)

    # ------------------------------------------------------------------------------------- end

    def _settle(self, job: Job, attempt: Attempt, exit_record: Mapping[str, Any]) -> bool:
        """The attempt wrote how it ended. What it held is released only once the engine confirms its end."""
        if not self._end(attempt):
            return False
        outcome = exit_record["outcome"]
        if outcome in (JobState.SUCCEEDED, JobState.PARTIAL, JobState.FAILED):
            return self._end_job(job, attempt, JobState(outcome), exit_record["reason"], exit_record)
        if outcome == "STOPPED":
            return self._stopped(job, attempt)
        if job.state in (JobState.CANCELLING, JobState.PREEMPTING):
            return self._stopped(job, attempt)
        return self._lost(job, attempt, exit_record["reason"])

    def _end(self, attempt: Attempt) -> bool:
        """Give it up for good, then end it. True once that is confirmed: no process of it runs, and none will start.

        The fence keeps a launch that comes late (of a controller that stood still) from beginning anything.
        """
        fenced = False
        with suppress(OSError):  # a full disk: what runs is ended all the same, but what starts late would not be kept
            raise_fence(attempt.paths.job.attempt(attempt.number + 1))
            fenced = True
        return self.executor.end(attempt) and fenced

    def _lost(self, job: Job, attempt: Attempt, code: str, said: str = "") -> bool:
        if not self._end(attempt):
            return False
        verdict = failure.after_loss(
            code, losses=job.detail.get("losses"), progressed=self._progressed(attempt), retries=job.spec.retries,
            now=self.clock(),
        )  # fmt: skip
        told = {"losses": dict(verdict.losses), "not_before": verdict.not_before,
                "sentence": f"{said} {verdict.sentence}".strip(), "remedy": verdict.remedy}  # fmt: skip
        if verdict.to is JobState.FAILED:
            return self._end_job(job, attempt, JobState.FAILED, code, told)
        self._move(job, JobState.QUEUED, code, detail={**_without_grants(job), **told})
        return True

    def _progressed(self, attempt: Attempt) -> bool:
        """Whether it has finished parts or written checkpoints."""
        rows = [*records.read(attempt.paths.records())[0], *records.read(attempt.paths.records("rank-0"))[0]]
        return any(row["kind"] in ("part", "checkpoint") and row.get("state") != "FAILED" for row in rows)

    def _how_lost(self, attempt: Attempt) -> str:
        """Gone without a word: with its node, where the engine no longer has that."""
        if isinstance(self.executor, Delegated):
            return self.executor.how_lost(attempt)
        try:
            there = {node.name for node in self.executor.nodes()}
        except EngineError:
            return "attempt-lost"
        return "attempt-lost" if all(grant.node in there for grant in attempt.grants) else "node-lost"

    def _end_job(
        self, job: Job, attempt: Attempt, state: JobState, reason: str, told: Mapping[str, Any] | None
    ) -> bool:
        sentence, remedy = failure.REASONS.get(reason, ("", ""))
        detail = {**_without_grants(job), "sentence": sentence, "remedy": remedy}
        detail |= {name: told[name] for name in ("sentence", "remedy", "counts", "usage") if told and name in told}
        try:
            self.announce(job, state, told)
        except PermedError as error:
            log.warning("job %s ended; telling tracking failed: %s", job.id, error.message)
        self._move(job, state, reason, detail=detail)
        return True

    def _move(self, job: Job, to: JobState, reason: str, **changes: Any) -> Job:
        move = Move(job.id, job.version, to, reason, self.name, self.policy.version, **changes)
        return self.queue.apply([move], lease=self.lease)[0]


def _without_grants(job: Job) -> dict[str, Any]:
    return clean(job.detail)


def decided(moves: list[Move], plan: Plan, seq: int, now: int) -> list[Move]:
    """The moves, each with what it stands on: `permed replay-decisions` takes the decision again from this."""
    passed = {admission.job_id: admission.passed for admission in plan.admissions}
    victims = {promise.job_id: promise.victims for promise in plan.promises}
    preemptor = {stop.job_id: (stop.for_job,) for stop in plan.preemptions if stop.for_job}
    made = []
    for move in moves:
        about = passed.get(move.job_id) or victims.get(move.job_id) or preemptor.get(move.job_id) or ()
        told = {"seq": seq, "now": now, "reason": move.reason, "about": list(about)}
        made.append(replace(move, detail={**(move.detail or {}), "decision": told}))
    return made


def _said(job: Job, sentence: str) -> dict[str, Any]:
    return {**job.detail, "sentence": sentence}


def ended(job: Job) -> bool:
    """True once nothing will happen to the job by itself."""
    return job.state in ENDED or job.state is JobState.HELD
