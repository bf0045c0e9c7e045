"""What a Ray's autoscaler is told: by the controller after each decision, through the bridge, once per change."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from permed_compute.admission.demand import Demand, Shape
from permed_compute.admission.snapshot import Node
from permed_compute.execution.controller import Controller
from permed_compute.execution.port import Scaling
from permed_compute.execution.ray import RayExecutor
from permed_compute.execution.raybridge import BridgeError, _Speaker
from permed_compute.paths import HomePaths
from permed_compute.queue.memory import MemoryQueue
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec

WORKER = Shape(2000, 1024, 0, "")
ON_GPU = Shape(1000, 512, 1000, "h100")


@pytest.fixture
def executor(home: HomePaths) -> RayExecutor:
    pytest.importorskip("ray", reason="ray is not installed")
    return RayExecutor(Settings(home=str(home.root), ray_address="10.9.8.7:6379"), home)


def bridged(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    def ask(call: str, timeout_s: float, **arguments: Any) -> None:
        if fail:
            raise BridgeError("no answer")
        told.append({"call": call, **arguments})

    monkeypatch.setattr(executor, "_ask", ask)
    return told


def test_ray_is_told_shapes_and_the_kind_of_gpu_once_per_change(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = bridged(executor, monkeypatch)
    first: Demand = ((ON_GPU, 1), (WORKER, 2))
    for wanted in (first, first, ()):
        executor.want(lambda: wanted)  # noqa: B023 - called at once
    assert told == [
        {
            "call": "want",
            "bundles": [
                {"CPU": 1.0, "memory": 512.0 * 2**20, "GPU": 1.0},
                *([{"CPU": 2.0, "memory": 1024.0 * 2**20}] * 2),
            ],
            "selectors": [{"permed-gpu-flavor": "h100"}, {}, {}],
        },
        {"call": "want", "bundles": [], "selectors": []},
    ]


def test_another_head_is_told_again(executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    told = bridged(executor, monkeypatch)
    executor.want(lambda: ((WORKER, 1),))
    executor._disconnect()
    executor.want(lambda: ((WORKER, 1),))
    assert len(told) == 2


def test_a_head_that_is_silent_does_not_hold_the_controller_up(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    bridged(executor, monkeypatch, fail=True)
    asked: list[int] = []

    def wanted() -> Demand:
        asked.append(1)
        return ((WORKER, 1),)

    for _ in range(5):
        executor.want(wanted)
    assert len(asked) == 1  # and again after a while


def test_a_ray_of_our_own_cannot_grow_and_is_told_nothing(home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray", reason="ray is not installed")
    executor = RayExecutor(Settings(home=str(home.root)), home)
    told = bridged(executor, monkeypatch)
    executor.want(lambda: pytest.fail("it was worked out in vain"))
    assert told == []


def test_the_bridge_hands_it_to_rays_own_call(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    sdk = SimpleNamespace(request_resources=lambda **words: told.append(words))
    monkeypatch.setitem(sys.modules, "ray.autoscaler.sdk", sdk)
    speaker = object.__new__(_Speaker)
    speaker.want([{"CPU": 1.0}], [{}])
    speaker.want([], [])
    assert told == [
        {"bundles": [{"CPU": 1.0}], "bundle_label_selectors": [{}]},
        {"bundles": [], "bundle_label_selectors": None},
    ]


class Elastic:
    """An engine without nodes that remembers what it was asked for."""

    name = "elastic"

    def __init__(self) -> None:
        self.wanted: list[Demand] = []

    def want(self, demand: Callable[[], Demand]) -> None:
        self.wanted.append(demand())

    def nodes(self) -> tuple[Node, ...]:
        return ()


def test_the_controller_says_what_waits_and_that_nothing_does_any_more(home: HomePaths, tmp_path: Path) -> None:
    engine, queue = Elastic(), MemoryQueue()
    assert isinstance(engine, Scaling)
    controller = Controller(queue, engine, home, Settings(home=str(home.root)))  # type: ignore[arg-type]
    controller.lead()
    resources = {"workers": 3, "cpus": 2, "memory": "1GiB"}
    spec = JobSpec.model_validate({"name": "n", "workload": "m:run", "code": str(tmp_path), "resources": resources})
    [job] = queue.submit([spec], owner="kari")
    controller.tick()
    assert engine.wanted[-1] == ((WORKER, 3),)
    JobService(queue, Caller("kari", True), engine.nodes).cancel(job.id)
    controller.tick()
    assert engine.wanted[-1] == ()
    controller.close()
