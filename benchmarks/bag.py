"""The same bag of parts through ours on Ray, bare Ray tasks, Ray Data and dask.distributed."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
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
    "What a queue, a ledger, digests and an exit record cost beside engines that have none of them. From handing the"
    " bag over to having every result; the engine runs, its workers are started for the bag (dask: its cluster too, as"
    " none stays). Wall time is the figure; CPU seconds and memory of everything that took part stand beside it. The"
    " bag of parts that do nothing shows what starting and a part cost by themselves. Goal: none; figures stand"
    " side by side."
)


def cases(quick: bool) -> list[Case]:
    parts, part_s = (20, 0.01) if quick else (200, 0.05)
    rig = _Rig()
    steps = _steps_for(part_s)
    bags = ((f"{parts} parts of {part_s * 1000:.0f} ms", steps), (f"{parts} parts that do nothing", 1))
    found = []
    for group, size in bags:
        found += [
            Case(group, "ours, on Ray, 2 workers", "s", "lower", _ours(rig, 2, parts, size), close=rig.close),
            Case(group, "bare Ray tasks", "s", "lower", _bare(rig, "tasks", parts, size), peer=True),
            Case(group, "Ray Data map_batches", "s", "lower", _bare(rig, "data", parts, size), peer=True),
            Case(group, "dask.distributed", "s", "lower", _bare(rig, "dask", parts, size), peer=True),
        ]
        if size > 1:
            found.append(Case(group, "ours, on Ray, 1 worker", "s", "lower", _ours(rig, 1, parts, size)))
    return found


def _ours(rig: _Rig, workers: int, parts: int, steps: int) -> Callable[[], float]:
    return lambda: rig.ours(workers, parts, steps)


def _bare(rig: _Rig, engine: str, parts: int, steps: int) -> Callable[[], float]:
    return lambda: rig.bare(engine, parts, steps)


class _Rig:
    def __init__(self) -> None:
        self._stack = ExitStack()
        self._client: Client | None = None
        self._bare: BareRay | None = None
        self._runs = itertools.count()
        self._sums: dict[tuple[int, int], int] = {}

    def close(self) -> None:
        self._stack.close()

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

    def bare(self, engine: str, parts: int, steps: int) -> float:
        if engine == "dask" and find_spec("distributed") is None:
            raise LeftOutError("distributed is not installed (extra: bench)")
        if self._bare is None:
            environment = self._stack.enter_context(ray_environment())
            self._bare = start_ray(environment, os.cpu_count() or 2, dashboard=False)
        numbers = [str(number) for number in (2, parts, steps)]
        command = [sys.executable, str(WORK / "bare_bag.py"), engine, self._bare.address, *numbers]
        told = json.loads(run(command, self._bare.environment, timeout_s=300).splitlines()[-1])
        self._same(parts, steps, told["sum"])
        return float(told["seconds"])

    def _same(self, parts: int, steps: int, total: int) -> None:
        if self._sums.setdefault((parts, steps), total) != total:
            raise RuntimeError("The sides computed different sums.")
