"""From a reason code to a sentence, what would have to change, and an estimate. The codes are a closed list."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from permed_compute.admission.snapshot import Plan, Wait
from permed_compute.queue.port import Job
from permed_compute.spec import format_memory
from permed_compute.states import JobState

CODES = ("held", "dependency", "dependency-failed", "back-off", "no-such-device", "never-fits", "behind", "capacity")
"""Every reason for which a job can wait, in the order in which they are looked for."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """One leading reason. `estimate` is ms since 1970 UTC at the latest, 0 where nobody can say."""

    job_id: str
    state: str
    code: str
    sentence: str
    change: str
    blockers: tuple[str, ...] = ()
    estimate: int = 0
    basis: str = ""

    def as_dict(self) -> dict[str, Any]:
        return {
            "job": self.job_id, "state": self.state, "code": self.code, "sentence": self.sentence,
            "change": self.change, "blockers": list(self.blockers), "estimate": self.estimate, "basis": self.basis,
        }  # fmt: skip


def explain(job: Job, plan: Plan, name_of: Callable[[str], str]) -> Explanation:
    """Why this job is where it is. `name_of(job_id)` gives the name to show for another job."""
    if job.state is JobState.HELD:
        return _held(job)
    wait = next((wait for wait in plan.waits if wait.job_id == job.id), None)
    if job.state is not JobState.QUEUED or wait is None:
        return _not_waiting(job)
    sentence, change = _SENTENCES[wait.code](wait, [f"{name_of(other)} ({other})" for other in wait.blockers])
    estimate = int(wait.numbers.get("ends_by", 0) or wait.numbers.get("not_before", 0))
    basis = "the time limit of what runs now" if wait.numbers.get("ends_by") else ""
    return Explanation(job.id, job.state.value, wait.code, sentence, change, wait.blockers, estimate, basis)


def _held(job: Job) -> Explanation:
    return Explanation(
        job.id, job.state.value, "held", f"The job is held ({job.reason}).",
        f"Release it: permed release {job.id}" if job.reason != "interrupted" else f"Go on: permed resume {job.id}",
    )  # fmt: skip


def _not_waiting(job: Job) -> Explanation:
    if job.state is JobState.QUEUED:
        return Explanation(job.id, job.state.value, "admissible", "It fits now and starts at the next decision.", "")
    detail = str(job.detail.get("sentence", ""))
    sentence = f"The job is {job.state.value} ({job.reason})." + (f" {detail}" if detail else "")
    return Explanation(job.id, job.state.value, job.reason, sentence, str(job.detail.get("remedy", "")))


def _need(numbers: Mapping[str, Any]) -> str:
    parts = [f"{numbers['cpu_milli'] / 1000:g} CPU", format_memory(numbers["memory"])]
    if numbers.get("gpu_milli"):
        parts.append(f"{numbers['gpu_milli'] / 1000:g} GPU")
    workers = numbers["workers"]
    return f"{workers} worker{'s' if workers > 1 else ''} of {', '.join(parts)}"


def _capacity(wait: Wait, names: list[str]) -> tuple[str, str]:
    return (
        f"It needs {_need(wait.numbers)}; {', '.join(names) or 'what runs now'} holds what it would use.",
        f"It starts when {names[0] if names else 'one of them'} ends, or is cancelled.",
    )


def _behind(wait: Wait, names: list[str]) -> tuple[str, str]:
    return f"{names[0]} stands before it and waits for the same nodes.", f"It moves up when {names[0]} has started."


def _never_fits(wait: Wait, names: list[str]) -> tuple[str, str]:
    numbers = wait.numbers
    return (
        f"It needs {_need(numbers)}; no node here has that even when empty (the largest has"
        f" {numbers['largest_cpu_milli'] / 1000:g} CPU and {format_memory(numbers['largest_memory'])}).",
        "Ask for less per worker, or submit it where larger nodes are.",
    )


def _no_such_device(wait: Wait, names: list[str]) -> tuple[str, str]:
    wants, here = ", ".join(wait.numbers["wants"]), ", ".join(wait.numbers["gpus_here"]) or "no GPU"
    return (
        f"It asks for [{wants}] and forbids CPU; here is {here}.",
        "Add one of the flavors that are here to `resources.flavors`, or `cpu` to allow the CPU; else it waits.",
    )


def _dependency(wait: Wait, names: list[str]) -> tuple[str, str]:
    return f"It waits for {', '.join(names)} to succeed.", f"It can start when {names[0]} has succeeded."


def _dependency_failed(wait: Wait, names: list[str]) -> tuple[str, str]:
    return (
        f"It depends on {', '.join(names)}, which ended without success.",
        f"Mend and resume that job (permed resume {wait.blockers[0]}), or cancel this one.",
    )


def _back_off(wait: Wait, names: list[str]) -> tuple[str, str]:
    return "Its last attempt was lost to a fault of the machine; it starts again after a pause.", "Nothing: it will."


_SENTENCES: dict[str, Callable[[Wait, list[str]], tuple[str, str]]] = {
    "dependency": _dependency, "dependency-failed": _dependency_failed, "back-off": _back_off,
    "no-such-device": _no_such_device, "never-fits": _never_fits, "behind": _behind, "capacity": _capacity,
}  # fmt: skip
