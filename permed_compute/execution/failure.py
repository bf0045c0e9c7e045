"""Failure policy in one place: what is tried again, how often, after which pause, and the words for it.

Deciding only: controller and driver act. Each kind of failure has a budget of its own, so that three nodes that die do
not use up what is there for a fault of the code. An attempt that made progress before it was lost clears all of them: a
long job on an unreliable machine goes on as long as it moves. Preemption is nobody's failure and costs no budget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from permed_compute.states import JobState

_MINUTE_MS = 60_000


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of failure: its words, and how often in a row an attempt that it ended is tried again.

    retries: None is what the job says (`retries`). First pause in ms, doubled each time up to the longest.
    """

    sentence: str
    remedy: str
    retries: int | None = None
    first_pause_ms: int = 1_000
    longest_pause_ms: int = 5 * _MINUTE_MS


KINDS = {
    # the machine's: it may take long, and the job can do nothing about it
    "node-lost": Kind("The node that it ran on is gone.", "Nothing: it starts on another.", 20, 2_000),
    "launch-failed": Kind(
        "The engine did not start the attempt.", "`permed doctor` shows what the engine says.", 5, 5_000
    ),
    # the machine's or the job's own: as often as the job says
    "attempt-lost": Kind(
        "The attempt's processes are gone without an exit record.", "Usually the engine or node died."
    ),
    "stale": Kind("The attempt had been given up before it began.", "Nothing: the next one starts.", 20),
    "worker-lost": Kind("A worker's process is gone.", "See `permed logs`; if it happens again, ask for more memory."),
    "peer-lost": Kind("The ranks lost each other.", "The network between them, or a rank's end: see `permed logs`."),
    # somebody else's doing, in Slurm
    "cancelled-in-slurm": Kind("It was cancelled in Slurm.", "`permed cancel` ends a job for good.", 5),
    "evicted": Kind("Slurm took its nodes for other work.", "Nothing: it goes on when its turn comes.", 20, 2_000),
    # likely the job's own: the same again would mostly do the same again
    "over-memory": Kind("A worker used more memory than it was granted.", "Raise resources.memory.", 1, 10_000),
    "bad-image": Kind(
        "The worker's environment cannot be started.", "The image or environment lacks what the job needs.", 1, 10_000
    ),
    # the job's own: never
    "device-memory": Kind(
        "A single sample does not fit into the GPU's memory.", "Ask for a GPU with more (resources.gpu_memory).", 0
    ),
    "out-of-memory": Kind("The computation ran out of memory.", "Make the parts smaller, or ask for more.", 1),
    "outside-group": Kind("Work was started outside the job's reservation.", "Leave scheduling to permed.", 0),
    "code-error": Kind("The workload's code raised an exception.", "See `permed logs`.", 0),
    "workload": Kind("The workload cannot run as asked.", "See `permed why`.", 0),
}
"""Of attempts, by code. A code that is not here is treated as `worker-lost`. What a workload or executor says itself
comes before these words."""

REASONS = {name: (kind.sentence, kind.remedy) for name, kind in KINDS.items()} | {
    "model-refused": ("Its model may not be used on patients.", "`permed why` says what would mend it."),
    "time-limit": ("It reached its time limit.", "Raise time_limit, then `permed resume`: finished parts are kept."),
    "continued": ("It reached its time limit and goes on from its checkpoint.", "Nothing: it will."),
    "preempted": ("It gave way to other work.", "Nothing: it goes on from its checkpoint when its turn comes."),
    "interrupted": ("It was interrupted.", "`permed resume` goes on where it stopped."),
    "executor-closed": ("Its machine asked it to go.", "Nothing: it goes on from its checkpoint."),
}
"""Code → (sentence, remedy)."""

_NEVER_AGAIN = frozenset({"workload", "refused", "device-memory"})
_ONCE_MORE = frozenset({"out-of-memory", "over-memory"})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a job whose attempt was lost. `losses` by kind, in a row without progress; `not_before` in ms."""

    to: JobState
    losses: Mapping[str, int]
    not_before: int
    sentence: str
    remedy: str


def after_loss(code: str, *, losses: Any, progressed: bool, retries: int, now: int) -> Verdict:
    """Queue the job again with a growing pause, or fail it when this kind's budget is spent.

    losses: what the last verdict said, {} at first. retries: the job's.
    """
    kind = KINDS.get(code, KINDS["worker-lost"])
    sentence = kind.sentence if code in KINDS else f"The attempt was lost ({code})."
    budget = retries if kind.retries is None else kind.retries
    before = losses if isinstance(losses, Mapping) and not progressed else {}
    counted = {**before, code: before.get(code, 0) + 1}
    times = counted[code]
    if times > budget:
        again = f" {times} times in a row without progress." if times > 1 else ""
        return Verdict(JobState.FAILED, counted, 0, sentence + again, kind.remedy)
    pause = min(kind.longest_pause_ms, kind.first_pause_ms * 2 ** (times - 1))
    said = f"{sentence} That is loss {times} of {budget} of this kind that it may have without progress."
    return Verdict(JobState.QUEUED, counted, now + pause, said, kind.remedy)


def part_again(code: str, times: int, retries: int) -> bool:
    """Whether a part that has failed, or ended its worker, so many times is tried once more.

    A refusal or a wrong job does not change; what ran out of memory gets one more chance, alone on its worker.
    """
    if code in _NEVER_AGAIN:
        return False
    return times <= (min(1, retries) if code in _ONCE_MORE else retries)
