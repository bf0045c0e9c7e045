"""`decide(snapshot, policy, now) -> Plan`: pure, deterministic, integers only; no I/O, no clock, no randomness.

The numbered steps are the design document; quotas, fair share, backfill and preemption take their places among them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from permed_compute.admission.snapshot import (
    ANY_GPU,
    CPU,
    Admission,
    Grant,
    Node,
    Plan,
    Policy,
    Reservation,
    Snapshot,
    Wait,
    Waiting,
)
from permed_compute.states import ENDED, JobState


@dataclass(slots=True)
class _Free:
    """What is left of one node. `gpus`: thousandths left, by device index."""

    node: Node
    cpu: int
    memory: int
    gpus: dict[int, int]

    @classmethod
    def whole(cls, node: Node) -> _Free:
        return cls(node, node.cpu_milli, node.memory, {gpu.index: 1000 for gpu in node.gpus})

    def take(self, grant: Grant) -> None:
        self.cpu -= grant.cpu_milli
        self.memory -= grant.memory
        for index in grant.devices:
            self.gpus[index] -= min(1000, grant.gpu_milli)

    def grants(self, job: Waiting, flavor: str) -> list[Grant]:
        """As many of the job's workers as fit into what is left; a share of a GPU goes to the fullest that has room."""
        gpus = dict(self.gpus)
        room = min(self.cpu // job.cpu_milli, self.memory // job.memory if job.memory else job.workers_max)
        grants: list[Grant] = []
        while len(grants) < min(room, job.workers_max):
            devices = () if flavor == CPU else self._devices(job, flavor, gpus)
            if devices is None:
                break
            for index in devices:
                gpus[index] -= min(1000, job.gpu_milli)
            gpu_milli = 0 if flavor == CPU else job.gpu_milli
            grants.append(Grant(self.node.name, job.cpu_milli, job.memory, gpu_milli, flavor, devices))
        return grants

    def _devices(self, job: Waiting, flavor: str, gpus: dict[int, int]) -> tuple[int, ...] | None:
        each, count = min(1000, job.gpu_milli), max(1, job.gpu_milli // 1000)
        fitting = [
            gpu.index
            for gpu in self.node.gpus
            if gpu.flavor == flavor and gpu.memory >= job.gpu_memory and gpus[gpu.index] >= each
        ]
        fitting.sort(key=lambda index: (gpus[index], index))
        return tuple(fitting[:count]) if len(fitting) >= count else None


def decide(snapshot: Snapshot, policy: Policy, now: int) -> Plan:
    """Which queued jobs start now and where, and one reason for each that does not.

    `now` is ms since 1970 UTC. A job gets `workers_min` together or nothing; further workers up to `workers_max` go
    where they fit. A job that does not fit keeps everything of its kind behind it waiting (no overtaking within the
    nodes it could use) until backfill with reservations allows better.
    """
    # 1. Validity and holds: dependencies and back-off.
    waits: dict[str, Wait] = {}
    ready: list[Waiting] = []
    for job in snapshot.waiting:
        hold = _hold(job, now)
        if hold:
            waits[job.job_id] = hold
        else:
            ready.append(job)

    # 2. What is reserved and what is free now: derived from the live reservations alone.
    free = _free(snapshot.nodes, snapshot.live)

    # 4. Order: priority band, then submission. (3, reclaim, comes with quotas.)
    rank = {band: place for place, band in enumerate(policy.bands)}
    ready.sort(key=lambda job: (rank[job.band], job.seq))

    # 5. Admit what fits; the first of a flavor list that can be had now, else wait for any of them.
    admissions: list[Admission] = []
    head_of: dict[str, str] = {}
    for job in ready:
        usable = _usable(job, snapshot.nodes)
        if not usable:
            waits[job.job_id] = _never(job, snapshot.nodes)
            continue
        # 6. Behind a job that waits for the same nodes nobody passes (strict order; backfill replaces this).
        ahead = next((head_of[name] for name in _node_names(usable) if name in head_of), None)
        placed = None if ahead else _place(job, usable, free)
        if placed is None:
            waits[job.job_id] = _wait(job, ahead, usable, snapshot.live, admissions)
            for name in _node_names(usable):
                head_of.setdefault(name, job.job_id)
            continue
        for grant in placed:
            free[grant.node].take(grant)
        admissions.append(Admission(job.job_id, job.version, placed, _why(job, placed[0].flavor, snapshot.nodes)))

    # 8. Reasons for all that still wait, in the order they were looked at. (7, preemption, comes with quotas.)
    order = {job.job_id: place for place, job in enumerate(snapshot.waiting)}
    return Plan(policy.version, tuple(admissions), tuple(sorted(waits.values(), key=lambda w: order[w.job_id])))


def _hold(job: Waiting, now: int) -> Wait | None:
    unmet = [dependency for dependency in job.dependencies if dependency.state is not JobState.SUCCEEDED]
    if unmet:
        ended = [dependency for dependency in unmet if dependency.state in ENDED]
        code = "dependency-failed" if ended else "dependency"
        return Wait(job.job_id, code, tuple(dependency.job_id for dependency in ended or unmet))
    if job.not_before > now:
        return Wait(job.job_id, "back-off", (), {"not_before": job.not_before})
    return None


def _free(nodes: Iterable[Node], live: Iterable[Reservation]) -> dict[str, _Free]:
    free = {node.name: _Free.whole(node) for node in nodes}
    for reservation in live:
        for grant in reservation.grants:
            if grant.node in free:  # a node that is gone still has its reservations until they are confirmed ended
                free[grant.node].take(grant)
    return free


def _usable(job: Waiting, nodes: tuple[Node, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """(flavor, nodes) that would hold all of the job's least workers if they were empty, in the job's order."""
    usable: list[tuple[str, tuple[str, ...]]] = []
    for flavor in dict.fromkeys(flavor for wanted in job.flavors for flavor in _meanings(wanted, nodes)):
        rooms = [(node.name, len(_Free.whole(node).grants(job, flavor))) for node in nodes]
        if sum(room for _, room in rooms) >= job.workers_min:
            usable.append((flavor, tuple(name for name, room in rooms if room)))
    return usable


def _meanings(wanted: str, nodes: tuple[Node, ...]) -> list[str]:
    """The flavors that a wish stands for: itself, or for `gpu` every kind of GPU that is here."""
    if wanted != ANY_GPU:
        return [wanted]
    return sorted({gpu.flavor for node in nodes for gpu in node.gpus})


def _node_names(usable: list[tuple[str, tuple[str, ...]]]) -> list[str]:
    return list(dict.fromkeys(name for _, names in usable for name in names))


def _place(job: Waiting, usable: list[tuple[str, tuple[str, ...]]], free: dict[str, _Free]) -> tuple[Grant, ...] | None:
    """Grants for at least `workers_min` workers of one flavor on as few nodes as possible, or None."""
    for flavor, names in usable:
        offers = sorted((free[name].grants(job, flavor) for name in names), key=lambda grants: -len(grants))
        grants = [grant for offer in offers for grant in offer][: job.workers_max]
        if len(grants) >= job.workers_min:
            return tuple(grants)
    return None


def _why(job: Waiting, flavor: str, nodes: tuple[Node, ...]) -> str:
    """Why this device: a sentence for the manifest."""
    wishes = ", ".join(job.flavors)
    if not job.gpu_milli:
        return "CPU: the job asks for no GPU."
    first = job.flavors[0]
    if flavor == CPU:
        there = sorted({gpu.flavor for node in nodes for gpu in node.gpus})
        reason = (
            f"the GPUs here are {', '.join(there)}, none of them free or wanted" if there else "there is no GPU here"
        )
        return f"CPU: the job prefers [{wishes}] and allows CPU; {reason}."
    if flavor == first or first == ANY_GPU:
        return f"{flavor}: the job's first choice of [{wishes}] was free."
    return f"{flavor}: the first of [{wishes}] that was free."


def _never(job: Waiting, nodes: tuple[Node, ...]) -> Wait:
    gpus = sorted({gpu.flavor for node in nodes for gpu in node.gpus})
    numbers = {
        "wants": list(job.flavors), "gpus_here": gpus, "workers": job.workers_min,
        "cpu_milli": job.cpu_milli, "memory": job.memory, "gpu_milli": job.gpu_milli,
        "largest_cpu_milli": max((node.cpu_milli for node in nodes), default=0),
        "largest_memory": max((node.memory for node in nodes), default=0),
    }  # fmt: skip
    known = any(flavor in (CPU, *gpus) for wanted in job.flavors for flavor in _meanings(wanted, nodes))
    return Wait(job.job_id, "never-fits" if known else "no-such-device", (), numbers)


def _wait(
    job: Waiting,
    ahead: str | None,
    usable: list[tuple[str, tuple[str, ...]]],
    live: tuple[Reservation, ...],
    admissions: list[Admission],
) -> Wait:
    names = set(_node_names(usable))
    if ahead:
        return Wait(job.job_id, "behind", (ahead,))
    holders = [held.job_id for held in live if any(grant.node in names for grant in held.grants)]
    holders += [new.job_id for new in admissions if any(grant.node in names for grant in new.grants)]
    ends = [held.ends_by for held in live if held.job_id in holders]
    numbers = {"workers": job.workers_min, "cpu_milli": job.cpu_milli, "memory": job.memory, "gpu_milli": job.gpu_milli}
    return Wait(job.job_id, "capacity", tuple(holders), {**numbers, "ends_by": min(ends, default=0)})
