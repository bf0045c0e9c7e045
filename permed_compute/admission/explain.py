"""From a reason code to a sentence, what would have to change, and an estimate. The codes are a closed list."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from permed_compute.admission.snapshot import Plan, Snapshot, Wait
from permed_compute.queue.port import Job
from permed_compute.spec import format_memory
from permed_compute.states import AWAITING_FILES, JobState

CODES = (
    "held", "transfer", "dependency", "dependency-failed", "back-off", "unknown-account", "account-not-in-force",
    "frozen", "no-such-device", "never-fits", "drained", "never-quota", "preempting", "quota", "window", "behind",
    "capacity",
)  # fmt: skip
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
    ahead: tuple[str, ...] = ()
    """Waiting jobs whose turn comes before: what is preempted for them, and their reserved starts."""

    def as_dict(self) -> dict[str, Any]:
        return {
            "job": self.job_id, "state": self.state, "code": self.code, "sentence": self.sentence,
            "change": self.change, "blockers": list(self.blockers), "estimate": self.estimate, "basis": self.basis,
            "ahead": list(self.ahead),
        }  # fmt: skip


def explain(
    job: Job, plan: Plan, snapshot: Snapshot | None, name_of: Callable[[str], str], missing: Sequence[str] = ()
) -> Explanation:
    """Why this job is where it is, by the plan that `decide` made of the snapshot (None: without estimates of others).

    `name_of(job_id)` gives the name to show for another job. missing: sets of files that it names and that have not
    come in.
    """
    if job.state is JobState.HELD:
        return _awaiting(job, missing) if job.reason == AWAITING_FILES else _held(job)
    wait = next((wait for wait in plan.waits if wait.job_id == job.id), None)
    if job.state is not JobState.QUEUED or wait is None:
        return _not_waiting(job)
    sentence, change = _SENTENCES[wait.code](wait, [f"{name_of(other)} ({other})" for other in wait.blockers])
    if wait.code == "back-off" and job.detail.get("sentence"):  # what was lost, and how often it may be
        sentence = f"{job.detail['sentence']} It starts again after a pause."
        change = str(job.detail.get("remedy", "")) or change
    estimate, basis = _estimate(wait, plan, snapshot)
    return Explanation(
        job.id, job.state.value, wait.code, sentence, change, wait.blockers, estimate, basis, _ahead(wait, plan)
    )


def _estimate(wait: Wait, plan: Plan, snapshot: Snapshot | None) -> tuple[int, str]:
    """When it starts at the latest (ms) and what that stands on, or (0, '')."""
    numbers = wait.numbers
    if numbers.get("starts_by"):
        return int(
            numbers["starts_by"]
        ), "a reserved start, from the time limits of what runs and is reserved before it"
    if numbers.get("not_before"):
        return int(numbers["not_before"]), "the pause after a lost attempt"
    if numbers.get("ends"):
        return int(numbers["ends"]), "the end of the window"
    if wait.code in ("no-such-device", "never-fits", "never-quota", "unknown-account", "frozen", "drained"):
        return 0, ""
    starts = {start.job_id: start.until for start in plan.starts}
    ends = {held.job_id: held.ends_by for held in snapshot.live} if snapshot is not None else {}
    known = [starts.get(other) or ends.get(other) or 0 for other in wait.blockers]
    if not known or not all(known):
        return 0, ""
    if wait.code == "preempting":
        return max(known), "the grace period of what gives way"
    if wait.code == "behind":
        return max(known), "the time limits of the reserved starts before it"
    return min(known), "the time limit of what it waits for that ends first; others may come before it"


def _ahead(wait: Wait, plan: Plan) -> tuple[str, ...]:
    promised = [promise.job_id for promise in plan.promises]
    mine = [start.at for start in plan.starts if start.job_id == wait.job_id]
    before = [start.job_id for start in plan.starts if not mine or start.at < mine[0]]
    return tuple(other for other in dict.fromkeys([*promised, *before]) if other != wait.job_id)


def _held(job: Job) -> Explanation:
    return Explanation(
        job.id, job.state.value, "held", f"The job is held ({job.reason}).",
        f"Release it: permed release {job.id}" if job.reason != "interrupted" else f"Go on: permed resume {job.id}",
    )  # fmt: skip


def _awaiting(job: Job, missing: Sequence[str]) -> Explanation:
    if not missing:
        return Explanation(
            job.id, job.state.value, AWAITING_FILES, "The files that it waited for have come in.",
            f"Let it go: permed release {job.id}",
        )  # fmt: skip
    return Explanation(
        job.id, job.state.value, AWAITING_FILES, f"It waits for files that have not come in: {', '.join(missing)}.",
        f"It is queued when they are in place: permed receive SOURCE --name {missing[0]}",
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
    hold = "hold" if len(names) > 1 else "holds"
    return (
        f"It needs {_need(wait.numbers)}; {', '.join(names) or 'what runs now'} {hold} what it would use.",
        f"It starts when {names[0] if names else 'one of them'} ends, or is cancelled.",
    )


def _behind(wait: Wait, names: list[str]) -> tuple[str, str]:
    first = names[0] if names else "a job before it"
    if wait.numbers.get("what") == "quota":
        return (
            f"{first} of the same account waits for quota that is about to free, and would wait longer.",
            f"It starts after {first}, or at once with a time limit that ends before that quota frees.",
        )
    return (
        f"It would delay the reserved start of {first}.",
        "It starts after that, or at once with a time limit that ends before the reserved start.",
    )


def _amount(flavor: str, amount: int) -> str:
    return format_memory(amount) if flavor == "memory" else f"{amount / 1000:g} {flavor}"


def _quota(wait: Wait, names: list[str]) -> tuple[str, str]:
    n = wait.numbers
    flavor = n["flavor"]
    return (
        f"It needs {_amount(flavor, n['wants'])}; {n['account']} uses {_amount(flavor, n['used'])} of its"
        f" {_amount(flavor, n['quota'])}" + (
            f" and may borrow {_amount(flavor, n['borrowing_limit'])}" if n["borrowing_limit"] >= 0 else ""
        ) + f"; {_amount(flavor, max(0, n['available']))} are left for it.",
        f"It starts when {names[0] if names else 'a job of that account'} ends, or with a larger quota or borrowing"
        f" limit for {n['account']}.",
    )  # fmt: skip


def _never_quota(wait: Wait, names: list[str]) -> tuple[str, str]:
    n = wait.numbers
    flavor = n["flavor"]
    return (
        f"It needs {_amount(flavor, n['wants'])}, more than {n['account']} may ever use at once.",
        "Ask for fewer workers, or for a larger quota or borrowing limit.",
    )


def _preempting(wait: Wait, names: list[str]) -> tuple[str, str]:
    return (
        f"{', '.join(names) or 'What stands in its way'} is giving way to it.",
        "Nothing: it starts when that has stopped; until then the place is kept for it.",
    )


def _window(wait: Wait, names: list[str]) -> tuple[str, str]:
    return (
        f"It would still run when {', '.join(wait.numbers['windows'])} begins.",
        "It starts after that, or at once with a shorter time limit.",
    )


def _drained(wait: Wait, names: list[str]) -> tuple[str, str]:
    nodes = ", ".join(wait.numbers["nodes"])
    return (
        f"Only {nodes} could hold it, and that is drained.",
        f"It starts after: permed undrain {nodes.split(', ')[0]}",
    )


def _frozen(wait: Wait, names: list[str]) -> tuple[str, str]:
    account = wait.numbers["account"]
    return f"Account {account} is frozen: nothing of it starts.", f"It starts after: permed thaw {account}"


def _unknown_account(wait: Wait, names: list[str]) -> tuple[str, str]:
    return (
        f"There is no account {wait.numbers['account']} in the policy in force.",
        "Submit it for an account that exists, or add this one: permed quota apply.",
    )


def _not_in_force(wait: Wait, names: list[str]) -> tuple[str, str]:
    return (
        f"Account {wait.numbers['account']} is outside its dates.",
        "It starts when the account is in force, or with other dates in the policy.",
    )


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
    "unknown-account": _unknown_account, "account-not-in-force": _not_in_force, "frozen": _frozen,
    "drained": _drained, "never-quota": _never_quota, "preempting": _preempting, "quota": _quota, "window": _window,
}  # fmt: skip
