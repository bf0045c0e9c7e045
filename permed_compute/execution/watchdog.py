"""Holds an attempt to what it was granted: cores by affinity, memory by ending the worker that takes more.

A placement group accounts and does not enforce: processes, threads and Ray work that a job starts outside its group
all bear its mark, and are pinned to its cores and counted to the worker that they came from, wherever Ray put them.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from permed_compute.execution import processes
from permed_compute.execution.processes import Process, ProcessTable
from permed_compute.execution.worker import WorkerLost

log = logging.getLogger(__name__)

TICK_S = 0.5
DRIVER = "driver"
DRIVER_MEMORY = 512
"""MiB that plan and reduce may take beyond what the workers leave unused of the attempt's memory."""


class Watchdog:
    """Watches one attempt from its driver's process, every `TICK_S` seconds where that costs little.

    granted: MiB per slot. cores: where the attempt may run; empty = anywhere. `driver_over` is called, once, when
    the driver's own memory (plan, reduce) is what exceeds the attempt's.
    """

    def __init__(
        self, name: str, granted: Sequence[int], cores: Sequence[int], driver_over: Callable[[WorkerLost], None]
    ) -> None:
        self._name, self._granted, self._cores = name, granted, list(cores)
        self._driver_over = driver_over
        self._reasons: dict[str, WorkerLost] = {}
        self._table = ProcessTable()
        self._seen: dict[tuple[int, int], Process] = {}
        self._ended_cpu_s = 0.0
        self._peak_mib = 0
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        threading.Thread(target=self._run, name="permed-watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def reason(self, slot: int) -> WorkerLost | None:
        """Why the watchdog ended that worker, if it did."""
        return self._reasons.get(str(slot))

    def end_slot(self, slot: int) -> bool:
        """End every process of that worker, so that another may take its place. True once none is left."""
        gone = processes.kill_all(lambda: self._slots().get(str(slot), []))
        self._reasons.pop(str(slot), None)
        return gone

    def end_all(self) -> bool:
        """End every worker's processes; the driver's own go with the driver. True once none is left."""
        return processes.kill_all(
            lambda: [process for slot, found in self._slots().items() if slot != DRIVER for process in found]
        )

    def facts(self) -> Mapping[str, Any]:
        """Peak memory of all workers together (MiB) and their CPU seconds, without the driver's own process."""
        with self._lock:
            return {"rss_peak_mib": self._peak_mib, "cpu_s": round(self._cpu_s(), 2)}

    def use(self) -> Mapping[str, Any]:
        """What all workers on this machine together use, as of the last round: see `live.Meter`."""
        with self._lock:
            return {"cpu_s": self._cpu_s(), "rss_mib": processes.resident_mib(self._seen.values())}

    def look(self) -> None:
        """One round: pin, count, and end whoever takes more memory than it was granted."""
        slots = self._slots()
        if self._cores:
            for found in slots.values():
                for process in found:
                    processes.pin(process.pid, self._cores)
        self._count([process for found in slots.values() for process in found if process.pid != os.getpid()])
        held = 0
        for slot, found in slots.items():
            if slot != DRIVER:
                held += min(self._granted[int(slot)], self._hold_to_memory(slot, found))
        self._hold_driver(slots.get(DRIVER, []), sum(self._granted) - held + DRIVER_MEMORY)

    def _cpu_s(self) -> float:
        return self._ended_cpu_s + sum(p.cpu_s + p.children_cpu_s for p in self._seen.values())

    def _slots(self) -> dict[str, list[Process]]:
        with self._lock:
            return processes.of_attempt(self._name, self._table.look())

    def _run(self) -> None:
        pause = TICK_S
        while not self._stop.wait(pause):
            began = time.thread_time()
            try:
                self.look()
            except OSError as error:  # /proc changes while it is read
                log.warning("watchdog of %s: %s", self._name, error)
            # On a machine with thousands of processes a look is dear: never more than a twentieth of a core.
            pause = max(TICK_S, 20 * (time.thread_time() - began))

    def _hold_to_memory(self, slot: str, found: list[Process]) -> int:
        granted = self._granted[int(slot)]
        used = _used(found, granted)
        if used > granted:
            self._reasons[slot] = WorkerLost(
                f"Worker {slot} held {used} MiB of memory; it was granted {granted} MiB.",
                code="over-memory", remedy="Raise resources.memory, or make the parts smaller.",
            )  # fmt: skip
            processes.kill(found)
        return used

    def _hold_driver(self, found: list[Process], allowed: int) -> None:
        used = _used(found, allowed)
        if used > allowed:
            self._stop.set()
            self._driver_over(
                WorkerLost(
                    f"Plan or reduce held {used} MiB of memory; {allowed} MiB were there for it.",
                    code="over-memory", remedy="Raise resources.memory, or keep less in plan and reduce.",
                )
            )  # fmt: skip

    def _count(self, found: list[Process]) -> None:
        now = {(process.pid, process.started): process for process in found}
        with self._lock:
            for who, process in self._seen.items():
                # A child that a living parent has waited for is in the parent's `children_cpu_s` from now on.
                if who not in now and process.parent not in {present.pid for present in found}:
                    self._ended_cpu_s += process.cpu_s + process.children_cpu_s
            self._seen = now
            self._peak_mib = max(self._peak_mib, processes.resident_mib(found))


def _used(found: list[Process], limit: int) -> int:
    """MiB; the exact figure costs a walk through the page tables, and is taken only where it could matter."""
    resident = processes.resident_mib(found)
    return resident if resident <= limit else processes.held_mib(found)
