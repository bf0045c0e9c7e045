"""The part ledger: finished parts by key, published by a rename that never replaces.

    <home>/ledger/<scope>/<2 hex>/<key>/part.json + the part's files        finished, read-only
    <home>/ledger/<scope>/.new/<key>.<job>.<attempt>.<chance>/              being written

A part's key is the SHA-256 of its inputs' digests, its parameters, the model's digest, the workload's output version,
the precision variant and the seed; the scope (legal entity, account, purpose, data class) is the folder, so that
nothing is ever shared across scopes. `rename` of a folder onto one that is not empty fails (POSIX), which is what
makes a publication exactly-once without a lock, on NFS and Lustre too.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.paths import read_json, write_json

RECORD = "part.json"


def part_key(
    *, inputs: tuple[str, ...], params: Mapping[str, Any], model: str, workload: str, version: str, variant: str,
    seed: int,
) -> str:  # fmt: skip
    """SHA-256 (hex) of everything that decides a part's output."""
    parts = {
        "inputs": list(inputs), "params": dict(params), "model": model, "workload": workload, "version": version,
        "variant": variant, "seed": seed,
    }  # fmt: skip
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Entry:
    """A published part: its folder and what `part.json` says."""

    folder: Path
    record: Mapping[str, Any]

    @property
    def files(self) -> list[Path]:
        """The part's files, relative to `folder`, sorted."""
        return [Path(name) for name in sorted(self.record["files"])]


class Ledger:
    """The finished parts of one scope. Any number of processes may use it at once."""

    def __init__(self, root: Path, scope: tuple[str, ...]) -> None:
        name = hashlib.sha256(json.dumps(list(scope)).encode()).hexdigest()[:20]
        self.root = root / name
        self._new = self.root / ".new"
        self._new.mkdir(parents=True, exist_ok=True, mode=0o700)
        if not (self.root / "scope.json").exists():
            write_json(self.root / "scope.json", list(scope))

    def folder(self, key: str) -> Path:
        return self.root / key[:2] / key

    def find(self, key: str) -> Entry | None:
        """The finished part, or None. An entry that a crash of the machine left without its bytes counts as none."""
        folder = self.folder(key)
        try:
            record = read_json(folder / RECORD)
        except ValueError:
            record = None
        if record is None:
            if folder.is_dir():
                self._set_aside(folder)
            return None
        if any(not (folder / name).is_file() for name in record["files"]):
            self._set_aside(folder)
            return None
        return Entry(folder, record)

    def begin(self, key: str, writer: str) -> Path:
        """A private folder to write the part's files in; `writer` names job and attempt."""
        folder = self._new / f"{key[:24]}.{writer}.{secrets.token_hex(4)}"
        folder.mkdir(mode=0o700)
        return folder

    def publish(self, key: str, folder: Path, record: Mapping[str, Any]) -> tuple[Entry, bool]:
        """Make `folder` the finished part. Returns it and True, or what was there before and False."""
        files = {}
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            files[str(path.relative_to(folder))] = _digest_and_sync(path)
        full = {**record, "key": key, "files": files}
        write_json(folder / RECORD, full)
        target = self.folder(key)
        target.parent.mkdir(exist_ok=True, mode=0o700)
        try:
            folder.rename(target)
        except OSError:
            present = self.find(key)
            if present is None:
                raise
            shutil.rmtree(folder, ignore_errors=True)
            return present, False
        _sync_folder(target.parent)
        return Entry(target, full), True

    def abandon(self, writer: str) -> int:
        """Remove what a job (or `job.attempt`) left half-written; returns how many folders."""
        left = [path for path in self._new.iterdir() if f".{writer}." in path.name]
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
        return len(left)

    def _set_aside(self, folder: Path) -> None:
        folder.rename(self._new / f"{folder.name[:24]}.damaged.{secrets.token_hex(4)}")


def _digest_and_sync(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    return digest


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def link_tree(source: Path, target: Path, names: list[Path]) -> None:
    """Show files of `source` under `target` by hard link, or by copy where the file system forbids links."""
    for name in names:
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            os.link(source / name, place)
        except OSError:
            shutil.copy2(source / name, place)
