"""Jobs and events as JSON-able rows: over the gateway's socket, and for `--json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from permed_compute.queue.port import Event, Job
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

_JOB = (
    "id", "version", "seq", "owner", "attempt", "reason", "submitted_at", "changed_at", "started_at", "array_id",
    "array_index",
)  # fmt: skip
_EVENT = (
    "seq", "at", "job_id", "actor", "action", "before", "after", "reason", "policy", "previous", "hash",
)  # fmt: skip


def job_row(job: Job, *, spec: bool = True) -> dict[str, Any]:
    """The job with its spec as nested JSON, or without it."""
    row: dict[str, Any] = {name: getattr(job, name) for name in _JOB}
    row["state"] = job.state.value
    if spec:
        row["spec"] = job.spec.model_dump(mode="json")
    row["detail"] = dict(job.detail)
    return row


def job_from_row(row: Mapping[str, Any], spec: JobSpec | None = None) -> Job:
    """The job that `job_row` wrote; `spec` where the row is without it."""
    fields = {name: row[name] for name in _JOB}
    own = spec or JobSpec.model_validate(row["spec"])
    return Job(**fields, state=JobState(row["state"]), spec=own, detail=dict(row["detail"]))


def event_row(event: Event) -> dict[str, Any]:
    return {name: getattr(event, name) for name in _EVENT} | {"data": dict(event.data)}


def event_from_row(row: Mapping[str, Any]) -> Event:
    """The event that `event_row` wrote."""
    return Event(**{name: row[name] for name in _EVENT}, data=dict(row["data"]))
