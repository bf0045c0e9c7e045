"""What NVML says, as admission's flavors; NVML itself is a stand-in."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from permed_compute.admission.snapshot import Gpu
from permed_compute.execution import device, ray
from permed_compute.execution.device import Device, flavor_of


@pytest.mark.parametrize(
    ("name", "flavor"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100"), ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "a100-mig-3g"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "h100-mig-1g"), ("NVIDIA H200", "h200"), ("Tesla V100-PCIE-32GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA H100 PCIe", "h100"), ("", "gpu"),
    ],
)  # fmt: skip
def test_flavors(name: str, flavor: str) -> None:
    assert flavor_of(name) == flavor


class Error(Exception): ...


def nvml(gpus: list[list[str]]) -> SimpleNamespace:
    """A library of GPUs: [name], or [name, slice, slice …] in MIG mode; the places between slices are empty."""

    def mode(handle: tuple[int, ...]) -> tuple[int, int]:
        return (int(len(gpus[handle[0]]) > 1), 0)

    def of_mig(handle: tuple[int, ...], place: int) -> tuple[int, ...]:
        if place % 2 or place // 2 + 1 >= len(gpus[handle[0]]):
            raise Error
        return (handle[0], place // 2 + 1)

    def name(handle: tuple[int, ...]) -> str:
        return gpus[handle[0]][handle[1] if len(handle) > 1 else 0]

    def rates(handle: tuple[int, ...]) -> SimpleNamespace:
        if len(handle) > 1:
            raise Error  # NVML does not say it of slices
        return SimpleNamespace(gpu=93)

    return SimpleNamespace(
        NVMLError=Error, NVML_DEVICE_MIG_ENABLE=1, nvmlInit=lambda: None, nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(gpus), nvmlDeviceGetHandleByIndex=lambda index: (index,),
        nvmlDeviceGetMigMode=mode, nvmlDeviceGetMaxMigDeviceCount=lambda handle: 7,
        nvmlDeviceGetMigDeviceHandleByIndex=of_mig, nvmlDeviceGetName=name,
        nvmlDeviceGetUUID=lambda handle: ("MIG-" if len(handle) > 1 else "GPU-") + "-".join(map(str, handle)),
        nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(
            total=(20480 if len(handle) > 1 else 40960) * 2**20, used=(1 + handle[-1]) * 2**20
        ),
        nvmlDeviceGetUtilizationRates=rates,
    )  # fmt: skip


def test_slices_are_devices_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    monkeypatch.setitem(sys.modules, "pynvml", nvml([[whole], [whole, sliced, sliced]]))
    assert device.gpu_devices() == [
        Device("a100", "GPU-0", 40960),
        Device("a100-mig-3g", "MIG-1-1", 20480), Device("a100-mig-3g", "MIG-1-2", 20480),
    ]  # fmt: skip
    assert device.visible((0, 2)) == "GPU-0,MIG-1-2"


def test_what_granted_devices_are_doing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, sliced = "NVIDIA A100-SXM4-40GB", "NVIDIA A100-SXM4-40GB MIG 3g.20gb"
    monkeypatch.setitem(sys.modules, "pynvml", nvml([[whole], [whole, sliced, sliced]]))
    assert device.use_of([0, 2]) == [{"busy": 93, "mib": 1}, {"busy": None, "mib": 3}]
    assert device.use_of([]) == []


def test_a_node_of_a_given_cluster_may_say_more_by_labels() -> None:
    resources = {"CPU": 8.0, "memory": 64 * 2.0**30, "GPU": 2.0, "accelerator_type:A100": 1.0}
    plain = ray._node({"name": "10.0.0.7", "resources": resources, "labels": {}})
    assert (plain.name, plain.cpu_milli, plain.memory) == ("10.0.0.7", 8000, 65536)
    assert plain.gpus == (Gpu("a100", 0, 0), Gpu("a100", 1, 0))
    labels = {"permed-gpu-flavor": "a100-mig-3g", "permed-gpu-memory": "20480"}
    told = ray._node({"name": "gpu-07", "resources": resources, "labels": labels})
    assert told.gpus == (Gpu("a100-mig-3g", 0, 20480), Gpu("a100-mig-3g", 1, 20480))
