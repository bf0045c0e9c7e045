"""Where CUDA is present: device choice, ranks over nccl, and a batch that does not fit."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from permed_compute.admission.snapshot import Grant
from permed_compute.execution import device
from permed_compute.execution.ray import RayExecutor
from permed_compute.learning.training import DeviceMemoryError, fitting
from permed_compute.paths import HomePaths
from permed_compute.settings import Settings
from permed_compute.testing.execution import Toys


def cuda() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not cuda(), reason="no CUDA device here")]


@pytest.fixture
def executor(home: HomePaths) -> Iterator[RayExecutor]:
    pytest.importorskip("ray", reason="ray is not installed")
    made = RayExecutor(Settings(home=str(home.root)), home)
    yield made
    assert made.stop()


@pytest.fixture
def toys(home: HomePaths, code: Path, tmp_path: Path) -> Toys:
    return Toys(home, code, tmp_path / "tally")


def test_devices_are_named_with_their_memory() -> None:
    import torch

    found = device.gpu_devices()
    assert len(found) >= torch.cuda.device_count() >= 1
    for each in found:
        assert each.flavor and each.memory > 1000 and each.uuid.startswith(("GPU-", "MIG-"))


def test_devices_say_what_they_do() -> None:
    [use] = device.use_of([0])
    assert use["mib"] is not None and use["mib"] >= 0
    assert use["busy"] is None or 0 <= use["busy"] <= 100


def granted(toys: Toys, workload: str, ranks: int, **params: Any) -> Any:
    """An attempt of ranks with the first devices, one each."""
    from dataclasses import replace

    attempt = toys.attempt(workload, job=f"{workload}-{ranks}", workers=ranks, seed=3, **params)
    spec = attempt.spec.model_copy(update={"workload": f"nets:{workload}"})
    flavor = device.gpu_devices()[0].flavor
    grants = tuple(Grant("local", 1000, 4096, 1000, flavor, (slot,)) for slot in range(ranks))
    made = replace(attempt, spec=spec, grants=grants)
    made.write()
    return made


@pytest.mark.ray
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_gang_trains_on_its_devices_over_nccl(executor: RayExecutor, toys: Toys, ranks: int) -> None:
    if len(device.gpu_devices()) < ranks:
        pytest.skip(f"{ranks} devices are needed")
    attempt = granted(toys, "train", ranks)
    executor.launch(attempt)
    assert toys.ending(attempt)["outcome"] == "SUCCEEDED", attempt.paths.log.read_text()[-2000:]
    values = toys.result(attempt)["values"]
    assert (values["world"], values["steps"]) == (ranks, 15)
    assert executor.end(attempt)


def test_a_batch_that_does_not_fit_is_halved_and_one_that_never_will_is_refused() -> None:
    import torch

    free, _ = torch.cuda.mem_get_info()
    sample = free // 6

    def attempt(size: int) -> None:
        torch.empty(size * sample, dtype=torch.uint8, device="cuda")

    assert fitting(attempt, 16, lambda size: size) == 4
    with pytest.raises(DeviceMemoryError, match="single sample"):
        fitting(lambda size: attempt(size * 100), 2, lambda size: size)


@pytest.mark.ray
def test_a_training_takes_as_many_samples_at_once_as_the_device_holds(executor: RayExecutor, toys: Toys) -> None:
    attempt = granted(toys, "train", 1, batch=4, hog=0.4)
    executor.launch(attempt)
    assert toys.ending(attempt)["outcome"] == "SUCCEEDED", attempt.paths.log.read_text()[-2000:]
    assert toys.result(attempt)["values"]["micro"] == 2
    assert executor.end(attempt)


@pytest.mark.ray
def test_a_sample_that_the_device_never_holds_is_a_clear_failure(executor: RayExecutor, toys: Toys) -> None:
    attempt = granted(toys, "train", 1, hog=1.5)
    executor.launch(attempt)
    ending = toys.ending(attempt)
    assert (ending["outcome"], ending["reason"]) == ("FAILED", "device-memory"), ending
    assert "gpu_memory" in ending["remedy"]
    assert executor.end(attempt)
