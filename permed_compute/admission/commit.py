"""From a plan to the moves that one compare-and-set transaction makes of it. Pure; whoever commits uses this.

For the controller: `queue.apply(moves_of(plan, job_of, actor=self.name), lease=self.lease)`; a `StaleError` drops the
whole plan. The simulator commits by the same function on the same queue, so that what it shows is what would happen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from permed_compute.admission.snapshot import Admission, Grant, Plan, Preemption
from permed_compute.queue.port import Job, Move
from permed_compute.states import JobState

OF_ONE_ATTEMPT = ("grants", "promised", "victims", "for", "not_before", "charge", "passed", "kept_at")
"""Keys of a job's detail that end with its attempt."""


def moves_of(plan: Plan, job_of: Callable[[str], Job], *, actor: str) -> list[Move]:
    """Preemptions and shrinking first, then promises, then starts: all of them, or none."""
    moves = []
    for stop in plan.preemptions:
        job = job_of(stop.job_id)
        detail = {**job.detail, "for": stop.for_job, "lost_ms": stop.lost_ms}
        moves.append(
            Move(job.id, stop.version, JobState.PREEMPTING, stop.reason, actor, plan.policy, detail=detail)
        )  # fmt: skip
    for change in plan.resizes:
        job = job_of(change.job_id)
        detail = {**job.detail, "grants": rows(change.grants), "for": change.for_job}
        moves.append(Move(job.id, change.version, job.state, "resized", actor, plan.policy, detail=detail))
    for promise in plan.promises:
        job = job_of(promise.job_id)
        detail = {**job.detail, "promised": rows(promise.grants), "victims": list(promise.victims)}
        moves.append(Move(job.id, promise.version, JobState.QUEUED, "promised", actor, plan.policy, detail=detail))
    return moves + [_start(plan, job_of(admission.job_id), admission, actor) for admission in plan.admissions]


def stopping_instead(plan: Plan) -> Plan:
    """The plan for engines whose attempts cannot be resized: an elastic job that is to shrink or grow is stopped and
    queued again, and takes what is there when its turn comes. Its finished parts are kept."""
    stops = [
        Preemption(each.job_id, each.version, each.for_job, "shrunk" if each.for_job else "grown")
        for each in plan.resizes
    ]
    return replace(plan, preemptions=(*plan.preemptions, *stops), resizes=()) if plan.resizes else plan


def _start(plan: Plan, job: Job, admission: Admission, actor: str) -> Move:
    detail = clean(job.detail) | {"grants": rows(admission.grants), "why": admission.why}
    if admission.charge != 1000:
        detail["charge"] = admission.charge
    if admission.passed:
        detail["passed"] = list(admission.passed)
    return Move(
        job.id, admission.version, JobState.RESERVED, admission.reason, actor, plan.policy, detail=detail
    )  # fmt: skip


def clean(detail: Any) -> dict[str, Any]:
    """A job's detail without what belonged to one attempt."""
    return {name: value for name, value in detail.items() if name not in OF_ONE_ATTEMPT}


def rows(grants: Iterable[Grant]) -> list[dict[str, Any]]:
    """Grants as JSON; `Grant.from_row` reads them."""
    return [
        {"node": g.node, "cpu_milli": g.cpu_milli, "memory": g.memory, "gpu_milli": g.gpu_milli, "flavor": g.flavor,
         "devices": list(g.devices)}
        for g in grants
    ]  # fmt: skip
