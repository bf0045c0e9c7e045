"""States of jobs and parts, and the moves that are allowed: one table each, and nothing else decides it.

HELD ─► QUEUED ─► RESERVED ─► LAUNCHING ─► RUNNING ─► SUCCEEDED | PARTIAL | FAILED | CANCELLED | TIMED_OUT
           ▲                                  │
           └── PREEMPTING (signal, checkpoint, grace) ◄┘      LAUNCHING/RUNNING ─► UNKNOWN ─► reconciled

PARTIAL: the job ended, some parts failed, each with its reason; the good results are published.
UNKNOWN: the engine cannot say whether the attempt lives; its reservation is kept. Never FAILED on a time-out.
"""

from __future__ import annotations

from enum import StrEnum

from permed_compute.errors import StateError


class JobState(StrEnum):
    HELD = "HELD"
    QUEUED = "QUEUED"
    RESERVED = "RESERVED"
    LAUNCHING = "LAUNCHING"
    RUNNING = "RUNNING"
    PREEMPTING = "PREEMPTING"
    CANCELLING = "CANCELLING"
    UNKNOWN = "UNKNOWN"
    SUCCEEDED = "SUCCEEDED"
    PARTIAL = "PARTIAL"
    FAILED = "FAILED"
    CANCELLED = "CANCELLED"
    TIMED_OUT = "TIMED_OUT"


class PartState(StrEnum):
    WAITING = "WAITING"
    RUNNING = "RUNNING"
    DONE = "DONE"  # computed by this job
    REUSED = "REUSED"  # the ledger had it already
    REFUSED = "REFUSED"  # the input must not be computed on; deterministic, so remembered
    FAILED = "FAILED"  # retries spent, or poisoned a worker


_J = JobState

ALLOWED: dict[JobState, frozenset[JobState]] = {
    # What a user holds may wait for its files too, and the other way round: noted without another state.
    _J.HELD: frozenset({_J.QUEUED, _J.HELD, _J.CANCELLED}),
    # A waiting job may be promised what is preempted for it, and an elastic one resized: noted without another state.
    _J.QUEUED: frozenset({_J.QUEUED, _J.RESERVED, _J.HELD, _J.CANCELLED, _J.FAILED}),
    _J.RESERVED: frozenset({_J.LAUNCHING, _J.QUEUED, _J.HELD, _J.CANCELLED}),
    _J.LAUNCHING: frozenset(
        {_J.RUNNING, _J.QUEUED, _J.FAILED, _J.CANCELLING, _J.UNKNOWN, _J.PREEMPTING, _J.SUCCEEDED, _J.PARTIAL}
    ),
    _J.RUNNING: frozenset(
        {
            _J.RUNNING,
            _J.SUCCEEDED,
            _J.PARTIAL,
            _J.FAILED,
            _J.TIMED_OUT,
            _J.CANCELLING,
            _J.PREEMPTING,
            _J.UNKNOWN,
            _J.QUEUED,
        }
    ),
    # A preempted or cancelled attempt may still end by itself before the signal reaches it; what it published counts.
    _J.PREEMPTING: frozenset({_J.QUEUED, _J.HELD, _J.SUCCEEDED, _J.PARTIAL, _J.FAILED, _J.CANCELLING}),
    _J.CANCELLING: frozenset({_J.CANCELLED, _J.SUCCEEDED, _J.PARTIAL, _J.FAILED, _J.TIMED_OUT}),
    _J.UNKNOWN: frozenset({_J.RUNNING, _J.QUEUED, _J.SUCCEEDED, _J.PARTIAL, _J.FAILED, _J.TIMED_OUT, _J.CANCELLING}),
    _J.SUCCEEDED: frozenset(),
    # `permed resume` takes an ended job up again; what its ledger holds is not computed twice.
    _J.PARTIAL: frozenset({_J.QUEUED}),
    _J.FAILED: frozenset({_J.QUEUED}),
    _J.CANCELLED: frozenset({_J.QUEUED}),
    _J.TIMED_OUT: frozenset({_J.QUEUED}),
}

AWAITING_FILES = "transfer"
"""Why a job is HELD that names sets of files which have not come in: `permed receive` lets it go."""
WAITING = frozenset({_J.HELD, _J.QUEUED})
LIVE = frozenset({_J.RESERVED, _J.LAUNCHING, _J.RUNNING, _J.PREEMPTING, _J.CANCELLING, _J.UNKNOWN})
"""States that hold a reservation: released only on confirmed termination."""
ENDED = frozenset({_J.SUCCEEDED, _J.PARTIAL, _J.FAILED, _J.CANCELLED, _J.TIMED_OUT})


def check_move(before: JobState, after: JobState) -> None:
    """Raise `StateError` unless the table allows `before` → `after`."""
    if after not in ALLOWED[before]:
        ways = ", ".join(sorted(ALLOWED[before])) or "nothing: it has ended for good"
        raise StateError(
            f"A job that is {before} cannot become {after}.", remedy=f"From {before} it can become {ways}."
        )
