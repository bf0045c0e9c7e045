"""POSIX: a folder that both sides reach, by a mount or by hands that carry it (a filsluse's share).

A volume is written under a hidden name, synced and renamed. What a cut left is compared with the source before it is
gone on from, so that a byte that flipped meanwhile is written again.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Self

from permed_compute.errors import NoRoomError, NotFoundError, TransferError
from permed_compute.transfer.port import CHUNK, Moved, Volume

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class Folder:
    """A folder as a channel."""

    path: Path
    largest: int = 0

    def __enter__(self) -> Self:
        if not self.path.is_dir():
            raise NotFoundError(
                "The channel's folder is not there.", remedy="Is the share mounted? mkdir, or mount it."
            )
        return self

    def __exit__(self, *exc: object) -> None: ...

    def put(self, volume: Volume, moved: Moved) -> None:
        target, part = self.path / volume.name, self._part(volume.name)
        if target.exists() and target.stat().st_size == volume.size:
            moved(volume.size)
            return
        held = part.stat().st_size if part.exists() else 0
        require_room(self.path, volume.size - held)
        try:
            with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
                _write(file, volume, moved)
            part.replace(target)
            sync(self.path)
        except OSError as error:
            if error.errno in _FULL:
                part.unlink(missing_ok=True)
            raise of_os(error) from None

    def forget(self, name: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        self._part(name).unlink(missing_ok=True)

    def sizes(self) -> Mapping[str, int]:
        return {
            entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file(follow_symlinks=False)
        }

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        try:
            with (self.path / name).open("rb") as file:
                file.seek(offset)
                while piece := file.read(CHUNK):
                    yield piece
        except OSError as error:
            raise of_os(error) from None

    def _part(self, name: str) -> Path:
        return self.path / f".{name}.part"


def _write(file: BinaryIO, volume: Volume, moved: Moved) -> None:
    at, same = 0, True
    for piece in volume.read(0):
        if same:
            same = file.read(len(piece)) == piece
            if not same:
                file.seek(at)
        if not same:
            file.write(piece)
        at += len(piece)
        moved(at)
    file.truncate(at)
    file.flush()
    os.fsync(file.fileno())


def require_room(folder: Path, size: int) -> None:
    """Raise `NoRoomError` where the file system has no room for `size` more bytes."""
    free = shutil.disk_usage(folder).free
    if size > free:
        raise NoRoomError(
            f"{size / 2**30:,.2f} GiB should go there; {free / 2**30:,.2f} are free. Nothing was written.",
            remedy="Make room, or choose another place.",
        )


def of_os(error: OSError) -> TransferError:
    """The operating system's word in ours; a full disk, quota or file size limit is `NoRoomError`."""
    if error.errno in _FULL:
        return NoRoomError(
            f"The disk or a quota is full ({errno.errorcode[error.errno or 0]}); what was half-written is removed.",
            remedy="Make room, or choose another place, then run it again.",
        )
    return TransferError(
        f"A file could not be read or written ({errno.errorcode.get(error.errno or 0, error.__class__.__name__)}).",
        remedy="Run it again when that is mended: it goes on from what is there.",
    )


def sync(folder: Path) -> None:
    """Make renames in the folder survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
