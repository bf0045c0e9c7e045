"""Training on volumes: an epoch by ours and by what people read patches with, a step beside memory, and memory."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs import volumes

TITLE = "Training on volumes"
WHY = (
    "A training reads the same scans for hundreds of epochs. An epoch: one random patch of each scan and its label,"
    " scaled and flipped, through the same small UNet, forward and backward, in one process; what each prepared before"
    " (stores, caches, packed files) is not in it. nnU-Net's reader is its files and how it reads them (a blosc2 array"
    " of float32 per case in its blocks and chunks, memory-mapped, one thread), not the package. A step where the"
    " network dominates: beside the same batches that lie in memory. Memory: what all processes of two ranks with two"
    " workers each hold (PSS) while they train. Goals: an epoch no longer than PersistentDataset's; ≥ 0.95 of the speed"
    " from memory; less memory than CacheDataset."
)
WORK = Path(__file__).parent / "work" / "ranks_read.py"
SCALE = {"a_min": -1000.0, "a_max": 400.0, "b_min": 0.0, "b_max": 1.0, "clip": True}
BLOCK, CHUNK = 16, (80, 64, 64)
"""What nnU-Net's rule gives for float32 and cubic patches of 64 to 128: 16³ fit L1, the chunk L3."""


def cases(quick: bool) -> list[Case]:
    rig = _Rig(edge=48, patch=32, count=2) if quick else _Rig(edge=160, patch=64, count=8)
    epoch, step, memory = (
        f"an epoch of {rig.count} patches of {rig.patch}³, s",
        "steps where the network dominates",
        f"2 ranks × 2 workers on {rig.count} scans, MiB",
    )
    readers: dict[str, Callable[[], Iterable[Any]]] = {
        "MONAI PersistentDataset": rig.persistent, "MONAI CacheDataset": rig.cached,
        "MONAI CacheDataset, copy_cache=False": lambda: rig.cached(copy_cache=False),
        "nnU-Net's blosc2 files": rig.blosc2,
    }  # fmt: skip
    return [
        Case(epoch, "ours, stores", "s", "lower", lambda: rig.epoch(rig.ours()), ratio=1.0,
             goal="≤ PersistentDataset's"),
        *(Case(epoch, name, "s", "lower", lambda make=make: rig.epoch(make()), peer=True)  # type: ignore[misc]
          for name, make in readers.items()),
        Case(step, "ours, stores", "steps/s", "higher", lambda: rig.steps(kept=False), ratio=0.95,
             goal="≥ 0.95 of memory's"),
        Case(step, "the same batches in memory", "steps/s", "higher", lambda: rig.steps(kept=True), peer=True),
        Case(memory, "ours, stores", "MiB", "lower", lambda: rig.memory("ours"), ratio=1.0, repeats=2,
             goal="≤ CacheDataset's"),
        Case(memory, "MONAI CacheDataset", "MiB", "lower", lambda: rig.memory("cache"), peer=True, repeats=2),
    ]  # fmt: skip


class _Rig:
    def __init__(self, edge: int, patch: int, count: int) -> None:
        self.edge, self.patch, self.count = edge, patch, count
        self._made: dict[str, Any] = {}
        self._epochs = 0

    # ------------------------------------------------------------------------------------- the scans

    def scans(self) -> list[dict[str, np.ndarray]]:
        """One CT-like volume, moved on for each scan, and what is dense in it."""
        found = []
        for k in range(self.count):
            image = np.roll(volumes.ct(self.edge), 7 * k, axis=2)
            found.append({"image": image, "label": (image > 60).astype(np.uint8)})
        return found

    def stores(self) -> list[dict[str, str]]:
        return self._once("stores", lambda: _stores(self.scans()))

    def niftis(self) -> list[dict[str, str]]:
        return self._once("niftis", lambda: _niftis(self.scans()))

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    # ------------------------------------------------------------------------------------- an epoch

    def ours(self) -> Iterable[Any]:
        return self._once("ours", lambda: ours(self.stores(), self.patch, batch=2, workers=0))

    def persistent(self) -> Iterable[Any]:
        from monai.data import PersistentDataset

        return self._once("persistent", lambda: loaded(
            PersistentDataset(self.niftis(), read_and_cut(self.patch), cache_dir=volumes.folder()), batch=2, workers=0
        ))  # fmt: skip

    def cached(self, **how: Any) -> Iterable[Any]:
        from monai.data import CacheDataset

        return self._once(f"cached {how}", lambda: loaded(
            CacheDataset(self.niftis(), read_and_cut(self.patch), progress=False, **how), batch=2, workers=0
        ))  # fmt: skip

    def blosc2(self) -> Iterable[Any]:
        return self._once("blosc2", lambda: loaded(_Blosc2(self.scans(), self.patch), batch=2, workers=0))

    def epoch(self, batches: Iterable[Any]) -> float:
        """Seconds; the first call of each reader fills its caches in the warm-up."""
        import torch

        torch.manual_seed(self._epochs)
        self._epochs += 1
        model, optimizer = net(large=False)
        began, seen = time.perf_counter(), 0
        for batch in batches:
            seen += _step(model, optimizer, batch, self.patch)
        took = time.perf_counter() - began
        if seen != self.count:
            raise RuntimeError(f"{seen} of {self.count} patches came.")
        return took

    # ------------------------------------------------------------------------------------- a step

    def steps(self, *, kept: bool) -> float:
        """Steps per second of a network that is the larger part."""
        model, optimizer = net(large=True)
        batches: Iterable[Any] = self.ours()
        if kept:
            batches = self._once("kept", lambda: list(self.ours()))
        began, done = time.perf_counter(), 0
        for batch in batches:
            _step(model, optimizer, batch, self.patch)
            done += 1
        return done / (time.perf_counter() - began)

    # ------------------------------------------------------------------------------------- memory

    def memory(self, kind: str) -> float:
        """MiB of two ranks and their workers, a page that several share counted once, in the middle of an epoch."""
        rows = self.stores() if kind == "ours" else self.niftis()
        command = [sys.executable, str(WORK), kind, json.dumps(rows), str(self.patch)]
        ranks = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=WORK.parents[2]
            )
            for _ in range(2)
        ]  # fmt: skip
        try:
            for rank in ranks:
                assert rank.stdout is not None
                if rank.stdout.readline().strip() != "ready":
                    raise RuntimeError("A rank ended before it had read anything.")
            return sum(_held(rank.pid) for rank in ranks) / 2**20
        finally:
            for rank in ranks:
                rank.communicate(timeout=60)  # the end of its input is its end


# ------------------------------------------------------------------------------------------------ readers


def ours(rows: list[dict[str, str]], patch: int, *, batch: int, workers: int) -> Iterable[Any]:
    from monai.data import list_data_collate
    from monai.transforms import Compose, RandFlipd, ScaleIntensityRanged

    from permed_compute.learning.loader import Loader, Windowed
    from permed_compute.learning.order import Seeded
    from permed_compute.workloads.radiology.patches import Case as Scan
    from permed_compute.workloads.radiology.patches import Random, Samples

    flips = (RandFlipd(("image", "label"), prob=0.5, spatial_axis=axis) for axis in range(3))
    transform = Compose([ScaleIntensityRanged("image", **SCALE), *flips])
    scans = [Scan((Path(row["image"]),), Path(row["label"])) for row in rows]
    samples = Samples(scans, Random((patch,) * 3), transform=transform)
    order = Windowed(len(samples), batch=batch, seed=0, groups=samples.groups, window=len(samples))
    return Loader(Seeded(samples, 0), order, workers=workers, collate=list_data_collate)


def read_and_cut(patch: int) -> Any:
    """As MONAI's tutorials do; what is before the crop is cached."""
    from monai.transforms import (
        Compose,
        EnsureChannelFirstd,
        LoadImaged,
        RandFlipd,
        RandSpatialCropd,
        ScaleIntensityRanged,
    )

    keys = ("image", "label")
    flips = (RandFlipd(keys, prob=0.5, spatial_axis=axis) for axis in range(3))
    crop = RandSpatialCropd(keys, (patch,) * 3, random_size=False)
    return Compose([LoadImaged(keys), EnsureChannelFirstd(keys), ScaleIntensityRanged("image", **SCALE), crop, *flips])


def loaded(dataset: Any, *, batch: int, workers: int) -> Iterable[Any]:
    from monai.data import DataLoader

    return DataLoader(dataset, batch_size=batch, shuffle=True, num_workers=workers)


class _Blosc2:
    """nnU-Net's files and how it reads them: scaled float32 and labels as blosc2 arrays, a patch is a slice of both."""

    def __init__(self, scans: list[dict[str, np.ndarray]], patch: int) -> None:
        from monai.transforms import Compose, RandFlipd

        self._patch, self._files = patch, _blosc2_files(scans)
        flips = (RandFlipd(("image", "label"), prob=0.5, spatial_axis=axis) for axis in range(3))
        self._transform = Compose(list(flips))
        self._chance = np.random.default_rng(0)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Any:
        import blosc2
        import torch

        sample = {}
        starts = None
        for name, file in self._files[index].items():
            array = blosc2.open(urlpath=str(file), mode="r", dparams={"nthreads": 1}, mmap_mode="r")
            if starts is None:
                starts = [int(self._chance.integers(0, n - self._patch + 1)) for n in array.shape[1:]]
            box = tuple(slice(at, at + self._patch) for at in starts)
            sample[name] = torch.from_numpy(np.ascontiguousarray(array[(slice(None), *box)]))
        return self._transform(sample)


def _blosc2_files(scans: list[dict[str, np.ndarray]]) -> list[dict[str, Path]]:
    try:
        import blosc2
    except ImportError:
        raise LeftOutError("blosc2 is not installed (extra: bench)") from None
    folder, found = volumes.folder(), []
    for k, scan in enumerate(scans):
        image = np.clip((scan["image"] - SCALE["a_min"]) / (SCALE["a_max"] - SCALE["a_min"]), 0, 1)
        row = {}
        for name, array in (("image", image.astype(np.float32)), ("label", scan["label"].astype(np.int16))):
            row[name] = folder / f"case-{k}{'' if name == 'image' else '_seg'}.b2nd"
            shape = array.shape
            blosc2.asarray(
                array[None], urlpath=str(row[name]), mode="w",
                chunks=(1, *(min(a, b) for a, b in zip(CHUNK, shape, strict=True))),
                blocks=(1, *(min(BLOCK, n) for n in shape)),
                cparams={"codec": blosc2.Codec.ZSTD, "clevel": 8, "nthreads": 1},
            )  # fmt: skip
        found.append(row)
    return found


# ------------------------------------------------------------------------------------------------ what is written


def _stores(scans: list[dict[str, np.ndarray]]) -> list[dict[str, str]]:
    from permed_compute.workloads.radiology import volume_store
    from permed_compute.workloads.radiology.read import Volume

    folder, affine = volumes.folder(), np.diag([-1.0, -1.0, 1.0, 1.0]) @ volumes.AFFINE
    rows = []
    for k, scan in enumerate(scans):
        row = {name: folder / f"{name}-{k}.zarr" for name in scan}
        for name, array in scan.items():
            volume = Volume(np.ascontiguousarray(array), affine, (), None, f"{k:02d}{name[0]}" * 16, "")
            kind = "label" if name == "label" else "image"
            volume_store.write(row[name], volume, inputs=[], kind=kind, threads=2)  # type: ignore[arg-type]
        rows.append({name: str(path) for name, path in row.items()})
    return rows


def _niftis(scans: list[dict[str, np.ndarray]]) -> list[dict[str, str]]:
    from permed_compute.workloads.radiology import nifti

    folder, rows = volumes.folder(), []
    for k, scan in enumerate(scans):
        row = {name: folder / f"{name}-{k}.nii.gz" for name in scan}
        for name, array in scan.items():
            nifti.write(np.ascontiguousarray(array), volumes.AFFINE, row[name], level=1)
        rows.append({name: str(path) for name, path in row.items()})
    return rows


# ------------------------------------------------------------------------------------------------ the network


@cache
def _weights(large: bool) -> Any:
    import torch
    from monai.networks.nets import SegResNet, UNet

    torch.manual_seed(0)
    if large:
        return SegResNet(spatial_dims=3, init_filters=8, in_channels=1, out_channels=2)
    return UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(8, 16), strides=(2,), norm="instance")


def net(*, large: bool) -> tuple[Any, Any]:
    """The same weights each time, and their optimiser. large: convolves at full resolution, as nnU-Net's do."""
    import copy

    import torch

    model = copy.deepcopy(_weights(large))
    return model, torch.optim.AdamW(model.parameters(), lr=1e-3)


def _step(model: Any, optimizer: Any, batch: Any, patch: int) -> int:
    """Forward and backward; returns the number of samples."""
    import torch

    image, label = (torch.as_tensor(batch[name]) for name in ("image", "label"))
    image, label = (getattr(each, "as_tensor", lambda each=each: each)() for each in (image, label))
    if tuple(image.shape[1:]) != (1, patch, patch, patch) or not 0 <= float(image[0, 0, 0, 0, 0]) <= 1:
        raise RuntimeError("The patch is another one than was asked for.")
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(image), label[:, 0].long()).backward()
    optimizer.step()
    return len(image)


def _held(pid: int) -> int:
    """Bytes of a process and all below it: PSS, so that pages they share count once."""
    import psutil

    root = psutil.Process(pid)
    return sum(int(one.memory_full_info().pss) for one in (root, *root.children(recursive=True)))
