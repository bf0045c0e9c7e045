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
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from permed_compute.execution import processes
from permed_compute.execution.processes import Process

SCHEMA = 1
REPEATS = 5
# In the environment of all that a case starts, daemons that left our tree included. Not PERMED_ or RAY_: our local Ray
# inherits neither.
_MARK = "BENCHMARK_RUN"
_SAMPLE_S = 0.25
_SETTLED_S = 5.0
"""A process this old has long done its exec: if it is not ours now, it never will be."""
_TICK = os.sysconf("SC_CLK_TCK")

_Who = tuple[int, int]
"""(pid, start time) names a process for good."""


class LeftOutError(Exception):
    """This case cannot be measured here (a peer is not installed): said in the report, no failure."""


@dataclass(frozen=True)
class Case:
    """One way to do what its group measures.

    group: what is measured; its cases share unit and `better`, and run interleaved. measure: does it once and returns
    the figure in `unit`; it may raise `LeftOutError`. goal: the aim in words. limit: the figure that ours must reach;
    ratio: how ours must stand to the first peer's median (`better` says on which side). close: run once at the end.
    Where one measurement takes a minute: `warm` warms up in its stead, and `repeats` is the most that are made.
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
    warm: Callable[[], float] | None = None
    repeats: int | None = None


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
    """Measure every case of these modules (by name). `facts` (machine, versions, commit) are kept with the figures.

    A KeyboardInterrupt ends it with what was measured so far and `interrupted: true`.
    """
    report = {
        "schema": SCHEMA,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "quick": quick,
        "repeats": repeats,
        **(facts or {}),
        "interrupted": False,
        "benchmarks": [],
    }
    try:
        for name, module in modules.items():
            row = {"name": name, "title": module.TITLE, "why": module.WHY, "groups": [], "error": ""}
            report["benchmarks"].append(row)
            _benchmark(row, module, quick, repeats, say)
    except KeyboardInterrupt:
        report["interrupted"] = True
    return report


def _benchmark(
    report: dict[str, Any], module: ModuleType, quick: bool, repeats: int, say: Callable[[str], None]
) -> None:
    """Its groups into `report` as they are measured."""
    name = report["name"]
    cases: list[Case] = []
    try:
        cases = list(module.cases(quick))
        for group in dict.fromkeys(case.group for case in cases):
            members = [case for case in cases if case.group == group]
            measuring = _Group(group, members)
            try:
                measuring.run(repeats, lambda words: say(f"{name}: {words}"))
            finally:
                report["groups"].append(measuring.report())
    except LeftOutError as reason:
        report["left_out"] = str(reason)
    except Exception as error:  # noqa: BLE001 - one benchmark that breaks must not lose the others' figures
        report["error"] = f"{error.__class__.__name__}: {error}"
    finally:
        for case in cases:
            if case.close is not None:
                with suppress(Exception):
                    case.close()


class _Group:
    """The cases of one group and what was measured of them so far."""

    def __init__(self, name: str, cases: Sequence[Case]) -> None:
        if len({(case.unit, case.better) for case in cases}) != 1 or len({case.name for case in cases}) != len(cases):
            raise ValueError(f"The cases of {name!r} must share unit and direction, and differ in name.")
        self.name, self.cases = name, cases
        self.readings: dict[str, list[Reading]] = {case.name: [] for case in cases}
        self.first: dict[str, float] = {}
        self.stopped: dict[str, dict[str, str]] = {}

    def run(self, repeats: int, say: Callable[[str], None]) -> None:
        for turn in range(repeats + 1):  # turn 0 warms up and is kept apart
            for case in _rotated(self.cases, turn):
                if case.name in self.stopped or (case.repeats is not None and turn > case.repeats):
                    continue
                say(f"{self.name}, {case.name}, " + (f"{turn} of {repeats}" if turn else "warm-up"))
                self._measure(case, turn)

    def _measure(self, case: Case, turn: int) -> None:
        warm = case.warm if turn == 0 else None
        try:
            reading = measured(warm or case.measure)
        except LeftOutError as reason:
            self.stopped[case.name] = {"left_out": str(reason)}
        except Exception as error:  # noqa: BLE001 - said in the report; the other cases go on
            self.stopped[case.name] = {"error": f"{error.__class__.__name__}: {error}"}
        else:
            if turn:
                self.readings[case.name].append(reading)
            elif warm is None:
                self.first[case.name] = reading.value

    def report(self) -> dict[str, Any]:
        rows = [
            {"name": case.name, "peer": case.peer, "first": self.first.get(case.name)}
            | summary(self.readings[case.name])
            | self.stopped.get(case.name, {})
            for case in self.cases
        ]
        head = {"group": self.name, "unit": self.cases[0].unit, "better": self.cases[0].better, "cases": rows}
        return head | {"goals": [goal for case in self.cases if (goal := _goal(case, rows)) is not None]}


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

    A daemon that left the tree (`ray start`) is found by a mark in its environment. What an ended process used stands
    in the account of a parent that waited for it; Ray's raylet does not wait for its workers, so the larger counts: the
    parent's account of its children, or what was last seen of those that are gone. Memory is the sum of resident sets:
    pages that processes share count once for each of them.
    """

    cpu_s = 0.0
    peak = 0

    def __init__(self) -> None:
        self._seen: dict[_Who, Process] = {}
        self._base: dict[_Who, Process] = {}
        self._parent: dict[_Who, _Who | None] = {}
        self._foreign: set[_Who] = set()
        self._stop = threading.Event()

    def __enter__(self) -> _Tree:
        os.environ.setdefault(_MARK, uuid.uuid4().hex)
        self._look()
        self._base, self._own = dict(self._seen), _used()
        self._thread = threading.Thread(target=self._watch, name="bench-memory", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        alive = self._look()
        own, children = (now - before for now, before in zip(_used(), self._own, strict=True))
        roots = [who for who in self._seen if who != _me() and (who in alive or self._parent[who] is None)]
        gone = sum(self._used_by(who, alive) for who in self._ended_below(_me(), alive))
        self.cpu_s = own + max(children, gone) + sum(self._used_by(who, alive) for who in roots)

    def _used_by(self, who: _Who, alive: set[_Who]) -> float:
        """Seconds of the process, and of those below it that have ended."""
        process, before = self._seen[who], self._base.get(who)
        own, children = process.cpu_s, process.children_cpu_s
        if before is not None:
            own, children = own - before.cpu_s, children - before.children_cpu_s
        return own + max(children, sum(self._used_by(child, alive) for child in self._ended_below(who, alive)))

    def _ended_below(self, who: _Who, alive: set[_Who]) -> list[_Who]:
        return [child for child, parent in self._parent.items() if parent == who and child not in alive]

    def _watch(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            self._look()

    def _look(self) -> set[_Who]:
        """Look at all processes; returns ours that are alive."""
        read = (processes.read(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - often
        found = {process.pid: process for process in read if process is not None}
        alive: set[_Who] = set()
        # Parents first, as far as numbers tell: a child is ours where its parent is.
        for process in sorted(found.values(), key=lambda process: process.started):
            who = (process.pid, process.started)
            if who in self._foreign:
                continue
            if who not in self._seen and not self._adopt(who, process, found.get(process.parent)):
                continue
            self._seen[who] = process
            alive.add(who)
        self.peak = max(self.peak, sum(self._seen[who].rss for who in alive))
        return alive

    def _adopt(self, who: _Who, process: Process, parent: Process | None) -> bool:
        above = (parent.pid, parent.started) if parent is not None else None
        if who == _me() or above in self._seen:
            self._parent[who] = above if who != _me() else None
            return True
        if _marked(process.pid):
            self._parent[who] = None
            return True
        if time.clock_gettime(time.CLOCK_BOOTTIME) - process.started / _TICK > _SETTLED_S:
            self._foreign.add(who)  # reading every environment each time would disturb the run
        return False


def _marked(pid: int) -> bool:
    try:
        return f"{_MARK}={os.environ[_MARK]}".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


def _me() -> _Who:
    process = processes.read(os.getpid())
    assert process is not None
    return process.pid, process.started


def _used() -> tuple[float, float]:
    """CPU seconds of this process, and of its children that it has waited for."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own.ru_utime + own.ru_stime, children.ru_utime + children.ru_stime
