"""What the controller tells a tracking server. Records are spooled first, then sent: a server that is down loses none.

A record is one JSON file; `files.py` spools them, `mlflow.py` sends them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from permed_compute.errors import EngineError


@dataclass(frozen=True, slots=True)
class RunRecord:
    """Everything that tracking gets of one job, complete at its end. Sending it twice changes nothing.

    params: flat, JSON scalars. metrics: name → list of (step, value, ms since 1970). artifacts: absolute paths below
    the job's results. tags: no identifiers. state: the job's final state.
    """

    job_id: str
    name: str
    experiment: str
    state: str
    started_at: int
    ended_at: int
    params: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Sequence[tuple[int, float, int]]] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    artifacts: Sequence[str] = ()
    models: Sequence[Mapping[str, Any]] = ()
    """To be registered, each: name, folder (among the artifacts), digest, card (Markdown), tags."""


class RecordRefusedError(EngineError):
    """The server is up but will not have this one record; the next one may well pass."""

    code = "record-refused"


class Tracker(Protocol):
    """A tracking server."""

    def send(self, record: RunRecord) -> str:
        """Create or complete the run of that job; returns where a person finds it.

        Raises `EngineError` when the server is down, `RecordRefusedError` when it refuses this record.
        """
        ...
