"""The frozen picture that `decide` sees, and the plan that it returns. Integers, tuples and strings only.

Units: CPU in thousandths of a core, memory in MiB, GPU in thousandths of a device, time in ms since 1970 UTC.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from permed_compute.queue.port import Job
from permed_compute.spec import Band
from permed_compute.states import LIVE, JobState

CPU = "cpu"
"""The flavor of a node's cores; every other flavor is a kind of GPU."""
ANY_GPU = "gpu"


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


@dataclass(frozen=True, slots=True)
class Dependency:
    """A job that must have succeeded, and how it stands."""

    job_id: str
    state: JobState


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


@dataclass(frozen=True, slots=True)
class Policy:
    """What an admin may set. The full policy set (quotas, fair share, backfill, preemption) grows here."""

    version: str = "fifo-1"
    bands: tuple[Band, ...] = (Band.CLINICAL, Band.RESEARCH, Band.OPPORTUNISTIC)
    """Highest first."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that `decide` may look at."""

    nodes: tuple[Node, ...]
    live: tuple[Reservation, ...]
    waiting: tuple[Waiting, ...]


@dataclass(frozen=True, slots=True)
class Admission:
    """Start this job with these grants. `why` says why these devices."""

    job_id: str
    version: int
    grants: tuple[Grant, ...]
    why: str


@dataclass(frozen=True, slots=True)
class Wait:
    """Why a job still waits: one leading code of `explain.SENTENCES`, and the jobs that are in its way."""

    job_id: str
    code: str
    blockers: tuple[str, ...] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Plan:
    """What `decide` returns; committed by compare-and-set, else dropped."""

    policy: str
    admissions: tuple[Admission, ...] = ()
    waits: tuple[Wait, ...] = ()


def take(
    nodes: tuple[Node, ...], jobs: Iterable[Job], dependency_states: Mapping[str, JobState], *, grace_ms: int
) -> Snapshot:
    """The snapshot of the queue's QUEUED and live jobs; usage is derived here, never counted up and down."""
    live, waiting = [], []
    for job in jobs:
        if job.state in LIVE:
            live.append(_reservation(job, grace_ms))
        elif job.state is JobState.QUEUED:
            waiting.append(_waiting(job, dependency_states))
    return Snapshot(nodes, tuple(live), tuple(waiting))


def grants_of(job: Job) -> tuple[Grant, ...]:
    """What a live job holds, as its detail records it."""
    return tuple(Grant.from_row(row) for row in job.detail.get("grants", ()))


def _reservation(job: Job, grace_ms: int) -> Reservation:
    start = job.started_at or job.changed_at
    ends_by = start + job.spec.time_limit * 1000 + grace_ms
    return Reservation(job.id, job.spec.name, job.spec.account, job.spec.band, grants_of(job), ends_by)


def _waiting(job: Job, states: Mapping[str, JobState]) -> Waiting:
    spec, need = job.spec, job.spec.resources
    return Waiting(
        job.id, job.version, job.seq, spec.name, spec.account, spec.band, job.submitted_at,
        need.workers.min, need.workers.max, need.cpu_milli, need.memory, need.gpu_milli, need.gpu_memory,
        need.order, spec.time_limit,
        tuple(Dependency(other, states[other]) for other in spec.dependencies),
        int(job.detail.get("not_before", 0)),
    )  # fmt: skip
