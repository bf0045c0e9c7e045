"""What nodes there would have to be for what runs, and for what waits for nodes: for an engine that can get more.

Pure, like `decide`, and said after each decision. Quotas bound it: what an account may not use now is not asked for, so
that no node is started for a job that then waits for its quota.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from permed_compute.admission.policy import CPU, Policy
from permed_compute.admission.quota import Tree, wanted_by
from permed_compute.admission.snapshot import ANY_GPU, Grant, Plan, Snapshot, Wait, Waiting, used_by

MOST = 10_000
"""Workers that are asked for at once: more than an autoscaler starts before it is told again."""
_FOR_NODES = frozenset({"capacity", "behind", "never-fits", "no-such-device"})


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What one worker needs, wherever it is. flavor: the kind of GPU; '' for none, or any."""

    cpu_milli: int
    memory: int
    gpu_milli: int
    flavor: str


Demand = tuple[tuple[Shape, int], ...]
"""(shape, how many workers of it), in a fixed order."""


def demand(snapshot: Snapshot, policy: Policy, plan: Plan, now: int) -> Demand:
    """Everything that is or will be held, and the least workers of each job that waits for nodes, in order of
    submission as far as the quotas reach."""
    tree = Tree(policy, now)
    total: Counter[Shape] = Counter()
    jobs = {job.job_id: job for job in snapshot.waiting}
    held = [(job.account, job.grants) for job in snapshot.live]
    held += [(jobs[new.job_id].account, new.grants) for new in plan.admissions]
    for account, grants in held:
        tree.add(account, used_by(grants))
        total.update(map(_of_grant, grants))
    waits = {wait.job_id: wait for wait in plan.waits if _is_for_nodes(wait)}
    for job in sorted((jobs[job_id] for job_id in waits), key=lambda job: job.seq):
        if total.total() + job.workers_min > MOST:
            break
        flavor = job.need.flavors[0] if job.gpu_milli else CPU
        if _within_quota(tree, job, flavor):
            total[_shape(job.cpu_milli, job.memory, job.gpu_milli, flavor)] += job.workers_min
    return tuple(sorted(total.items()))


def spread(asked: Demand) -> Iterable[Shape]:
    """One shape per worker."""
    return (shape for shape, count in asked for _ in range(count))


def _is_for_nodes(wait: Wait) -> bool:
    return wait.code in _FOR_NODES and wait.numbers.get("what") != "quota"


def _within_quota(tree: Tree, job: Waiting, flavor: str) -> bool:
    """Whether its account may use that much beside what is asked for already; counts it where so."""
    if not tree.number:
        return True
    if job.account not in tree.number:
        return False
    each = wanted_by(job.need, flavor)
    allowed, _ = tree.workers(job.account, each, job.workers_min)
    if allowed < job.workers_min:
        return False
    tree.add(job.account, {name: amount * job.workers_min for name, amount in each.items()})
    return True


def _of_grant(grant: Grant) -> Shape:
    return _shape(grant.cpu_milli, grant.memory, grant.gpu_milli, grant.flavor)


def _shape(cpu_milli: int, memory: int, gpu_milli: int, flavor: str) -> Shape:
    return Shape(cpu_milli, memory, gpu_milli, flavor if gpu_milli and flavor != ANY_GPU else "")
