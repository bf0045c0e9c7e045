"""Milliseconds of CPU time per random 96³ patch: ours from the sharded store, and what people read patches with."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs import volumes

TITLE = "Random patches from a volume"
WHY = (
    "A GPU that trains eats patches; whoever decodes a whole volume for each starves it. 96³ float32 from a 256³ int16"
    " CT-like volume, warm cache, one process; every patch is compared with the volume. First the reading alone, then"
    " samples as MONAI's DataLoader gets them (MetaTensor with its affine)."
    " Goals: ≤ 6 ms, ≥ 3 × zarr-python, ≥ 10 × PersistentDataset."
)
SIZE = 96

Read = Callable[[int, int, int], np.ndarray]


def cases(quick: bool) -> list[Case]:
    edge, count = (128, 4) if quick else (256, 40)
    reads = {
        "zarr-python, same store": zarr, "tensorstore, same store": tensorstore, "zarr-python, zstd 64³ in 256³": zstd,
        "nibabel, .nii.gz": nibabel, "npy memory map, not packed": memmap,
    }  # fmt: skip
    samples = {
        "MONAI PersistentDataset": persistent, "MONAI Dataset, .nii.gz": loaded,
        "MONAI CacheDataset, copy_cache=False": cached,
    }  # fmt: skip
    group, other = "reading, CPU ms per patch", "samples, CPU ms per patch"
    return [
        Case(group, "ours, store", "ms", "lower", timed(ours, edge, count), limit=6.0, ratio=1 / 3,
             goal="≤ 6 ms and ≥ 3 × zarr-python"),
        *(Case(group, name, "ms", "lower", timed(make, edge, count), peer=True) for name, make in reads.items()),
        Case(other, "ours, store", "ms", "lower", drawn(mine, edge, count), limit=6.0, ratio=1 / 10,
             goal="≤ 6 ms and ≥ 10 × PersistentDataset"),
        Case(other, "ours, store, balanced with its label", "ms", "lower", drawn(balanced, edge, count)),
        *(Case(other, name, "ms", "lower", drawn(make, edge, max(2, count // 4)), peer=True)
          for name, make in samples.items()),
    ]  # fmt: skip


def timed(make: Callable[[int], Read], edge: int, count: int) -> Callable[[], float]:
    def measure() -> float:
        try:
            read = make(edge)
        except ImportError as error:
            raise LeftOutError(f"{error.name} is not installed (extra: bench)") from None
        array, starts = volumes.ct(edge), np.random.default_rng(1).integers(0, edge - SIZE + 1, (count, 3)).tolist()
        for x, y, z in starts[:2]:
            seen = read(x, y, z)
            if seen.dtype != np.float32 or not np.array_equal(seen, _patch(array, x, y, z)):
                raise ValueError(f"{make.__name__} gives other voxels")
        began = time.process_time()
        for x, y, z in starts:
            read(x, y, z)
        return (time.process_time() - began) / count * 1e3

    return measure


def _patch(array: np.ndarray, x: int, y: int, z: int) -> np.ndarray:
    return array[x : x + SIZE, y : y + SIZE, z : z + SIZE]


def drawn(make: Callable[[int], Any], edge: int, count: int) -> Callable[[], float]:
    """Of a map-style dataset of {"image": …}."""

    def measure() -> float:
        dataset, array = make(edge), volumes.ct(edge)
        if not _found(np.asarray(dataset[0]["image"])[0], array):
            raise ValueError(f"{make.__name__} gives other voxels")
        began = time.process_time()
        for _ in range(count):
            dataset[0]
        return (time.process_time() - began) / count * 1e3

    return measure


def _found(patch: np.ndarray, array: np.ndarray) -> bool:
    """Whether the patch lies somewhere in the array: MONAI's PersistentDataset forgets where."""
    most = array.shape[0] - SIZE + 1
    places = np.argwhere(array[:most, :most, :most] == patch[0, 0, 0])
    for step in range(1, SIZE):
        places = places[array[tuple((places + step).T)] == patch[step, step, step]]
    return len(places) == 1 and np.array_equal(_patch(array, *places[0].tolist()), patch)


# ------------------------------------------------------------------------------------------------ reading


def ours(edge: int) -> Read:
    from permed_compute.workloads.radiology.volume_store import VolumeStore

    store = VolumeStore(volumes.store(edge))
    return lambda x, y, z: store.values((x, y, z), (SIZE,) * 3)


def zarr(edge: int) -> Read:
    import zarr

    array = zarr.open_array(volumes.store(edge), mode="r")
    return lambda x, y, z: _patch(array, x, y, z).astype(np.float32)


def tensorstore(edge: int) -> Read:
    import tensorstore

    array = tensorstore.open(
        {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(volumes.store(edge))},
         "context": {"data_copy_concurrency": {"limit": 1}}}, open=True,
    ).result()  # fmt: skip
    return lambda x, y, z: _patch(array, x, y, z).read().result().astype(np.float32)


_ZSTD: dict[int, Path] = {}


def zstd(edge: int) -> Read:
    import zarr
    from zarr.codecs import ZstdCodec

    if edge not in _ZSTD:
        _ZSTD[edge] = volumes.folder() / "zstd.zarr"
        made = zarr.create_array(
            _ZSTD[edge], shape=(edge,) * 3, dtype="int16", chunks=(64,) * 3, shards=(min(edge, 256),) * 3,
            compressors=[ZstdCodec(level=1)],
        )  # fmt: skip
        made[...] = volumes.ct(edge)
    array = zarr.open_array(_ZSTD[edge], mode="r")
    return lambda x, y, z: _patch(array, x, y, z).astype(np.float32)


def nibabel(edge: int) -> Read:
    import nibabel

    def read(x: int, y: int, z: int) -> np.ndarray:
        return _patch(nibabel.load(volumes.nifti(edge)).dataobj, x, y, z).astype(np.float32)

    return read


_NPY: dict[int, Path] = {}


def memmap(edge: int) -> Read:
    if edge not in _NPY:
        _NPY[edge] = volumes.folder() / "v.npy"
        np.save(_NPY[edge], volumes.ct(edge))
    array = np.load(_NPY[edge], mmap_mode="r")
    return lambda x, y, z: np.asarray(_patch(array, x, y, z)).astype(np.float32)


# ------------------------------------------------------------------------------------------------ samples


class Repeated:
    """Index 0 of `samples`, another patch each time."""

    def __init__(self, samples: Any) -> None:
        from permed_compute.learning.order import Seeded

        self._samples, self._epoch = Seeded(samples, 0), 0

    def __getitem__(self, index: int) -> Any:
        self._epoch += 1
        return self._samples[(self._epoch, index)]


def mine(edge: int) -> Repeated:
    from permed_compute.workloads.radiology import patches

    return Repeated(patches.Samples([patches.Case((volumes.store(edge),))], patches.Random((SIZE,) * 3)))


def balanced(edge: int) -> Repeated:
    from permed_compute.workloads.radiology import patches, volume_store
    from permed_compute.workloads.radiology.read import Volume

    label = volumes.store(edge).with_name("label.zarr")
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volumes.AFFINE
    volume = Volume((volumes.ct(edge) > 60).astype(np.uint8), affine, (), None, "c" * 64, "")
    volume_store.write(label, volume, inputs=[], kind="label")
    case = patches.Case((volumes.store(edge),), label)
    return Repeated(patches.Samples([case], patches.Balanced((SIZE,) * 3, {0: 1, 1: 1})))


def _monai(edge: int) -> tuple[list[dict[str, str]], Any]:
    from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, RandSpatialCropd

    crop = RandSpatialCropd("image", (SIZE,) * 3, random_size=False)
    return [{"image": str(volumes.nifti(edge))}], Compose([LoadImaged("image"), EnsureChannelFirstd("image"), crop])


_CACHES: dict[int, Path] = {}


def persistent(edge: int) -> Any:
    from monai.data import PersistentDataset

    _CACHES.setdefault(edge, volumes.folder())
    return PersistentDataset(*_monai(edge), cache_dir=_CACHES[edge])


def loaded(edge: int) -> Any:
    from monai.data import Dataset

    return Dataset(*_monai(edge))


def cached(edge: int) -> Any:
    from monai.data import CacheDataset

    return CacheDataset(*_monai(edge), copy_cache=False, progress=False)
