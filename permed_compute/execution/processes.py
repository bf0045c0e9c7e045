"""Processes of this machine by what they inherited: which belong to an attempt, which to a local Ray. Linux (/proc).

A mark is an environment variable, so that children carry it however they detach (double fork, setsid, another Ray
worker). A process that wiped its environment is still found below its parent: members adopt orphans (`adopt_orphans`).
A worker that Ray is starting has the mark in its command line until it has passed the gate (`raysetup`).
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.execution import raysetup

ATTEMPT_MARK = "PERMED_ATTEMPT"
"""`<attempt name>/<slot>`, slot a number or `driver`."""
STARTING_MARK = "PERMED_ATTEMPT at the gate"
"""No variable, but the same of a process that is not yet one of the attempt's: nothing of the attempt runs in it."""
SESSION_MARK = "PERMED_RAY"
"""The runtime folder of the home whose local Ray this is."""

_TICK = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
_SETTLED_S = 15.0
"""A process this old has long done its exec: that it bears no mark need not be looked up again."""
_LOOKS, _LOOK_AGAIN_S = 20, 0.001
"""Within an exec, a process has neither command line nor environment."""
_PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True, slots=True)
class Process:
    """One look at one process. `started` (clock ticks after boot) with `pid` names it for good; `rss` in bytes.

    cpu_s: its own; children_cpu_s: of the children that it has waited for.
    """

    pid: int
    parent: int
    session: int
    started: int
    cpu_s: float
    children_cpu_s: float
    rss: int


def read(pid: int) -> Process | None:
    """The process as it is now; None where there is none, or only its zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    field = text[text.rindex(")") + 2 :].split()
    if field[0] in "ZX":
        return None
    return Process(
        pid, parent=int(field[1]), session=int(field[3]), started=int(field[19]),
        cpu_s=(int(field[11]) + int(field[12])) / _TICK, children_cpu_s=(int(field[13]) + int(field[14])) / _TICK,
        rss=int(field[21]) * _PAGE,
    )  # fmt: skip


def alive(pid: int, started: int) -> bool:
    """Whether that very process, not a later one of the same number, still runs."""
    process = read(pid)
    return process is not None and process.started == started


class ProcessTable:
    """All processes of this machine, looked at together.

    It remembers between looks: a process that was once below a marked one keeps the mark when its parent dies.
    """

    def __init__(self) -> None:
        self.processes: dict[int, Process] = {}
        self._marks: dict[tuple[int, int], Mapping[str, str]] = {}
        self._kept: dict[tuple[int, int], dict[str, str]] = {}

    def look(self) -> ProcessTable:
        """Look again; returns itself."""
        found = (read(int(name)) for name in os.listdir("/proc") if name.isdigit())  # noqa: PTH208 - called often
        self.processes = {process.pid: process for process in found if process is not None and process.parent != 2}
        present = {(process.pid, process.started) for process in self.processes.values()}
        self._marks = {who: marks for who, marks in self._marks.items() if who in present}
        self._kept = {who: marks for who, marks in self._kept.items() if who in present}
        return self

    def marked(self, name: str) -> dict[int, str]:
        """Process → value of that mark, for those that bear it and, from the nearest parent, all below them."""
        own = {pid: self._mark(process).get(name) for pid, process in self.processes.items()}
        found: dict[int, str] = {}
        for pid, process in self.processes.items():
            kept = self._kept.setdefault((pid, process.started), {})
            value = self._inherited(pid, own) or kept.get(name)
            if value:
                found[pid] = kept[name] = value
        return found

    def _inherited(self, pid: int, own: Mapping[int, str | None]) -> str | None:
        seen = set()
        while pid in own and pid not in seen:
            if own[pid]:
                return own[pid]
            seen.add(pid)
            pid = self.processes[pid].parent
        return None

    def _mark(self, process: Process) -> Mapping[str, str]:
        who = (process.pid, process.started)
        known = self._marks.get(who)
        if known is None:
            known = _marks_of(process.pid)
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - process.started / _TICK
            if STARTING_MARK not in known and (ATTEMPT_MARK in known or age > _SETTLED_S):
                self._marks[who] = known
        return known


def _marks_of(pid: int) -> Mapping[str, str]:
    """The command line first: who passes the gate between the two looks is found by the second."""
    for _ in range(_LOOKS):
        words, environment = _read(pid, "cmdline"), _read(pid, "environ")
        if words or environment:
            break
        time.sleep(_LOOK_AGAIN_S)
    found = _marks_in_environment(environment)
    if raysetup.CONTEXT.encode() in words:
        mark = _variables_to_be(words).get(ATTEMPT_MARK)
        found |= {STARTING_MARK: mark} if mark else {}
    return found


def _marks_in_environment(data: bytes) -> dict[str, str]:
    if b"PERMED_" not in data:
        return {}
    pairs = (item.decode(errors="replace").partition("=") for item in data.split(b"\0") if item.startswith(b"PERMED_"))
    return {name: value for name, _, value in pairs if name in (ATTEMPT_MARK, SESSION_MARK)}


def _variables_to_be(words: bytes) -> Mapping[str, str]:
    """What a worker that Ray is starting will have in its environment."""
    try:
        context = raysetup.context_of(words.decode(errors="replace").split("\0"))
    except ValueError:  # a command line that quotes Ray's
        return {}
    variables: Mapping[str, str] = context.get("env_vars") or {}
    return variables


def _read(pid: int, what: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""


def kill(processes: Iterable[Process]) -> None:
    """SIGKILL, each only if it is still the process that was looked at."""
    for process in processes:
        if alive(process.pid, process.started):
            try:
                os.kill(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


def kill_all(find: Callable[[], Collection[Process]], timeout_s: float = 5.0) -> bool:
    """Kill what `find` returns until it returns nothing. False where something is left after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = find()
        if not found:
            return True
        if time.monotonic() > deadline:
            return False
        kill(found)
        time.sleep(0.02)


def of_attempt(name: str, table: ProcessTable | None = None, kind: str = ATTEMPT_MARK) -> dict[str, list[Process]]:
    """The attempt's processes on this machine, by slot; or those at its gate (`STARTING_MARK`)."""
    table = table or ProcessTable().look()
    slots: dict[str, list[Process]] = {}
    for pid, mark in table.marked(kind).items():
        attempt, _, slot = mark.rpartition("/")
        if attempt == name:
            slots.setdefault(slot, []).append(table.processes[pid])
    return slots


def kill_attempt(name: str, *, spare: Collection[int] = (), timeout_s: float = 5.0) -> bool:
    """End every process of the attempt on this machine but `spare`, and who stands at its gate. True once none is left.

    Where its fence is up, none comes after that.
    """
    table = ProcessTable()

    def left() -> list[Process]:
        table.look()
        slots = [*of_attempt(name, table).values(), *of_attempt(name, table, STARTING_MARK).values()]
        return [process for found in slots for process in found if process.pid not in spare]

    return kill_all(left, timeout_s)


def adopt_orphans() -> None:
    """From now on, a process below this one whose parent dies becomes this one's child instead of init's."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def pin(pid: int, cores: Collection[int]) -> None:
    """Hold every thread of the process to these cores; one that ends meanwhile needs no holding."""
    wanted = set(cores)
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208 - called often
    except OSError:
        return
    for thread in threads:
        try:
            if os.sched_getaffinity(int(thread)) != wanted:
                os.sched_setaffinity(int(thread), wanted)
        except OSError:
            continue


def use_of(pids: Iterable[int]) -> Mapping[str, Any]:
    """CPU seconds so far (`cpu_s`, waited-for children included) and resident memory now (`rss_mib`)."""
    found = [process for pid in pids if (process := read(pid)) is not None]
    return {"cpu_s": sum(p.cpu_s + p.children_cpu_s for p in found), "rss_mib": resident_mib(found)}


def resident_mib(processes: Iterable[Process]) -> int:
    """Resident memory, pages shared between the processes counted in each: never less than what they hold."""
    return sum(process.rss for process in processes) // 2**20


def held_mib(processes: Iterable[Process]) -> int:
    """Memory that would be free if they ended: anonymous and shared memory, shared pages counted once (PSS).

    Pages of mapped files are left out: the kernel takes them back when somebody needs them.
    """
    return sum(_held_kib(process) for process in processes) // 1024


def _held_kib(process: Process) -> int:
    try:
        lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    rows = {line.split(":")[0]: int(line.split()[1]) for line in lines[1:]}
    if "Pss_Anon" not in rows:
        return rows.get("Pss", process.rss // 1024)
    return rows["Pss_Anon"] + rows.get("Pss_Shmem", 0) + rows.get("SwapPss", 0)
