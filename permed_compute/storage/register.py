"""A frequency register's folder: its releases, who was counted in each, and a chain of audit entries.

    <register>/releases/0001/public/     what may leave: frequencies.parquet, beacon.jsonl.gz, release.json
    <register>/releases/0001/private/    members.json, aside.json: who was counted and who was not, by pseudonym, for
                                         the next release's checks; facts.json: how many cells a difference withheld
    <register>/audit.jsonl               one line a release, each with the digest of the line before

A release is made elsewhere and renamed into place; its number is the next. The whole folder has mode 0700.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.errors import AuditError
from permed_compute.paths import read_json


@dataclass(frozen=True, slots=True)
class Release:
    number: int
    folder: Path

    @property
    def facts(self) -> Mapping[str, Any]:
        """What the release says of itself, and what is said of it here only."""
        public, private = (
            read_json(self.folder / name) or {} for name in ("public/release.json", "private/facts.json")
        )
        return {**public, **private}

    @property
    def table(self) -> Path:
        return self.folder / "public" / "frequencies.parquet"

    @property
    def members(self) -> dict[str, frozenset[str]]:
        """Pseudonyms of the people counted, by population."""
        return self._people("members.json")

    @property
    def aside(self) -> dict[str, frozenset[str]]:
        """Those of the populations who were not counted."""
        return self._people("aside.json")

    def _people(self, name: str) -> dict[str, frozenset[str]]:
        found = read_json(self.folder / "private" / name) or {}
        return {population: frozenset(people) for population, people in found.items()}


class Register:
    """One register. Writers take turns by a lock on the folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._releases = root / "releases"
        self._releases.mkdir(parents=True, exist_ok=True, mode=0o700)
        root.chmod(0o700)

    def releases(self) -> list[Release]:
        """In order."""
        numbers = sorted(int(path.name) for path in self._releases.iterdir() if path.name.isdigit())
        return [Release(number, self._releases / f"{number:04d}") for number in numbers]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One writer at a time, across processes."""
        handle = os.open(self.root / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def add(self, made: Path, facts: Mapping[str, Any]) -> Release:
        """Take the folder `made` (`public/`, `private/`) as the next release; call it within `turn`.

        A release with the same `digest` is returned as it stands: the job that made it was run again.
        """
        for release in self.releases():
            if release.facts.get("digest") == facts["digest"]:
                self._enter(release)
                return release
        number = max((release.number for release in self.releases()), default=0) + 1
        target = self._releases / f"{number:04d}"
        fresh = self._releases / f".{number:04d}.new"
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(made, fresh)
        for folder in (fresh, *(path for path in fresh.rglob("*") if path.is_dir())):
            folder.chmod(0o700)
        fresh.rename(target)
        release = Release(number, target)
        self._enter(release)
        return release

    def _enter(self, release: Release) -> None:
        """Its audit entry, unless a crash came only after it was written."""
        lines = self._lines()
        if any(json.loads(line)["release"] == release.number for line in lines):
            return
        facts = release.facts
        told = ("made_at", "digest", "policy", "people", "variants", "withheld", "withdrawn", "account", "purpose")
        entry = {"release": release.number, "before": _digest(lines[-1]) if lines else "",
                 "table": _file_digest(release.table), **{name: facts.get(name) for name in told}}  # fmt: skip
        with (self.root / "audit.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _lines(self) -> list[str]:
        path = self.root / "audit.jsonl"
        return path.read_text(encoding="utf-8").splitlines() if path.exists() else []

    def entries(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._lines()]

    def verify(self) -> int:
        """How many entries there are. Raises `AuditError` naming the first that does not follow, or a changed table."""
        before = ""
        lines = self._lines()
        for seq, line in enumerate(lines, 1):
            entry = json.loads(line)
            if entry["before"] != before:
                raise AuditError(f"Entry {seq} of the register does not follow the one before.", seq=seq)
            table = Release(entry["release"], self._releases / f"{entry['release']:04d}").table
            if not table.exists() or _file_digest(table) != entry["table"]:
                raise AuditError(f"The table of release {entry['release']} is not what was released.", seq=seq)
            before = _digest(line)
        numbers = [release.number for release in self.releases()]
        if numbers != [json.loads(line)["release"] for line in lines]:
            raise AuditError("Releases and audit entries are not the same.", seq=len(lines) + 1)
        return len(lines)


def _digest(line: str) -> str:
    return hashlib.sha256(line.encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
