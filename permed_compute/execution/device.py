"""What this machine can offer to jobs: cores, memory, GPUs and MIG slices by flavor. Never imports torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from permed_compute.admission.snapshot import Gpu, Node
from permed_compute.settings import Settings

_SHARE_OF_MEMORY = 0.8  # the rest is for the system, the page cache and our own controller


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU or a MIG slice as NVML names it; `uuid` is what CUDA_VISIBLE_DEVICES takes. Memory in MiB."""

    flavor: str
    uuid: str
    memory: int


def local_node(settings: Settings) -> Node:
    """This machine as admission sees it, cut down to what the settings offer."""
    cores = float(len(os.sched_getaffinity(0)))
    cpus = min(settings.cpus or cores, cores) if settings.executor == "ray" else settings.cpus or cores
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    memory = settings.memory or int(total * _SHARE_OF_MEMORY)
    gpus = [] if settings.gpus == "none" else gpu_devices()
    return Node(
        "local", round(cpus * 1000), memory, tuple(Gpu(gpu.flavor, place, gpu.memory) for place, gpu in enumerate(gpus))
    )


def visible(devices: tuple[int, ...]) -> str:
    """CUDA_VISIBLE_DEVICES for the devices of a grant."""
    there = gpu_devices()
    return ",".join(there[index].uuid for index in devices)


def gpu_devices() -> list[Device]:
    """GPUs in NVML's order, each MIG slice as a device of its own; empty where there is no driver or no binding."""
    with _handles() as handles:
        return [_named(handle) for handle in handles]


def use_of(devices: Collection[int]) -> list[dict[str, int | None]]:
    """Percent of the last second in which a kernel ran (`busy`; None: NVML does not say it of MIG slices), and MiB in
    use (`mib`), by whomever, of the devices of a grant."""
    if not devices:
        return []
    with _handles() as handles:
        return [_use(handle) for index, handle in enumerate(handles) if index in devices]


@contextmanager
def _handles() -> Iterator[list[Any]]:
    """NVML's handles of all devices; none where there is no driver or no binding."""
    try:
        import pynvml
    except ImportError:
        yield []
        return
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        yield []
        return
    try:
        yield [handle for index in range(pynvml.nvmlDeviceGetCount()) for handle in _of_gpu(index)]
    finally:
        pynvml.nvmlShutdown()


def _of_gpu(index: int) -> list[Any]:
    """The GPU, or its slices where it is cut into them."""
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        mig = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:
        mig = False
    if not mig:
        return [handle]
    handles = []
    for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
        try:
            handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
        except pynvml.NVMLError:
            continue
    return handles


def _named(handle: Any) -> Device:
    import pynvml

    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total // 2**20
    return Device(
        flavor_of(_text(pynvml.nvmlDeviceGetName(handle))), _text(pynvml.nvmlDeviceGetUUID(handle)), memory
    )  # fmt: skip


def _use(handle: Any) -> dict[str, int | None]:
    import pynvml

    try:
        busy = int(pynvml.nvmlDeviceGetUtilizationRates(handle).gpu)
    except pynvml.NVMLError:
        busy = None
    return {"busy": busy, "mib": pynvml.nvmlDeviceGetMemoryInfo(handle).used // 2**20}


def flavor_of(name: str) -> str:
    """`'NVIDIA A100-SXM4-40GB MIG 3g.20gb'` → `'a100-mig-3g'`; `'NVIDIA H100 PCIe'` → `'h100'`."""
    words = re.sub(r"^(NVIDIA|Tesla|GeForce|Quadro|\s)+", "", name).strip()
    model = re.split(r"[\s-]", words)[0].lower() or "gpu"
    if re.match(r"RTX", words, re.IGNORECASE):
        model = "-".join(re.findall(r"[a-z0-9]+", words.lower())[:2])
    mig = re.search(r"MIG\s+(\d+g)", name)
    return f"{model}-mig-{mig[1]}" if mig else model


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
