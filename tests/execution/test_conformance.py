"""Both executors show the same behaviour."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from permed_compute.execution.inprocess import InProcessExecutor
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths
from permed_compute.settings import Settings
from permed_compute.testing.execution import ExecutorConformance, Toys


class TestInProcess(ExecutorConformance):
    isolates = False

    @pytest.fixture
    def executor(self, home: HomePaths) -> Iterator[InProcessExecutor]:
        executor = InProcessExecutor(Settings(home=str(home.root), executor="inprocess"))
        yield executor
        executor.close()


@pytest.mark.ray
class TestRay(ExecutorConformance):
    @pytest.fixture
    def executor(self, ray_executor: RayExecutor) -> RayExecutor:
        return ray_executor

    @pytest.fixture
    def toys(self, ray_toys: Toys) -> Toys:
        return ray_toys
