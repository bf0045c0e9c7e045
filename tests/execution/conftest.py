"""One Ray for the whole test session: starting one takes seconds, and two would fight over two cores."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.errors import NotFoundError
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths
from permed_compute.settings import Settings
from permed_compute.testing.execution import Toys
from permed_compute.testing.slurm import SlurmCluster, SlurmNode

_numbers = itertools.count()


@pytest.fixture
def code() -> Path:
    """The toy workloads."""
    return Path(__file__).parent / "code"


@pytest.fixture(scope="session")
def ray_home(tmp_path_factory: pytest.TempPathFactory) -> HomePaths:
    """The home whose Ray every test of this session uses."""
    return HomePaths(tmp_path_factory.mktemp("ray") / "home").create()


@pytest.fixture(scope="session")
def session_executor(ray_home: HomePaths) -> Iterator[RayExecutor]:
    pytest.importorskip("ray", reason="ray is not installed")
    executor = RayExecutor(Settings(home=str(ray_home.root)), ray_home)
    yield executor
    assert executor.stop()
    shutil.rmtree(ray_home.runtime)


@pytest.fixture
def ray_executor(session_executor: RayExecutor) -> Iterator[RayExecutor]:
    """The session's Ray, with nothing of the last test in it."""
    yield session_executor
    session_executor.sweep(())


@pytest.fixture(scope="session")
def slurm() -> Iterator[SlurmCluster]:
    """The session's Slurm: one of Saga's nodes as declared, with the factors that NRIS bills by."""
    try:
        cluster = SlurmCluster((SlurmNode("n1", cpus=40, memory=182_784),), weights="CPU=1.0,Mem=0.2577031G")
    except NotFoundError as error:
        pytest.skip(str(error))
    with cluster:
        yield cluster


@pytest.fixture
def ray_toys(ray_home: HomePaths, code: Path, tmp_path: Path) -> Toys:
    """Toys for the session's Ray, apart from every other test's."""
    # The process in the name: an attempt is ended by its name, and another suite may run on this machine.
    return Toys(ray_home, code, tmp_path / "tally", scope=f"t{os.getpid()}x{next(_numbers)}")
