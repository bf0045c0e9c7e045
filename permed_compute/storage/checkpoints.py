"""Checkpoints of a gang: one folder each, written beside by all ranks, published by rename, verified before use.

<job>/state/checkpoint-000007/rank-0/…  rank-1/…  checkpoint.json      {"world": 2, "files": {name: sha256}}

Ranks meet through the folder alone: each writes its part, synced to the disk, and last its `rank-N.json`; rank 0
publishes once all have. So nothing here needs the ranks' network, and saving may go on in a thread beside training.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from permed_compute.errors import StaleError
from permed_compute.paths import read_json, write_json

_PATTERN = "checkpoint-??????"
_PREFIX = "checkpoint-"
_RECORD = "checkpoint.json"
_POLL_S = 0.01
_LONGEST_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class Keep:
    """Which checkpoints stay: the `newest` (one more than one, should the newest turn out damaged), and for good every
    one whose number `every` divides (0: none)."""

    newest: int = 2
    every: int = 0

    def doomed(self, names: Collection[str]) -> list[str]:
        """Those that may go."""
        ordered = sorted(names)
        older = ordered[: max(0, len(ordered) - max(1, self.newest))]
        return [name for name in older if not self.every or number_of(name) % self.every]


@dataclass(frozen=True, slots=True)
class Part:
    """One rank's part in checkpoint `number`. `attempt` is the fencing number: what an older one left is swept away."""

    state: Path
    number: int
    attempt: int
    rank: int
    world: int

    @property
    def final(self) -> Path:
        return self.state / f"{_PREFIX}{self.number:06d}"

    @property
    def beside(self) -> Path:
        """Where all ranks of this attempt write until it is complete."""
        return self.state / f".new-{self.attempt:04d}-{self.number:06d}"


def save(part: Part, write: Callable[[Path], None], *, fence: Callable[[], None], keep: Keep | None = None) -> Path:
    """Every rank calls this for the same number. Rank 0 returns once it is published, others once theirs is written.

    `write(folder)` stores this rank's state. `fence` raises where a newer attempt has taken over, so that an old one
    can never publish; it also ends rank 0's waiting for a rank that died.
    """
    mine = part.beside / f"rank-{part.rank}"
    mine.mkdir(parents=True, exist_ok=True, mode=0o700)
    write(mine)
    files = {str(path.relative_to(part.beside)): _synced(path) for path in sorted(mine.rglob("*")) if path.is_file()}
    write_json(part.beside / f"rank-{part.rank}.json", files)
    if part.rank == 0:
        _publish(part, _gathered(part, fence), fence, keep or Keep())
    return part.final


def names(state: Path) -> list[str]:
    """All that are published, newest first. Whether they are whole is not looked at."""
    return sorted((folder.name for folder in state.glob(_PATTERN)), reverse=True)


def number_of(name: str) -> int:
    return int(name.removeprefix(_PREFIX))


def newest(state: Path) -> Path | None:
    """The newest checkpoint whose files are what was written, or None."""
    return next((state / name for name in names(state) if whole(state / name)), None)


def whole(folder: Path, share: tuple[int, int] = (0, 1)) -> bool:
    """Whether the files are, byte for byte, what was written. (i, n): look at every n-th file from the i-th on only."""
    first, step = share
    try:
        record = read_json(folder / _RECORD)
        files: Sequence[tuple[str, str]] = sorted(record["files"].items()) if record is not None else ()
        return record is not None and all(_digest(folder / name) == value for name, value in files[first::step])
    except (OSError, ValueError, KeyError):
        return False


def world_of(folder: Path) -> int:
    """How many ranks wrote it."""
    return int((read_json(folder / _RECORD) or {"world": 0})["world"])


def written_at(state: Path) -> int:
    """When the newest was published (ms since 1970 UTC), 0 where there is none. Reads no file."""
    for name in names(state):
        try:
            return (state / name / _RECORD).stat().st_mtime_ns // 1_000_000
        except OSError:
            continue
    return 0


def _gathered(part: Part, fence: Callable[[], None]) -> dict[str, str]:
    """Digests of every rank's files, waited for."""
    files: dict[str, str] = {}
    pause = _POLL_S
    for rank in range(part.world):
        while (row := read_json(part.beside / f"rank-{rank}.json")) is None:
            fence()
            time.sleep(pause)
            pause = min(_LONGEST_POLL_S, 1.5 * pause)
        files |= row
    return files


def _publish(part: Part, files: dict[str, str], fence: Callable[[], None], keep: Keep) -> None:
    for rank in range(part.world):
        (part.beside / f"rank-{rank}.json").unlink()
    write_json(part.beside / _RECORD, {"world": part.world, "files": files})
    fence()
    if part.final.exists():
        raise StaleError(f"{part.final.name} is there already: another attempt has gone on.")
    part.beside.rename(part.final)
    _sync_folder(part.state)
    for name in keep.doomed(names(part.state)):
        shutil.rmtree(part.state / name, ignore_errors=True)
    for left in part.state.glob(".new-*"):
        if int(left.name.split("-")[1]) < part.attempt:
            shutil.rmtree(left, ignore_errors=True)


def _synced(path: Path) -> str:
    """The file's digest, once its bytes are on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
