"""One shard of a Zarr v3 array (`sharding_indexed`, ZEP 2): chunks' bytes, then their (offset, length) and a CRC-32C.

A shard is published by rename, so one that exists is whole; its index is checked all the same where it is read. A shard
of which every chunk is absent has no file.
"""

from __future__ import annotations

import mmap
import shutil
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path

import numpy as np

from permed_compute.errors import Finding, RefusedInput
from permed_compute.paths import replacing

_ABSENT = 2**64 - 1
_ENTRY = 16
_CRC = 4
_OPEN_MOST = 256

INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
"""As `zarr.json` says it."""


def write(path: Path, chunks: Sequence[bytes | memoryview | None]) -> int:
    """Publish one shard from its chunks in stored order; returns the bytes written (0: all absent, no file)."""
    if not any(chunk is not None for chunk in chunks):
        return 0
    index = np.full((len(chunks), 2), _ABSENT, "<u8")
    at = 0
    for k, chunk in enumerate(chunks):
        if chunk is not None:
            index[k] = at, len(chunk)
            at += len(chunk)
    packed = index.tobytes()
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        file.write(b"".join([*(chunk for chunk in chunks if chunk is not None), packed, _crc(packed)]))
    return at + len(packed) + _CRC


def write_files(path: Path, files: Sequence[Path]) -> int:
    """Publish one shard whose chunks are these files, in order, without holding them; returns the bytes written."""
    index = np.empty((len(files), 2), "<u8")
    at = 0
    with replacing(path) as temporary, temporary.open("wb", buffering=0) as file:
        for k, chunk in enumerate(files):
            with chunk.open("rb", buffering=0) as source:
                shutil.copyfileobj(source, file, 1 << 20)
            index[k] = at, file.tell() - at
            at = file.tell()
        packed = index.tobytes()
        file.write(packed + _crc(packed))
        return file.tell()


def index(path: Path, count: int) -> np.ndarray | None:
    """(count, 2) uint64 offsets and lengths of the shard, or None without a file. Raises `RefusedInput`."""
    try:
        with path.open("rb", buffering=0) as file:
            size = file.seek(0, 2)
            file.seek(max(0, size - count * _ENTRY - _CRC))
            return _checked(file.read(), size, count)
    except FileNotFoundError:
        return None


def present(found: np.ndarray) -> np.ndarray:
    """Which chunks of the index exist: their numbers."""
    return np.flatnonzero(found[:, 0] != _ABSENT)


def whole(path: Path, count: int) -> bool:
    """Whether the file is a shard of `count` chunks with a sound index that stays inside it."""
    try:
        return index(path, count) is not None
    except (OSError, RefusedInput):
        return False


def _crc(packed: bytes) -> bytes:
    import google_crc32c

    return struct.pack("<I", google_crc32c.value(packed))


def _checked(tail: bytes, size: int, count: int) -> np.ndarray:
    """(count, 2) uint64 offsets and lengths. Raises `RefusedInput` (SHARD_DAMAGED)."""
    packed, crc = tail[:-_CRC], tail[-_CRC:]
    if len(packed) == count * _ENTRY and _crc(packed) == crc:
        index = np.frombuffer(packed, "<u8").reshape(-1, 2)
        there = index[index[:, 0] != _ABSENT]
        if not len(there) or int(there.sum(axis=1).max()) <= size - len(tail):
            return index
    raise RefusedInput(
        Finding("SHARD_DAMAGED", "A shard's index does not agree with its checksum.", "refused", "", {"bytes": size}),
        remedy="`permed verify` lists what is damaged; make the store again.",
    )


class Shards:
    """The chunks of many shards through memory maps. Threads may share it; at most 256 shards are mapped at a time.

    file: from a shard's name (any key) to its path. count: chunks in a shard.
    """

    def __init__(self, file: Callable[[Hashable], Path], count: int) -> None:
        self._file, self._count = file, count
        self._lock = threading.Lock()
        self._open: OrderedDict[Hashable, tuple[list[list[int]], memoryview] | None] = OrderedDict()

    def chunk(self, shard: Hashable, k: int) -> memoryview | None:
        """Bytes of the shard's k-th chunk (a view into the map), or None where it is absent."""
        found = self.shard(shard)
        if found is None:
            return None
        offset, length = found[0][k]
        return None if offset == _ABSENT else found[1][offset : offset + length]

    def shard(self, shard: Hashable) -> tuple[list[list[int]], memoryview] | None:
        """The shard's (offset, length) by chunk and its mapped bytes, or None where it has no file."""
        with self._lock:
            if shard in self._open:
                self._open.move_to_end(shard)
                return self._open[shard]
            found = self._open[shard] = self._map(self._file(shard))
            while len(self._open) > _OPEN_MOST:
                self._open.popitem(last=False)  # unmapped when the last view of it goes
            return found

    def close(self) -> None:
        with self._lock:
            self._open.clear()

    def _map(self, path: Path) -> tuple[list[list[int]], memoryview] | None:
        try:
            with path.open("rb") as file:
                mapped = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError:
            return None
        except ValueError:  # an empty file cannot be mapped
            mapped = memoryview(b"")
        tail = self._count * _ENTRY + _CRC
        index = _checked(bytes(mapped[-tail:]), len(mapped), self._count)
        return index.tolist(), mapped
