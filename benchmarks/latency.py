"""How long after a job is submitted its work begins, warm and cold, beside Ray's own way to submit jobs."""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from benchmarks.harness import Case
from benchmarks.rigs.bare_ray import WORK, BareRay, ray_environment, run, start_ray
from benchmarks.rigs.home import controller, disk_folder, new_home, permed
from permed_compute.client import RemoteService
from permed_compute.queue.server import connect
from permed_compute.settings import Settings
from permed_compute.spec import load
from permed_compute.states import ENDED

TITLE = "From submit to the first part"
WHY = (
    "A researcher who tries a job on one image waits for its start, again and again. Every way runs one task that"
    " writes down when it begins; before that, ours has made the job durable, decided about it and fenced the attempt."
    " Warm: Ray and controller run. Goal: sooner than `ray job submit` that starts one task, from Python as from the"
    " command line. Cold: nothing runs, and Ray is started too."
)

_WAIT_S = 120.0
_JOB = """\
name: latency
workload: ours:stamped
code: {code}
resources: {{workers: 1, cpus: 1, memory: 512MiB}}
params: {{stamp: {stamp}}}
"""


def cases(quick: bool) -> list[Case]:
    rig = _Rig()
    python, shell, cold = "warm, from Python", "warm, from the command line", "cold, from the command line"

    def case(group: str, name: str, measure: Callable[[], float], **more: Any) -> Case:
        return Case(group, name, "s", "lower", measure, close=rig.close, **more)

    sooner = {"goal": "sooner than ray job submit", "ratio": 1.0}
    return [
        case(python, "ours, Client.submit", rig.ours_by_python, **sooner),
        case(python, "JobSubmissionClient, one task", rig.ray_by_python, peer=True),
        case(shell, "ours, permed submit", rig.ours_by_shell, **sooner),
        case(shell, "ray job submit, one task", rig.ray_by_shell, peer=True),
        case(cold, "ours, permed run", rig.ours_cold),
        case(cold, "ray start, then ray job submit, one task", rig.ray_cold, peer=True),
        case(cold, "a script with ray.init, one task", rig.script_cold, peer=True),
    ]


class _Rig:
    """Both warm sides, each started when first needed; a cold measurement ends whatever it started."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._settings: Settings | None = None
        self._bare: BareRay | None = None
        self._folder: Path | None = None
        self._numbers = itertools.count()

    def close(self) -> None:
        self._stack.close()

    # ------------------------------------------------------------------------------------- warm

    def ours_by_python(self) -> float:
        settings, stamp = self._warm_home(), self._stamp()
        spec = load(self._job_file(stamp))
        with connect(settings.paths.socket) as gateway:
            service = RemoteService(gateway)
            began = time.time()
            service.submit([spec])
            begun = _read(stamp)
            _wait_for(lambda: all(job.state in ENDED for job in service.jobs()))
        return begun - began

    def ours_by_shell(self) -> float:
        settings, stamp = self._warm_home(), self._stamp()
        command, environment = permed(settings, "submit", str(self._job_file(stamp)))
        began = time.time()
        run(command, environment)
        begun = _read(stamp)
        with connect(settings.paths.socket) as gateway:
            service = RemoteService(gateway)
            _wait_for(lambda: all(job.state in ENDED for job in service.jobs()))
        return begun - began

    def ray_by_python(self) -> float:
        bare, stamp = self._warm_ray(), self._stamp()
        command = [sys.executable, str(WORK / "bare_submit.py"), bare.jobs, _task(stamp)]
        began = float(run(command, bare.environment).splitlines()[-1])
        return _read(stamp) - began

    def ray_by_shell(self) -> float:
        bare, stamp = self._warm_ray(), self._stamp()
        began = time.time()
        _ray_job_submit(bare, stamp)
        return _read(stamp) - began

    def _warm_home(self) -> Settings:
        if self._settings is None:
            self._settings = self._stack.enter_context(new_home("ray"))
            self._stack.enter_context(controller(self._settings))
        return self._settings

    def _warm_ray(self) -> BareRay:
        if self._bare is None:
            environment = self._stack.enter_context(ray_environment())
            self._bare = start_ray(environment, _cpus(), dashboard=True)
        return self._bare

    # ------------------------------------------------------------------------------------- cold

    def ours_cold(self) -> float:
        stamp = self._stamp()
        with new_home("ray") as settings:
            command, environment = permed(settings, "run", str(self._job_file(stamp)))
            began = time.time()
            run(command, environment)
        return _read(stamp) - began

    def ray_cold(self) -> float:
        stamp = self._stamp()
        with ray_environment() as environment:
            began = time.time()
            _ray_job_submit(start_ray(environment, _cpus(), dashboard=True), stamp)
            return _read(stamp) - began

    def script_cold(self) -> float:
        stamp = self._stamp()
        with ray_environment() as environment:
            began = time.time()
            run([sys.executable, str(WORK / "bare_task.py"), str(stamp), "cold"], environment)
            return _read(stamp) - began

    # ------------------------------------------------------------------------------------- both

    def _stamp(self) -> Path:
        if self._folder is None:
            self._folder = self._stack.enter_context(disk_folder())
        return self._folder / f"stamp-{next(self._numbers)}"

    def _job_file(self, stamp: Path) -> Path:
        file = stamp.with_suffix(".yaml")
        file.write_text(_JOB.format(code=WORK, stamp=stamp), encoding="utf-8")
        return file


def _task(stamp: Path) -> str:
    return f"{sys.executable} {WORK / 'bare_task.py'} {stamp}"


def _ray_job_submit(bare: BareRay, stamp: Path) -> None:
    """Returns when the job has ended: the next measurement must not share the machine with it."""
    command = [sys.executable, "-m", "ray.scripts.scripts", "job", "submit", "--", *_task(stamp).split()]
    run(command, bare.environment)


def _read(stamp: Path) -> float:
    """When the task began, by its own word."""
    _wait_for(stamp.exists)
    return float(stamp.read_text(encoding="ascii"))


def _wait_for(there: Callable[[], bool]) -> None:
    end = time.monotonic() + _WAIT_S
    while not there():
        if time.monotonic() > end:
            raise RuntimeError(f"It did not come within {_WAIT_S:g} s.")
        time.sleep(0.01)


def _cpus() -> int:
    return len(os.sched_getaffinity(0))
