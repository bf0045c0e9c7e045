"""Encoders on a GPU: fed by the reader, beside the same encoder on tiles that already lie in its memory."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs import slides

TITLE = "Encoding on a GPU"
WHY = (
    "A GPU that waits for tiles is what users of slide tools complain of most. ResNet50 and ViT-S with random weights,"
    " bfloat16, tiles of 224 pixels; one block is read while the one before is encoded, as a worker does. Goal: 90 % of"
    " the rate on tiles that lie in the GPU's memory. Left out where there is no CUDA device."
)
_SIZE, _BLOCK, _THREADS = 224, 1024, 16


def cases(quick: bool) -> list[Case]:
    edge, blocks = (4096, 1) if quick else (20_480, 12)
    found: list[Case] = []
    for name in ("resnet50", "vit_small_patch16_224"):
        group = f"{name}, tiles/s"
        found += [
            Case(group, "ours, from the store", "tiles/s", "higher", on_gpu(fed, name, edge, blocks), ratio=0.9,
                 goal="≥ 90 % of tiles in GPU memory"),
            Case(group, "tiles in GPU memory", "tiles/s", "higher", on_gpu(resident, name, edge, blocks), peer=True),
        ]  # fmt: skip
    return found


def on_gpu(work: Callable[..., float], name: str, edge: int, blocks: int) -> Callable[[], float]:
    def measure() -> float:
        import torch

        if not torch.cuda.is_available():
            raise LeftOutError("there is no CUDA device")
        return work(name, edge, blocks, "cuda:0")

    return measure


def encoder(name: str, device: str) -> Any:
    from permed_compute.workloads.pathology import networks
    from permed_compute.workloads.pathology.encoders import Recipe

    made = Recipe(name, "timm", "", None, name)
    return networks.TorchEncoder(networks._of_timm(made), made, device, _THREADS)


def fed(name: str, edge: int, blocks: int, device: str) -> float:
    """Blocks from the store, one read ahead."""
    from permed_compute.workloads.pathology.reader import Reader
    from permed_compute.workloads.pathology.source import open_slide

    made = encoder(name, device)
    at = np.arange(0, edge - 2 * _SIZE, _SIZE)
    corners = np.stack([axis.ravel() for axis in np.meshgrid(at, at)], 1)
    places = [
        np.take(corners, np.arange(k, k + _BLOCK), axis=0, mode="wrap") for k in range(0, _BLOCK * blocks, _BLOCK)
    ]
    with Reader(open_slide(slides.store(edge)), threads=_THREADS) as reader, ThreadPoolExecutor(1) as ahead:
        made.encode(reader.read_many(slides.MPP, places[0], _SIZE))
        began = time.perf_counter()
        following = ahead.submit(reader.read_many, slides.MPP, places[0], _SIZE)
        for k in range(blocks):
            pixels = following.result()
            if k + 1 < blocks:
                following = ahead.submit(reader.read_many, slides.MPP, places[k + 1], _SIZE)
            made.encode(pixels)
        return _BLOCK * blocks / (time.perf_counter() - began)


def resident(name: str, edge: int, blocks: int, device: str) -> float:
    """The same batches, moved once."""
    import torch

    made = encoder(name, device)
    tiles = torch.randint(0, 256, (made.front.batch, _SIZE, _SIZE, 3), dtype=torch.uint8).numpy()
    there = made.front.moved(tiles)
    steps = max(1, _BLOCK * blocks // made.front.batch)
    with torch.inference_mode():
        made._some(made.front.prepared(there, None)).cpu()
        began = time.perf_counter()
        for _ in range(steps):
            last = made._some(made.front.prepared(there, None))
        last.cpu()
    return made.front.batch * steps / (time.perf_counter() - began)
