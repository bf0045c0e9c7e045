"""What a conversion may take: the file system's room, and the files and bytes that a site allows a project."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from permed_compute.errors import WorkloadError


@dataclass(frozen=True, slots=True)
class Budget:
    """The most that the target folder may hold; 0 = no bound of its own. A folder counts as a file, as quotas do."""

    files: int = 0
    bytes: int = 0


def check(folder: Path, *, files: int, size: int, budget: Budget) -> None:
    """Raise `WorkloadError` where `files` more files of `size` bytes in all exceed the budget or the file system.

    What lies in the folder already counts against the budget.
    """
    place = next(path for path in (folder, *folder.parents) if path.exists())
    had_files, had_bytes = _taken(folder) if budget.files or budget.bytes else (0, 0)
    remedy = "Give fewer inputs, another folder, or a larger budget; nothing was written."
    if budget.files and had_files + files > budget.files:
        raise WorkloadError(
            f"The stores take up to {files:,} files; {had_files:,} are there and the budget is {budget.files:,}.",
            remedy=remedy,
        )
    if budget.bytes and had_bytes + size > budget.bytes:
        raise WorkloadError(
            f"The stores take up to {size / 2**30:,.2f} GiB; {had_bytes / 2**30:,.2f} are there and the budget is"
            f" {budget.bytes / 2**30:,.2f}.", remedy=remedy,
        )  # fmt: skip
    free, inodes = shutil.disk_usage(place).free, os.statvfs(place).f_favail
    if size > free:
        raise WorkloadError(
            f"The stores take up to {size / 2**30:,.2f} GiB; {free / 2**30:,.2f} are free.", remedy=remedy
        )
    if inodes and files > inodes:  # 0: the file system does not count them
        raise WorkloadError(f"The stores take up to {files:,} files; the file system allows {inodes:,}.", remedy=remedy)


def _taken(folder: Path) -> tuple[int, int]:
    """(files and folders, bytes) below the folder."""
    files = size = 0
    for place, folders, names in os.walk(folder):
        files += len(folders) + len(names)
        size += sum(Path(place, name).lstat().st_size for name in names)
    return files, size
