"""Send and receive: a set of files through a channel, each step gone on from after any cut."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from permed_compute.errors import DamagedError, NoRoomError, StateError, TransferError
from permed_compute.paths import write_json
from permed_compute.spec import DataClass
from permed_compute.transfer.bundle import Arrived, Bundle, Layout, Stream, front
from permed_compute.transfer.folder import of_os, require_room, sync
from permed_compute.transfer.manifest import Manifest, Row, short
from permed_compute.transfer.port import CHUNK, Channel, Progress
from permed_compute.transfer.receipts import Receipt, receipt
from permed_compute.transfer.receipts import file as receipt_file

Verify = Callable[[bytes, bytes], str]
"""(manifest's text, signature or b'') -> who signed; raises where that is not enough."""


def send(channel: Channel, bundle: Bundle, *, largest: int = 0, anew: bool = False, progress: Progress) -> list[str]:
    """Put the bundle into the channel, in volumes of at most `largest` bytes (0: its own limit). Returns their names.

    What is there of an earlier call is gone on from, unless `anew`. Where the far side is full, all are removed.
    """
    volumes = bundle.volumes(min((size for size in (largest, channel.largest) if size), default=0))
    done, total = 0, bundle.layout.size
    if anew:
        for volume in volumes:
            channel.forget(volume.name)
    try:
        for volume in volumes:
            channel.put(volume, lambda there, before=done: progress(before + there, total))  # type: ignore[misc]
            done += volume.size
    except NoRoomError:
        for volume in volumes:
            with suppress(TransferError):  # it goes one way, or is full for that too: what we could remove is removed
                channel.forget(volume.name)
        raise
    return [volume.name for volume in volumes]


def receive(found: Arrived, to: Path, *, verify: Verify, receipts: Path, progress: Progress) -> Receipt:
    """Put the set's files into the new folder `to`: the signature is verified before anything is written, every file
    before the folder gets its name. What an earlier call left is verified and gone on from.

    Raises `DamagedError` naming the file by number and digest, `NoRoomError` (nothing is left), `StateError` where `to`
    holds something else, and what `verify` raises.
    """
    manifest, signature = front(found)
    signer = verify(manifest.text, signature)
    to = to.absolute()
    made = Receipt(manifest.reference, str(to), len(manifest.rows), manifest.size, manifest.data_class.value, signer)
    before = receipt(receipts, manifest.reference)
    if before is not None and Path(before.folder) == to:
        progress(manifest.size, manifest.size)
        return before
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise StateError("The folder to receive into holds something else.", remedy="Give one that is not there yet.")
    layout = Layout(manifest, signature)
    if found.size != layout.size:
        raise DamagedError(
            f"The bundle has {found.size:,} bytes; its manifest makes {layout.size:,}.",
            remedy="Is it still being sent? If not, ask for it again (`permed send --anew`).",
        )
    with _staging(to.parent / f".{to.name}.{short(manifest.reference)}.receiving") as staging:
        try:
            _Landing(layout, found, staging, progress).run()
            _sync_tree(staging)
            if to.exists():
                to.rmdir()  # empty
            write_json(receipt_file(receipts, made.reference), made.as_dict())  # in force once the folder has its name
            staging.rename(to)
            sync(to.parent)
        except OSError as error:
            raise of_os(error) from None
    return made


@contextmanager
def _staging(folder: Path) -> Iterator[Path]:
    """A private folder that one process writes; removed where the disk is full."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    except BlockingIOError:
        raise StateError("Somebody else receives this set there just now.", remedy="Wait for that to end.") from None
    except NoRoomError:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        os.close(handle)


@dataclass
class _Landing:
    """Files from the stream into the staging folder, in the manifest's order."""

    layout: Layout
    found: Arrived
    staging: Path
    progress: Progress

    def run(self) -> None:
        rows, layout = self.layout.manifest.rows, self.layout
        first, landed = self._landed()
        require_room(self.staging, layout.manifest.size - landed)
        held = self._held(rows[first]) if first < len(rows) else 0
        stream = self._stream(first, held)
        for index in range(first, len(rows)):
            if index > first:
                stream.expect(layout.before(index))
            if not self._land(rows[index], stream, held, landed):
                # What lay there was not this file's beginning, or it broke on the way: once more from its first byte.
                stream = self._stream(index, 0)
                if not held or not self._land(rows[index], stream, 0, landed):
                    self._path(rows[index]).unlink()
                    raise DamagedError(
                        f"File {index + 1} of {len(rows)} ({short(rows[index].digest)}…) is not what was sent.",
                        remedy="Nothing was put in place. Ask for the set again: `permed send --anew`.",
                    )
            held, landed = 0, landed + rows[index].size
        if first < len(rows):
            stream.expect(layout.before(len(rows)))

    def _landed(self) -> tuple[int, int]:
        """(the first file that is not there whole and right, bytes before it)."""
        landed = 0
        for index, row in enumerate(self.layout.manifest.rows):
            path = self._path(row)
            if not path.is_file() or path.stat().st_size != row.size:
                return index, landed
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != row.digest:
                    path.unlink()
                    return index, landed
            landed += row.size
            self.progress(landed, self.layout.manifest.size)
        return len(self.layout.manifest.rows), landed

    def _held(self, row: Row) -> int:
        path = self._path(row)
        return min(path.stat().st_size, row.size) if path.is_file() else 0

    def _stream(self, index: int, held: int) -> Stream:
        """From byte `held` of that file on; at its beginning (or the stream's end), what stands before is compared."""
        if held:
            return Stream(self.found.read(self.layout.starts[index] + held))
        before = self.layout.before(index)
        ends = self.layout.starts[index] if index < len(self.layout.starts) else self.layout.size
        stream = Stream(self.found.read(ends - len(before)))
        stream.expect(before)
        return stream

    def _land(self, row: Row, stream: Stream, held: int, landed: int) -> bool:
        path = self._path(row)
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        digest = hashlib.sha256()
        with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600), "r+b") as file:
            _feed(digest, file, held)
            at = held
            while at < row.size:
                piece = stream.some(min(CHUNK, row.size - at))
                file.write(piece)
                digest.update(piece)
                at += len(piece)
                self.progress(landed + at, self.layout.manifest.size)
            file.truncate(at)
        return digest.hexdigest() == row.digest

    def _path(self, row: Row) -> Path:
        return self.staging / row.name


def _feed(digest: Any, file: BinaryIO, count: int) -> None:
    while count > 0 and (piece := file.read(min(CHUNK, count))):
        digest.update(piece)
        count -= len(piece)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync(Path(place, name))
        sync(Path(place))


def manifest_of(source: Path, data_class: DataClass, digest: Callable[[Path], str], progress: Progress) -> Manifest:
    """`Manifest.of`, with the operating system's errors in our words."""
    try:
        return Manifest.of(source, data_class, digest, progress)
    except OSError as error:
        raise of_os(error) from None
