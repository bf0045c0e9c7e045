"""The same bag of parts through ours on Slurm, submitit, dask-jobqueue and a plain sbatch array, on one real Slurm."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks.harness import Case, LeftOutError
from benchmarks.overhead import _steps_for
from benchmarks.rigs.bare_ray import WORK
from benchmarks.rigs.home import disk_folder, new_home
from permed_compute.client import open_client
from permed_compute.errors import NotFoundError
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.testing.execution import wait_for
from permed_compute.testing.slurm import SlurmCluster, SlurmNode

TITLE = "A bag of parts through Slurm"
WHY = (
    "A site charges and limits allocations, and starts them when it likes: a bag should take one, and its parts little"
    " more than their own time. Real slurmctld and slurmd on this machine with 2 declared cores and nothing else to do,"
    " so that nobody waits in the queue: on a busy site every allocation waits. From handing the bag over to having"
    " every result, starting our Ray in the allocation included. Overhead: what the bag took beyond its own computing"
    " on two cores, by part. Goal: one allocation, and less overhead for a part than any that takes one each."
)
_WORKERS = 2
_SIDES = {"ours, one job": "ours", "plain sbatch array": "array", "submitit": "submitit", "dask-jobqueue": "dask"}
_NEEDS = {"submitit": "submitit", "dask": "dask_jobqueue"}


def cases(quick: bool) -> list[Case]:
    parts, part_s = (6, 0.05) if quick else (200, 0.1)
    rig = _Rig(parts, _steps_for(part_s), part_s)
    bag = f"{parts} parts of {part_s * 1000:.0f} ms, {_WORKERS} workers"
    found = []
    for number, (name, side) in enumerate(_SIDES.items()):
        peer = number > 0
        best = {} if peer else {"goal": "less than the plain array", "ratio": 1.0}
        one = {} if peer else {"goal": "one", "limit": 1.0}
        found += [
            Case(f"{bag}: until every result is there", name, "s", "lower", partial(rig.seconds, side), peer=peer,
                 close=rig.close),
            Case(f"{bag}: overhead of a part", name, "ms", "lower", partial(rig.overhead, side), peer=peer, **best),
            Case(f"{bag}: allocations", name, "jobs", "lower", partial(rig.allocations, side), peer=peer, **one),
        ]  # fmt: skip
    groups = list(dict.fromkeys(case.group for case in found))
    return sorted(found, key=lambda case: groups.index(case.group))


@dataclass(frozen=True, slots=True)
class _Told:
    seconds: float
    allocations: int


class _Rig:
    """One Slurm for all. The bag's overhead and allocations are those of its newest measurement of time."""

    def __init__(self, parts: int, steps: int, part_s: float) -> None:
        self._parts, self._steps, self._part_s = parts, steps, part_s
        self._stack = ExitStack()
        self._slurm: SlurmCluster | None = None
        self._runs = itertools.count()
        self._sum: int | None = None
        self._told: dict[str, _Told] = {}

    def close(self) -> None:
        self._stack.close()

    def seconds(self, side: str) -> float:
        missing = _NEEDS.get(side, "json")
        if find_spec(missing) is None:
            raise LeftOutError(f"{missing} is not installed (extra: bench)")
        slurm = self._started()
        run: Callable[[SlurmCluster], tuple[_Told, int]] = self._ours if side == "ours" else partial(self._bare, side)
        told, total = run(slurm)
        if self._sum not in (None, total):
            raise RuntimeError(f"The sides computed different sums: {self._sum} and {total}.")
        self._sum, self._told[side] = total, told
        return told.seconds

    def overhead(self, side: str) -> float:
        return 1000 * (self._newest(side).seconds - self._parts * self._part_s / _WORKERS) / self._parts

    def allocations(self, side: str) -> float:
        return float(self._newest(side).allocations)

    def _newest(self, side: str) -> _Told:
        if side not in self._told:
            raise LeftOutError("not measured")
        return self._told[side]

    def _started(self) -> SlurmCluster:
        if self._slurm is None:
            try:
                made = SlurmCluster((SlurmNode("n1", cpus=_WORKERS, memory=8_000),), lines=("MaxArraySize=2001",))
            except NotFoundError as error:
                raise LeftOutError(str(error)) from None
            self._slurm = self._stack.enter_context(made)
            self._stack.enter_context(made.inside())
        return self._slurm

    def _ours(self, slurm: SlurmCluster) -> tuple[_Told, int]:
        with new_home("slurm") as settings, open_client(changed(settings, site=str(slurm.site_file()))) as client:
            spec = JobSpec(
                name="bag", workload="ours:BURNING", code=str(WORK),
                params={"parts": self._parts, "steps": self._steps, "run": next(self._runs)},
                resources={"workers": _WORKERS, "cpus": 1, "memory": "512MiB"},
            )  # fmt: skip
            began = perf_counter()
            [job] = client.wait([job.id for job in client.submit(spec)])
            seconds = perf_counter() - began
            if job.state is not JobState.SUCCEEDED:
                raise RuntimeError(f"The job ended {job.state}: {job.reason}, {job.detail.get('sentence', '')}")
            result: Any = read_json(client.paths(job).results / "result.json")
            name = f"--name=permed-{job.id}-{job.attempt:04d}"
            used = slurm.run("squeue", "--states=all", "--noheader", "--format=%A", name).split()
            wait_for(lambda: not slurm.run("squeue", "--noheader", name), "its end")  # it writes until then
            return _Told(seconds, len(used)), int(result["values"]["sum"])

    def _bare(self, side: str, slurm: SlurmCluster) -> tuple[_Told, int]:
        with disk_folder() as folder:
            command = [sys.executable, str(WORK / "bare_slurm.py"), side, str(_WORKERS), str(self._parts),
                       str(self._steps), str(folder)]  # fmt: skip
            done = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=900, cwd=Path.home(),
                env=os.environ | {"PYTHONPATH": str(WORK)},
            )  # fmt: skip
            if done.returncode:
                raise RuntimeError(f"{side}: {done.stderr[-500:]}")
            told = json.loads(done.stdout.splitlines()[-1])
        return _Told(float(told["seconds"]), int(told["allocations"])), int(told["sum"])
