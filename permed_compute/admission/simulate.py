"""The same `decide` and the same queue on a virtual clock: what would happen, and what would have happened.

Event-driven: time jumps from one arrival, end or decision to the next. Every change of a job is a move in a real queue
(`MemoryQueue`, or `SqlQueue` for the benchmark), with its version, its event and the state table's consent: what
the controller may not do the simulator cannot do either. Only two things are simulated: the clock and the machines.

Same trace, policy and seed, same result to the byte.
"""

from __future__ import annotations

import gc
import heapq
import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

from permed_compute.admission.commit import clean, moves_of, stopping_instead
from permed_compute.admission.decide import decide as ours
from permed_compute.admission.placement import Cluster
from permed_compute.admission.policy import Policy
from permed_compute.admission.snapshot import (
    Grant,
    Need,
    Node,
    Plan,
    Reservation,
    Snapshot,
    Waiting,
    grants_of,
    used_by,
    waiting_of,
)
from permed_compute.admission.traces import Trace, TraceJob
from permed_compute.admission.usage import Decayed
from permed_compute.errors import StaleError, StateError
from permed_compute.queue.port import Clock, Job, Lease, Move, Queue
from permed_compute.states import LIVE, JobState

T = TypeVar("T")
Decide = Callable[[Snapshot, Policy, int], Plan]
Open = Callable[[Clock], Queue]
"""Opens an empty queue that reads the time from the clock."""

ACTOR = "simulator"
_LOOK_AGAIN_MS = 3_600_000
"""With nothing happening a decision is taken again after one cycle, two, four … and at most this."""


class Baseline(Protocol):
    """A rule to compare with: gets the simulator's own view of what each job has had (`Simulation.attained`)."""

    def __call__(self, attained: Callable[[str], int]) -> Decide: ...


@dataclass(frozen=True, slots=True)
class Rules:
    """How the simulated controller and machines behave. Times in ms.

    `cycle`: decisions fall on multiples of it. `launch`: from reservation to computing, GPUs held. `batched`: changes
    between two decisions are one transaction, as group commit does. `checks`: the invariants hold after every commit.
    `on_request`: a job that can checkpoint does so when asked to stop, as our workers do, and loses the grace period;
    without it also what it did since its last scheduled checkpoint.
    """

    cycle: int = 5_000
    launch: int = 2_000
    batched: bool = False
    checks: bool = False
    on_request: bool = True
    resizable: bool = False
    """Attempts can lose workers while they run. Ours cannot yet: an elastic job that shrinks is stopped."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, by chance from `seed`. Rates are per thousand of what could go wrong that way."""

    seed: int = 0
    node_losses: int = 0
    """So many nodes, each at a random moment, for half an hour."""
    lost_acks: int = 0
    """A commit is durable and its answer never arrives: the controller starts anew from the queue."""
    duplicate_acks: int = 0
    """The same plan is committed once more."""
    late_exits: int = 0
    """An end is noticed up to ten minutes late; what it held stays reserved."""
    races: int = 0
    """A user cancels a job between the decision and its commit."""


@dataclass(slots=True)
class Record:
    """What became of one job. Times in ms from the trace's start; −1: never."""

    job: TraceJob
    first_start: int = -1
    end: int = -1
    outcome: str = "waiting"
    attempts: int = 0
    preempted: int = 0
    held: int = 0
    """Measured resource (thousandths) × ms that it held."""
    lost: int = 0
    """The same of what was computed for nothing, or only waited through a grace period."""
    need: int = 0
    """The same of its work alone."""

    @property
    def wait(self) -> int:
        """ms until it first started; −1 where it never did."""
        return self.first_start - self.job.submit if self.first_start >= 0 else -1

    @property
    def completion(self) -> int:
        """ms from submission to its end; −1 where it did not succeed."""
        return self.end - self.job.submit if self.outcome == "SUCCEEDED" else -1


@dataclass(frozen=True, slots=True)
class Sample:
    """The pool after one decision. Amounts in thousandths of the measured resource."""

    at: int
    waiting: int
    busy: int
    capacity: int
    wanted: int
    """What the waiting jobs ask for at least."""
    placeable: int
    """What of the free amount some waiting job could take as it lies."""
    used: Mapping[str, int]
    """By account."""
    asked: Mapping[str, int]
    """By account: what jobs that may reclaim wait for."""
    largest: Mapping[str, int]
    """By account: the largest of those jobs."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One trace under one policy."""

    trace: str
    policy: str
    measured: str
    """`gpu`, or `cpu` where no job asks for a GPU."""
    capacity: int
    """Thousandths of the measured resource, with every node there."""
    records: tuple[Record, ...]
    samples: tuple[Sample, ...]
    busy: int
    """Thousandths × ms held until `horizon`."""
    horizon: int
    """The last submission: beyond it there is only draining."""
    makespan: int
    cycles: int
    commits: int
    faults: Mapping[str, int] = field(default_factory=dict)


class _Clock:
    __slots__ = ("now",)

    def __init__(self, now: int) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now


class _Run:
    """A job as the simulated machines know it. `left` and `kept` are worker-ms of work still to do: truly, and if it
    had to start from its last checkpoint."""

    __slots__ = (
        "amount", "began", "counted", "grants", "job", "kept", "left", "record", "token", "trace", "uses", "work_from",
        "workers",
    )  # fmt: skip

    def __init__(self, trace: TraceJob, record: Record) -> None:
        self.trace = trace
        self.record = record
        self.job: Job | None = None
        self.left = self.kept = trace.work * trace.workers_min
        self.workers = 0
        self.grants: tuple[Grant, ...] = ()
        self.uses: dict[str, int] = {}
        self.amount = 0
        """Measured resource of its grants, in thousandths."""
        self.began = 0
        """When this attempt began: its time limit counts from here."""
        self.counted = 0
        """Up to when what it held is in its record."""
        self.work_from = 0
        """When it began to compute with `workers` workers."""
        self.token = 0
        """Events of an earlier attempt, or of another number of workers, carry a smaller one."""

    def progress(self, now: int) -> None:
        """Count what was computed since `work_from`, and what of it is safe by schedule."""
        done = max(0, now - self.work_from)
        self.left = max(0, self.left - done * self.workers)
        every = self.trace.checkpoint
        if every and done >= every:
            self.kept -= done // every * every * self.workers
        self.work_from = max(self.work_from, now)

    def kept_at(self, now: int) -> int:
        every = self.trace.checkpoint
        if not every or now <= self.work_from:
            return self.work_from
        return self.work_from + (now - self.work_from) // every * every


class _Asking:
    """What the waiting jobs ask for at least, kept up as they come and go."""

    def __init__(self, gpu: bool, policy: Policy) -> None:
        self._gpu = gpu
        self._policy = policy
        self._jobs: Counter[tuple[str, bool, int]] = Counter()
        """(account, may it reclaim, thousandths of the measured resource) → jobs."""
        self._by_need: Counter[Need] = Counter()
        self._paused: list[Waiting] = []
        """In back-off since they were last looked at."""

    @property
    def needs(self) -> int:
        return len(self._by_need)

    def _key(self, job: Waiting) -> tuple[str, bool, int]:
        unit = job.gpu_milli if self._gpu else job.cpu_milli
        return job.account, self._policy.rules[job.band].reclaims, job.workers_min * unit

    def add(self, job: Waiting) -> None:
        self._jobs[self._key(job)] += 1
        self._by_need[job.need] += 1
        if job.not_before:
            self._paused.append(job)

    def remove(self, job: Waiting) -> None:
        _less(self._jobs, self._key(job))
        _less(self._by_need, job.need)
        if job in self._paused:
            self._paused.remove(job)

    def by_account(self, now: int) -> tuple[dict[str, int], dict[str, int], int]:
        """What those that may reclaim ask for, the largest of it, and what all ask for."""
        self._paused = [job for job in self._paused if job.not_before > now]
        paused = Counter(self._key(job) for job in self._paused)
        asked: dict[str, int] = {}
        largest: dict[str, int] = {}
        wanted = 0
        for (account, reclaims, need), jobs in self._jobs.items():
            wanted += jobs * need
            jobs -= paused[account, reclaims, need]
            if reclaims and jobs:
                asked[account] = asked.get(account, 0) + jobs * need
                largest[account] = max(largest.get(account, 0), need)
        return asked, largest, wanted


def _less(counter: Counter[T], key: T) -> None:
    counter[key] -= 1
    if not counter[key]:
        del counter[key]


_FINISH, _RUN, _STOPPED, _LOST, _NODE_DOWN, _NODE_UP = range(6)


class Simulation:
    """One run. `simulate` is the short way."""

    def __init__(
        self, trace: Trace, policy: Policy, open_queue: Open, *, decide: Decide | Baseline = ours,
        nodes: tuple[Node, ...] = (), rules: Rules = Rules(), faults: Faults = Faults(), name: str = "",
    ) -> None:  # fmt: skip
        self.trace = trace
        self.policy = policy
        self.name = name or f"policy {policy.version}"
        self.rules = rules
        self.faults = faults
        self.nodes = nodes or trace.nodes
        self.told: Counter[str] = Counter()
        self._decide: Decide = decide(self.attained) if getattr(decide, "wants_attained", False) else decide  # type: ignore[call-arg, assignment, arg-type]
        self._clock = _Clock(trace.start)
        self._queue = open_queue(self._clock)
        self._lease: Lease | None = self._queue.acquire(ACTOR, 1 << 50)
        self._chance = random.Random(faults.seed)
        self._gpu = any(job.gpu_milli for job in trace.jobs)
        self._records = [Record(job, need=job.work * job.workers_min * self._unit(job)) for job in trace.jobs]
        self._runs: dict[str, _Run] = {}
        self._waiting: dict[str, Waiting] = {}
        self._asking = _Asking(self._gpu, policy)
        self._floor = Cluster(self.nodes)
        """What is free, whatever quotas and reserved starts say: for samples."""
        self._live: dict[str, Reservation] = {}
        self._heap: list[tuple[int, int, int, Any, int]] = []
        self._count = 0
        self._moves: list[Move] = []
        self._ahead: dict[str, int] = {}
        """Versions that moves not yet committed lead to."""
        self._next_arrival = 0
        self._due: int | None = None
        timed = bool(policy.accounts) or getattr(decide, "wants_attained", False)
        self._first_pause = rules.cycle if timed else _LOOK_AGAIN_MS
        """Without quotas time alone changes nothing that matters before the next event."""
        self._pause = self._first_pause
        self._down: set[str] = set()
        self._usage = Decayed(policy, trace.start)
        self._busy = self._area = 0
        self._since = trace.start
        self._horizon = trace.start + trace.span
        self._used: Counter[str] = Counter()
        self._samples: list[Sample] = []
        self._cycles = self._commits = 0
        self._plan_faults()

    def _unit(self, job: TraceJob) -> int:
        return job.gpu_milli if self._gpu else job.cpu_milli

    def _measure(self, grants: Iterable[Grant]) -> int:
        return sum(grant.gpu_milli if self._gpu else grant.cpu_milli for grant in grants)

    def attained(self, job_id: str) -> int:
        """Measured resource × ms that the job has had: what least-attained-service orders by."""
        run = self._runs[job_id]
        return run.record.held + run.amount * (self._clock.now - run.counted)

    # ------------------------------------------------------------------------------------- the loop

    def run(self, until: int | None = None) -> Outcome:
        """To the end of the last job, or to `until` ms after the trace's start."""
        # Everything that is made here stays: the collector would look at all of it again and again.
        collecting = gc.isenabled()
        gc.disable()
        try:
            return self._run(until)
        finally:
            if collecting:
                gc.enable()

    def _run(self, until: int | None) -> Outcome:
        last = None if until is None else self.trace.start + until
        while (now := self._next_moment()) is not None and (last is None or now <= last):
            self._clock.now = now
            self._arrive(now)
            while self._heap and self._heap[0][0] <= now:
                _, _, kind, what, token = heapq.heappop(self._heap)
                self._happen(kind, what, token, now)
            if not self.rules.batched:
                self._flush()
            if self._due is not None and self._due <= now and self._open_questions():
                self._cycle(now)
        return self._outcome()

    def _next_moment(self) -> int | None:
        moments = []
        if self._next_arrival < len(self.trace.jobs):
            moments.append(self.trace.start + self.trace.jobs[self._next_arrival].submit)
        if self._heap:
            moments.append(self._heap[0][0])
        if self._due is not None and self._open_questions():
            moments.append(self._due)
        return min(moments, default=None)

    def _open_questions(self) -> bool:
        """Is there anything to decide: somebody waits, or somebody could grow?"""
        return bool(self._waiting) or any(len(job.grants) < job.workers_max for job in self._live.values())

    def _at(self, at: int, kind: int, what: Any, token: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at, self._count, kind, what, token))

    def _look(self, now: int) -> None:
        """Something changed: decide at the next cycle."""
        at = -(-now // self.rules.cycle) * self.rules.cycle
        self._due = at if self._due is None else min(self._due, at)
        self._pause = self._first_pause

    def _arrive(self, now: int) -> None:
        jobs, first = self.trace.jobs, self._next_arrival
        last = first
        while last < len(jobs) and self.trace.start + jobs[last].submit <= now:
            last += 1
        if last == first:
            return
        self._next_arrival = last
        start = self.trace.start
        stored = self._queue.submit([job.spec(start) for job in jobs[first:last]], owner="trace")
        for number, job in enumerate(stored, start=first):
            run = self._runs[job.id] = _Run(jobs[number], self._records[number])
            self._queued(run, job)
        self._look(now)

    def _queued(self, run: _Run, job: Job) -> None:
        run.job = job
        before = self._waiting.get(job.id)
        if before is not None:  # it has been promised something
            self._asking.remove(before)
        waiting = self._waiting[job.id] = waiting_of(job, {})
        self._asking.add(waiting)

    def _not_waiting(self, job_id: str) -> None:
        before = self._waiting.pop(job_id, None)
        if before is not None:
            self._asking.remove(before)

    # ------------------------------------------------------------------------------------- the machines

    def _happen(self, kind: int, what: Any, token: int, now: int) -> None:
        if kind in (_NODE_DOWN, _NODE_UP):
            self._node(kind, what, now)
            return
        run: _Run = what
        if run.token != token or run.job is None:
            return
        if kind == _RUN:
            job = self._move(run, JobState.RUNNING, "started", started_at=now)
            self._live[job.id] = replace(self._live[job.id], version=job.version, stoppable=True)
        elif kind == _FINISH:
            run.progress(now)
            over = run.left > 0  # it reached its time limit first
            run.record.lost += run.amount * (now - run.began) if over else 0
            self._release(run, now)
            self._end(run, JobState.TIMED_OUT if over else JobState.SUCCEEDED, now)
        elif kind == _STOPPED:
            self._requeue(run, "preempted", now)
        elif kind == _LOST:
            self.told["attempts lost with a node"] += 1
            self._requeue(run, "attempt-lost", now, not_before=now + 30_000)

    def _start(self, run: _Run, job: Job, now: int) -> None:
        """A reserved job is launched; the engine would find an attempt of that name if it were there already."""
        if run.grants:
            raise StateError(f"{run.trace.name} is launched while an attempt of it lives.")
        run.job = job
        self._granted(run, grants_of(job))
        run.began = run.counted = now
        run.work_from = now + self.rules.launch
        run.token += 1
        run.record.attempts += 1
        if run.record.first_start < 0:
            run.record.first_start = now - self.trace.start
        self._move(run, JobState.LAUNCHING, "launching", attempt=run.record.attempts, started_at=0)
        if self.rules.launch:
            self._at(now + self.rules.launch, _RUN, run, run.token)
        else:
            self._move(run, JobState.RUNNING, "started", started_at=now)
        self._hold(run, 1, now)
        self._finish_later(run)
        self._not_waiting(job.id)
        self._live[job.id] = self._reservation(run)
        if self._down and any(grant.node in self._down for grant in run.grants):
            self._lose(run, now)

    def _granted(self, run: _Run, grants: tuple[Grant, ...]) -> None:
        run.grants = grants
        run.workers = len(grants)
        run.uses = used_by(grants)
        run.amount = self._measure(grants)

    def _finish_later(self, run: _Run) -> None:
        limit = run.began + self.rules.launch + run.trace.limit
        end = min(limit, run.work_from - (-run.left // run.workers))
        if self.faults.late_exits and self._chance.randrange(1000) < self.faults.late_exits:
            self.told["late exits"] += 1
            end += self._chance.randrange(600_000)
        self._at(end, _FINISH, run, run.token)

    def _reservation(self, run: _Run) -> Reservation:
        """What `snapshot.reservation` would make of it, with the simulated machine's own times."""
        job, trace = run.job, run.trace
        assert job is not None
        elastic = trace.workers_max > trace.workers_min
        return Reservation(
            job.id, trace.name, trace.account, trace.band, run.grants,
            run.began + trace.limit + self.rules.launch + self.policy.grace * 1000, job.version, run.began,
            run.work_from, job.spec.time_limit, trace.workers_min if elastic else 0,
            trace.workers_max if elastic else 0, job.state is JobState.RUNNING, int(job.detail.get("charge", 1000)),
        )  # fmt: skip

    def _hold(self, run: _Run, sign: int, now: int) -> None:
        self._area += self._busy * max(0, min(now, self._horizon) - self._since)
        self._since = max(self._since, min(now, self._horizon))
        self._busy += sign * run.amount
        self._used[run.trace.account] += sign * run.amount
        self._floor.hold(run.grants, 0, sign)
        charge = int(run.job.detail.get("charge", 1000)) if run.job is not None else 1000
        self._usage.hold(run.trace.account, run.uses, sign * charge, now)

    def _release(self, run: _Run, now: int) -> None:
        assert run.job is not None
        self._hold(run, -1, now)
        self._count_held(run, now)
        self._granted(run, ())
        run.token += 1
        del self._live[run.job.id]

    def _count_held(self, run: _Run, now: int) -> None:
        run.record.held += run.amount * (now - run.counted)
        run.counted = now

    def _requeue(self, run: _Run, reason: str, now: int, *, not_before: int = 0) -> None:
        """It was stopped: back to its last checkpoint. What it held since it was asked to stop (`work_from` stands
        there) did nothing either."""
        run.record.lost += self._unit(run.trace) * (run.kept - run.left)
        run.record.lost += run.amount * max(0, now - run.work_from)
        self._release(run, now)
        run.left = run.kept
        assert run.job is not None
        detail = clean(run.job.detail)
        if not_before:
            detail["not_before"] = not_before
            self._look(not_before)
        job = self._move(run, JobState.QUEUED, reason, detail=detail)
        self._queued(run, job)
        self._look(now)

    def _end(self, run: _Run, state: JobState, now: int) -> None:
        run.record.end = now - self.trace.start
        run.record.outcome = state.value
        assert run.job is not None
        reason = "done" if state is JobState.SUCCEEDED else "time-limit"
        self._move(run, state, reason, detail=clean(run.job.detail))
        self._look(now)

    def _stop(self, run: _Run, now: int) -> None:
        """Asked to stop: it computes no more, and is gone when its grace has passed."""
        run.progress(now)
        run.work_from = now
        if self.rules.on_request and run.trace.checkpoint:
            run.kept = run.left
        run.token += 1
        run.record.preempted += 1
        self._at(now + self.policy.grace * 1000, _STOPPED, run, run.token)

    # ------------------------------------------------------------------------------------- faults

    def _plan_faults(self) -> None:
        for _ in range(self.faults.node_losses):
            node = self._chance.choice(self.nodes).name
            at = self.trace.start + self._chance.randrange(max(1, self.trace.span))
            self._at(at, _NODE_DOWN, node)
            self._at(at + 1_800_000, _NODE_UP, node)

    def _node(self, kind: int, name: str, now: int) -> None:
        if kind == _NODE_UP:
            self._down.discard(name)
            self._floor.open(name)
        else:
            self.told["nodes lost"] += 1
            self._down.add(name)
            self._floor.close(name)
            for run in [run for run in self._runs.values() if any(grant.node == name for grant in run.grants)]:
                self._lose(run, now)
        self._look(now)

    def _lose(self, run: _Run, now: int) -> None:
        """It computes no more; after a heartbeat the controller knows, and only then is its reservation released."""
        run.progress(now)
        run.work_from = now
        run.token += 1
        self._at(now + 30_000, _LOST, run, run.token)

    # ------------------------------------------------------------------------------------- the controller

    def _move(self, run: _Run, to: JobState, reason: str, **changes: Any) -> Job:
        """Into the next transaction; returns the job as it will be."""
        job = run.job
        assert job is not None
        self._moves.append(Move(job.id, job.version, to, reason, ACTOR, self.policy.version, **changes))
        run.job = Job(
            job.id, job.spec, to, job.version + 1, job.seq, job.owner, changes.get("attempt", job.attempt), reason,
            job.submitted_at, self._clock.now, changes.get("started_at", job.started_at), job.array_id,
            job.array_index, changes.get("detail", job.detail),
        )  # fmt: skip
        return run.job

    def _flush(self) -> None:
        if self._moves:
            moves, self._moves = self._moves, []
            self._queue.apply(moves, lease=self._lease)
            self._commits += 1

    def _cycle(self, now: int) -> None:
        self._due = None
        self._flush()
        self._cycles += 1
        plan = self._decide(self.snapshot(now), self.policy, now)
        changed = self._commit(plan, now)
        if self.rules.checks:
            self._check()
        self._sample(now)
        if changed is None:
            self._look(now + 1)
        elif self._due is None:
            # Deciding again at once would say the same. What time alone changes (run times, ageing, decay) is looked
            # at less and less often.
            self._due = -(-(now + self._pause) // self.rules.cycle) * self.rules.cycle
            if not self._live and not self._heap and self._next_arrival >= len(self.trace.jobs):
                self._due = None if self._pause >= _LOOK_AGAIN_MS and not changed else self._due  # it fits nowhere
            self._pause = min(2 * self._pause, _LOOK_AGAIN_MS)

    def snapshot(self, now: int) -> Snapshot:
        """What the controller would see."""
        live = []
        for job_id, held in self._live.items():
            kept = self._runs[job_id].kept_at(now)
            if kept != held.kept_at:
                held = self._live[job_id] = held.kept(kept)
            live.append(held)
        nodes = tuple(node for node in self.nodes if node.name not in self._down) if self._down else self.nodes
        return Snapshot(
            nodes, tuple(live), tuple(self._waiting.values()), usage=self._usage.at(now),
            policy_since=self.trace.start, grace_ms=self.policy.grace * 1000,
        )  # fmt: skip

    def _commit(self, plan: Plan, now: int) -> bool | None:
        """One transaction by compare-and-set, or nothing: True where anything moved, None where the plan was stale."""
        moves = moves_of(plan if self.rules.resizable else stopping_instead(plan), self._job_of, actor=ACTOR)
        if not moves:
            return False
        if self._hit(self.faults.races, "races"):
            self._cancel_one(moves, now)
        try:
            changed = self._queue.apply(moves, lease=self._lease)
        except StaleError:
            self.told["plans dropped"] += 1
            return None
        self._commits += 1
        if self._hit(self.faults.duplicate_acks, "duplicate acks"):
            self._apply_again(moves)
        if self._hit(self.faults.lost_acks, "lost acks"):
            changed = self._queue.jobs(states=LIVE | {JobState.QUEUED})
        self._act_on(changed, now)
        self._flush()
        return True

    def _job_of(self, job_id: str) -> Job:
        job = self._runs[job_id].job
        assert job is not None
        return job

    def _act_on(self, jobs: Iterable[Job], now: int) -> None:
        """What the queue says is so: launch what is reserved, stop what is preempted, resize, remember promises."""
        for job in jobs:
            run = self._runs[job.id]
            if job.state is JobState.RESERVED and not run.grants:
                self._start(run, job, now)
            elif run.job is not None and job.version != run.job.version:
                self._follow(run, job, now)

    def _follow(self, run: _Run, job: Job, now: int) -> None:
        before, run.job = run.job, job
        if job.state is JobState.PREEMPTING and before is not None and before.state is not JobState.PREEMPTING:
            self._stop(run, now)
            gone_by = now + self.policy.grace * 1000
            self._live[job.id] = replace(self._live[job.id], version=job.version, stoppable=False, ends_by=gone_by)
        elif job.state is JobState.QUEUED:
            self._queued(run, job)
        elif job.state in LIVE and grants_of(job) != run.grants:
            self._resize(run, job, now)

    def _resize(self, run: _Run, job: Job, now: int) -> None:
        """An elastic map job goes on with other workers; what its parts have done is done."""
        run.progress(now)
        run.kept = run.left if run.trace.checkpoint else run.kept
        self._hold(run, -1, now)
        self._count_held(run, now)
        self._granted(run, grants_of(job))
        self._hold(run, 1, now)
        run.token += 1
        if job.state is JobState.LAUNCHING:
            self._at(max(now, run.work_from), _RUN, run, run.token)
        self._finish_later(run)
        self._live[job.id] = replace(self._live[job.id], version=job.version, grants=run.grants)

    # ------------------------------------------------------------------------------------- injected at the commit

    def _hit(self, rate: int, what: str) -> bool:
        if rate and self._chance.randrange(1000) < rate:
            self.told[what] += 1
            return True
        return False

    def _apply_again(self, moves: list[Move]) -> None:
        try:
            self._queue.apply(moves, lease=self._lease)
        except StaleError:
            return
        raise StateError("A plan was committed twice.")

    def _cancel_one(self, moves: list[Move], now: int) -> None:
        """A user's cancel that lands first: the whole plan is stale."""
        waiting = [move.job_id for move in moves if move.job_id in self._waiting]
        if not waiting:
            return
        run = self._runs[self._chance.choice(waiting)]
        job = run.job
        assert job is not None
        run.job = self._queue.apply([Move(job.id, job.version, JobState.CANCELLED, "cancelled-by-user", "trace")])[0]
        self._not_waiting(job.id)
        run.record.end, run.record.outcome = now - self.trace.start, "CANCELLED"

    def _check(self) -> None:
        """Invariants 1, 2 and 4: nothing is given twice, gangs are whole, queue and machines say the same."""
        held: dict[str, list[Grant]] = {}
        for job_id, live in self._live.items():
            run = self._runs[job_id]
            if live.grants != run.grants or len(run.grants) < run.trace.workers_min:
                raise StateError(f"{run.trace.name} holds {len(run.grants)} of {run.trace.workers_min} workers.")
            for grant in run.grants:
                held.setdefault(grant.node, []).append(grant)
        for node in self.nodes:
            grants = held.get(node.name, [])
            devices: Counter[int] = Counter()
            for grant in grants:
                for index in grant.devices:
                    devices[index] += min(1000, grant.gpu_milli)
            if (
                sum(grant.cpu_milli for grant in grants) > node.cpu_milli
                or sum(grant.memory for grant in grants) > node.memory
                or any(amount > 1000 for amount in devices.values())
            ):
                raise StateError(f"{node.name} has been given out more than once.")
        stored = {job.id: job.state for job in self._queue.jobs(states=LIVE)}
        if set(stored) != set(self._live):
            raise StateError("The queue and the machines disagree on what lives.")

    # ------------------------------------------------------------------------------------- what is written down

    def _sample(self, now: int) -> None:
        capacity = sum(
            1000 * len(node.gpus) if self._gpu else node.cpu_milli for node in self.nodes if node.name not in self._down
        )
        asked, largest, wanted = self._asking.by_account(now)
        free = capacity - self._busy
        placeable = self._placeable() if free > 0 and wanted else 0
        self._samples.append(
            Sample(
                now - self.trace.start, len(self._waiting), self._busy, capacity, wanted, min(free, placeable),
                {name: amount for name, amount in self._used.items() if amount}, asked, largest,
            )
        )  # fmt: skip

    def _placeable(self) -> int:
        """How much of what is free waiting jobs could take at once as it lies, whatever quotas and reservations say."""
        total, tried, placed = 0, set(), []
        for waiting in self._waiting.values():
            need = waiting.need
            if need in tried:
                continue
            found = next(
                (found for flavor in self._floor.meanings(need)
                 if (found := self._floor.place(need, flavor, need.workers_max, waiting.account, 0, 1))), None,
            )  # fmt: skip
            if found is None:
                tried.add(need)
                if len(tried) == self._asking.needs:
                    break
                continue
            self._floor.hold(found, 0)
            placed.append(found)
            total += self._measure(found)
        for found in placed:
            self._floor.hold(found, 0, -1)
        return total

    def _outcome(self) -> Outcome:
        now = self._clock.now
        self._flush()
        self._area += self._busy * max(0, min(now, self._horizon) - self._since)
        self._since = max(self._since, min(now, self._horizon))
        capacity = sum(1000 * len(node.gpus) if self._gpu else node.cpu_milli for node in self.nodes)
        for run in self._runs.values():
            if run.grants:
                self._count_held(run, now)
                run.record.outcome = "running"
        self._queue.close()
        return Outcome(
            self.trace.name, self.name, "gpu" if self._gpu else "cpu", capacity, tuple(self._records),
            tuple(self._samples), self._area, self.trace.span, now - self.trace.start, self._cycles, self._commits,
            dict(sorted(self.told.items())),
        )  # fmt: skip


def simulate(trace: Trace, policy: Policy, open_queue: Open, **how: Any) -> Outcome:
    """What becomes of the trace's jobs under this policy. See `Simulation` for the rest."""
    return Simulation(trace, policy, open_queue, **how).run()
