"""The bundle: a set as one byte stream, a tar that is a BagIt bag (RFC 8493) with a signed manifest in front.

    permed-<16 hex>/permed-manifest.json        names, sizes, SHA-256: what is signed
    permed-<16 hex>/permed-manifest.json.sig    SSHSIG, where it is signed
    permed-<16 hex>/bagit.txt, manifest-sha256.txt
    permed-<16 hex>/data/<name>                 the files

The stream depends on names and contents only (no times, no owners), and every offset in it follows from the manifest.
So it is never written to disk by who sends it, begins again at any byte, and is cut into volumes anywhere. Who receives
it makes the same headers from the verified manifest and compares: nobody's tar headers are ever obeyed. Standard tools
open it too: `tar xf`, then `sha256sum -c manifest-sha256.txt`.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from permed_compute.errors import DamagedError, NotFoundError, TransferError
from permed_compute.transfer.manifest import LARGEST, Manifest, Row, short
from permed_compute.transfer.port import CHUNK, Channel, Volume

_BLOCK = 512
_END = bytes(2 * _BLOCK)
_LARGEST_SIGNATURE = 64 << 10
_VOLUME = re.compile(r"permed-([0-9a-f]{16}(?:-[0-9a-f]{8})?)(?:\.(\d{4})of(\d{4}))?\.tar")


def _header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.PAX_FORMAT, "utf-8", "strict")


def _padding(size: int) -> bytes:
    return bytes(-size % _BLOCK)


def _member(name: str, content: bytes) -> bytes:
    return _header(name, len(content)) + content + _padding(len(content))


class Layout:
    """Where everything stands in the stream of a manifest and its signature (empty: unsigned)."""

    def __init__(self, manifest: Manifest, signature: bytes) -> None:
        self.manifest = manifest
        self._base = f"permed-{short(manifest.reference)}"
        # In the volumes' name: what one key signed is never gone on with by another.
        self.stem = self._base + (f"-{hashlib.sha256(signature).hexdigest()[:8]}" if signature else "")
        members = {"permed-manifest.json": manifest.text}
        if signature:
            members["permed-manifest.json.sig"] = signature
        members["bagit.txt"] = b"BagIt-Version: 1.0\nTag-File-Character-Encoding: UTF-8\n"
        members["manifest-sha256.txt"] = "".join(
            f"{row.digest}  data/{row.name.replace('%', '%25')}\n" for row in manifest.rows
        ).encode()
        self.front = b"".join(_member(f"{self._base}/{name}", content) for name, content in members.items())
        self.starts: list[int] = []
        """Offset of each file's first byte."""
        end = len(self.front)
        for row in manifest.rows:
            self.starts.append(end + len(self.header(row)))
            end = self.starts[-1] + row.size + len(_padding(row.size))
        self.size = end + len(_END)

    def header(self, row: Row) -> bytes:
        return _header(f"{self._base}/data/{row.name}", row.size)

    def before(self, index: int) -> bytes:
        """What stands between the file before (or the beginning) and file `index`; its number may be one too many."""
        rows = self.manifest.rows
        left = _padding(rows[index - 1].size) if index else self.front
        return left + (self.header(rows[index]) if index < len(rows) else _END)

    def index(self, offset: int) -> int:
        """The first file that ends after `offset`, or the number of files."""
        at = max(0, bisect_right(self.starts, offset) - 1)
        return at if offset < self.starts[at] + self.manifest.rows[at].size else at + 1


@dataclass(frozen=True)
class Bundle:
    """A set that is sent: the stream is made of the source's files while it is read."""

    source: Path
    layout: Layout

    def volumes(self, largest: int = 0) -> list[Volume]:
        """The stream in pieces of at most `largest` bytes (0: one)."""
        whole, stem = self.layout.size, self.layout.stem
        if not largest or whole <= largest:
            return [self._volume(f"{stem}.tar", 0, whole)]
        count = -(-whole // largest)
        if count > 9999:
            raise TransferError(
                f"The set would take {count} volumes; 9999 is the most.", remedy="Allow larger volumes, or send less."
            )
        return [
            self._volume(f"{stem}.{n + 1:04d}of{count:04d}.tar", n * largest, min(whole, (n + 1) * largest))
            for n in range(count)
        ]

    def _volume(self, name: str, start: int, stop: int) -> Volume:
        return Volume(name, stop - start, lambda offset: self.read(start + offset, stop))

    def read(self, start: int, stop: int) -> Iterator[bytes]:
        """The stream's bytes from `start` to before `stop`. Raises `TransferError` where a file is not what its digest
        says, as soon as its last byte has been read."""
        layout, rows, at = self.layout, self.layout.manifest.rows, start
        for index in range(layout.index(start), len(rows) + 1):
            between = layout.before(index)
            begins = (layout.starts[index] if index < len(rows) else layout.size) - len(between)
            for piece in _chunks(between[max(0, at - begins) : max(0, stop - begins)]):
                at += len(piece)
                yield piece
            if at < stop:
                for piece in self._file(rows[index], at - layout.starts[index], stop - layout.starts[index]):
                    at += len(piece)
                    yield piece
            if at >= stop:
                return

    def _file(self, row: Row, start: int, stop: int) -> Iterator[bytes]:
        path = self.source if self.source.is_file() else self.source / row.name
        stop = min(stop, row.size)
        digest, at = hashlib.sha256(), 0
        try:
            with path.open("rb") as file:
                while at < stop and (piece := file.read(min(CHUNK, stop - at))):
                    digest.update(piece)
                    if at + len(piece) > start:
                        yield piece[max(0, start - at) :]
                    at += len(piece)
        except OSError as error:
            raise _changed(row, error.__class__.__name__) from None
        if at < stop or (stop == row.size and digest.hexdigest() != row.digest):
            raise _changed(row, "it has other bytes")


def _chunks(piece: bytes) -> Iterator[bytes]:
    for begin in range(0, len(piece), CHUNK):
        yield piece[begin : begin + CHUNK]


def _changed(row: Row, why: str) -> TransferError:
    return TransferError(
        f"A file of the source changed while it was sent ({short(row.digest)}…, {why}).",
        remedy="Send it again when nobody writes there: it travels as a new set.",
    )


# ------------------------------------------------------------------------------------------- receiving


@dataclass(frozen=True)
class Arrived:
    """The volumes of one set in a channel, in order, as one stream again."""

    channel: Channel
    stem: str
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def size(self) -> int:
        return sum(self.sizes)

    def read(self, offset: int) -> Iterator[bytes]:
        for name, size in zip(self.names, self.sizes, strict=True):
            if offset < size:
                yield from self.channel.read(name, offset)
            offset = max(0, offset - size)


def stems(channel: Channel) -> dict[str, dict[tuple[int, int], tuple[str, int]]]:
    """Sets that lie in the channel, whole or not: the first 16 characters of their references, with name and size of
    each volume by (its number, how many there are)."""
    found: dict[str, dict[tuple[int, int], tuple[str, int]]] = {}
    for name, size in channel.sizes().items():
        match = _VOLUME.fullmatch(name)
        if match:
            found.setdefault(match[1], {})[int(match[2] or 1), int(match[3] or 1)] = name, size
    return found


def arrived(channel: Channel, reference: str = "") -> Arrived:
    """The set of that reference (a part of it will do), or the only one there is. Raises `NotFoundError`, naming the
    sets that are there, or the first volume that is missing."""
    found = stems(channel)
    wanted = reference if "-" in reference else short(reference)
    fitting = [stem for stem in found if stem.startswith(wanted)]
    if len(fitting) != 1:
        there = f"There: {', '.join(sorted(found)[:10])}." if found else "No set is there yet."
        raise NotFoundError(
            f"{len(fitting) or 'No'} sets fit here. {there}",
            remedy="Say which with --reference." if found else "Run `permed send` on the other side first.",
        )
    volumes = found[fitting[0]]
    # One that was sent anew in volumes of another size may lie beside an older one: the one that is whole counts.
    counts = sorted({count for _, count in volumes})
    missing = [next((n for n in range(1, count + 1) if (n, count) not in volumes), 0) for count in counts]
    if 0 not in missing:
        raise NotFoundError(
            f"Volume {missing[0]} of {counts[0]} of set {fitting[0]} is not there.",
            remedy="Run the same `permed send` again: it goes on where it was cut.",
        )
    count = counts[missing.index(0)]
    ordered = [volumes[n, count] for n in range(1, count + 1)]
    return Arrived(channel, fitting[0], tuple(name for name, _ in ordered), tuple(size for _, size in ordered))


class Stream:
    """Bytes taken in order, however the channel cuts them."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def some(self, most: int) -> bytes:
        """At least one and at most `most` bytes. Raises `DamagedError` at the end."""
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                raise DamagedError(
                    "The bundle ends too early.", remedy="Ask who sent it to send it again (`permed send --anew`)."
                )
            self._left = piece
        taken, self._left = self._left[:most], self._left[most:]
        return taken

    def take(self, count: int) -> bytes:
        taken = bytearray()
        while len(taken) < count:
            taken += self.some(count - len(taken))
        return bytes(taken)

    def expect(self, content: bytes) -> None:
        """Raise `DamagedError` unless exactly these bytes come next."""
        if self.take(len(content)) != content:
            raise DamagedError(
                "What stands between the bundle's files is not what its manifest says.",
                remedy="Ask who sent it to send it again (`permed send --anew`).",
            )


def front(found: Arrived) -> tuple[Manifest, bytes]:
    """The manifest, checked for safety and against the name it came under, and its signature (b'': unsigned)."""
    stream = Stream(found.read(0))
    reference, _, mark = found.stem.partition("-")
    manifest = Manifest.read(_first(stream, reference, "permed-manifest.json", LARGEST))
    if short(manifest.reference) != reference:
        raise DamagedError("The bundle is not the set that its name says.", remedy="Ask who sent it to send it again.")
    return manifest, _first(stream, reference, "permed-manifest.json.sig", _LARGEST_SIGNATURE, optional=not mark)


def _first(stream: Stream, stem: str, name: str, largest: int, *, optional: bool = False) -> bytes:
    try:
        info = tarfile.TarInfo.frombuf(stream.take(_BLOCK), "utf-8", "strict")
    except (tarfile.TarError, UnicodeDecodeError):
        raise _no_bundle() from None
    if info.name != f"permed-{stem}/{name}" or not info.isreg() or not 0 < info.size <= largest:
        if optional:
            return b""
        raise _no_bundle()
    content = stream.take(info.size)
    stream.take(len(_padding(info.size)))
    return content


def _no_bundle() -> DamagedError:
    return DamagedError(
        "This is not a bundle, or its beginning is damaged.", remedy="Ask who sent it to send it again."
    )
