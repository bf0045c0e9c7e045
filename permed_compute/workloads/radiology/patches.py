"""Samples for training and inference from volumes: random, balanced and grid patches, or whole volumes, as MONAI wants.

    samples = Samples(cases("dataset.json"), Random((96, 96, 96), per_volume=4), transform=…)
    Loader(Seeded(samples, seed), Windowed(len(samples), batch, seed, groups=samples.groups, window=64), workers=4)

An image is a store, a NIfTI file or a DICOM folder: the samples are the same, a store is faster. A sample is
{"image": (channels, x, y, z) float32 MetaTensor, "label": (1, x, y, z)}, its affine moved to the patch's corner. Which
patch it is depends on the seed that `Seeded` (or MONAI) sets before it is asked for, and on nothing else.
"""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from torch.utils.data import Dataset, get_worker_info

from permed_compute.errors import WorkloadError
from permed_compute.storage.volumes import CHUNK, SHARD, Triple
from permed_compute.workloads.radiology import geometry, nifti, pet, read, straighten, volume_store
from permed_compute.workloads.radiology.read import Volume
from permed_compute.workloads.radiology.volume_store import VolumeStore

if TYPE_CHECKING:
    from numpy.random import Generator

SAME_PLACE = 1e-3
"""Affines of one case agree within this (mm, and mm per voxel)."""
_BUDGET = 2 << 30
_OPEN_MOST = 512


# ------------------------------------------------------------------------------------------------ cases


@dataclass(frozen=True, slots=True)
class Case:
    """What makes one sample: an image per channel, and the label where there is one; all on one grid."""

    images: tuple[Path, ...]
    label: Path | None = None


def cases(index: Path | str, split: str = "training") -> list[Case]:
    """Of a Decathlon list such as `radiology/ingest` writes; paths are relative to its folder."""
    index = Path(index)
    rows = json.loads(index.read_text(encoding="utf-8"))[split]
    found = []
    for row in rows:
        row = row if isinstance(row, Mapping) else {"image": row}
        images = row["image"] if isinstance(row["image"], list) else [row["image"]]
        label = index.parent / row["label"] if row.get("label") else None
        found.append(Case(tuple(index.parent / image for image in images), label))
    return found


# ------------------------------------------------------------------------------------------------ sources


class Source(Protocol):
    """A volume that gives boxes of values; see `VolumeStore`."""

    shape: Triple
    affine_ras: np.ndarray
    dtype: np.dtype[Any]

    @property
    def digest(self) -> str: ...
    @property
    def class_chunks(self) -> Mapping[int, Sequence[Sequence[int]]]: ...
    def values(self, start: Sequence[int], size: Sequence[int], dtype: Any = ...) -> np.ndarray: ...


class Decoded:
    """A volume in memory, with the boxes of a store."""

    def __init__(self, volume: Volume, kind: volume_store.Kind) -> None:
        array = volume_store.as_label(volume.array, volume.series) if kind == "label" else volume.array
        self._array = np.ascontiguousarray(array)
        self._fill = 0 if kind == "label" else volume_store.darkest(array)
        self.shape: Triple = (array.shape[0], array.shape[1], array.shape[2])
        self.affine_ras, self.digest, self.dtype = volume.affine_ras, volume.series, array.dtype

    @property
    def nbytes(self) -> int:
        return self._array.nbytes

    def values(self, start: Sequence[int], size: Sequence[int], dtype: Any = np.float32) -> np.ndarray:
        out = np.full(tuple(size), self._fill, dtype)
        low = [max(s, 0) for s in start]
        high = [max(min(s + n, m), a) for s, n, m, a in zip(start, size, self.shape, low, strict=True)]
        to = tuple(slice(a - s, b - s) for s, a, b in zip(start, low, high, strict=True))
        out[to] = self._array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
        return out

    @cached_property
    def class_chunks(self) -> Mapping[int, Sequence[Sequence[int]]]:
        return {int(name): rows for name, rows in volume_store.label_chunks(self._array).items()}


@dataclass
class Sources:
    """Opens what a path names. Decoded volumes are kept up to `budget` bytes, shared by the loader's workers.

    suv, straight: of DICOM, as the parameters `pet` and `tilt` of `radiology/ingest`.
    Raises `RefusedInput`, and `WorkloadError` where one volume alone exceeds the budget.
    """

    budget: int = _BUDGET
    suv: bool = True
    straight: bool = False
    _kept: OrderedDict[tuple[str, str], Decoded] = field(default_factory=OrderedDict, repr=False)
    _open: OrderedDict[str, VolumeStore] = field(default_factory=OrderedDict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_open": OrderedDict()}

    @property
    def share(self) -> int:
        """Bytes for this process."""
        worker = get_worker_info()
        return self.budget // max(1, worker.num_workers if worker else 1)

    @property
    def held(self) -> int:
        return sum(item.nbytes for item in self._kept.values())

    def open(self, path: Path, kind: volume_store.Kind) -> Source:
        if (path / "zarr.json").is_file():
            return self._store(path)
        key = (str(path), kind)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        made = Decoded(self._volume(path), kind)
        if made.nbytes > self.share:
            raise WorkloadError(
                f"A volume of {made.nbytes:,} bytes does not fit this worker's {self.share:,}.",
                remedy="Ingest it into a store, of which only patches are read, or raise the budget.",
            )
        while self._kept and self.held + made.nbytes > self.share:
            self._kept.popitem(last=False)
        self._kept[key] = made
        return made

    def _store(self, path: Path) -> VolumeStore:
        key = str(path)
        if key not in self._open:
            self._open[key] = VolumeStore(path)
            while len(self._open) > _OPEN_MOST:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(key)
        return self._open[key]

    def _volume(self, path: Path) -> Volume:
        if nifti.is_nifti(path):
            return nifti.read(path, _digest(path))[0]
        series = [one for one in read.scan(read.find(path), _digest).series if one.is_volume and not one.is_localiser]
        if len(series) != 1:
            raise WorkloadError(
                f"A folder given as an image holds {len(series)} series.", remedy="Give one folder per series."
            )
        volume = (straighten.assemble if self.straight else read.assemble)(series[0])
        return pet.as_suv(volume)[0] if self.suv and volume.modality == "PT" else volume

    def shape(self, path: Path) -> Triple:
        """Voxels, from the header alone where it says them."""
        if nifti.is_nifti(path):
            x, y, z = nifti.shape_of(path, _digest(path))
            return x, y, z
        return self.open(path, "image").shape


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------------------------------------------------------------------------ ways to cut


class Cut(Protocol):
    """Which boxes of a volume are samples."""

    def count(self, shape: Triple) -> int:
        """Samples of a volume of this shape."""
        ...

    def box(self, number: int, shape: Triple, label: Source | None, chance: Generator) -> tuple[Triple, Triple]:
        """(start, size) of the number-th; a start below 0 is outside, where voxels are the volume's darkest."""
        ...


@dataclass(frozen=True, slots=True)
class Whole:
    """The volume itself."""

    def count(self, shape: Triple) -> int:
        return 1

    def box(self, number: int, shape: Triple, label: Source | None, chance: Generator) -> tuple[Triple, Triple]:
        return (0, 0, 0), shape


@dataclass(frozen=True, slots=True)
class Random:
    """`per_volume` patches anywhere inside; a volume that is smaller lies in the middle of its patch."""

    size: Triple
    per_volume: int = 1

    def count(self, shape: Triple) -> int:
        return self.per_volume

    def box(self, number: int, shape: Triple, label: Source | None, chance: Generator) -> tuple[Triple, Triple]:
        return _around([int(chance.integers(0, n)) for n in _room(shape, self.size)], shape, self.size), self.size


@dataclass(frozen=True, slots=True)
class Balanced:
    """Patches whose middle voxel is of a class drawn by weight; class 0 means a random patch.

    Every voxel of a class is equally likely, as in MONAI's RandCropByLabelClassesd, but no label is read whole: the
    store says which chunks hold the class, and one of them is decoded. Near an edge the patch moves inside. Weights of
    classes that a volume lacks go to the others; without any it is a random patch.
    """

    size: Triple
    weights: Mapping[int, float]
    per_volume: int = 1

    def count(self, shape: Triple) -> int:
        return self.per_volume

    def box(self, number: int, shape: Triple, label: Source | None, chance: Generator) -> tuple[Triple, Triple]:
        if label is None:
            raise WorkloadError("Balanced patches need a label.", remedy="Use Random, or give every case a label.")
        chunks = label.class_chunks
        there = [one for one in sorted(self.weights) if self.weights[one] > 0 and (one == 0 or one in chunks)]
        if not there:
            return Random(self.size).box(number, shape, label, chance)
        weights = np.array([self.weights[one] for one in there], float)
        one = there[int(chance.choice(len(there), p=weights / weights.sum()))]
        if one == 0:
            return Random(self.size).box(number, shape, label, chance)
        middle = _voxel_of(one, chunks[one], shape, label, chance)
        return _around([v - n // 2 for v, n in zip(middle, self.size, strict=True)], shape, self.size), self.size


def _voxel_of(
    one: int, chunks: Sequence[Sequence[int]], shape: Triple, label: Source, chance: Generator
) -> list[int]:  # fmt: skip
    """A voxel of the class, each equally likely."""
    counts = np.cumsum([count for _, count in chunks])
    drawn = int(chance.integers(0, counts[-1]))
    which = int(np.searchsorted(counts, drawn, side="right"))
    grid = [-(-n // CHUNK) for n in shape]
    corner = [int(at) * CHUNK for at in np.unravel_index(chunks[which][0], grid)]
    size = [min(CHUNK, n - at) for n, at in zip(shape, corner, strict=True)]
    inside = np.flatnonzero(label.values(corner, size, np.int32) == one)
    place = np.unravel_index(inside[drawn - (int(counts[which - 1]) if which else 0)], size)
    return [at + int(v) for at, v in zip(corner, place, strict=True)]


@dataclass(frozen=True, slots=True)
class Grid:
    """Every voxel at least once: patches in steps of size × (1 - overlap), the last moved inside, as MONAI slides."""

    size: Triple
    overlap: float = 0.0

    def count(self, shape: Triple) -> int:
        return int(np.prod([len(starts) for starts in self._starts(shape)]))

    def box(self, number: int, shape: Triple, label: Source | None, chance: Generator) -> tuple[Triple, Triple]:
        starts = self._starts(shape)
        x, y, z = np.unravel_index(number, [len(axis) for axis in starts])
        return _around([starts[0][x], starts[1][y], starts[2][z]], shape, self.size), self.size

    def _starts(self, shape: Triple) -> list[list[int]]:
        starts = []
        for room, size in zip(_room(shape, self.size), self.size, strict=True):
            step = max(1, int(size * (1 - self.overlap)))
            starts.append([*range(0, room - 1, step), room - 1])
        return starts


def _room(shape: Triple, size: Triple) -> list[int]:
    """Places that a patch may start at, along each axis."""
    return [max(n - own, 0) + 1 for n, own in zip(shape, size, strict=True)]


def _around(start: Sequence[int], shape: Triple, size: Triple) -> Triple:
    """The start moved inside; along an axis where the volume is smaller, so that it lies in the middle."""
    x, y, z = (
        min(max(int(at), 0), n - own) if n >= own else -((own - n) // 2)
        for at, n, own in zip(start, shape, size, strict=True)
    )
    return x, y, z


# ------------------------------------------------------------------------------------------------ samples


class Samples(Dataset[Any]):
    """Map-style samples of all cases, in the order of the cases. MONAI's transforms take them as they are.

    budget: bytes of decoded volumes over all workers of a process; stores are read in place and take none of it.
    """

    def __init__(
        self,
        items: Sequence[Case],
        cut: Cut,
        *,
        transform: Callable[[Any], Any] | None = None,
        budget: int = _BUDGET,
        suv: bool = True,
        straight: bool = False,
    ) -> None:
        self.items, self.cut, self.transform = list(items), cut, transform
        self._sources = Sources(budget, suv, straight)
        self._seed = 0
        fixed = isinstance(cut, (Random, Balanced, Whole))
        counts = [cut.count((0, 0, 0) if fixed else self._sources.shape(case.images[0])) for case in self.items]
        self._first = np.concatenate([[0], np.cumsum(counts)]).astype(int)

    def __len__(self) -> int:
        return int(self._first[-1])

    @property
    def groups(self) -> list[int]:
        """Of each sample, the number of the store's shard (or the volume) that it is read from, for `Windowed`."""
        return list(self._groups())

    def _groups(self) -> Iterator[int]:
        offset = 0
        for number, case in enumerate(self.items):
            count = int(self._first[number + 1] - self._first[number])
            if not isinstance(self.cut, Grid):
                yield from [offset] * count
                offset += 1
                continue
            shape = self._sources.shape(case.images[0])
            shards = [-(-n // SHARD) for n in shape]
            for k in range(count):
                start, size = self.cut.box(k, shape, None, np.random.default_rng(0))
                middle = [min(max(a + n // 2, 0), m - 1) // SHARD for a, n, m in zip(start, size, shape, strict=True)]
                yield offset + int(np.ravel_multi_index(middle, shards))
            offset += int(np.prod(shards))

    def set_random_state(self, seed: int | None = None, state: Any = None) -> Samples:
        """What the next sample is drawn with; MONAI's name for it."""
        self._seed = int(seed if seed is not None else state.randint(2**31) if state is not None else 0)
        return self

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = int(np.searchsorted(self._first, index, side="right")) - 1
        case = self.items[number]
        chance = np.random.Generator(np.random.Philox([self._seed, index]))
        sample = self._cut(case, index - int(self._first[number]), chance)
        return sample if self.transform is None else self.transform(sample)

    def _cut(self, case: Case, number: int, chance: Generator) -> dict[str, Any]:
        images = [self._sources.open(path, "image") for path in case.images]
        label = self._sources.open(case.label, "label") if case.label else None
        _check_one_grid([*images, *([label] if label else [])])
        start, size = self.cut.box(number, images[0].shape, label, chance)
        values = [image.values(start, size) for image in images]
        channels = values[0][None] if len(values) == 1 else np.stack(values)
        sample = {"image": _tensor(channels, images[0], start)}
        if label is not None:
            sample["label"] = _tensor(label.values(start, size, label.dtype)[None], label, start)
        return sample


def _check_one_grid(sources: Sequence[Source]) -> None:
    first = sources[0]
    for other in sources[1:]:
        apart = float(np.abs(first.affine_ras - other.affine_ras).max())
        if first.shape != other.shape or apart > SAME_PLACE:
            geometry.refuse(
                "GRIDS_DIFFER", f"The volumes of a case lie on different grids: {list(first.shape)} and"
                f" {list(other.shape)}, affines {apart:.4g} mm apart.", other.digest,
                "Resample one to the other first.", affine_apart=round(apart, 6),
                shapes=[list(first.shape), list(other.shape)],
            )  # fmt: skip


def _tensor(values: np.ndarray, source: Source, start: Triple) -> Any:
    import torch
    from monai.data.meta_tensor import MetaTensor

    affine = source.affine_ras.copy()
    affine[:3, 3] += affine[:3, :3] @ start
    # The digest stands where MONAI keeps a file's name: names can carry identifiers.
    meta = {"filename_or_obj": source.digest, "location": list(start), "spatial_shape": list(source.shape)}
    return MetaTensor(torch.from_numpy(values), affine=torch.from_numpy(affine), meta=meta)
