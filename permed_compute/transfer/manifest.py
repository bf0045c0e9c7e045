"""The manifest: which files a set has, by name, size and SHA-256. Its own digest is the set's reference.

Names are the user's and travel inside the bundle only. A reader trusts none of them: a name that is absolute, climbs,
hides a control character or stands in another file's way is refused before anything is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

from permed_compute.errors import DamagedError, NotFoundError, TransferError
from permed_compute.spec import DataClass
from permed_compute.transfer.port import Progress

FORMAT = "permed-transfer/1"
LARGEST = 512 << 20
"""Bytes of a manifest: about three million files."""
_HEX = frozenset("0123456789abcdef")


@dataclass(frozen=True, slots=True)
class Row:
    """One file: relative POSIX name, bytes, SHA-256 (hex)."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Manifest:
    """The files of a set, ordered by name, and how sensitive they are."""

    rows: tuple[Row, ...]
    data_class: DataClass

    @cached_property
    def text(self) -> bytes:
        """Canonical JSON: what is signed, and what the reference is taken of."""
        body = {
            "format": FORMAT, "data_class": self.data_class.value,
            "files": [[row.name, row.size, row.digest] for row in self.rows],
        }  # fmt: skip
        return json.dumps(body, sort_keys=True, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"

    @cached_property
    def reference(self) -> str:
        """SHA-256 (hex) of the text: the same files under the same names have the same one, whoever sends them."""
        return hashlib.sha256(self.text).hexdigest()

    @cached_property
    def size(self) -> int:
        return sum(row.size for row in self.rows)

    @classmethod
    def of(
        cls, source: Path, data_class: DataClass, digest: Callable[[Path], str],
        progress: Progress = lambda done, total: None,
    ) -> Manifest:  # fmt: skip
        """Of a file or a folder. Raises `NotFoundError`; `TransferError` for what cannot travel: links, devices,
        names that are not UTF-8 or not safe. Empty folders do not travel."""
        if not source.exists():
            raise NotFoundError("There is nothing at the source's path.", remedy="Give a file or a folder.")
        files = sorted((name, path) for name, path in _walk(source))
        if not files:
            raise TransferError("The source has no files.", remedy="Give a file, or a folder with files.")
        bad = [name for name, _ in files if not _safe(name)]
        if bad:
            raise TransferError(
                f"{len(bad)} of {len(files)} names cannot travel: not UTF-8, or with control signs or backslashes.",
                remedy="Rename those files.",
            )
        sizes = [path.stat().st_size for _, path in files]
        rows, done, total = [], 0, sum(sizes)
        for (name, path), size in zip(files, sizes, strict=True):
            rows.append(Row(name, size, digest(path)))
            progress(done := done + size, total)
        return cls(tuple(rows), data_class)

    @classmethod
    def read(cls, text: bytes) -> Manifest:
        """A manifest that somebody sent. Raises `DamagedError` unless it is exactly as `text` writes it."""
        try:
            body = json.loads(text)
            rows = tuple(Row(str(name), int(size), str(digest)) for name, size, digest in body["files"])
            manifest = cls(rows, DataClass(body["data_class"]))
        except (ValueError, KeyError, TypeError):
            raise _no_manifest("it is not a manifest of this version") from None
        if body.get("format") != FORMAT or manifest.text != text:
            raise _no_manifest("it is not a manifest of this version")
        _check(rows)
        return manifest


def _walk(source: Path) -> Iterator[tuple[str, Path]]:
    if source.is_file():
        yield source.name, source
        return
    others = 0
    for place, folders, names in os.walk(source):
        others += sum(Path(place, name).is_symlink() for name in folders)
        for name in names:
            path = Path(place, name)
            if stat.S_ISREG(path.lstat().st_mode):
                yield path.relative_to(source).as_posix(), path
            else:
                others += 1
    if others:
        raise TransferError(
            f"The source holds {others} links or devices, which do not travel.",
            remedy="Copy what they lead to into the folder, or take them out.",
        )


def _safe(name: str) -> bool:
    """A relative path of plain components that every file system here can hold."""
    try:
        size = max(len(part.encode()) for part in name.split("/"))
    except UnicodeEncodeError:
        return False
    plain = name.isprintable() and "\\" not in name and not PurePosixPath(name).is_absolute()
    return plain and 0 < size <= 255 and len(name.encode()) < 4000 and not {"", ".", ".."} & set(name.split("/"))


def _check(rows: Sequence[Row]) -> None:
    names = [row.name for row in rows]
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    if not rows or names != sorted(set(names)) or not all(map(_safe, names)):
        raise _no_manifest("its names are not safe, not in order, or not each there once")
    if folders & set(names):
        raise _no_manifest("a file's name is also a folder's")
    if any(row.size < 0 or len(row.digest) != 64 or not set(row.digest) <= _HEX for row in rows):
        raise _no_manifest("a size or a digest is impossible")


def _no_manifest(why: str) -> DamagedError:
    return DamagedError(
        f"The bundle's manifest is refused: {why}.", remedy="Nothing was unpacked. Ask who sent it to send it again."
    )


def short(reference: Any) -> str:
    """The 16 characters that names and people use."""
    return str(reference)[:16]
