"""What an attempt says of itself while it runs: what it uses, how far it is, how fast, and when it will be done.

The driver writes a record of kind `use` every few seconds (`Meter`). Whoever watches reads the newest one from the end
of the attempt's records (`newest_use`): a look at 1,000 jobs is 1,000 short reads, and asks no engine.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.execution.records import Records
from permed_compute.paths import AttemptPaths

_FIRST_S, _EVERY_S = 1.0, 5.0
_WINDOW_S = 300.0
"""The rate is that of the last minutes: parts differ, and a mean over hours says little of the next ones."""
_BLOCK, _MOST = 4096, 2**20


@dataclass(frozen=True, slots=True)
class Far:
    """How far an attempt is. done, total: parts of this round, or steps of a training; 0 of 0: not known yet.
    computed: what this attempt did itself, over all rounds."""

    done: int = 0
    total: int = 0
    computed: int = 0


@dataclass(frozen=True, slots=True)
class Use:
    """One look. `at` in ms; cpus: cores in use, mean since the look before; memory in MiB; gpu: percent busy, mean over
    its devices, None where nobody knows; rate: per second."""

    at: int
    cpus: float | None
    memory: int | None
    gpu: float | None
    gpu_memory: int | None
    done: int
    total: int
    rate: float

    @property
    def ends(self) -> int:
        """When what is planned will be done at this rate, ms; 0 where that cannot be said."""
        return self.at + round(1000 * (self.total - self.done) / self.rate) if self.rate and self.total else 0


class Meter:
    """Writes `use` records while its block runs.

    use() → {cpu_s: seconds so far, rss_mib, gpus: [{busy: percent | None, mib}]}, each where known.
    """

    def __init__(self, records: Records, use: Callable[[], Mapping[str, Any]], far: Callable[[], Far]) -> None:
        self._records, self._use, self._far = records, use, far
        self._stop = threading.Event()
        self._before: tuple[float, float] | None = None
        self._seen: deque[tuple[float, int]] = deque()
        self._thread = threading.Thread(target=self._run, name="permed-meter", daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        pause = _FIRST_S
        while not self._stop.wait(pause):
            self._records.write("use", **self.look(time.monotonic()))
            pause = _EVERY_S

    def look(self, now: float) -> dict[str, Any]:
        """The values of one record; `now` in seconds of a steady clock."""
        used, far = self._use(), self._far()
        # Before the first word of it nothing is known: a training that is taken up does not begin at 0.
        rate = self._rate(now, far.computed) if far.total else 0.0
        row: dict[str, Any] = {"done": far.done, "total": far.total, "rate": round(rate, 6)}
        if "cpu_s" in used:
            row["cpus"] = round(self._cores(now, used["cpu_s"]), 2)
        if "rss_mib" in used:
            row["memory"] = used["rss_mib"]
        if gpus := used.get("gpus"):
            busy = [gpu["busy"] for gpu in gpus if gpu["busy"] is not None]
            row |= {"gpu": round(sum(busy) / len(busy), 1) if busy else None, "gpu_memory": sum(g["mib"] for g in gpus)}
        return row

    def _cores(self, now: float, cpu_s: float) -> float:
        before, self._before = self._before, (now, cpu_s)
        if before is None or now <= before[0]:
            return 0.0
        return max(0.0, cpu_s - before[1]) / (now - before[0])

    def _rate(self, now: float, computed: int) -> float:
        self._seen.append((now, computed))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_S:
            self._seen.popleft()
        since, then = self._seen[0]
        return max(0, computed - then) / (now - since) if now > since else 0.0


def newest_use(paths: AttemptPaths) -> Use | None:
    """The newest `use` record of the attempt's driver; None where there is none yet."""
    row = newest(paths.records(), "use")
    if row is None:
        return None
    return Use(
        row["t"], row.get("cpus"), row.get("memory"), row.get("gpu"), row.get("gpu_memory"), row["done"], row["total"],
        row["rate"],
    )  # fmt: skip


def steps_of(paths: AttemptPaths) -> Far:
    """How far a training is, as its first rank says."""
    row = newest(paths.records("rank-0"), "progress")
    return Far() if row is None else Far(row["done"], row["total"], row["done"])


def newest(path: Path, kind: str) -> Mapping[str, Any] | None:
    """The last record of a kind, looked for from the file's end, at most 1 MiB back."""
    mark = f'"kind":"{kind}"'.encode()
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            block = _BLOCK
            while True:
                start = max(0, size - block)
                file.seek(start)
                lines = file.read(size - start).split(b"\n")
                # The first line may have begun before this block, and the last one may not be written to its end.
                for line in reversed(lines[0 if start == 0 else 1 : -1]):
                    if mark in line:
                        row: Mapping[str, Any] = json.loads(line)
                        return row
                if start == 0 or block >= _MOST:
                    return None
                block *= 16
    except (FileNotFoundError, ValueError):
        return None
