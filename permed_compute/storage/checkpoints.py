"""Checkpoints of a gang: one folder per step, written beside, published by rename, verified by digest before use.

<job>/state/checkpoint-000007/rank-0/…  rank-1/…  checkpoint.json      {"world": 2, "files": {name: sha256}}
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

from permed_compute.paths import read_json, write_json

KEEP = 2
"""The newest, and one before it in case the newest turns out damaged."""


def newest(state: Path) -> Path | None:
    """The newest complete checkpoint whose files are what was written, or None."""
    for folder in sorted(state.glob("checkpoint-??????"), reverse=True):
        if _whole(folder):
            return folder
    return None


def save(
    state: Path,
    *,
    rank: int,
    world: int,
    write: Callable[[Path], None],
    barrier: Callable[[], None],
    fence: Callable[[], None],
) -> Path:
    """Every rank calls this together. `write(folder)` stores the rank's state; rank 0 publishes when all have.

    `fence` raises where a newer attempt has taken over, so that an old one can never publish.
    """
    done = sorted(state.glob("checkpoint-??????"))
    number = int(done[-1].name.removeprefix("checkpoint-")) + 1 if done else 1
    new = state / f".new-checkpoint-{number:06d}"
    if rank == 0:
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True, mode=0o700)
    barrier()
    mine = new / f"rank-{rank}"
    mine.mkdir(mode=0o700)
    write(mine)
    barrier()
    final = state / f"checkpoint-{number:06d}"
    if rank == 0:
        fence()
        files = {str(p.relative_to(new)): _digest(p) for p in sorted(new.rglob("*")) if p.is_file()}
        write_json(new / "checkpoint.json", {"world": world, "files": files})
        new.rename(final)
        for old in done[: max(0, len(done) + 1 - KEEP)]:
            shutil.rmtree(old, ignore_errors=True)
    barrier()
    return final


def _whole(folder: Path) -> bool:
    try:
        record = read_json(folder / "checkpoint.json")
        return record is not None and all(_digest(folder / name) == value for name, value in record["files"].items())
    except (OSError, ValueError, KeyError):
        return False


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
