"""The spool: records wait here, one file each, until a tracking server has them. No job needs a server to end."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from permed_compute.errors import EngineError
from permed_compute.paths import write_json
from permed_compute.tracking.port import RecordRefusedError, RunRecord, Tracker


@dataclass(frozen=True, slots=True)
class Drained:
    """What one `drain` did. `error` is a sentence for people, '' where everything was sent."""

    sent: int
    left: int
    error: str = ""
    found_at: tuple[str, ...] = ()
    """Where a person finds each run that was sent, in the order of sending."""


class Spool:
    """Records as files below `folder`, named by the end of the attempt and the job, so that names sort by age."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def put(self, record: RunRecord) -> Path:
        """Keep the record durably. The same job and end again replaces the same file."""
        entry = self.folder / f"{record.ended_at:015d}-{record.job_id}.json"
        write_json(entry, asdict(record))
        return entry

    def pending(self) -> list[Path]:
        """Entries that wait, oldest end first."""
        return sorted(self.folder.glob("[0-9]*.json"))

    def read(self, entry: Path) -> RunRecord:
        """The record of an entry. Raises `RecordRefusedError` where the file is not one."""
        try:
            row = json.loads(entry.read_text(encoding="utf-8"))
            row["metrics"] = {
                name: [(int(step), float(value), int(at)) for step, value, at in points]
                for name, points in row["metrics"].items()
            }
            row["models"] = tuple(row.get("models", ()))
            return RunRecord(**row)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise RecordRefusedError(
                f"The spooled record {entry.name} cannot be read ({error.__class__.__name__}).",
                remedy="Move it out of the spool; the job's results are not touched by that.",
            ) from None

    def done(self, entry: Path) -> None:
        """The server has it."""
        entry.unlink(missing_ok=True)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """True for the one process that sends now; False where another one does."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield False
            else:
                yield True
        finally:
            os.close(handle)  # releases the lock


def drain(spool: Spool, tracker: Tracker) -> Drained:
    """Send what is pending, oldest first; what cannot be sent stays. Never raises for a server that is down.

    A refused record does not hold up the ones behind it; a server that is down ends the round at once, so that a long
    spool does not wait for one time-out after another.
    """
    found: list[str] = []
    complaints: list[str] = []
    with spool.alone() as mine:
        if not mine:
            left = len(spool.pending())
            return Drained(0, left, f"Another process is sending the {left} spooled records now." if left else "")
        for entry in spool.pending():
            try:
                found.append(tracker.send(spool.read(entry)))
            except FileNotFoundError:
                continue  # `done` in the meantime
            except RecordRefusedError as error:
                complaints.append(str(error))
            except EngineError as error:
                complaints.append(str(error))
                break
            else:
                spool.done(entry)
        left = len(spool.pending())
    return Drained(len(found), left, _sentence(left, complaints), tuple(found))


def _sentence(left: int, complaints: list[str]) -> str:
    if not complaints:
        return ""
    waiting = "1 record waits" if left == 1 else f"{left} records wait"
    more = f" ({len(complaints) - 1} more like it)" if len(complaints) > 1 else ""
    return f"{complaints[0]}{more} {waiting} in the spool and will be sent later; no job is held up by that."
