"""Tiles at an exact resolution in µm per pixel, from any `Slide`: uint8 batches at the JPEG decoder's own speed.

    with Reader(open_slide(path)) as reader:
        tile = reader.read(0.5, x, y, 256)               (256, 256, 3) uint8 RGB
        batch = reader.read_many(0.5, places, 256)       (n, 256, 256, 3)

`x, y` are level-0 pixels of the tile's upper left corner; beyond the slide it is white. A level whose resolution is the
wanted one (to 0.1 %) is cropped; otherwise the next finer one is reduced: by 2, 4 or 8 inside the JPEG's DCT where it
is that much finer, and the rest by the mean (whole factors) or a triangle filter of the right support. Decoded tiles
are kept, least recently used out first, so that tiles off the grid, read in order, decode each stored tile about once.
"""

from __future__ import annotations

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
_MOST_HALVINGS = 3


@dataclass(frozen=True, slots=True)
class _Way:
    """How one resolution is read."""

    level: int
    halvings: int
    pixel: float
    """Level-0 pixels per decoded pixel."""
    scale: tuple[float, float]
    """What is left to reduce, along x and y."""


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
        self._read(out, self._way(mpp), x, y)
        return out

    def read_many(
        self, mpp: float, places: Sequence[tuple[float, float]] | np.ndarray, size: int, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(n, size, size, 3) uint8 RGB, tile k at level-0 (x, y) = places[k]; `out`: written in place."""
        way = self._way(mpp)
        batch = np.empty((len(places), size, size, 3), np.uint8) if out is None else out
        if self._pool is None:
            for k, (x, y) in enumerate(places):
                self._read(batch[k], way, float(x), float(y))
        else:
            # In runs, so that neighbours, which share stored tiles, stay with one thread.
            runs = np.array_split(np.arange(len(places)), max(1, min(len(places), 4 * self._pool._max_workers)))
            list(self._pool.map(lambda run: self._run(batch, way, places, run), runs))
        return batch

    def _run(self, batch: np.ndarray, way: _Way, places: Any, run: np.ndarray) -> None:
        for k in run:
            self._read(batch[k], way, float(places[k][0]), float(places[k][1]))

    def level_of(self, mpp: float) -> int:
        """The level that `read` takes for this resolution."""
        return self._way(mpp).level

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self.slide.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------- how

    def _way(self, mpp: float) -> _Way:
        """Which level, how many halvings, and what is left to reduce, for this resolution."""
        if not 0.01 <= mpp <= 10_000:
            refuse("MPP_IMPLAUSIBLE", f"Tiles of {mpp:g} µm per pixel make no sense.", "Write e.g. 0.5.", mpp=mpp)
        want = mpp / self.mpp[0], mpp / self.mpp[1]  # level-0 pixels per wanted pixel
        finest = min(want)
        level = max(
            (k for k, item in enumerate(self.slide.levels) if item.downsample <= finest * (1 + _EXACT)),
            key=lambda k: self.slide.levels[k].downsample,
            default=0,
        )
        item = self.slide.levels[level]
        halvings = 0
        while (
            halvings < _MOST_HALVINGS
            # Beyond the first halving, half of what is left is meaned: the DCT's own 1/4 and 1/8 are too blunt.
            and item.downsample * 2 ** (halvings + 1 + (halvings > 0)) <= finest * (1 + _EXACT)
            and item.layout.tile_w % 2 ** (halvings + 1) == item.layout.tile_h % 2 ** (halvings + 1) == 0
        ):
            halvings += 1
        pixel = item.downsample * 2**halvings
        scale = want[0] / pixel, want[1] / pixel
        if abs(scale[0] - 1) < _EXACT and abs(scale[1] - 1) < _EXACT:
            scale = (1.0, 1.0)
        return _Way(level, halvings, pixel, scale)

    def _read(self, out: np.ndarray, way: _Way, x: float, y: float) -> None:
        height, width = out.shape[:2]
        left, top = x / way.pixel, y / way.pixel
        on_grid = abs(left - round(left)) < 1e-6 and abs(top - round(top)) < 1e-6
        if on_grid and way.scale == (1.0, 1.0):
            self._region(out, way, round(left), round(top))
            return
        from PIL import Image

        # The filter reaches one output pixel beyond: without that margin, edges of neighbouring tiles would differ.
        span_x, span_y = width * way.scale[0], height * way.scale[1]
        margin_x, margin_y = int(way.scale[0]) + 2, int(way.scale[1]) + 2
        x0, y0 = int(np.floor(left)) - margin_x, int(np.floor(top)) - margin_y
        x1, y1 = int(np.ceil(left + span_x)) + margin_x, int(np.ceil(top + span_y)) + margin_y
        region = np.empty((y1 - y0, x1 - x0, 3), np.uint8)
        self._region(region, way, x0, y0)
        box = (left - x0, top - y0, left - x0 + span_x, top - y0 + span_y)
        whole = on_grid and all(abs(scale - round(scale)) < _EXACT for scale in way.scale)
        kernel = Image.Resampling.BOX if whole else Image.Resampling.BILINEAR
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
