"""From an image on the network's grid to labels on the source's: streamed, beside MONAI's way and nnU-Net's way."""

from __future__ import annotations

import ctypes
import gc
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, LeftOutError
from permed_compute.workloads.radiology import precision
from permed_compute.workloads.radiology.sliding import Grid, Windows, labels

TITLE = "Segmenting a volume"
WHY = (
    "Sliding windows, stitching, resampling to the source's grid and argmax, with the same U-Net (MONAI's, 122 k"
    " parameters, one thread). MONAI's way: sliding_window_inference, Resize, AsDiscrete. nnU-Net's way: the same"
    " stitching, skimage's resize per class, argmax. `precision: auto`: the variant of the network that our job"
    " measures and keeps per machine type (eager is the default). Extra memory: the most resident memory beyond what"
    " was there. Goals: ≥ 1.3 × at 2 classes; ≥ 4 × and a tenth of the extra memory at 25."
)
_SIZES = {2: ((144, 144, 144), (192, 192, 192), 96), 25: ((100, 160, 160), (200, 320, 320), 64)}
"""Classes → the network's grid, the source's, the window."""
_QUICK = {2: ((32, 32, 32), (40, 40, 40), 16), 25: ((16, 32, 32), (32, 64, 64), 16)}
_EXTRA: dict[tuple[str, int], float] = {}


def cases(quick: bool) -> list[Case]:
    both = [case for classes in (2, 25) for case in (*_time(classes, quick), *_memory(classes, quick))]
    return [*both, *_after_network(quick)]


def _time(classes: int, quick: bool) -> list[Case]:
    group, goal = f"{classes} classes, CPU s", {2: 1.3, 25: 4.0}[classes]
    run = partial(_measured, classes=classes, quick=quick)
    return [
        Case(group, "ours", "s", "lower", lambda: run("ours"), goal=f"≥ {goal:g} ×", ratio=1 / goal),
        Case(
            group,
            "ours, precision: auto",
            "s",
            "lower",
            lambda: run("ours, chosen"),
            goal=f"≥ {goal:g} ×",
            ratio=1 / goal,
        ),
        Case(group, "MONAI's way", "s", "lower", lambda: run("monai"), peer=True),
        Case(group, "nnU-Net's way", "s", "lower", lambda: run("nnunet"), peer=True),
        Case(group, "MONAI's way, the network as ours chose", "s", "lower", lambda: run("monai, chosen"), peer=True),
    ]


def _after_network(quick: bool) -> list[Case]:
    """What is left where the network costs next to nothing: one 1×1×1 convolution."""
    group, run = "25 classes, a network of one 1³ convolution, CPU s", partial(_measured, classes=25, quick=quick)
    return [
        Case(group, "ours", "s", "lower", lambda: run("ours, free"), goal="≥ 4 ×", ratio=1 / 4),
        Case(group, "MONAI's way", "s", "lower", lambda: run("monai, free"), peer=True),
        Case(group, "nnU-Net's way", "s", "lower", lambda: run("nnunet, free"), peer=True),
    ]


def _memory(classes: int, quick: bool) -> list[Case]:
    """Of the runs that were timed: nothing is computed again."""
    group = f"{classes} classes, extra MiB"

    def extra(who: str) -> float:
        if (who, classes) not in _EXTRA:
            _measured(who, classes, quick)
        return _EXTRA[who, classes]

    goal: dict[str, Any] = {"goal": "≤ 1/10", "ratio": 0.1} if classes == 25 else {}
    return [
        Case(group, "ours", "MiB", "lower", lambda: extra("ours"), **goal),
        Case(group, "MONAI's way", "MiB", "lower", lambda: extra("monai"), peer=True),
        Case(group, "nnU-Net's way", "MiB", "lower", lambda: extra("nnunet"), peer=True),
    ]


# ------------------------------------------------------------------------------------------------ the three ways


@cache
def _network(classes: int) -> Any:
    import torch

    try:
        from monai.networks.nets import UNet
    except ImportError:
        raise LeftOutError("MONAI is not installed (extra: radiology)") from None
    torch.manual_seed(0)
    torch.set_num_threads(1)
    channels, strides = (8, 16, 32, 64), (2, 2, 2)
    return UNet(spatial_dims=3, in_channels=1, out_channels=classes, channels=channels, strides=strides).eval()


@cache
def _free(classes: int) -> Any:
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(1)
    return torch.nn.Conv3d(1, classes, 1).eval()


@cache
def _image(shape: tuple[int, ...]) -> Any:
    """Smooth, as images are: noise on a coarse grid, interpolated."""
    import torch

    coarse = torch.randn((1, 1, *(n // 8 for n in shape)), generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=shape, mode="trilinear")[0]


def ours(network: Any, image: Any, roi: int, shape: tuple[int, int, int]) -> np.ndarray:
    windows = Windows((roi, roi, roi), (0.25, 0.25, 0.25), "gaussian")
    return labels(image, network, windows, grid=Grid.same_extent(shape, image.shape[1:]), keep_bytes=_KEEP)


def monai(network: Any, image: Any, roi: int, shape: tuple[int, int, int]) -> np.ndarray:
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import AsDiscrete, Resize

    with torch.inference_mode():
        logits = sliding_window_inference(image[None], (roi,) * 3, 1, network, 0.25, "gaussian")[0]
        return np.asarray(AsDiscrete(argmax=True)(Resize(shape, mode="trilinear")(logits))[0].numpy(), np.uint8)


def nnunet(network: Any, image: Any, roi: int, shape: tuple[int, int, int]) -> np.ndarray:
    import torch
    from monai.inferers import sliding_window_inference
    from skimage.transform import resize

    with torch.inference_mode():
        logits = sliding_window_inference(image[None], (roi,) * 3, 1, network, 0.25, "gaussian")[0].numpy()
    out = np.zeros((len(logits), *shape), np.float32)
    for c, values in enumerate(logits):
        out[c] = resize(values, shape, 1, mode="edge", anti_aliasing=False, clip=True)
    return out.argmax(0).astype(np.uint8)


_WAYS: dict[str, Callable[..., np.ndarray]] = {"ours": ours, "monai": monai, "nnunet": nnunet}
_KEEP = 96 << 20
_FOUND: dict[tuple[int, bool], np.ndarray] = {}


@cache
def _chosen(classes: int, roi: int) -> Any:
    """The network as `precision: auto` runs it: chosen, and built, once per machine type."""
    network = _network(classes)
    variants = {name: precision.apply(network, name, "cpu") for name in precision.VARIANTS}
    probe = precision.probe(1, (roi,) * 3, "cpu")
    choice = precision.choose(
        variants, probe, tolerance=precision.TOLERANCE, machine=precision.machine("cpu", 1), clock=time.perf_counter
    )
    return variants[choice.variant]


def _measured(who: str, classes: int, quick: bool) -> float:
    """CPU seconds of one way; what memory it took besides is kept. All ways must give the same labels."""
    small, shape, roi = (_QUICK if quick else _SIZES)[classes]
    kind = who.partition(", ")[2]
    network = {"": _network, "chosen": partial(_chosen, roi=roi), "free": _free}[kind](classes)
    image = _image(small)
    gc.collect()
    before = _reset_peak()
    began = time.process_time()
    found = _WAYS[who.partition(", ")[0]](network, image, roi, shape)
    took = time.process_time() - began
    _EXTRA[who, classes] = (_resident("VmHWM") - before) / 1024
    known = _FOUND.setdefault((classes, kind == "free"), found)
    if (known != found).mean() > 1e-4:
        raise ValueError("other labels than the others")
    return took


def _reset_peak() -> int:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # or what the run before left to the allocator would hide what this one takes
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        raise LeftOutError("the peak of resident memory cannot be reset here") from None
    return _resident("VmRSS")


def _resident(name: str) -> int:
    """KiB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))
