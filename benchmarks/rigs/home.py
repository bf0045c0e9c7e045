"""A home of its own for a measurement, and a controller in a process of its own that serves it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import LeftOutError
from permed_compute.errors import NotFoundError
from permed_compute.execution import processes
from permed_compute.execution.processes import SESSION_MARK, Process, ProcessTable
from permed_compute.queue.mounts import filesystem
from permed_compute.queue.server import connect
from permed_compute.settings import Settings

_IN_MEMORY = {"tmpfs", "ramfs"}
_START_S = 120.0


@contextmanager
def disk_folder() -> Iterator[Path]:
    """An empty folder on a disk; it goes afterwards."""
    with tempfile.TemporaryDirectory(prefix="permed-bench-") as name:
        folder = Path(name)
        if filesystem(folder)[1] in _IN_MEMORY:
            raise LeftOutError(f"{folder.parent} is memory, where durable means nothing (set TMPDIR to a disk)")
        yield folder


@contextmanager
def new_home(executor: str) -> Iterator[Settings]:
    """Settings of an empty home without tracking. Nothing of it stays."""
    with disk_folder() as folder:
        settings = Settings(
            home=str(folder / "home"), anchor=str(folder / "anchor"), executor=executor, gpus="none",
            tracking_uri="none",
        )  # fmt: skip
        try:
            yield settings
        finally:
            end_ray_of(settings.paths.runtime)
            shutil.rmtree(settings.paths.runtime, ignore_errors=True)


def end_ray_of(folder: Path) -> None:
    """End every process of the Ray that bears the mark of this folder; `ray stop` would end everybody's."""

    def left() -> list[Process]:
        table = ProcessTable().look()
        return [table.processes[pid] for pid, value in table.marked(SESSION_MARK).items() if value == str(folder)]

    if not processes.kill_all(left, timeout_s=20.0):
        raise RuntimeError(f"Processes of the Ray of {folder} cannot be ended.")


def permed(settings: Settings, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """(command, environment) of the program on this home."""
    given = {"HOME": settings.home, "ANCHOR": settings.anchor, "EXECUTOR": settings.executor}
    given |= {"GPUS": settings.gpus, "TRACKING_URI": settings.tracking_uri}
    environment = os.environ | {f"PERMED_{name}": value for name, value in given.items()}
    return [sys.executable, "-m", "permed_compute.cli", *arguments], environment


@contextmanager
def controller(settings: Settings) -> Iterator[None]:
    """`permed controller` of this home, from when it answers until it has stopped."""
    command, environment = permed(settings, "controller")
    settings.paths.create()
    with (settings.paths.root / "bench.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_until_it_answers(settings, process)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30.0)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_it_answers(settings: Settings, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_S
    while process.poll() is None and time.monotonic() < end:
        try:
            connect(settings.paths.socket).close()
        except NotFoundError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"The controller did not start: {(settings.paths.root / 'bench.log').read_text()[-500:]}")
