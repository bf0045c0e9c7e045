"""Failure policy in one place: what is tried again, how often, after which pause, and the words for it.

Deciding only: the controller acts. An attempt that finished parts before it was lost does not use up the budget: a
long job on an unreliable machine goes on as long as it moves.
"""

from __future__ import annotations

from dataclasses import dataclass

from permed_compute.states import JobState

REASONS = {
    "worker-lost": ("A worker's process is gone.", "See `permed logs`; if it happens again, ask for more memory."),
    "over-memory": ("A worker used more memory than it was granted.", "Raise resources.memory."),
    "outside-group": ("Work was started outside the job's reservation.", "Leave scheduling to permed."),
    "attempt-lost": ("The attempt's processes are gone without an exit record.", "Usually the engine or node died."),
    "launch-failed": ("The engine did not start the attempt.", "`permed doctor` shows what the engine says."),
    "time-limit": ("It reached its time limit.", "Raise time_limit, then `permed resume`: finished parts are kept."),
    "code-error": ("The workload's code raised an exception.", "See `permed logs`."),
    "preempted": ("It gave way to other work.", "Nothing: it goes on from its checkpoint when its turn comes."),
    "interrupted": ("It was interrupted.", "`permed resume` goes on where it stopped."),
}
"""Code → (sentence, remedy). What a workload or executor says itself comes before these."""

_FIRST_PAUSE_MS = 1_000
_LONGEST_PAUSE_MS = 300_000


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of a job whose attempt was lost. `losses` in a row without progress; `not_before` in ms."""

    to: JobState
    losses: int
    not_before: int
    sentence: str
    remedy: str


def after_loss(code: str, *, losses: int, progressed: bool, retries: int, now: int) -> Verdict:
    """Queue the job again with a growing pause, or fail it when its budget is spent."""
    losses = 1 if progressed else losses + 1
    sentence, remedy = REASONS.get(code, (f"The attempt was lost ({code}).", ""))
    if losses > retries:
        return Verdict(JobState.FAILED, losses, 0, f"{sentence} {losses} times in a row without progress.", remedy)
    pause = min(_LONGEST_PAUSE_MS, _FIRST_PAUSE_MS * 2 ** (losses - 1))
    return Verdict(JobState.QUEUED, losses, now + pause, sentence, remedy)
