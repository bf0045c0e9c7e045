"""Append-only JSON lines that an attempt writes and the controller folds in.

One writer per file. A line is complete when it ends with a newline: a crash can only cut the last one, which the
reader leaves for the next look. The file's mtime is the attempt's heartbeat.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from permed_compute.queue.port import wall_clock


class Records:
    """The writing side. Thread-safe."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._path = path
        self._lock = threading.Lock()
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if path.stat().st_size:  # an earlier process of this attempt died within a line: close that line
            os.write(self._file, b"\n")

    def write(self, kind: str, **values: Any) -> None:
        """Append one record; `t` is ms since 1970 UTC."""
        line = json.dumps({"t": wall_clock(), "kind": kind, **values}, separators=(",", ":"), ensure_ascii=False)
        with self._lock:
            os.write(self._file, line.encode() + b"\n")

    def beat(self) -> None:
        """A sign of life that costs no bytes."""
        os.utime(self._path)

    def close(self) -> None:
        os.close(self._file)


def read(path: Path, offset: int = 0) -> tuple[list[Mapping[str, Any]], int]:
    """Complete records from byte `offset`, and the offset to go on from. A missing file has none."""
    try:
        with path.open("rb") as file:
            file.seek(offset)
            data = file.read()
    except FileNotFoundError:
        return [], offset
    end = data.rfind(b"\n") + 1
    return list(_parsed(data[:end])), offset + end


def _parsed(data: bytes) -> Iterator[Mapping[str, Any]]:
    for line in data.splitlines():
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except ValueError:
            continue  # a line that a crash cut and `Records` closed


def last_sign(root: Path) -> int:
    """When the attempt last showed life (ms), 0 where it has not: its driver's records alone, since ranks and workers
    may go on for a while after it has died."""
    try:
        return (root / "records-driver.jsonl").stat().st_mtime_ns // 1_000_000
    except FileNotFoundError:
        return 0
