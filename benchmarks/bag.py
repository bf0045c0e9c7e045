"""The same bag of parts through ours on Ray, bare Ray tasks, Ray Data and dask.distributed."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from importlib.util import find_spec
from typing import Any

from benchmarks.harness import Case, LeftOutError
from benchmarks.overhead import _steps_for
from benchmarks.rigs.bare_ray import WORK, BareRay, ray_environment, run, start_ray
from benchmarks.rigs.home import new_home
from permed_compute.client import Client, open_client
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

TITLE = "A bag of parts on four engines"
WHY = (
    "What a queue, a ledger, digests and an exit record cost beside engines that have none of them. The bag: from"
    " handing it over to having every result; the engine runs, its workers are started for the bag (dask: its cluster"
    " too, as none stays). CPU seconds and memory of everything that took part stand beside it. A part more: what"
    " another part costs that does nothing, starting left out (a large bag less a small one, by their difference in"
    " parts). 1 → 2 workers: the same bag on one worker, then on two, in one measurement. Goal: two workers are at"
    " least 1.7 times as fast as one; for the rest, figures stand side by side."
)
_SMALL, _LARGE = 100, 600
_SCALING = 1.7


def cases(quick: bool) -> list[Case]:
    parts, part_s = (20, 0.01) if quick else (200, 0.1)
    small, large = (5, 15) if quick else (_SMALL, _LARGE)
    rig = _Rig()
    steps = _steps_for(part_s)
    whole = f"{parts} parts of {part_s * 1000:.0f} ms, 2 workers"
    more, scaling = (
        "a part more that does nothing, 2 workers",
        f"{parts} parts of {part_s * 1000:.0f} ms: 1 → 2 workers",
    )
    found = []
    for number, (name, side) in enumerate(_SIDES.items()):
        peer, close = number > 0, rig.close
        bag = partial(rig.bag, side)
        found += [
            Case(whole, name, "s", "lower", partial(bag, 2, parts, steps), peer=peer, close=close),
            Case(more, name, "ms", "lower", partial(_slope, bag, small, large), peer=peer),
        ]
        if side != "data":  # its readers want a core of their own, so that one worker is never one
            goal = {} if peer else {"goal": f"≥ {_SCALING} × as fast", "limit": 1.0 if quick else _SCALING}
            found.append(
                Case(scaling, name, "×", "higher", partial(_faster, bag, parts, steps), peer=peer, **goal)
            )  # fmt: skip
    return sorted(found, key=lambda case: [whole, more, scaling].index(case.group))


_SIDES = {
    "ours, on Ray": "ours", "bare Ray tasks": "tasks", "Ray Data map_batches": "data", "dask.distributed": "dask",
}  # fmt: skip


def _slope(bag: Callable[[int, int, int], float], small: int, large: int) -> float:
    """Milliseconds that another part costs."""
    return 1000 * (bag(2, large, 1) - bag(2, small, 1)) / (large - small)


def _faster(bag: Callable[[int, int, int], float], parts: int, steps: int) -> float:
    """How many times as fast two workers are as one."""
    return bag(1, parts, steps) / bag(2, parts, steps)


class _Rig:
    def __init__(self) -> None:
        self._stack = ExitStack()
        self._client: Client | None = None
        self._bare: BareRay | None = None
        self._runs = itertools.count()
        self._sums: dict[tuple[int, int], int] = {}

    def close(self) -> None:
        self._stack.close()

    def bag(self, side: str, workers: int, parts: int, steps: int) -> float:
        """Seconds."""
        return self.ours(workers, parts, steps) if side == "ours" else self.bare(side, workers, parts, steps)

    def ours(self, workers: int, parts: int, steps: int) -> float:
        if self._client is None:
            self._client = self._stack.enter_context(open_client(self._stack.enter_context(new_home("ray"))))
        spec = JobSpec(
            name="bag", workload="ours:BURNING", code=str(WORK),
            params={"parts": parts, "steps": steps, "run": next(self._runs)},
            resources={"workers": workers, "cpus": 1, "memory": "512MiB"},
        )  # fmt: skip
        began = time.perf_counter()
        [job] = self._client.wait([job.id for job in self._client.submit(spec)])
        seconds = time.perf_counter() - began
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"The job ended {job.state}: {job.reason}, {job.detail.get('sentence', '')}")
        result: Any = read_json(self._client.paths(job).results / "result.json")
        self._same(parts, steps, result["values"]["sum"])
        return seconds

    def bare(self, engine: str, workers: int, parts: int, steps: int) -> float:
        if engine == "dask" and find_spec("distributed") is None:
            raise LeftOutError("distributed is not installed (extra: bench)")
        if self._bare is None:
            environment = self._stack.enter_context(ray_environment())
            self._bare = start_ray(environment, os.cpu_count() or 2, dashboard=False)
        numbers = [str(number) for number in (workers, parts, steps)]
        command = [sys.executable, str(WORK / "bare_bag.py"), engine, self._bare.address, *numbers]
        told = json.loads(run(command, self._bare.environment, timeout_s=300).splitlines()[-1])
        self._same(parts, steps, told["sum"])
        return float(told["seconds"])

    def _same(self, parts: int, steps: int, total: int) -> None:
        if self._sums.setdefault((parts, steps), total) != total:
            raise RuntimeError("The sides computed different sums.")
