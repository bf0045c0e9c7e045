"""Content digests of input files, remembered by (device, inode, size, mtime): one small file per source folder.

One file per folder, not per source file, because projects have inode quotas (1 M files at NRIS).
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from permed_compute.paths import read_json, write_json


class DigestCache:
    """SHA-256 of files. One thread each; processes may share the folder (the last writer wins, harmlessly)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "digests"
        self._known: dict[Path, dict[str, list[object]]] = {}
        self._changed: set[Path] = set()

    def digest(self, path: Path) -> str:
        """SHA-256 (hex) of the file's bytes."""
        path = path.resolve()
        stat = path.stat()
        mark: list[object] = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns]
        rows = self._rows(path.parent)
        row = rows.get(self._name(path))
        if row is not None and row[:4] == mark:
            return str(row[4])
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        rows[self._name(path)] = [*mark, digest]
        self._changed.add(path.parent)
        return digest

    def save(self) -> None:
        """Write what was learnt."""
        for folder in self._changed:
            write_json(self._file(folder), self._known[folder])
        self._changed.clear()

    def _name(self, path: Path) -> str:
        # Names can carry identifiers: the cache knows them only by digest.
        return hashlib.sha256(path.name.encode(errors="surrogateescape")).hexdigest()[:24]

    def _file(self, folder: Path) -> Path:
        return self._folder / f"{hashlib.sha256(str(folder).encode(errors='surrogateescape')).hexdigest()[:24]}.json"

    def _rows(self, folder: Path) -> dict[str, list[object]]:
        if folder not in self._known:
            try:
                self._known[folder] = read_json(self._file(folder)) or {}
            except ValueError:
                self._known[folder] = {}
        return self._known[folder]
