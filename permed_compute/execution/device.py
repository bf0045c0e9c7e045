"""What this machine can offer to jobs: cores, memory, GPUs and MIG slices by flavor. Never imports torch."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

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
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        return [device for index in range(pynvml.nvmlDeviceGetCount()) for device in _of_gpu(pynvml, index)]
    finally:
        pynvml.nvmlShutdown()


def _of_gpu(nvml: object, index: int) -> list[Device]:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    try:
        mig = pynvml.nvmlDeviceGetMigMode(handle)[0] == pynvml.NVML_DEVICE_MIG_ENABLE
    except pynvml.NVMLError:
        mig = False
    handles = [handle]
    if mig:
        handles = []
        for place in range(pynvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                handles.append(pynvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, place))
            except pynvml.NVMLError:
                continue
    return [
        Device(
            flavor_of(_text(pynvml.nvmlDeviceGetName(each))),
            _text(pynvml.nvmlDeviceGetUUID(each)),
            pynvml.nvmlDeviceGetMemoryInfo(each).total // 2**20,
        )
        for each in handles
    ]


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
