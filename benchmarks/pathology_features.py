"""Reading a slide's features: float16 Zarr as the job writes them, beside HDF5 as other tools write it."""

from __future__ import annotations

import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.harness import Case
from permed_compute.workloads.pathology import features

TITLE = "Reading features"
WHY = (
    "Training on bags of features reads every slide's once an epoch. 15,000 tiles × 1536; HDF5 as it is found: float32,"
    " grown as it comes, a chunk per tile, and beside it with chunks of 512. Goal: 5 times as fast. Warm."
)
_DIM, _BLOCK = 1536, 1024
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def cases(quick: bool) -> list[Case]:
    count = 2000 if quick else 15_000
    group = "one slide, ms"
    return [
        Case(group, "ours, float16 Zarr", "ms", "lower", lambda: _timed(count, 0), goal="≤ 1/5", ratio=0.2),
        Case(group, "HDF5, a chunk per tile", "ms", "lower", lambda: _timed(count, 1), peer=True),
        Case(group, "HDF5, chunks of 512", "ms", "lower", lambda: _timed(count, 512), peer=True),
    ]


@cache
def _written(count: int) -> Path:
    import h5py

    folder = tempfile.TemporaryDirectory(prefix="permed-bench-features-")
    _KEPT.append(folder)
    root = Path(folder.name)
    values = np.random.default_rng(0).normal(0, 1, (count, _DIM)).astype(np.float16)
    chunks = []
    for k in range(0, count, _BLOCK):
        features.write_chunk(root / f"{k:06d}", values[k : k + _BLOCK], _BLOCK)
        chunks.append(root / f"{k:06d}" / features.CHUNK)
    facts = {"target_mpp": 0.5, "patch_size": 224}
    features.assemble(root / "s.zarr", np.zeros((count, 2)), chunks, block=_BLOCK, dim=_DIM, encoder="e", facts=facts)
    for rows in (1, 512):
        with h5py.File(root / f"{rows}.h5", "w") as file:
            data = file.create_dataset("features", (0, _DIM), maxshape=(None, _DIM), chunks=(rows, _DIM), dtype="f4")
            for k in range(0, count, 512):
                part = values[k : k + 512]
                data.resize(k + len(part), 0)
                data[k:] = part
    return root


def _timed(count: int, rows: int) -> float:
    import h5py

    root = _written(count)
    began = time.perf_counter()
    if not rows:
        _, values, _ = features.read(root / "s.zarr")
    else:
        with h5py.File(root / f"{rows}.h5") as file:
            values = file["features"][:]
    took = time.perf_counter() - began
    if values.shape != (count, _DIM) or abs(float(values[count // 2].astype(np.float32).mean())) > 0.2:
        raise ValueError("other values than were written")
    return 1000 * took
