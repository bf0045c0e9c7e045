"""The frozen picture that `decide` sees, and the plan that it returns. Integers, tuples and strings only.

Units: CPU in thousandths of a core, memory in MiB, GPU in thousandths of a device, time in ms since 1970 UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple, overload

from permed_compute.admission.policy import CPU, MEMORY, Policy, gpu_flavor
from permed_compute.queue.port import Job
from permed_compute.spec import Band
from permed_compute.states import LIVE, JobState

__all__ = [
    "ANY_GPU", "CPU", "Admission", "Dependency", "Gpu", "Grant", "Need", "Node", "Plan", "Policy", "Preemption",
    "Promise", "Reason", "Reservation", "Resize", "Snapshot", "Start", "Wait", "Waiting", "Waits", "Window",
    "grants_of", "open_questions", "take", "used_by",
]  # fmt: skip

ANY_GPU = "gpu"
"""The wish for any kind of GPU. `cpu` is the flavor of a node's cores; every other flavor is a kind of GPU."""
NEVER = 1 << 60
"""A moment that does not come."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU, or one MIG slice, of a node: its flavor, its place in the node's list, its memory in MiB."""

    flavor: str
    index: int
    memory: int


@dataclass(frozen=True, slots=True)
class Node:
    """What one machine offers to jobs."""

    name: str
    cpu_milli: int
    memory: int
    gpus: tuple[Gpu, ...] = ()


@dataclass(frozen=True, slots=True)
class Grant:
    """What one worker gets, and where. `flavor` is `cpu` or the GPU kind that was chosen.

    `devices` are the indices of its GPUs on that node: whole ones, or one that it has a share of
    (`gpu_milli` < 1000).
    """

    node: str
    cpu_milli: int
    memory: int
    gpu_milli: int
    flavor: str
    devices: tuple[int, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Grant:
        """From its JSON form."""
        return cls(**{**row, "devices": tuple(row["devices"])})


def used_by(grants: Iterable[Grant]) -> dict[str, int]:
    """What grants take, by the names that quotas use: `cpu`, `memory`, `gpu:<flavor>`."""
    total = {CPU: 0, MEMORY: 0}
    for grant in grants:
        total[CPU] += grant.cpu_milli
        total[MEMORY] += grant.memory
        if grant.gpu_milli:
            name = gpu_flavor(grant.flavor)
            total[name] = total.get(name, 0) + grant.gpu_milli
    return total


@dataclass(frozen=True, slots=True)
class Reservation:
    """A live job and what it holds."""

    job_id: str
    name: str
    account: str
    band: Band
    grants: tuple[Grant, ...]
    ends_by: int
    """Start + time limit + grace: no later, by promise."""
    version: int = 0
    started_at: int = 0
    """When it was given what it holds, ms."""
    kept_at: int = 0
    """Its newest checkpoint, ms, or `started_at`: what it computed since is lost when it is stopped."""
    time_limit: int = 0
    workers_min: int = 0
    workers_max: int = 0
    """0: not elastic, never resized."""
    stoppable: bool = True
    """False while it is stopping already, not yet running, or its engine is silent."""
    charge: int = 1000
    """Thousandths at which its use counts for fairness."""
    uses: Mapping[str, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "uses", used_by(self.grants))

    def kept(self, at: int) -> Reservation:
        """The same with its newest checkpoint at that moment."""
        return Reservation(
            self.job_id, self.name, self.account, self.band, self.grants, self.ends_by, self.version, self.started_at,
            at, self.time_limit, self.workers_min, self.workers_max, self.stoppable, self.charge,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Dependency:
    """A job that must have succeeded, and how it stands."""

    job_id: str
    state: JobState


class Need(NamedTuple):
    """What each of a job's workers needs, and how many; what decides where it fits."""

    workers_min: int
    workers_max: int
    cpu: int
    memory: int
    gpu: int
    gpu_memory: int
    flavors: tuple[str, ...]

    @property
    def device(self) -> int:
        """Thousandths of each device."""
        return self.gpu if self.gpu < 1000 else 1000

    @property
    def devices(self) -> int:
        """Devices per worker."""
        return max(1, self.gpu // 1000)


@lru_cache(maxsize=1 << 16)
def _shared(need: Need) -> Need:
    """One object for all that need the same."""
    return need


@lru_cache(maxsize=1 << 16)
def _kind(account: str, band: Band, need: Need) -> str:
    return f"{account} {band.value} {tuple(need)}"


@dataclass(frozen=True, slots=True)
class Waiting:
    """A queued job's request, per worker; `workers_min` together or none, up to `workers_max` where they fit."""

    job_id: str
    version: int
    seq: int
    name: str
    account: str
    band: Band
    submitted_at: int
    workers_min: int
    workers_max: int
    cpu_milli: int
    memory: int
    gpu_milli: int
    gpu_memory: int
    flavors: tuple[str, ...]
    time_limit: int
    dependencies: tuple[Dependency, ...] = ()
    not_before: int = 0
    """Back-off after a fault of the machine: do not start earlier."""
    deadline: int = 0
    """ms, 0 = none. Orders the clinical band by slack."""
    estimate: int = 0
    """Seconds that its like took before, 0 = unknown. For slack and estimates; the limit stays the promise."""
    promised: tuple[Grant, ...] = ()
    """Capacity that was preempted for it: nobody else's until it starts or withdraws."""
    need: Need = field(init=False, repr=False, compare=False)
    kind: str = field(init=False, repr=False, compare=False)
    """Equivalence class (account, band, need): but for their time limits, jobs of one kind fit or not alike."""

    def __post_init__(self) -> None:
        need = _shared(
            Need(
                self.workers_min, self.workers_max, self.cpu_milli, self.memory, self.gpu_milli, self.gpu_memory,
                self.flavors,
            )
        )  # fmt: skip
        object.__setattr__(self, "need", need)
        object.__setattr__(self, "kind", _kind(self.account, self.band, need))


@dataclass(frozen=True, slots=True)
class Window:
    """Nodes that are not for everybody from `start` to `end` (ms): maintenance, or an admin's reservation.

    `accounts` (and those below them) may use them meanwhile; none for maintenance.
    """

    name: str
    nodes: tuple[str, ...]
    start: int
    end: int
    accounts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that `decide` may look at."""

    nodes: tuple[Node, ...]
    live: tuple[Reservation, ...]
    waiting: tuple[Waiting, ...]
    usage: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """account → flavor → thousandth-seconds (MiB-seconds), decayed, each at its charge: see `fairshare`."""
    drained: tuple[str, ...] = ()
    """Nodes on which nothing new starts."""
    frozen: tuple[str, ...] = ()
    """Accounts of which (and below which) nothing new starts."""
    windows: tuple[Window, ...] = ()
    policy_since: int = 0
    """When the policy came into force, ms: a lowered quota is drained `drain_after` later."""
    seq: int = 0
    """The newest event that this picture knows."""
    grace_ms: int = 30_000
    """A job that reaches its time limit is gone so much later at the latest."""


@dataclass(frozen=True, slots=True)
class Admission:
    """Start this job with these grants. `why` says why these devices."""

    job_id: str
    version: int
    grants: tuple[Grant, ...]
    why: str
    reason: str = "admitted"
    """admitted, backfilled (passed a reserved job without delaying it), promised (got what was preempted for it)."""
    passed: tuple[str, ...] = ()
    """The reserved jobs that it passed."""
    charge: int = 1000
    """Thousandths at which its use counts for fairness: little where nobody else wanted it."""


@dataclass(frozen=True, slots=True)
class Preemption:
    """Stop this live job with its checkpoint and queue it again. `for_job` is '' where a quota is drained."""

    job_id: str
    version: int
    for_job: str
    reason: str
    """reclaimed, higher-band, opportunistic, quota-lowered."""
    lost_ms: int = 0
    """Worker-milliseconds of work since the last checkpoint."""


@dataclass(frozen=True, slots=True)
class Promise:
    """What preemptions free for a waiting job: its own until it starts or withdraws."""

    job_id: str
    version: int
    grants: tuple[Grant, ...]
    victims: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Resize:
    """Give a live elastic map job these grants instead of what it holds. `for_job` is '' where it grows."""

    job_id: str
    version: int
    grants: tuple[Grant, ...]
    for_job: str = ""


@dataclass(frozen=True, slots=True)
class Start:
    """A reserved start on the timeline, at the latest `at` (ms), that backfill never delays."""

    job_id: str
    at: int
    until: int
    grants: tuple[Grant, ...]


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a job still waits: one leading code of `explain.CODES`, and the jobs that are in its way."""

    job_id: str
    code: str
    blockers: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a class of jobs cannot start now: the code, and who and what stands in the way."""

    code: str
    blockers: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


class Waits(Sequence[Wait]):
    """One `Wait` for each job that still waits, in the order of the snapshot.

    A decision finds reasons by class; what each job's is called is written out when somebody asks.
    """

    __slots__ = ("_made", "_order", "_reasons")

    def __init__(self, order: tuple[Waiting, ...], reasons: Mapping[str, Reason]) -> None:
        self._order = order
        self._reasons = reasons
        self._made: tuple[Wait, ...] | None = None

    def all(self) -> tuple[Wait, ...]:
        if self._made is None:
            known = [(job.job_id, self._reasons.get(job.job_id)) for job in self._order]
            self._made = tuple(Wait(name, why.code, why.blockers, why.numbers) for name, why in known if why)
        return self._made

    def __len__(self) -> int:
        return len(self._reasons)

    def __iter__(self) -> Iterator[Wait]:
        return iter(self.all())

    @overload
    def __getitem__(self, place: int) -> Wait: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Wait, ...]: ...
    def __getitem__(self, place: int | slice) -> Wait | tuple[Wait, ...]:
        return self.all()[place]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self.all() == tuple(other)

    def __hash__(self) -> int:
        return hash(len(self))


@dataclass(frozen=True, slots=True)
class Plan:
    """What `decide` returns; committed by compare-and-set, else dropped."""

    policy: str
    admissions: tuple[Admission, ...] = ()
    waits: Sequence[Wait] = ()
    preemptions: tuple[Preemption, ...] = ()
    promises: tuple[Promise, ...] = ()
    resizes: tuple[Resize, ...] = ()
    starts: tuple[Start, ...] = ()


def take(
    nodes: tuple[Node, ...],
    jobs: Iterable[Job],
    dependency_states: Mapping[str, JobState],
    *,
    grace_ms: int,
    usage: Mapping[str, Mapping[str, int]] | None = None,
    drained: tuple[str, ...] = (),
    frozen: tuple[str, ...] = (),
    windows: tuple[Window, ...] = (),
    policy_since: int = 0,
    seq: int = 0,
) -> Snapshot:
    """The snapshot of the queue's QUEUED and live jobs; usage is derived here, never counted up and down."""
    live, waiting = [], []
    for job in jobs:
        if job.state in LIVE:
            live.append(reservation(job, grace_ms))
        elif job.state is JobState.QUEUED:
            waiting.append(waiting_of(job, dependency_states))
    return Snapshot(
        nodes, tuple(live), tuple(waiting), usage or {}, drained, frozen, windows, policy_since, seq, grace_ms
    )


def open_questions(snapshot: Snapshot) -> bool:
    """Is there anything to decide: does somebody wait, or could a running elastic job have more workers?"""
    return bool(snapshot.waiting) or any(len(job.grants) < job.workers_max for job in snapshot.live)


def grants_of(job: Job) -> tuple[Grant, ...]:
    """What a live job holds, as its detail records it."""
    return tuple(Grant.from_row(row) for row in job.detail.get("grants", ()))


def reservation(job: Job, grace_ms: int) -> Reservation:
    """A live job and what it holds. One that is stopping is gone by the end of its grace."""
    spec, detail = job.spec, job.detail
    # Before it runs, `started_at` may be of an earlier attempt.
    fresh = job.state in (JobState.RESERVED, JobState.LAUNCHING)
    began = job.changed_at if fresh else job.started_at or job.changed_at
    ends_by = began + spec.time_limit * 1000 + grace_ms
    if job.state in (JobState.PREEMPTING, JobState.CANCELLING):
        ends_by = min(ends_by, job.changed_at + grace_ms)
    workers = spec.resources.workers
    elastic = workers.max > workers.min
    return Reservation(
        job.id, spec.name, spec.account, spec.band, grants_of(job), ends_by, job.version, began,
        max(began, int(detail.get("kept_at", 0))), spec.time_limit,
        workers.min if elastic else 0, workers.max if elastic else 0,
        job.state is JobState.RUNNING, int(detail.get("charge", 1000)),
    )  # fmt: skip


def waiting_of(job: Job, states: Mapping[str, JobState]) -> Waiting:
    """A queued job's request. A promise holds only while its last move is the one that made it."""
    spec, need = job.spec, job.spec.resources
    promised = job.detail.get("promised", ()) if job.reason == "promised" else ()
    return Waiting(
        job.id, job.version, job.seq, spec.name, spec.account, spec.band, job.submitted_at,
        need.workers.min, need.workers.max, need.cpu_milli, need.memory, need.gpu_milli, need.gpu_memory,
        need.order, spec.time_limit,
        tuple(Dependency(other, states[other]) for other in spec.dependencies),
        int(job.detail.get("not_before", 0)),
        int(spec.deadline.timestamp() * 1000) if spec.deadline else 0,
        int(job.detail.get("estimate", 0)),
        tuple(Grant.from_row(row) for row in promised),
    )  # fmt: skip
