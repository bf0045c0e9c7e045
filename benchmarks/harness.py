"""Measures cases of one group interleaved (A B A B …), so that a machine that warms up or is shared treats all alike.

A benchmark is a module `benchmarks/<name>.py` with TITLE, WHY and `cases(quick) -> list[Case]`. `run` returns one JSON
object; the page and the comparison of two runs stand in `permed_compute.reports.benchmarks`.
"""

from __future__ import annotations

import gc
import os
import resource
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from types import ModuleType
from typing import Any, Literal

import psutil

SCHEMA = 1
REPEATS = 5
# In the environment of all that a case starts, daemons that left our tree included. Not PERMED_ or RAY_: our local Ray
# inherits neither.
_MARK = "BENCHMARK_RUN"
_SAMPLE_S = 0.25


class LeftOutError(Exception):
    """This case cannot be measured here (a peer is not installed): said in the report, no failure."""


@dataclass(frozen=True)
class Case:
    """One way to do what its group measures.

    group: what is measured; its cases share unit and `better`, and run interleaved. measure: does it once and returns
    the figure in `unit`; it may raise `LeftOutError`. goal: the aim in words. limit: the figure that ours must reach;
    ratio: how ours must stand to the first peer's median (`better` says on which side). close: run once at the end.
    """

    group: str
    name: str
    unit: str
    better: Literal["higher", "lower"]
    measure: Callable[[], float]
    peer: bool = False
    goal: str = ""
    limit: float | None = None
    ratio: float | None = None
    close: Callable[[], None] | None = None


@dataclass(frozen=True, slots=True)
class Reading:
    """One measurement: the figure, and what the whole process tree used meanwhile (seconds, MiB)."""

    value: float
    wall_s: float
    cpu_s: float
    rss_mib: float


def run(
    modules: Mapping[str, ModuleType],
    *,
    quick: bool = False,
    repeats: int = REPEATS,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda sentence: None,
) -> dict[str, Any]:
    """Measure every case of these modules (by name). `facts` (machine, versions, commit) are kept with the figures."""
    return {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "repeats": repeats,
        **(facts or {}),
        "benchmarks": [_benchmark(name, module, quick, repeats, say) for name, module in modules.items()],
    }


def _benchmark(name: str, module: ModuleType, quick: bool, repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    report: dict[str, Any] = {"name": name, "title": module.TITLE, "why": module.WHY, "groups": [], "error": ""}
    cases: list[Case] = []
    try:
        cases = list(module.cases(quick))
        for group in dict.fromkeys(case.group for case in cases):
            members = [case for case in cases if case.group == group]
            report["groups"].append(_group(group, members, repeats, lambda words: say(f"{name}: {words}")))
    except LeftOutError as reason:
        report["left_out"] = str(reason)
    except Exception as error:  # noqa: BLE001 - one benchmark that breaks must not lose the others' figures
        report["error"] = f"{error.__class__.__name__}: {error}"
    finally:
        for case in cases:
            if case.close is not None:
                with suppress(Exception):
                    case.close()
    return report


def _group(group: str, cases: Sequence[Case], repeats: int, say: Callable[[str], None]) -> dict[str, Any]:
    if len({(case.unit, case.better) for case in cases}) != 1 or len({case.name for case in cases}) != len(cases):
        raise ValueError(f"The cases of {group!r} must share unit and direction, and differ in name.")
    readings: dict[str, list[Reading]] = {case.name: [] for case in cases}
    first: dict[str, float] = {}
    stopped: dict[str, dict[str, str]] = {}
    for turn in range(repeats + 1):  # turn 0 warms up and is kept apart
        for case in _rotated(cases, turn):
            if case.name in stopped:
                continue
            say(f"{group}, {case.name}, " + (f"{turn} of {repeats}" if turn else "warm-up"))
            try:
                reading = measured(case.measure)
            except LeftOutError as reason:
                stopped[case.name] = {"left_out": str(reason)}
            except Exception as error:  # noqa: BLE001 - said in the report; the other cases go on
                stopped[case.name] = {"error": f"{error.__class__.__name__}: {error}"}
            else:
                if turn:
                    readings[case.name].append(reading)
                else:
                    first[case.name] = reading.value
    rows = [
        {"name": case.name, "peer": case.peer, "first": first.get(case.name)}
        | summary(readings[case.name])
        | stopped.get(case.name, {})
        for case in cases
    ]
    head = {"group": group, "unit": cases[0].unit, "better": cases[0].better, "cases": rows}
    return head | {"goals": [goal for case in cases if (goal := _goal(case, rows)) is not None]}


def _rotated(cases: Sequence[Case], turn: int) -> list[Case]:
    """Each turn begins with another case: none always profits from standing second."""
    at = turn % len(cases)
    return [*cases[at:], *cases[:at]]


def summary(readings: Sequence[Reading]) -> dict[str, Any]:
    """Median with min–max of the figure; medians of wall and CPU seconds; the highest memory."""
    values = [reading.value for reading in readings]
    if not values:
        return {"n": 0}
    return {
        "n": len(values),
        "median": statistics.median(values),
        "min": min(values),
        "max": max(values),
        "values": values,
        "wall_s": statistics.median(reading.wall_s for reading in readings),
        "cpu_s": statistics.median(reading.cpu_s for reading in readings),
        "rss_mib": max(reading.rss_mib for reading in readings),
    }


def _goal(case: Case, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The aim of a case and whether its median meets it: True, False, or None where nothing could be compared."""
    if not (case.goal or case.limit is not None or case.ratio is not None):
        return None
    mine = next(row for row in rows if row["name"] == case.name).get("median")
    peers = [row["median"] for row in rows if row["peer"] and row.get("median")]
    checks: list[bool] = []
    if case.limit is not None and mine is not None:
        checks.append(mine >= case.limit if case.better == "higher" else mine <= case.limit)
    against = mine / peers[0] if mine is not None and peers else None
    if case.ratio is not None and against is not None:
        checks.append(against >= case.ratio if case.better == "higher" else against <= case.ratio)
    wanted = (case.limit is not None) + (case.ratio is not None)
    met = all(checks) if checks and (len(checks) == wanted or not all(checks)) else None
    return {"case": case.name, "goal": case.goal, "limit": case.limit, "ratio": case.ratio, "met": met}


# --------------------------------------------------------------------------------------------- one measurement


def measured(measure: Callable[[], float]) -> Reading:
    """Do it once, with the CPU time and the memory of this process and of everything it started."""
    gc.collect()
    with _Tree() as tree:
        began = time.perf_counter()
        value = float(measure())
        wall = time.perf_counter() - began
    return Reading(value, wall, tree.cpu_s, tree.peak / 2**20)


class _Tree:
    """CPU seconds and peak memory of this process and all it started, between enter and exit.

    A child that has ended is in its parent's account (`RUSAGE_CHILDREN`, `children_user`). A daemon that left the tree
    (`ray start`) is found by a mark in its environment, and counted up to when it was last seen. Memory is the sum of
    resident sets: pages that processes share count once for each of them.
    """

    cpu_s = 0.0
    peak = 0

    def __init__(self) -> None:
        self._ours: dict[int, psutil.Process | None] = {}
        self._last: dict[int, float] = {}
        self._orphans: set[int] = set()
        self._stop = threading.Event()

    def __enter__(self) -> _Tree:
        os.environ.setdefault(_MARK, uuid.uuid4().hex)
        self._sample()
        self._base, self._own = dict(self._last), _own_cpu()
        self._thread = threading.Thread(target=self._watch, name="bench-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        alive = self._sample()
        counted = [pid for pid in self._last if pid in alive or pid in self._orphans]
        others = sum(self._last[pid] - self._base.get(pid, 0.0) for pid in counted)
        self.cpu_s = _own_cpu() - self._own + others

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self._sample()

    def _sample(self) -> set[int]:
        memory = psutil.Process().memory_info().rss
        alive: set[int] = set()
        pids = set(psutil.pids())
        for pid in pids - {os.getpid()}:
            process = self._process(pid)
            if process is None:
                continue
            with suppress(psutil.Error), process.oneshot():
                memory += process.memory_info().rss
                self._last[pid] = sum(process.cpu_times()[:4])  # its own, and its children's that have ended
                alive.add(pid)
                parent = process.ppid()
                if parent != os.getpid() and self._ours.get(parent) is None:
                    self._orphans.add(pid)
        for pid in self._ours.keys() - pids:
            del self._ours[pid]  # the number may come again for another process
        self.peak = max(self.peak, memory)
        return alive

    def _process(self, pid: int) -> psutil.Process | None:
        """The process where it is ours, looked at once: reading every environment each time would disturb the run."""
        if pid not in self._ours:
            ours: psutil.Process | None = None
            with suppress(psutil.Error, OSError):
                process = psutil.Process(pid)
                mine = any(parent.pid == os.getpid() for parent in process.parents())
                if mine or process.environ().get(_MARK) == os.environ[_MARK]:
                    ours = process
            self._ours[pid] = ours
        return self._ours[pid]


def _own_cpu() -> float:
    return sum(
        usage.ru_utime + usage.ru_stime
        for usage in (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    )
