"""Exit codes: one table, from which the program, its help, and docs/reference/exit-codes.md are made."""

from __future__ import annotations

from enum import IntEnum

from permed_compute.errors import (
    AuditError,
    DamagedError,
    EngineError,
    NotFoundError,
    PermedError,
    PermissionDeniedError,
    QueueError,
    RefusedInput,
    SettingsError,
    SiteRefusalError,
    SpecError,
    StaleError,
    StateError,
    TransferError,
    WorkloadError,
)
from permed_compute.states import JobState


class Exit(IntEnum):
    OK = 0
    FAILED = 1
    USAGE = 2
    PARTIAL = 3
    NOT_FOUND = 4
    REFUSED = 5
    UNAVAILABLE = 6
    INTERRUPTED = 130


MEANING = {
    Exit.OK: "it was done; a job that was waited for has SUCCEEDED",
    Exit.FAILED: "the job ended without success (FAILED, CANCELLED, TIMED_OUT), or a check found something wrong",
    Exit.USAGE: "the command, the job file or a setting is wrong",
    Exit.PARTIAL: "the job ended PARTIAL: some parts have no result, the others do",
    Exit.NOT_FOUND: "there is no such job, file or name",
    Exit.REFUSED: "refused: not yours to do, not possible in the job's present state, or against a site's rules",
    Exit.UNAVAILABLE: "the queue, an engine or a channel cannot be used now",
    Exit.INTERRUPTED: "interrupted; `permed resume` goes on where it stopped",
}

_OF_ERROR: tuple[tuple[type[PermedError], Exit], ...] = (
    (SpecError, Exit.USAGE),
    (SettingsError, Exit.USAGE),
    (WorkloadError, Exit.USAGE),
    (NotFoundError, Exit.NOT_FOUND),
    (PermissionDeniedError, Exit.REFUSED),
    (StateError, Exit.REFUSED),
    (RefusedInput, Exit.REFUSED),
    (SiteRefusalError, Exit.REFUSED),
    (StaleError, Exit.UNAVAILABLE),
    (QueueError, Exit.UNAVAILABLE),
    (EngineError, Exit.UNAVAILABLE),
    (DamagedError, Exit.FAILED),
    (TransferError, Exit.UNAVAILABLE),
    (AuditError, Exit.FAILED),
)


def of_error(error: PermedError) -> Exit:
    """The exit code of an error that ends a command."""
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), Exit.FAILED)


def of_states(states: list[JobState]) -> Exit:
    """The exit code of jobs that were waited for: the worst of theirs."""
    if all(state is JobState.SUCCEEDED for state in states):
        return Exit.OK
    if all(state in (JobState.SUCCEEDED, JobState.PARTIAL) for state in states):
        return Exit.PARTIAL
    if any(state is JobState.HELD for state in states):
        return Exit.INTERRUPTED
    return Exit.FAILED


def epilog() -> str:
    """The table for `permed --help`."""
    return "Exit codes: " + "; ".join(f"{code.value} {text}" for code, text in MEANING.items()) + "."
