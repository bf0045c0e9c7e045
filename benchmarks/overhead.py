"""What the layer costs: CPU-burning parts through queue, admission and ledger, beside a loop on bare Ray."""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from benchmarks.harness import Case
from benchmarks.rigs.bare_ray import WORK, BareRay, ray_environment, run, start_ray
from benchmarks.rigs.home import disk_folder, new_home
from benchmarks.work.burn import burn
from permed_compute.client import Client, open_client
from permed_compute.execution import records
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

TITLE = "Overhead of the layer"
WHY = (
    "What records, retries and never computes twice must not cost computing time. The same parts with the same amount"
    " of pure Python work, two workers of one CPU each; seconds from the first part's start to the last publication,"
    " as the attempt's own records say. Goal: at most 5 % more than the loop on bare Ray, whose parts write their"
    " result and rename it (ours is also synced to the disk, with its digests). Both sides' sums are compared."
)

_WORKERS = 2


def cases(quick: bool) -> list[Case]:
    parts, part_s = (40, 0.02) if quick else (400, 0.075)
    rig = _Rig(parts, _steps_for(part_s))
    group = f"{parts} parts of {part_s * 1000:.0f} ms, {_WORKERS} workers: first start to last publication"

    def case(name: str, measure: Callable[[], float], **more: Any) -> Case:
        return Case(group, name, "s", "lower", measure, close=rig.close, **more)

    return [
        case("ours, on Ray", rig.ours, goal="≤ 1.05 × bare Ray", ratio=1.05),
        case("loop on bare Ray, results written by rename", lambda: rig.bare(write=True), peer=True),
        case("loop on bare Ray, results only returned", lambda: rig.bare(write=False), peer=True),
    ]


def _steps_for(seconds: float) -> int:
    """How many steps take that long here, at best; the same number then serves every case."""
    steps = 20_000

    def once() -> float:
        began = time.perf_counter()
        burn(steps, 1)
        return time.perf_counter() - began

    return round(steps * seconds / min(once() for _ in range(15)))


class _Rig:
    """Both engines, each started when first needed and kept: the figure is of parts, not of starting."""

    def __init__(self, parts: int, steps: int) -> None:
        self._parts, self._steps = parts, steps
        self._stack = ExitStack()
        self._client: Client | None = None
        self._bare: BareRay | None = None
        self._runs = itertools.count()
        self._sum: int | None = None

    def close(self) -> None:
        self._stack.close()

    def ours(self) -> float:
        if self._client is None:
            self._client = self._stack.enter_context(open_client(self._stack.enter_context(new_home("ray"))))
        client = self._client
        spec = JobSpec(
            name="overhead", workload="ours:BURNING", code=str(WORK),
            params={"parts": self._parts, "steps": self._steps, "run": next(self._runs)},
            resources={"workers": _WORKERS, "cpus": 1, "memory": "512MiB"},
        )  # fmt: skip
        [job] = client.wait([job.id for job in client.submit(spec)])
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"The job ended {job.state}: {job.reason}, {job.detail.get('sentence', '')}")
        paths = client.paths(job)
        result = read_json(paths.results / "result.json")
        self._same(result["values"]["sum"])
        rows, _ = records.read(paths.attempt(job.attempt).records())
        done = [row for row in rows if row["kind"] == "part" and row["state"] == "DONE"]
        if len(done) != self._parts:
            raise RuntimeError(f"{len(done)} of {self._parts} parts were computed.")
        return max(row["started"] / 1000 + row["seconds"] for row in done) - min(row["started"] for row in done) / 1000

    def bare(self, *, write: bool) -> float:
        if self._bare is None:
            environment = self._stack.enter_context(ray_environment())
            cpus = os.cpu_count() or _WORKERS
            self._bare = start_ray(environment, cpus, dashboard=False)
        with disk_folder() as folder:
            numbers = [str(number) for number in (_WORKERS, self._parts, self._steps)]
            place = [str(folder)] if write else []
            command = [sys.executable, str(WORK / "bare_loop.py"), self._bare.address, *numbers, *place]
            told = json.loads(run(command, self._bare.environment, timeout_s=600).splitlines()[-1])
            if write and len(list(folder.glob("part-*.json"))) != self._parts:
                raise RuntimeError("A result file is missing.")
        self._same(told["sum"])
        return float(told["seconds"])

    def _same(self, total: int) -> None:
        if self._sum not in (None, total):
            raise RuntimeError(f"The sides computed different sums: {self._sum} and {total}.")
        self._sum = total
