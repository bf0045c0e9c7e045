"""The in-process executor: an attempt is a thread of this process. For tests, debuggers and machines without Ray.

Its limits are a thread's limits: it cannot be ended by force, its memory is not its own, and it dies with the
controller (which finds it GONE afterwards and launches again). A gang of several ranks runs in processes of its own.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from permed_compute.admission.snapshot import Node
from permed_compute.execution import processes
from permed_compute.execution.device import local_node
from permed_compute.execution.driver import drive
from permed_compute.execution.gang import TERMINATION
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.worker import Member, Row, WorkerLost, usage
from permed_compute.paths import write_json
from permed_compute.settings import Settings

_END_WAIT_S = 5.0


class InProcessExecutor:
    """See `execution.port.Executor`. `nodes` may be given by tests; default: this machine."""

    name = "inprocess"

    def __init__(self, settings: Settings, nodes: tuple[Node, ...] | None = None) -> None:
        self._nodes = nodes if nodes is not None else (local_node(settings),)
        self._threads: dict[str, threading.Thread] = {}
        self._attempts: dict[str, Attempt] = {}

    def nodes(self) -> tuple[Node, ...]:
        return self._nodes

    def launch(self, attempt: Attempt) -> None:
        if attempt.name in self._threads:
            return
        thread = threading.Thread(
            target=drive, args=(attempt.paths, _crew, self.facts()), name=attempt.name, daemon=True
        )
        self._threads[attempt.name], self._attempts[attempt.name] = thread, attempt
        thread.start()

    def liveness(self, attempt: Attempt) -> Liveness:
        thread = self._threads.get(attempt.name)
        return Liveness.ALIVE if thread is not None and thread.is_alive() else Liveness.GONE

    def end(self, attempt: Attempt) -> bool:
        thread = self._threads.get(attempt.name)
        if thread is not None and thread.is_alive():
            _ask_to_stop(attempt)
            thread.join(_END_WAIT_S)
            if thread.is_alive():
                return False
        self._threads.pop(attempt.name, None)
        return True

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        kept = {attempt.name for attempt in keep}
        return [name for name, thread in self._threads.items() if name not in kept and thread.is_alive()]

    def facts(self) -> Mapping[str, Any]:
        return {"engine": self.name}

    def close(self) -> None:
        alive = [name for name, thread in self._threads.items() if thread.is_alive()]
        for name in alive:
            _ask_to_stop(self._attempts[name])
        deadline = time.monotonic() + _END_WAIT_S
        for name in alive:
            self._threads[name].join(max(0.0, deadline - time.monotonic()))


def _ask_to_stop(attempt: Attempt) -> None:
    if attempt.paths.root.exists() and not attempt.paths.stop.exists():
        write_json(attempt.paths.stop, {"reason": "end"})


def _crew(attempt: Attempt) -> _Threads | _Processes:
    from permed_compute.workloads import registry
    from permed_compute.workloads.port import Gang

    gang = isinstance(registry.find(attempt.spec).workload, Gang)
    return _Processes(attempt) if gang and len(attempt.grants) > 1 else _Threads(attempt)


class _Threads:
    """Members as threads; two calls of one member may overlap (load beside run)."""

    def __init__(self, attempt: Attempt) -> None:
        self.size = len(attempt.grants)
        self._attempt = attempt
        self._members = [Member(str(attempt.paths.root), slot, isolated=False) for slot in range(self.size)]
        self._pool = ThreadPoolExecutor(max_workers=2 * self.size, thread_name_prefix="permed-member")

    def start(self, slot: int, call: str, row: Row) -> Future[Row]:
        method: Callable[[Row], Row] = getattr(self._members[slot], call)
        return self._pool.submit(method, row)

    def restart(self, slot: int) -> None:
        self._members[slot] = Member(str(self._attempt.paths.root), slot, isolated=False)

    def facts(self) -> Mapping[str, Any]:
        return {}  # the members' memory and time are this process's, which the driver counts itself

    def use(self) -> Mapping[str, Any]:
        return processes.use_of([os.getpid()])

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)


class _Processes:
    """Ranks as spawned processes, for gangs."""

    def __init__(self, attempt: Attempt) -> None:
        self.size = len(attempt.grants)
        self._root = str(attempt.paths.root)
        self._pool = ProcessPoolExecutor(self.size, mp_context=multiprocessing.get_context("spawn"))
        self._facts: Row = {"rss_peak_mib": 0, "cpu_s": 0.0}

    def start(self, slot: int, call: str, row: Row) -> Future[Row]:
        inner = self._pool.submit(_call_member, self._root, slot, call, row)
        outer: Future[Row] = Future()

        def hand_over(done: Future[tuple[Row, Row]]) -> None:
            error = done.exception()
            if isinstance(error, BrokenProcessPool):
                outer.set_exception(WorkerLost(f"The process of rank {slot} is gone."))
            elif error is not None:
                outer.set_exception(error)
            else:
                value, used = done.result()
                self._facts["rss_peak_mib"] = max(self._facts["rss_peak_mib"], used["rss_peak_mib"])
                self._facts["cpu_s"] += used["cpu_s"]
                outer.set_result(value)

        inner.add_done_callback(hand_over)
        return outer

    def restart(self, slot: int) -> None:
        raise WorkerLost("A rank was lost; a gang goes on only as a whole.")

    def facts(self) -> Mapping[str, Any]:
        return self._facts

    def use(self) -> Mapping[str, Any]:
        return processes.use_of(list(self._pool._processes or {}))

    def close(self) -> None:
        for process in list((self._pool._processes or {}).values()):
            process.terminate()  # a rank that waits for one that failed would wait for ever
        self._pool.shutdown(wait=True, cancel_futures=True)


def _call_member(root: str, slot: int, call: str, row: Row) -> tuple[Row, Row]:
    TERMINATION.listen()
    return getattr(Member(root, slot, isolated=True), call)(row), usage()
