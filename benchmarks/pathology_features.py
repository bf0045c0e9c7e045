"""Reading a slide's features: float16 Zarr as the job writes them, beside HDF5 as other tools write it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.harness import Case
from permed_compute.workloads.pathology import features

TITLE = "Reading features"
WHY = (
    "Training on bags of features reads every slide's once an epoch. 15,000 tiles × 1536. HDF5 as found: float32,"
    " in chunks of one tile (TRIDENT) or 32 (CLAM); beside it chunks of 512 and one piece, which neither writes, and"
    " CLAM's .pt. Until every cache line has been looked at once, because ours is mapped where HDF5 copies. Goal: 5"
    " times as fast as HDF5. Warm."
)
_DIM, _BLOCK = 1536, 1024
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def cases(quick: bool) -> list[Case]:
    count = 2000 if quick else 15_000
    group = "one slide, ms"
    return [
        Case(group, "ours, float16 Zarr, mapped", "ms", "lower", lambda: _timed(count, _ours),
             goal="≤ 1/5 of HDF5 in chunks of 32", ratio=0.2),
        Case(group, "HDF5, chunks of 32 (CLAM)", "ms", "lower", lambda: _timed(count, _hdf5(32)), peer=True),
        Case(group, "HDF5, a chunk per tile (TRIDENT)", "ms", "lower", lambda: _timed(count, _hdf5(1)), peer=True),
        Case(group, "HDF5, chunks of 512", "ms", "lower", lambda: _timed(count, _hdf5(512)), peer=True),
        Case(group, "HDF5, one piece", "ms", "lower", lambda: _timed(count, _hdf5(0)), peer=True),
        Case(group, "torch.save (CLAM)", "ms", "lower", lambda: _timed(count, _torch), peer=True),
    ]  # fmt: skip


@cache
def _written(count: int) -> Path:
    import h5py
    import torch

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
    single = values.astype(np.float32)
    for rows in (0, 1, 32, 512):
        with h5py.File(root / f"{rows}.h5", "w") as file:
            how = {"chunks": (rows, _DIM), "maxshape": (None, _DIM)} if rows else {}
            file.create_dataset("features", data=single, **how)
    torch.save(torch.from_numpy(single), root / "s.pt")
    return root


def _ours(root: Path) -> np.ndarray:
    return features.read(root / "s.zarr")[1]


def _hdf5(rows: int) -> Callable[[Path], np.ndarray]:
    def read(root: Path) -> np.ndarray:
        import h5py

        with h5py.File(root / f"{rows}.h5") as file:
            return np.asarray(file["features"][:])

    return read


def _torch(root: Path) -> np.ndarray:
    import torch

    return np.asarray(torch.load(root / "s.pt", weights_only=True).numpy())


def _timed(count: int, read: Callable[[Path], np.ndarray]) -> float:
    root = _written(count)
    began = time.perf_counter()
    values = read(root)
    seen = int(values.view(np.uint8).reshape(-1)[3::64].sum())
    took = time.perf_counter() - began
    if values.shape != (count, _DIM) or not seen or abs(float(values[count // 2].astype(np.float32).mean())) > 0.2:
        raise ValueError("other values than were written")
    return 1000 * took
