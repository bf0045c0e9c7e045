"""An engine that places jobs itself (Slurm): what the controller asks of it beyond `port.Executor`.

It keeps the time limits, it may be away for days, and it may stop an attempt and start it again under the same id:
such an attempt *pauses*. A pause is a stop request that says so (`ask_pause`); the driver then leaves a paused record
instead of an exit record, and whoever starts the attempt again takes both away (`unpause`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from permed_compute.errors import EngineError
from permed_compute.execution.port import Attempt
from permed_compute.paths import AttemptPaths, read_json, write_json
from permed_compute.queue.port import Job, wall_clock
from permed_compute.spec import JobSpec


class EngineAwayError(EngineError):
    """The engine cannot be asked: nothing was refused and nothing is known. What was asked is asked again."""

    code = "engine-away"


@dataclass(frozen=True, slots=True)
class Word:
    """What the engine says of an attempt, for `permed why`: a code, why, and what would have to change."""

    code: str
    sentence: str
    change: str = ""


@runtime_checkable
class Delegated(Protocol):
    """Beside `port.Executor`. `launch` raises `EngineAwayError` where the engine is away: the job stays LAUNCHING."""

    def require(self, spec: JobSpec) -> None:
        """Raises `PermedError` where the engine would refuse the job."""
        ...

    def queued(self, jobs: Sequence[Job]) -> None:
        """Keep what they will need when they are sent, perhaps by another process."""
        ...

    def expect(self, arrays: Mapping[str, Sequence[Attempt]]) -> None:
        """What is about to be launched, by array, replacing what was said before: it may go out together."""
        ...

    def how_lost(self, attempt: Attempt) -> str:
        """Code of `failure.KINDS`, or `time-limit`, for an attempt that is GONE without an exit record."""
        ...

    def says(self, attempt: Attempt) -> Word | None:
        """Where the engine has the attempt; None where its own records say more."""
        ...


def paused_file(paths: AttemptPaths) -> Path:
    """What the driver writes instead of an exit record when it was asked to pause and has."""
    return paths.root / "paused.json"


def ask_pause(paths: AttemptPaths, reason: str) -> None:
    """Please stop where you can go on, and do not call it an end."""
    write_json(paths.stop, {"reason": reason, "at": wall_clock(), "pause": True})


def pauses(paths: AttemptPaths) -> bool:
    """Whether what asked the attempt to stop wants it to go on later, as the same attempt."""
    stop: dict[str, Any] = read_json(paths.stop) or {}
    return bool(stop.get("pause"))


def unpause(paths: AttemptPaths) -> None:
    """Before the attempt goes on."""
    paths.stop.unlink(missing_ok=True)
    paused_file(paths).unlink(missing_ok=True)
