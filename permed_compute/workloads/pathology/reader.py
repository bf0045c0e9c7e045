"""Tiles at an exact resolution in µm per pixel, from any `Slide`: uint8 batches at the JPEG decoder's own speed.

    with Reader(open_slide(path)) as reader:
        tile = reader.read(0.5, x, y, 256)               (256, 256, 3) uint8 RGB
        batch = reader.read_many(0.5, places, 256)       (n, 256, 256, 3)

`x, y` are level-0 pixels of the tile's upper left corner; beyond the slide it is white. A tile is what level 0 gives
when it is reduced by the mean (whole factors, to 0.1 %) or by a triangle filter of the right support (others). It is
made from the coarsest pixels that give the same within 35 dB: a level of that resolution is cropped where the corner
lies on its pixels; the next finer one is reduced, by 2, 4 or 8 inside the JPEG's DCT where it is that much finer; a
corner between coarse pixels takes finer ones. Decoded tiles are kept, least recently used out first, so that tiles off
the grid, read in order, decode each stored tile about once.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from permed_compute.storage.shards import FILL
from permed_compute.workloads.pathology.source import refuse

CACHE_MIB = 64
_EXACT = 1e-3
_ON_GRID = 1e-6
_MOST_HALVINGS = 3
_TRIANGLE_LEAST, _OFF_GRID_LEAST, _BROKEN_LEAST = 1.5, 4.0, 6.0
"""Decoded pixels per wanted one, at least: for the triangle filter; for a mean whose corner lies between pixels; for a
mean over a number of them that is not whole. Below, sharp tissue (CMU-1) comes out under 35 dB."""


@dataclass(frozen=True, slots=True)
class _Way:
    """One way to read a resolution."""

    level: int
    halvings: int
    pixel: float
    """Level-0 pixels per decoded pixel."""
    scale: tuple[float, float]
    """What is left to reduce, along x and y."""
    mean: bool
    """The wanted pixel is a whole number of level-0 pixels: reduced by the mean."""
    whole: bool
    """So is what is left to reduce."""

    def suits(self, x: float, y: float) -> bool:
        """Whether a tile with this corner comes out as from level 0."""
        if not self.mean:
            return min(self.scale) >= _TRIANGLE_LEAST
        if not self.whole:
            return min(self.scale) >= _BROKEN_LEAST
        if (x / self.pixel).is_integer() and (y / self.pixel).is_integer():
            return True
        return min(self.scale) >= _OFF_GRID_LEAST or _split(x / self.pixel)[1] == _split(y / self.pixel)[1] == 0


def _split(place: float) -> tuple[int, float]:
    """The pixel, and how far into it."""
    near = round(place)
    if abs(place - near) < _ON_GRID:
        return near, 0.0
    pixel = math.floor(place)
    return pixel, place - pixel


def _snapped(scale: float) -> float:
    whole = round(scale)
    return float(whole) if whole and abs(scale / whole - 1) < _EXACT else scale


class Reader:
    """Reads one slide; threads may share it. `cache_mib` bounds the decoded tiles that are kept."""

    def __init__(self, slide: Any, *, threads: int = 1, cache_mib: int = CACHE_MIB) -> None:
        self.slide = slide
        self.mpp: tuple[float, float] = slide.about.mpp
        self._room = cache_mib << 20
        self._kept: OrderedDict[tuple[int, int, int, int], np.ndarray | None] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()
        self._own = threading.local()
        self._known: dict[float, list[_Way]] = {}
        self._pool = ThreadPoolExecutor(threads) if threads > 1 else None

    @property
    def dimensions(self) -> tuple[int, int]:
        """(width, height) at level 0 in pixels."""
        layout = self.slide.levels[0].layout
        return layout.width, layout.height

    def read(self, mpp: float, x: float, y: float, size: int | tuple[int, int]) -> np.ndarray:
        """(height, width, 3) uint8 RGB. `size`: edge, or (width, height), in pixels of `mpp`. Raises `RefusedInput`."""
        width, height = (size, size) if isinstance(size, int) else size
        out = np.empty((height, width, 3), np.uint8)
        self._read(out, self._ways(mpp), x, y)
        return out

    def read_many(
        self, mpp: float, places: Sequence[tuple[float, float]] | np.ndarray, size: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(n, size, size, 3) uint8 RGB, tile k at level-0 (x, y) = places[k]; `out`: written in place."""
        ways = self._ways(mpp)
        batch = np.empty((len(places), size, size, 3), np.uint8) if out is None else out
        if self._pool is None:
            for k, (x, y) in enumerate(places):
                self._read(batch[k], ways, float(x), float(y))
        else:
            # In runs, so that neighbours, which share stored tiles, stay with one thread.
            runs = np.array_split(np.arange(len(places)), max(1, min(len(places), 4 * self._pool._max_workers)))
            list(self._pool.map(lambda run: self._run(batch, ways, places, run), runs))
        return batch

    def _run(self, batch: np.ndarray, ways: list[_Way], places: Any, run: np.ndarray) -> None:
        for k in run:
            self._read(batch[k], ways, float(places[k][0]), float(places[k][1]))

    def scale(self, mpp: float) -> tuple[float, float]:
        """Level-0 pixels per pixel of `mpp`, (x, y), as `read` takes it: whole where it is whole to 0.1 %."""
        return _snapped(mpp / self.mpp[0]), _snapped(mpp / self.mpp[1])

    def level_of(self, mpp: float) -> int:
        """The level that `read` takes for this resolution, where the corner lies on its pixels."""
        return self._best(self._ways(mpp), 0, 0).level

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------- how

    def _ways(self, mpp: float) -> list[_Way]:
        """Levels and halvings that are no coarser than this resolution, coarsest first; the last is level 0 itself."""
        if not 0.01 <= mpp <= 10_000:
            refuse("MPP_IMPLAUSIBLE", f"Tiles of {mpp:g} µm per pixel make no sense.", "Write e.g. 0.5.", mpp=mpp)
        if mpp not in self._known:
            self._known[mpp] = self._found(mpp)
        return self._known[mpp]

    def _found(self, mpp: float) -> list[_Way]:
        want = self.scale(mpp)
        mean = all(scale == round(scale) for scale in want)
        finest = min(want) * (1 + _EXACT)
        ways: dict[float, _Way] = {}
        for level, item in enumerate(self.slide.levels):
            if level and item.downsample > finest:
                continue
            for halvings in range(_MOST_HALVINGS + 1):
                # Beyond the first halving, half of what is left is meaned: the DCT's own 1/4 and 1/8 are too blunt.
                blunt = item.downsample * 2 ** (halvings + (halvings > 1)) > finest
                if halvings and (blunt or (item.layout.tile_w | item.layout.tile_h) % 2**halvings):
                    break
                pixel = item.downsample * 2**halvings
                scale = _snapped(want[0] / pixel), _snapped(want[1] / pixel)
                whole = all(left == round(left) for left in scale)
                ways[pixel] = _Way(level, halvings, pixel, scale, mean, whole)  # of two, the one that decodes less
        return [ways[pixel] for pixel in sorted(ways, reverse=True)]

    @staticmethod
    def _best(ways: list[_Way], x: float, y: float) -> _Way:
        return next((way for way in ways if way.suits(x, y)), ways[-1])

    def _read(self, out: np.ndarray, ways: list[_Way], x: float, y: float) -> None:
        way = self._best(ways, x, y)
        if way.mean and way.whole:
            self._meaned(out, way, x / way.pixel, y / way.pixel)
        else:
            self._filtered(out, way, x / way.pixel, y / way.pixel)

    def _meaned(self, out: np.ndarray, way: _Way, left: float, top: float) -> None:
        """Means over whole pixels; a corner between pixels moves the grid there, by a mean of two."""
        (x0, dx), (y0, dy) = _split(left), _split(top)
        across, down = round(way.scale[0]), round(way.scale[1])
        if dx == dy == 0 and across == down == 1:
            self._region(out, way, x0, y0)
            return
        from PIL import Image

        height, width = out.shape[:2]
        region = np.empty((height * down + (dy > 0), width * across + (dx > 0), 3), np.uint8)
        self._region(region, way, x0, y0)
        region = _moved(region, dx, dy)
        out[:] = np.asarray(Image.fromarray(region).resize((width, height), Image.Resampling.BOX))

    def _filtered(self, out: np.ndarray, way: _Way, left: float, top: float) -> None:
        from PIL import Image

        kernel = Image.Resampling.BOX if way.mean else Image.Resampling.BILINEAR
        # The filter reaches one output pixel beyond: without that margin, edges of neighbouring tiles would differ.
        height, width = out.shape[:2]
        span_x, span_y = width * way.scale[0], height * way.scale[1]
        margin_x, margin_y = int(way.scale[0]) + 2, int(way.scale[1]) + 2
        x0, y0 = int(np.floor(left)) - margin_x, int(np.floor(top)) - margin_y
        x1, y1 = int(np.ceil(left + span_x)) + margin_x, int(np.ceil(top + span_y)) + margin_y
        region = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        self._region(region, way, x0, y0)
        box = (left - x0, top - y0, left - x0 + span_x, top - y0 + span_y)
        out[:] = np.asarray(Image.fromarray(region).resize((width, height), kernel, box=box))

    def _region(self, out: np.ndarray, way: _Way, x0: int, y0: int) -> None:
        """Fill `out` with the pixels from (x0, y0) of the level, halved `way.halvings` times."""
        layout = self.slide.levels[way.level].layout
        tile_w, tile_h = layout.tile_w >> way.halvings, layout.tile_h >> way.halvings
        width, height = layout.width >> way.halvings, layout.height >> way.halvings
        x1, y1 = x0 + out.shape[1], y0 + out.shape[0]
        inside = x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height
        whole = x0 % tile_w == y0 % tile_h == out.shape[0] % tile_h == out.shape[1] % tile_w == 0
        if inside and whole:
            # Whole tiles only: decoded in place and not kept, because nothing else will ask for them.
            for k in range(out.shape[0] // tile_h):
                for j in range(out.shape[1] // tile_w):
                    part = out[k * tile_h : (k + 1) * tile_h, j * tile_w : (j + 1) * tile_w]
                    self._aligned(part, way, y0 // tile_h + k, x0 // tile_w + j)
            return
        if not inside:
            out[:] = FILL
        for row in range(max(0, y0) // tile_h, -(-min(y1, height) // tile_h)):
            for column in range(max(0, x0) // tile_w, -(-min(x1, width) // tile_w)):
                tile = self._tile(way, row, column)
                ty, tx = row * tile_h, column * tile_w
                a, b = max(y0, ty), min(y1, ty + tile_h, height)
                c, d = max(x0, tx), min(x1, tx + tile_w, width)
                if a < b and c < d:
                    seen: Any = FILL if tile is None else tile[a - ty : b - ty, c - tx : d - tx]
                    out[a - y0 : b - y0, c - x0 : d - x0] = seen

    def _aligned(self, out: np.ndarray, way: _Way, row: int, column: int) -> None:
        into = getattr(self.slide, "tile_into", None)
        if into is None:
            tile = self.slide.tile(way.level, row, column, way.halvings)
        else:
            tile = into(self._buffer(out), way.level, row, column, way.halvings)
        if tile is None:
            out[:] = FILL
        elif tile is not out:
            out[:] = tile

    def _buffer(self, out: np.ndarray) -> np.ndarray:
        """`out` where a decoder can write to it, else this thread's own (fresh memory costs as much as decoding)."""
        if out.flags.c_contiguous:
            return out
        held = getattr(self._own, "tile", None)
        if held is None or held.shape != out.shape:
            held = self._own.tile = np.empty(out.shape, np.uint8)
        return held

    def _tile(self, way: _Way, row: int, column: int) -> np.ndarray | None:
        key = way.level, way.halvings, row, column
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        tile: np.ndarray | None = self.slide.tile(way.level, row, column, way.halvings)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = tile
                self._size += 0 if tile is None else tile.nbytes
                while self._size > self._room and len(self._kept) > 1:
                    _, old = self._kept.popitem(last=False)
                    self._size -= 0 if old is None else old.nbytes
        return tile


def _moved(pixels: np.ndarray, dx: float, dy: float) -> np.ndarray:
    """The picture as seen from dx, dy (0 ≤ … < 1) further right and down; one pixel smaller where that is not 0."""
    for axis, by in ((0, dy), (1, dx)):
        if by:
            ahead = round(256 * by)
            first, second = (pixels[:-1], pixels[1:]) if axis == 0 else (pixels[:, :-1], pixels[:, 1:])
            mixed = first.astype(np.uint16) * (256 - ahead) + second.astype(np.uint16) * ahead
            pixels = ((mixed + 128) >> 8).astype(np.uint8)
    return np.ascontiguousarray(pixels)


def as_dask(slide: Any, level: int = 0) -> Any:
    """A dask array (height, width, 3) uint8 of a level, one block per stored tile; nothing is read before computing."""
    import dask.array as da

    layout = slide.levels[level].layout

    def block(block_info: Any = None) -> np.ndarray:
        (top, bottom), (left, right), _ = block_info[None]["array-location"]
        tile = slide.tile(level, top // layout.tile_h, left // layout.tile_w)
        if tile is None:
            return np.full((bottom - top, right - left, 3), FILL, np.uint8)
        return np.asarray(tile[: bottom - top, : right - left])

    def edges(length: int, step: int) -> tuple[int, ...]:
        return tuple(min(step, length - at) for at in range(0, length, step))

    chunks = (edges(layout.height, layout.tile_h), edges(layout.width, layout.tile_w), (3,))
    blocks: Any = da.map_blocks
    return blocks(block, dtype=np.uint8, chunks=chunks, meta=np.empty((0, 0, 0), np.uint8))
