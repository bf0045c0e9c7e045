"""Sliding-window inference whose logits are never whole: blended, resampled and decided while the window moves on.

    labels(image, predict, windows, grid) -> array of labels on `grid`

The windows lie, are weighted and are added up as in MONAI's `sliding_window_inference` (1.6.1), in its order, so that
the sums are the same numbers; what differs is how much of them is kept. Windows with the same start along the first
axis are a layer. Once a layer is done, the planes before the next one are final: they are resampled and decided class
by class against a running maximum, and forgotten; on a CPU by `kernels`, elsewhere by torch. C×D×H×W logits become
C×(window + 1)×H×W. Where that is above `keep_bytes`, rows of windows are taken in the same way, C×(window + 1)²×W, and
the planes that the next layer goes on with wait in a scratch file; where that is still too much, all windows' outputs
do, and are read back class by class: memory then does not depend on the number of classes (beyond what the network
itself returns for one batch of windows).
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.workloads.radiology.sealed import MARK

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Predict = Callable[["Tensor"], "Tensor"]
"""(batch, channels, *roi) → logits (batch, classes, *roi)."""

KEEP_BYTES = 512 << 20
_TILE_BYTES = {"cpu": 4 << 20, "cuda": 64 << 20}
"""Of one class's values that are worked on at a time: enough to fill a GPU."""
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
        answer: Answer | None = None
        ends = [[*each[1:], int(n)] for each, n in zip(starts, padded.shape[1:], strict=True)]
        for layer, start in enumerate(starts[0]):
            places = [(start, y, x) for y, x in product(starts[1], starts[2])]
            for begin in range(0, len(places), windows.batch):
                group = places[begin : begin + windows.batch]
                out = _predicted(predict, padded, group, roi)
                if answer is None:
                    plane = (int(padded.shape[2]), int(padded.shape[3]))
                    kept = _Kept(
                        out.shape[1], roi, plane, inner, decision.activation, image.device, weight, Path(folder)
                    )
                    answer = Answer(_sums(kept, decision, keep_bytes), inner, grid, decision)
                for k, place in enumerate(group):
                    answer.sums.add(out[k], place)
                    row, column = divmod(begin + k, len(starts[2]))
                    if column + 1 == len(starts[2]):
                        answer.advance(ends[0][layer], ends[1][row])
                del out  # or it would still be there while the network makes the next one
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


@cache
def _kernels(device: str) -> Any:
    """The compiled way on a CPU; None elsewhere, and where Numba is not installed: torch does the same, slower.

    Nor in a sealed process: it could not keep what it compiles, and compiling takes longer than many a study.
    """
    if device != "cpu" or os.environ.get(MARK):
        return None
    try:
        from permed_compute.workloads.radiology import kernels
    except ImportError:
        return None
    return kernels


@dataclass
class _Kept:
    """What all kinds of sums are made for."""

    classes: int
    roi: tuple[int, ...]
    plane: tuple[int, int]
    inner: tuple[slice, ...]
    """What is image and not padding."""
    activation: str
    device: torch.device
    weight: Tensor | None
    """Importance map; None where every voxel of a window weighs 1."""
    folder: Path


def _sums(kept: _Kept, decision: Decision, keep_bytes: int) -> Sums:
    """The fastest kind within `keep_bytes`."""
    height, width = kept.plane
    row = 4 * kept.classes * (kept.roi[0] + 1) * width
    if row * height <= keep_bytes:
        return Slab(kept, height)
    compiled = _kernels(kept.device.type) is not None and decision.kind == "argmax"
    if compiled and row * (kept.roi[1] + 1) <= keep_bytes and kept.roi[1] + 1 < height:
        return Slab(kept, kept.roi[1] + 1)
    return Spill(kept)


class Sums(Protocol):
    """The weighted sums of the windows' logits over what is not yet decided, and their weights."""

    kept: _Kept
    by_rows: bool
    """Rows can be decided, and then forgotten, before a layer is done."""
    tile: int
    """How many tiles' worth of planes are best asked for at a time."""

    def add(self, values: Tensor, place: tuple[int, int, int]) -> None:
        """A window's logits, (classes, *roi)."""
        ...

    def finish(self, ready: int, below: int) -> None:
        """No window is added any more to planes before `ready`, as far as their rows before `below` are concerned."""
        ...

    def final(self, a: int, b: int) -> Iterator[tuple[int, Tensor, int, int]]:
        """Planes a … b-1, blended and activated: (first class, (classes, planes, rows, W), its first plane and row).

        Contiguous; outside the image proper (its padding) there is anything. Raises `WorkloadError` for NaN.
        """
        ...

    def forget(self, first: int, row: int, ready: int, below: int) -> None:
        """Planes before `first` and rows before `row` are decided, as far as rows before `below` are concerned."""
        ...


class _Rolling:
    """What all kinds share: weights (window + 1, H, W), beginning at plane `first`."""

    def __init__(self, kept: _Kept) -> None:
        import torch

        self.kept, self.first = kept, 0
        self.weights = torch.zeros((kept.roi[0] + 1, *kept.plane), device=kept.device)

    def _weigh(self, place: tuple[int, int, int]) -> None:
        """A window's weight is added."""
        z, y, x = place
        z -= self.first
        depth, height, width = self.kept.roi
        self.weights[z : z + depth, y : y + height, x : x + width] += (
            1.0 if self.kept.weight is None else self.kept.weight
        )

    def _weighted(self, values: Tensor) -> Tensor:
        """Of one class: so that no weighted copy of the whole window is made."""
        return values if self.kept.weight is None else values * self.kept.weight

    def _roll(self, tensor: Tensor, gone: int) -> None:
        """Drop the first `gone` planes or rows, move the others up, and clear what follows."""
        kept = max(0, tensor.shape[0] - gone)
        tensor[:kept] = tensor[gone:].clone()
        tensor[kept:] = 0


class Slab(_Rolling):
    """Sums in memory: (classes, window + 1, rows, W), of all rows or of those that one row of windows covers.

    In the latter case the planes that the next layer of windows adds to wait in a file, row by row.
    """

    tile = 1

    def __init__(self, kept: _Kept, rows: int) -> None:
        import torch

        super().__init__(kept)
        self.by_rows = rows < kept.plane[0]
        self.sums = torch.zeros((kept.classes, kept.roi[0] + 1, rows, kept.plane[1]), device=kept.device)
        self.row = 0
        """At which `sums` begins."""
        self.settled, self.divided = 0, 0
        """Planes before it hold what is final instead of sums; so do rows before it of the planes that are ready."""
        self.kernels = _kernels(kept.device.type)
        self.ones = torch.ones(kept.roi) if kept.weight is None else kept.weight
        self.waiting = _Waiting(self.sums, kept) if self.by_rows else None

    def add(self, values: Tensor, place: tuple[int, int, int]) -> None:
        self._weigh(place)
        z, y, x = place[0] - self.first, place[1] - self.row, place[2]
        if self.kernels is not None:
            arrays = (self.sums.numpy(), values.contiguous().numpy(), self.ones.numpy())
            self.kernels.shared(self.kernels.add, self.kept.classes, *arrays, z, y, x)
            return
        depth, height, width = self.kept.roi
        for sums, logits in zip(self.sums, values, strict=True):
            sums[z : z + depth, y : y + height, x : x + width] += self._weighted(logits)

    def final(self, a: int, b: int) -> Iterator[tuple[int, Tensor, int, int]]:
        yield 0, self.sums, self.first, self.row

    def finish(self, ready: int, below: int) -> None:
        """Quotients and activations in place."""
        planes, rows, columns = self.kept.inner
        a, b = max(self.settled, planes.start) - self.first, min(ready, planes.stop) - self.first
        top, bottom = max(self.divided, rows.start) - self.row, min(below, rows.stop) - self.row
        self.divided = below
        if a >= b or top >= bottom:
            return
        block = self.sums[:, a:b, top:bottom, columns]
        if self.kernels is None:
            block /= self.weights[a:b, top + self.row : bottom + self.row, columns]
        else:
            box = (top, bottom, columns.start, columns.stop)
            arrays = (self.sums.numpy(), self.weights.numpy(), self.row)
            _refuse_unless(not any(self.kernels.shared(self.kernels.divide, self.kept.classes, *arrays, a, b, box)))
        if self.kept.activation == "sigmoid":
            block.sigmoid_()
        elif self.kept.activation == "softmax":
            for plane in block.unbind(1):
                plane.copy_(plane.softmax(0))

    def forget(self, first: int, row: int, ready: int, below: int) -> None:
        over = below == self.kept.plane[0]
        if self.waiting is not None:
            self.waiting.store(first - self.first, self.row, below)
            self._roll_rows(0 if over else row, over)
        if not over:
            return
        tensors = [self.weights] if self.by_rows else [*self.sums, self.weights]
        for tensor in tensors:
            self._roll(tensor, first - self.first)
        self.first, self.settled, self.divided = first, ready, 0

    def _roll_rows(self, row: int, over: bool) -> None:
        """Begin at `row`; what the layer before left of the rows that are new here is read. over: of the next layer."""
        assert self.waiting is not None
        rows = self.sums.shape[2]
        if over:
            self.sums.zero_()
            new = 0
            self.waiting.next_layer()
        else:
            gone = min(row - self.row, rows)
            new = rows - gone
            for tensor in self.sums.flatten(0, 1):
                self._roll(tensor, gone)
        self.row = row
        self.waiting.load(row, row + new, min(row + rows, self.kept.plane[0]))


class _Waiting:
    """Rows of planes for the next layer of windows, in a file: (classes, window + 1, H, W), the planes from the first.

    A row is read by the next layer before that layer writes what it leaves of it itself.
    """

    def __init__(self, sums: Tensor, kept: _Kept) -> None:
        self._sums, self._height = sums.numpy(), kept.plane[0]
        self._planes, self._next, self._stored = 0, 0, 0
        self._file = _scratch(kept.folder / "waiting")

    def store(self, first: int, row: int, below: int) -> None:
        """Rows that are final in this layer, of the planes from `first` (counted in sums, which begin at `row`)."""
        a, b = self._stored - row, below - row
        self._next = self._sums.shape[1] - first
        for c, planes in enumerate(self._sums):
            for k, plane in enumerate(planes[first:]):
                _write(self._file, plane[a:b], self._place(c, k, self._stored))
        self._stored = below

    def load(self, row: int, a: int, b: int) -> None:
        for c, planes in enumerate(self._sums):
            for k, plane in enumerate(planes[: self._planes]):
                _read(self._file, plane[a - row : b - row], self._place(c, k, a))

    def next_layer(self) -> None:
        self._planes, self._stored = self._next, 0

    def _place(self, c: int, k: int, row: int) -> int:
        _, planes, _, width = self._sums.shape
        return int(4 * width * (self._height * (c * planes + k) + row))

    def __del__(self) -> None:
        os.close(self._file)


def _scratch(path: Path) -> int:
    """An open file that nobody else sees and that a kill leaves nothing of."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    os.unlink(path)  # noqa: PTH108 - the open file goes on
    return file


@dataclass(frozen=True, slots=True)
class _Block:
    """One window's weighted output in a file: (classes, *roi) float32, class after class."""

    place: tuple[int, int, int]
    file: int
    offset: int


class Spill(_Rolling):
    """Windows' outputs in one file per layer, written and read once or twice; added up when a class is asked for."""

    by_rows = False
    tile = 2  # fewer and longer reads

    def __init__(self, kept: _Kept) -> None:
        super().__init__(kept)
        self.blocks: list[_Block] = []

    def add(self, values: Tensor, place: tuple[int, int, int]) -> None:
        self._weigh(place)
        known = [block for block in self.blocks if block.place[0] == place[0]]
        length = 4 * math.prod(self.kept.roi)
        if known:
            file, offset = known[-1].file, known[-1].offset + length * self.kept.classes
        else:
            file, offset = _scratch(self.kept.folder / f"layer-{place[0]}"), 0
        for c, logits in enumerate(values):
            _write(file, self._weighted(logits).contiguous().cpu().numpy(), offset + c * length)
        self.blocks.append(_Block(place, file, offset))

    def finish(self, ready: int, below: int) -> None:
        """Windows are added up when they are read."""

    def final(self, a: int, b: int) -> Iterator[tuple[int, Tensor, int, int]]:
        import torch

        top, total = self.weights, self.weights
        if self.kept.activation == "softmax":
            top = self._logits(0, a, b)
            for c in range(1, self.kept.classes):
                top = torch.maximum(top, self._logits(c, a, b))
            total = torch.zeros_like(top)
            for c in range(self.kept.classes):
                total += (self._logits(c, a, b) - top).exp_()
        for c in range(self.kept.classes):
            x = self._logits(c, a, b)
            if self.kept.activation == "softmax":
                x = x.sub_(top).exp_().div_(total)
            elif self.kept.activation == "sigmoid":
                x = x.sigmoid_()
            _finite(x[(slice(None), *self.kept.inner[1:])])
            yield c, x[None], a, 0

    def _logits(self, c: int, a: int, b: int) -> Tensor:
        """Of class c, blended, (b - a, H, W)."""
        import torch

        total = torch.zeros((b - a, *self.kept.plane), device=self.kept.device)
        depth, height, width = self.kept.roi
        for block in self.blocks:
            z, y, x = block.place
            low, high = max(a, z), min(b, z + depth)
            if low >= high:
                continue
            buffer = np.empty((high - low, height, width), np.float32)
            _read(block.file, buffer, block.offset + 4 * height * width * (c * depth + low - z))
            part = torch.from_numpy(buffer).to(self.kept.device)
            total[low - a : high - a, y : y + height, x : x + width] += part
        return total.div_(self.weights[a - self.first : b - self.first])

    def forget(self, first: int, row: int, ready: int, below: int) -> None:
        over = {block.file for block in self.blocks if block.place[0] + self.kept.roi[0] <= first}
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
    try:
        while view:
            done = os.pwrite(file, view, offset)
            view, offset = view[done:], offset + done
    except OSError as error:
        raise OutOfMemoryError(
            f"The scratch folder cannot take the windows' outputs ({error.strerror}).",
            remedy="Give it more room, or allow more memory (keep_memory).",
        ) from None


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

    def moved(self, by: int, which: slice = slice(None)) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """low, high (voxels of an array that begins `by` before ours) and share, of the voxels `which`."""
        return self.low[which] + by, self.high[which] + by, self.share[which]


class Answer:
    """Labels on the grid wanted, filled plane by plane as sums become final."""

    def __init__(self, sums: Sums, inner: tuple[slice, ...], grid: Grid | None, decision: Decision) -> None:
        """`inner`: the image without its padding, in the planes and rows of `sums`."""
        lengths = [s.stop - s.start for s in inner]
        x, y, z = lengths
        grid = grid or Grid((x, y, z), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0))
        classes, device = sums.kept.classes, sums.kept.device
        if decision.kind == "threshold" and classes != 1:
            raise WorkloadError(
                f"A threshold decides one channel; the network has {classes}.", remedy="Decide by argmax."
            )
        self.sums, self.inner, self.decision, self.begin = sums, inner, decision, inner[0].start
        axes = [_Axis.of(*row) for row in zip(grid.shape, grid.scale, grid.offset, lengths, strict=True)]
        self.depth, self.rows, self.columns = axes
        self.done = 0
        """Planes of `depth.inside` that are decided."""
        self.above = 0
        """Rows of `rows.inside` that are decided of the planes that are next."""
        self.array = np.zeros(grid.shape, np.uint8 if classes <= 256 else np.int16)
        self.kernels = _kernels(device.type)
        self._index = {id(axis): _on(axis, device) for axis in (self.rows, self.columns)}
        voxels = max(1, len(self.rows.low) * len(self.columns.low))
        self._tile = max(1, sums.tile * _TILE_BYTES.get(device.type, 1 << 20) // (4 * voxels))

    def advance(self, ready: int, below: int) -> None:
        """Planes before `ready` are final as far as their rows before `below` are: decide what they suffice for."""
        height = self.sums.kept.plane[0]
        if below < height and not self.sums.by_rows:
            return
        planes = int(np.searchsorted(self.depth.high, ready - self.begin, side="left"))
        rows = int(np.searchsorted(self.rows.high, below - self.inner[1].start, side="left"))
        self.sums.finish(ready, below)
        for a in range(self.done, planes, self._tile):
            self._decide(a, min(a + self._tile, planes), rows)
        row = _needed(self.rows, rows, below, self.inner[1].start)
        if ready < self.inner[0].stop:
            self.sums.forget(_needed(self.depth, planes, ready, self.begin), row, ready, below)
        elif below < height:
            self.sums.forget(ready, row, ready, below)
        self.above = rows if below < height else 0
        self.done = self.done if below < height else planes

    def _decide(self, a: int, b: int, rows: int) -> None:
        low, high = int(self.depth.low[a]), int(self.depth.high[b - 1]) + 1
        values = self.sums.final(low + self.begin, high + self.begin)
        compiled = self.kernels is not None and self.decision.kind == "argmax"
        inside = slice(self.rows.inside.start + self.above, self.rows.inside.start + rows)
        where = (slice(self.depth.inside.start + a, self.depth.inside.start + b), inside, self.columns.inside)
        self.array[where] = self._largest(values, a, b, rows) if compiled else self._torch(values, a, b, low, high)

    def _largest(self, values: Iterator[tuple[int, Tensor, int, int]], a: int, b: int, rows: int) -> np.ndarray:
        left, right, across = self.columns.moved(self.inner[2].start)
        columns = (left.astype(np.uint32), right.astype(np.uint32), across)
        best = np.full((b - a, rows - self.above, len(across)), -np.inf, np.float32)
        found = np.zeros(best.shape, np.int16)
        if not best.size:  # nothing wanted lies inside
            return found
        for c, tensor, plane, row in values:
            depth = self.depth.moved(self.begin - plane, slice(a, b))
            down = self.rows.moved(self.inner[1].start - row, slice(self.above, rows))
            arguments = (tensor.numpy(), c, depth, down, columns, best, found)
            self.kernels.shared(self.kernels.decide, best.shape[1], *arguments)
        return found

    def _torch(self, values: Iterator[tuple[int, Tensor, int, int]], a: int, b: int, low: int, high: int) -> np.ndarray:
        along = [
            (int(i) - low, int(j) - low, float(t))
            for i, j, t in zip(self.depth.low[a:b], self.depth.high[a:b], self.depth.share[a:b], strict=True)
        ]
        low, high = low + self.begin, high + self.begin
        each = (
            self._resampled(x[(slice(low - plane, high - plane), *self.inner[1:])], along)
            for _, many, plane, _ in values
            for x in many
        )
        if self.decision.kind == "argmax":
            return running_argmax(each, self.array.dtype == np.uint8).cpu().numpy()
        return (_finite(next(each)) >= self.decision.threshold).cpu().numpy()

    def _resampled(self, x: Tensor, along: Sequence[tuple[int, int, float]]) -> Tensor:
        """Columns first and planes last: the gathers of the inner axes run over the fewest values."""
        if not self.columns.same:
            x = _lerp(x, 2, self._index[id(self.columns)], self.columns.plain)
        if not self.rows.same:
            x = _lerp(x, 1, self._index[id(self.rows)], self.rows.plain)
        return x if self.depth.same else _lerp_planes(x, along)


def _needed(axis: _Axis, done: int, limit: int, begin: int) -> int:
    """The first plane or row that voxels from `done` on still need; `limit` at most."""
    return min(limit, int(axis.low[done]) + begin) if done < len(axis.low) else limit


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
    _refuse_unless(float(values.amax()) < math.inf)  # NaN is no number's least
    return values


def _refuse_unless(finite: bool) -> None:
    if not finite:
        raise WorkloadError(
            "The network returned NaN or infinity.",
            remedy="Check the input's values and the precision variant of the model.",
        )


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
