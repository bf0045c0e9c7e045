"""Sliding-window inference whose logits are never whole: blended, resampled and decided while the window moves on.

    labels(image, predict, windows, grid) -> array of labels on `grid`

The windows lie, are weighted and are added up as in MONAI's `sliding_window_inference` (1.6.1), in its order, so that
the sums are the same numbers; what differs is how much of them is kept. Windows with the same start along the first
axis are a layer. Once a layer is done, the planes before the next one are final: they are resampled and decided class
by class against a running maximum, and forgotten. C×D×H×W logits become C×(window + 1)×H×W, and where that is above
`keep_bytes`, the windows' outputs lie in a scratch file and are read back class by class: memory then does not depend
on the number of classes (beyond what the network itself returns for one batch of windows).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from permed_compute.errors import WorkloadError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Predict = Callable[["Tensor"], "Tensor"]
"""(batch, channels, *roi) → logits (batch, classes, *roi)."""

KEEP_BYTES = 512 << 20
_TILE_BYTES = {"cpu": 1 << 20, "cuda": 64 << 20}
"""Of one class's values that are worked on at a time: a CPU's second-level cache; enough to fill a GPU."""
_LEAST_WEIGHT = 1e-3
_INSIDE = 1e-4
"""Voxels of the network's grid: rounding of affines does not put a border voxel outside."""


class OutOfMemoryError(WorkloadError):
    """The network does not fit the device even with the smallest windows."""

    code = "out-of-memory"


@dataclass(frozen=True, slots=True)
class Windows:
    """How the image is cut and put together again. The names are MONAI's but for `batch` (`sw_batch_size`)."""

    roi_size: tuple[int, int, int]
    overlap: tuple[float, float, float] = (0.25, 0.25, 0.25)
    mode: Literal["constant", "gaussian"] = "constant"
    sigma_scale: float = 0.125
    batch: int = 1
    padding_mode: str = "constant"
    cval: float = 0.0


@dataclass(frozen=True, slots=True)
class Grid:
    """Where answers are wanted: voxel i along an axis lies at `scale * i + offset` voxels of the network's grid.

    scale > 0 (a reversed axis is reversed afterwards). Values are trilinear between voxel centres, constant over the
    half voxel beyond the outermost; further outside the label is 0.
    """

    shape: tuple[int, int, int]
    scale: tuple[float, float, float]
    offset: tuple[float, float, float]

    @classmethod
    def same_extent(cls, shape: Sequence[int], network: Sequence[int]) -> Grid:
        """Both grids fill the same box: `interpolate(align_corners=False)`, nnU-Net's and scikit-image's way."""
        scale = [n / m for n, m in zip(network, shape, strict=True)]
        x, y, z = scale
        i, j, k = (0.5 * s - 0.5 for s in scale)
        return cls((shape[0], shape[1], shape[2]), (x, y, z), (i, j, k))


@dataclass(frozen=True, slots=True)
class Decision:
    """How logits become a label. `activation` comes before resampling, as in most bundles' postprocessing."""

    kind: Literal["argmax", "threshold"] = "argmax"
    activation: Literal["none", "softmax", "sigmoid"] = "none"
    threshold: float = 0.5
    """For `threshold`, of the one channel there is: label 1 where the value is at least this."""


# ------------------------------------------------------------------------------------------------ networks


def flipped(predict: Predict, axes: Iterable[tuple[int, ...]]) -> Predict:
    """Test-time augmentation: the mean of the logits over the given flips (spatial axes 0-2; `()` is none).

    Per window, as nnU-Net mirrors: blending is linear, so the mean of the stitched logits is the same.
    """
    turns = [tuple(axis + 2 for axis in flip) for flip in axes]

    def mean(x: Tensor) -> Tensor:
        total = None
        for dims in turns:
            out = predict(x.flip(dims)).flip(dims) if dims else predict(x)
            total = out if total is None else total.add_(out)
        assert total is not None, "one flip at least"
        return total.div_(len(turns))

    return mean


def ensemble(predicts: Sequence[Predict]) -> Predict:
    """The mean of several networks' logits."""

    def mean(x: Tensor) -> Tensor:
        total = predicts[0](x)
        for predict in predicts[1:]:
            total = total + predict(x)
        return total.div_(len(predicts))

    return mean if len(predicts) > 1 else predicts[0]


# ------------------------------------------------------------------------------------------------ the way through


def labels(
    image: Tensor,
    predict: Predict,
    windows: Windows,
    *,
    grid: Grid | None = None,
    decision: Decision | None = None,
    keep_bytes: int = KEEP_BYTES,
    scratch: Path | None = None,
) -> np.ndarray:
    """Labels of `image` (channels, D, H, W; float32 on the network's device) on `grid`, else on the image's own voxels.

    uint8, or int16 above 255 classes. `keep_bytes` bounds what is kept of the logits; above it a file below `scratch`
    (the system's temporary folder) takes them. Raises `WorkloadError` where the network returns another shape or NaN.
    """
    import torch

    decision = decision or Decision()
    sizes = tuple(int(n) for n in image.shape[1:])
    roi = tuple(r if r > 0 else n for r, n in zip(windows.roi_size, sizes, strict=True))
    padded, before = _padded(image, roi, windows)
    starts = [_starts(n, r, o) for n, r, o in zip(padded.shape[1:], roi, windows.overlap, strict=True)]
    weight = None if windows.mode == "constant" else importance(roi, windows.sigma_scale, image.device)
    inner = tuple(slice(b, b + n) for b, n in zip(before, sizes, strict=True))
    with torch.inference_mode(), tempfile.TemporaryDirectory(prefix="windows-", dir=scratch) as folder:
        sums: Slab | Spill | None = None
        answer: Answer | None = None
        for layer, start in enumerate(starts[0]):
            places = [(start, y, x) for y, x in product(starts[1], starts[2])]
            for k in range(0, len(places), windows.batch):
                group = places[k : k + windows.batch]
                out = _predicted(predict, padded, group, roi)
                if sums is None or answer is None:
                    slab = 4 * out.shape[1] * (roi[0] + 1) * math.prod(padded.shape[2:])
                    kind = Slab if slab <= keep_bytes else Spill
                    sums = kind(out.shape[1], roi, tuple(padded.shape[2:]), image.device, weight, Path(folder))
                    answer = Answer(sums, inner, grid, decision)
                for place, values in zip(group, out, strict=True):
                    sums.add(values, place)
                del out
            assert sums is not None and answer is not None
            ready = starts[0][layer + 1] if layer + 1 < len(starts[0]) else int(padded.shape[1])
            sums.keep(answer.advance(ready), ready)
    assert answer is not None, "one window at least"
    return answer.array


def importance(roi: Sequence[int], sigma_scale: float, device: Any) -> Tensor:
    """MONAI's Gaussian importance map (`compute_importance_map`), to the bit: it clamps from below at 0.001."""
    import torch

    weight = torch.ones((), device=device)
    for n in roi:
        x = torch.arange(-(n - 1) / 2.0, (n - 1) / 2.0 + 1, dtype=torch.float, device=device)
        weight = weight.unsqueeze(-1) * torch.exp(x**2 / (-2 * (n * sigma_scale) ** 2))
    return weight.clamp_(min=max(float(weight.min()), _LEAST_WEIGHT))


def _padded(image: Tensor, roi: Sequence[int], windows: Windows) -> tuple[Tensor, list[int]]:
    from torch.nn.functional import pad

    more = [max(r - n, 0) for r, n in zip(roi, image.shape[1:], strict=True)]
    before = [m // 2 for m in more]
    if not any(more):
        return image, before
    sides = [side for b, m in zip(reversed(before), reversed(more), strict=True) for side in (b, m - b)]
    fill = {"value": windows.cval} if windows.padding_mode == "constant" else {}
    return pad(image[None], sides, mode=windows.padding_mode, **fill)[0], before


def _starts(length: int, roi: int, overlap: float) -> list[int]:
    """Of the windows along one axis: every `roi * (1 - overlap)`, the last one moved back to the border."""
    step = roi if roi == length else max(1, int(roi * (1 - overlap)))
    count = math.ceil((length - roi) / step) + 1
    return [min(k * step, length - roi) for k in range(count)]


def _predicted(predict: Predict, image: Tensor, places: Sequence[tuple[int, ...]], roi: Sequence[int]) -> Tensor:
    import torch

    cut = [image[:, z : z + roi[0], y : y + roi[1], x : x + roi[2]] for z, y, x in places]
    out = predict(torch.stack(cut) if len(cut) > 1 else cut[0][None])
    shape = tuple(getattr(out, "shape", ()))
    if len(shape) != 5 or shape[0] != len(cut) or shape[2:] != tuple(roi):
        raise WorkloadError(
            f"The network returned {shape or type(out).__name__} for windows of {tuple(roi)}.",
            remedy="It must give one logit per class and voxel, at the window's size.",
        )
    return out.float()


# ------------------------------------------------------------------------------------------------ sums of windows


class Sums(Protocol):
    """The weighted sums of the windows' logits over the planes that are not yet decided, and their weights."""

    classes: int
    weights: Tensor
    first: int
    """The plane at which `weights` begins."""
    tile: int
    """How many tiles' worth of planes are best asked for at a time."""

    def values(self, c: int, a: int, b: int) -> Tensor:
        """Sums of class c on planes a … b-1, (b - a, H, W)."""
        ...


@dataclass
class _Rolling:
    """What both kinds share: weights (window + 1, H, W), beginning at plane `first`."""

    classes: int
    roi: tuple[int, ...]
    plane: tuple[int, ...]
    device: torch.device
    weight: Tensor | None
    """Importance map; None where every voxel of a window weighs 1."""
    folder: Path
    first: int = field(default=0, init=False)
    weights: Tensor = field(init=False)

    def __post_init__(self) -> None:
        import torch

        self.weights = torch.zeros((self.roi[0] + 1, *self.plane), device=self.device)

    def _place(self, place: tuple[int, int, int]) -> tuple[slice, slice, slice]:
        """Where a window lies in what is kept; its weight is added."""
        z, y, x = place
        z -= self.first
        where = (slice(z, z + self.roi[0]), slice(y, y + self.roi[1]), slice(x, x + self.roi[2]))
        self.weights[where] += 1.0 if self.weight is None else self.weight
        return where

    def _weighted(self, values: Tensor) -> Tensor:
        """Of one class: so that no weighted copy of the whole window is made."""
        return values if self.weight is None else values * self.weight

    def _roll(self, tensor: Tensor, gone: int) -> None:
        """Drop the first `gone` planes, move the others up, and clear what follows."""
        kept = max(0, tensor.shape[0] - gone)
        tensor[:kept] = tensor[gone:].clone()
        tensor[kept:] = 0


class Slab(_Rolling):
    """Sums in memory: (classes, window + 1, H, W)."""

    tile = 1

    def __post_init__(self) -> None:
        import torch

        super().__post_init__()
        self.sums = torch.zeros((self.classes, self.roi[0] + 1, *self.plane), device=self.device)

    def add(self, values: Tensor, place: tuple[int, int, int]) -> None:
        where = self._place(place)
        for sums, logits in zip(self.sums, values, strict=True):
            sums[where] += self._weighted(logits)

    def values(self, c: int, a: int, b: int) -> Tensor:
        return self.sums[c, a - self.first : b - self.first]

    def keep(self, first: int, ready: int) -> None:
        """Planes before `first` are decided; those from `ready` on are still to come."""
        for tensor in (*self.sums, self.weights):
            self._roll(tensor, first - self.first)
        self.first = first


@dataclass(frozen=True, slots=True)
class _Block:
    """One window's weighted output in a file: (classes, *roi) float32, class after class."""

    place: tuple[int, int, int]
    file: int
    offset: int


class Spill(_Rolling):
    """Windows' outputs in one file per layer, written and read once or twice; added up when a class is asked for."""

    tile = 8  # fewer and longer reads

    def __post_init__(self) -> None:
        super().__post_init__()
        self.blocks: list[_Block] = []

    def add(self, values: Tensor, place: tuple[int, int, int]) -> None:
        self._place(place)
        known = [block for block in self.blocks if block.place[0] == place[0]]
        length = 4 * math.prod(self.roi)
        if known:
            file, offset = known[-1].file, known[-1].offset + length * self.classes
        else:
            name = str(self.folder / f"layer-{place[0]}")
            file, offset = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600), 0
            os.unlink(name)  # noqa: PTH108 - the open file goes on; nothing is left behind by a kill
        try:
            for c, logits in enumerate(values):
                _write(file, self._weighted(logits).contiguous().cpu().numpy(), offset + c * length)
        except OSError as error:
            raise OutOfMemoryError(
                f"The scratch folder cannot take the windows' outputs ({error.strerror}).",
                remedy="Give it more room, or allow more memory (keep_memory).",
            ) from None
        self.blocks.append(_Block(place, file, offset))

    def values(self, c: int, a: int, b: int) -> Tensor:
        import torch

        total = torch.zeros((b - a, *self.plane), device=self.device)
        depth, height, width = self.roi
        for block in self.blocks:
            z, y, x = block.place
            low, high = max(a, z), min(b, z + depth)
            if low >= high:
                continue
            buffer = np.empty((high - low, height, width), np.float32)
            _read(block.file, buffer, block.offset + 4 * height * width * (c * depth + low - z))
            total[low - a : high - a, y : y + height, x : x + width] += torch.from_numpy(buffer).to(self.device)
        return total

    def keep(self, first: int, ready: int) -> None:
        over = {block.file for block in self.blocks if block.place[0] + self.roi[0] <= first}
        self.blocks = [block for block in self.blocks if block.file not in over]
        for file in over:
            os.close(file)
        self._roll(self.weights, first - self.first)
        self.first = first

    def __del__(self) -> None:
        for file in {block.file for block in self.blocks}:
            os.close(file)


def _write(file: int, data: np.ndarray, offset: int) -> None:
    view = data.reshape(-1).view(np.uint8).data
    while view:
        done = os.pwrite(file, view, offset)
        view, offset = view[done:], offset + done


def _read(file: int, buffer: np.ndarray, offset: int) -> None:
    view = buffer.reshape(-1).view(np.uint8).data
    while view:
        done = os.preadv(file, [view], offset)
        if not done:
            raise WorkloadError("The scratch file of the windows is shorter than it was written.")
        view, offset = view[done:], offset + done


# ------------------------------------------------------------------------------------------------ resample, decide


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along one axis: value at i = lerp(in[low[i]], in[high[i]], share[i]), i in `inside`."""

    inside: slice
    low: np.ndarray
    high: np.ndarray
    share: np.ndarray
    plain: bool
    """Every voxel lies on one of the network's."""
    same: bool
    """They are the network's."""

    @classmethod
    def of(cls, count: int, scale: float, offset: float, length: int) -> _Axis:
        if not scale > 0:
            raise WorkloadError("A grid's scale must be above 0.")
        at = scale * np.arange(count, dtype=np.float64) + offset
        inside = np.flatnonzero((at >= -0.5 - _INSIDE) & (at <= length - 0.5 + _INSIDE))
        span = slice(int(inside[0]), int(inside[-1]) + 1) if inside.size else slice(0, 0)
        at = at[span].clip(0, length - 1)
        low = np.floor(at).astype(np.int64)
        plain = bool(np.array_equal(at, low))
        same = plain and np.array_equal(low, np.arange(length))
        high = np.minimum(np.ceil(at).astype(np.int64), length - 1)
        return cls(span, low, high, (at - low).astype(np.float32), plain, same)


class Answer:
    """Labels on the grid wanted, filled plane by plane as sums become final."""

    def __init__(self, sums: Sums, inner: tuple[slice, ...], grid: Grid | None, decision: Decision) -> None:
        """`inner`: the image without its padding, in the planes and rows of `sums`."""
        lengths = [s.stop - s.start for s in inner]
        x, y, z = lengths
        grid = grid or Grid((x, y, z), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
        if decision.kind == "threshold" and sums.classes != 1:
            raise WorkloadError(
                f"A threshold decides one channel; the network has {sums.classes}.", remedy="Decide by argmax."
            )
        self.sums, self.inner, self.decision = sums, inner, decision
        axes = [_Axis.of(*row) for row in zip(grid.shape, grid.scale, grid.offset, lengths, strict=True)]
        self.depth, self.rows, self.columns = axes
        self.done = 0
        """Planes of `depth.inside` that are decided."""
        self.array = np.zeros(grid.shape, np.uint8 if sums.classes <= 256 else np.int16)
        device = sums.weights.device
        self._index = {id(axis): _on(axis, device) for axis in (self.rows, self.columns)}
        voxels = max(1, len(self.rows.low) * len(self.columns.low))
        self._tile = max(1, sums.tile * _TILE_BYTES.get(device.type, 1 << 20) // (4 * voxels))

    def advance(self, ready: int) -> int:
        """Decide what planes before `ready` suffice for; returns the first plane that is still needed."""
        begin = self.inner[0].start
        while self.done < len(self.depth.low) and self.depth.high[self.done] + begin < ready:
            stop = self.done + self._tile
            last = int(np.searchsorted(self.depth.high[:stop], ready - begin, side="left"))
            self._decide(self.done, last)
            self.done = last
        left = self.depth.low[self.done :]
        return min(ready, int(left[0]) + begin) if left.size else ready

    def _decide(self, a: int, b: int) -> None:
        low, high = int(self.depth.low[a]), int(self.depth.high[b - 1]) + 1
        source = _Final(self.sums, self.inner, low, high, self.decision.activation)
        along = [
            (int(i) - low, int(j) - low, float(t))
            for i, j, t in zip(self.depth.low[a:b], self.depth.high[a:b], self.depth.share[a:b], strict=True)
        ]
        values = (self._resampled(source.values(c), along) for c in range(self.sums.classes))
        if self.decision.kind == "argmax":
            found = running_argmax(values, self.array.dtype == np.uint8)
        else:
            found = _finite(next(values)) >= self.decision.threshold
        where = (slice(self.depth.inside.start + a, self.depth.inside.start + b), self.rows.inside, self.columns.inside)
        self.array[where] = found.cpu().numpy()

    def _resampled(self, x: Tensor, along: Sequence[tuple[int, int, float]]) -> Tensor:
        """Columns first and planes last: the gathers of the inner axes run over the fewest values."""
        if not self.columns.same:
            x = _lerp(x, 2, self._index[id(self.columns)], self.columns.plain)
        if not self.rows.same:
            x = _lerp(x, 1, self._index[id(self.rows)], self.rows.plain)
        return x if self.depth.same else _lerp_planes(x, along)


def _on(axis: _Axis, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    import torch

    low, high, share = (torch.from_numpy(each).to(device) for each in (axis.low, axis.high, axis.share))
    return low, high, share


def _lerp(x: Tensor, dim: int, index: tuple[Tensor, ...], plain: bool) -> Tensor:
    import torch

    low, high, share = index

    def take(i: Tensor) -> Tensor:
        # Along the last axis `gather` is 2.6 times as fast as `index_select`; the latter copies whole rows.
        return x.gather(2, i.expand(*x.shape[:2], -1)) if dim == 2 else x.index_select(dim, i)

    weight = share if dim == 2 else share[:, None]
    return take(low) if plain else torch.lerp(take(low), take(high), weight)


def _lerp_planes(x: Tensor, along: Sequence[tuple[int, int, float]]) -> Tensor:
    """Plane by plane from views: two thirds of the values are never copied, and this axis has the most of them."""
    import torch

    out = x.new_empty((len(along), *x.shape[1:]))
    for plane, (low, high, share) in zip(out, along, strict=True):
        torch.lerp(x[low], x[high], share, out=plane)
    return out


class _Final:
    """Blended values on planes low … high-1 of the unpadded image, class by class."""

    def __init__(self, sums: Sums, inner: tuple[slice, ...], low: int, high: int, activation: str) -> None:
        begin = inner[0].start
        self.sums, self.across = sums, inner[1:]
        self.a, self.b = low + begin, high + begin
        self.weights = sums.weights[self.a - sums.first : self.b - sums.first][(slice(None), *self.across)]
        self.activation = activation
        self.top, self.total = self._sum_up() if activation == "softmax" else (self.weights, self.weights)

    def _logits(self, c: int) -> Tensor:
        return self.sums.values(c, self.a, self.b)[(slice(None), *self.across)] / self.weights

    def _sum_up(self) -> tuple[Tensor, Tensor]:
        """Of the softmax: the largest logit, and the sum of exponentials below it."""
        import torch

        top = self._logits(0)
        for c in range(1, self.sums.classes):
            top = torch.maximum(top, self._logits(c))
        total = torch.zeros_like(top)
        for c in range(self.sums.classes):
            total += (self._logits(c) - top).exp_()
        return top, total

    def values(self, c: int) -> Tensor:
        x = self._logits(c)
        if self.activation == "softmax":
            return x.sub_(self.top).exp_().div_(self.total)
        return x.sigmoid_() if self.activation == "sigmoid" else x


def running_argmax(values: Iterator[Tensor], small: bool) -> Tensor:
    """The index of the largest of `values` per voxel, the first where several are equal, two of them in memory.

    Labels only grow on the way, so that the new label is a maximum too: no gather, no branch. Raises `WorkloadError`
    where a value is NaN.
    """
    import torch

    best = next(values)
    found = torch.zeros(best.shape, dtype=torch.uint8 if small else torch.int16, device=best.device)
    higher = torch.empty(best.shape, dtype=torch.bool, device=best.device)
    for c, value in enumerate(values, start=1):
        _greater(value, best, higher)
        torch.maximum(found, (higher.view(torch.uint8) if small else higher.to(torch.int16)).mul_(c), out=found)
        best = torch.maximum(best, value, out=value)
    _finite(best)
    return found


def _greater(a: Tensor, b: Tensor, out: Tensor) -> None:
    """`a > b`. On a CPU by NumPy: torch's comparison into bool is not vectorised (5 times as slow)."""
    if a.device.type == "cpu":
        np.greater(a.numpy(), b.numpy(), out=out.numpy())
    else:
        out.copy_(a > b)


def _finite(values: Tensor) -> Tensor:
    if bool(values.isnan().any()):
        raise WorkloadError(
            "The network returned NaN.", remedy="Check the input's values and the precision variant of the model."
        )
    return values


def nearest(found: np.ndarray, grid: Grid) -> np.ndarray:
    """Labels of the network's grid on `grid`, by the nearest voxel (of two as near, the even one); 0 outside."""
    out = np.zeros(grid.shape, found.dtype)
    axes = [_Axis.of(*row) for row in zip(grid.shape, grid.scale, grid.offset, found.shape, strict=True)]
    index = [np.rint(axis.low + axis.share.astype(np.float64)).astype(np.int64) for axis in axes]
    out[tuple(axis.inside for axis in axes)] = found[np.ix_(*index)]
    return out


# ------------------------------------------------------------------------------------------------ too little memory


def fitting(
    windows: Windows, compute: Callable[[Windows], np.ndarray], *, divisor: int = 16
) -> tuple[np.ndarray, Windows]:
    """`compute(windows)`, again with smaller windows where the device's memory does not suffice, and those used.

    First one window at a time, then windows of half the length along the longest axis, in multiples of `divisor` (what
    the network halves its input by). Raises `OutOfMemoryError` once no axis can be halved.
    """
    import torch

    tried = windows
    while True:
        try:
            return compute(tried), tried
        except (MemoryError, torch.OutOfMemoryError, RuntimeError) as error:
            if not _is_memory(error):
                raise
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        smaller = _smaller(tried, divisor)
        if smaller is None:
            raise OutOfMemoryError(
                f"The network does not fit this device's memory with windows of {windows.roi_size}, nor of"
                f" {tried.roi_size}.",
                remedy="Ask for more memory (resources.memory, resources.gpu_memory), or for another flavour.",
            )
        tried = smaller


def _is_memory(error: BaseException) -> bool:
    import torch

    text = str(error).lower()
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or ("alloc" in text and "memory" in text)


def _smaller(windows: Windows, divisor: int) -> Windows | None:
    if windows.batch > 1:
        return replace(windows, batch=1)
    axis = int(np.argmax(windows.roi_size))
    half = math.ceil(windows.roi_size[axis] / 2 / divisor) * divisor
    if half >= windows.roi_size[axis]:
        return None
    roi = list(windows.roi_size)
    roi[axis] = half
    return replace(windows, roi_size=(roi[0], roi[1], roi[2]))
