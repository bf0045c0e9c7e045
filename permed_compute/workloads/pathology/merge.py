"""From the labels of tiles to one slide's objects: GeoJSON and OME-Zarr labels, in one pass over the tiles' files.

    regions(frame, tiles, out, scratch)         a map of classes: every 4-connected region one annotation
    instances(frame, tiles, out)                objects that each tile found with its halo: every object one detection

Tiles are read row by row; memory holds three rows of labels, whatever the slide's height, and only tiles that hold
something. An instance belongs to the tile that its centre lies in. Where two tiles still claim the same pixels, the
first keeps them; what then has lost more than half of itself was the same object, and is not counted again.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from permed_compute.workloads.pathology import geojson, outlines
from permed_compute.workloads.pathology.labels import LabelWriter, Named

OBJECTS = "objects.geojson"
Places = Mapping[tuple[int, int], Path]
"""(row, column) of each tile that holds labels, and the file that `store` wrote."""


@dataclass(frozen=True)
class Frame:
    """Where tiles lie. tile, halo, size (width, height): pixels of mpp; scale: level-0 pixels per pixel, (x, y).

    least_um2: smaller regions are not among the objects; they stay in the label image.
    """

    tile: int
    halo: int
    size: tuple[int, int]
    scale: tuple[float, float]
    mpp: float
    name: str
    classes: tuple[Named, ...]
    least_um2: float = 0.0

    def writer(self, out: Path, kind: str) -> LabelWriter:
        return LabelWriter(out, self.name, *self.size, self.tile, kind, self.mpp)

    def feature(self, item: outlines.Region, kind: str) -> dict[str, Any]:
        known = self.classes[item.label - 1]
        measured = {
            "Area µm^2": round(item.pixels * self.mpp**2, 3),
            "Perimeter µm": round(outlines.perimeter(item.rings) * self.mpp, 3),
        }
        rings = [ring * np.array(self.scale) for ring in item.rings]
        return geojson.feature(rings, kind, known.name, known.colour, measured)


# ------------------------------------------------------------------------------------------------ a tile's file


def store(path: Path, labels: np.ndarray) -> None:
    """A square array of labels as zstd of its bytes; the reader knows shape and type."""
    from numcodecs.zstd import compress

    path.write_bytes(compress(np.ascontiguousarray(labels), 1))


def _stored(path: Path, kind: str) -> np.ndarray:
    from numcodecs.zstd import decompress

    labels = np.frombuffer(decompress(path.read_bytes()), kind)
    edge = round(len(labels) ** 0.5)
    return labels.reshape(edge, edge)


def owned(labels: np.ndarray, halo: int) -> tuple[np.ndarray, int]:
    """(edge, edge) uint32 of a tile with its halo: objects whose centre lies in the tile, numbered from 1; and how many
    of those the halo cuts.

    Of an object in several pieces the largest is kept.
    """
    whole = _joined(labels)
    count = int(whole.max(initial=0))
    if not count:
        return np.zeros(labels.shape, np.uint32), 0
    ys, xs = np.nonzero(whole)
    numbers = whole[ys, xs]
    pixels = np.bincount(numbers, minlength=count + 1)
    inside = np.ones(count + 1, bool)
    for places in (ys, xs):
        centre = np.bincount(numbers, places, count + 1) // np.maximum(pixels, 1)
        inside &= (centre >= halo) & (centre < len(labels) - halo)
    inside[0] = False
    order = np.cumsum(inside) * inside
    kept = order[whole].astype(np.uint32)
    border = np.unique(np.concatenate([kept[0], kept[-1], kept[:, 0], kept[:, -1]]))
    return kept, int((border > 0).sum()) if halo else 0


def _joined(labels: np.ndarray) -> np.ndarray:
    """Each label's largest 4-connected piece, numbered from 1 in the order of their first pixels."""
    from skimage.measure import label

    number: Any = label
    pieces: np.ndarray = number(labels, connectivity=1, background=0)
    count = int(pieces.max(initial=0))
    sizes = np.bincount(pieces.reshape(-1), minlength=count + 1)
    whose = np.zeros(count + 1, labels.dtype)
    whose[pieces.reshape(-1)] = labels.reshape(-1)
    order = np.lexsort((np.arange(count + 1), -sizes, whose))
    _, first = np.unique(whose[order], return_index=True)
    best = np.sort(order[first])
    best = best[whose[best] != 0]
    new = np.zeros(count + 1, np.int64)
    new[best] = np.arange(1, len(best) + 1)
    return np.asarray(new[pieces])


# ------------------------------------------------------------------------------------------------ classes


def regions(frame: Frame, tiles: Places, out: Path, scratch: Path) -> dict[str, Any]:
    """Writes `objects.geojson` and `labels/`; returns regions and mm² by class."""
    rows = _rows(tiles)
    writer = frame.writer(out, "uint8")
    counts = dict.fromkeys((item.value for item in frame.classes), 0)
    pixels = np.zeros(256, np.int64)
    held: dict[tuple[int, int], np.ndarray] = {}
    with geojson.writing(out / OBJECTS) as write, tempfile.TemporaryFile(dir=scratch) as spool:
        found = outlines.Regions(cast(BinaryIO, spool), frame.tile)
        for row, columns in rows.items():
            below = rows.get(row + 1, ())
            for place in [*((row, column) for column in columns), *((row + 1, column) for column in below)]:
                if place not in held:
                    held[place] = _stored(tiles[place], "uint8")
            found.begin(row)
            for column in columns:
                labels = held[row, column]
                found.add(row, column, _padded(held, row, column, frame.tile))
                writer.put(row, column, labels)
                pixels += np.bincount(labels.reshape(-1), minlength=256)
            for item in found.closed(below):
                if item.pixels * frame.mpp**2 >= frame.least_um2:
                    counts[item.label] += 1
                    write(frame.feature(item, "annotation"))
            held = {place: labels for place, labels in held.items() if place[0] >= row}
    writer.close(frame.classes, {"mpp": frame.mpp})
    by_class = {
        item.name: {
            "objects": counts[item.value], "area_mm2": round(int(pixels[item.value]) * frame.mpp**2 / 1e6, 6)
        }
        for item in frame.classes
    }  # fmt: skip
    return {"objects": sum(counts.values()), "classes": by_class}


def _rows(tiles: Places) -> dict[int, tuple[int, ...]]:
    """Columns of each row, in order."""
    rows: dict[int, list[int]] = {}
    for row, column in sorted(tiles):
        rows.setdefault(row, []).append(column)
    return {row: tuple(columns) for row, columns in rows.items()}


def _padded(held: Mapping[tuple[int, int], np.ndarray], row: int, column: int, tile: int) -> np.ndarray:
    """The tile with one pixel of its neighbours around it; where there is none, 0."""
    out = np.zeros((tile + 2, tile + 2), np.uint8)
    cut = {-1: (slice(0, 1), slice(-1, None)), 0: (slice(1, -1), slice(None)), 1: (slice(-1, None), slice(0, 1))}
    for down in (-1, 0, 1):
        for across in (-1, 0, 1):
            labels = held.get((row + down, column + across))
            if labels is not None:
                out[cut[down][0], cut[across][0]] = labels[cut[down][1], cut[across][1]]
    return out


# ------------------------------------------------------------------------------------------------ instances


class _Canvas:
    """Numbers of objects over the tiles that are under way; tiles are made where something is drawn."""

    def __init__(self, tile: int) -> None:
        self._tile = tile
        self._tiles: dict[tuple[int, int], np.ndarray] = {}

    def get(self, y0: int, x0: int, edge: int) -> np.ndarray:
        out = np.zeros((edge, edge), np.uint32)
        for place, inner, outer in self._cut(y0, x0, edge):
            if place in self._tiles:
                out[outer] = self._tiles[place][inner]
        return out

    def add(self, y0: int, x0: int, numbers: np.ndarray) -> None:
        for place, inner, outer in self._cut(y0, x0, len(numbers)):
            part = numbers[outer]
            if part.any():
                there = self._tiles.setdefault(place, np.zeros((self._tile, self._tile), np.uint32))
                np.maximum(there[inner], part, out=there[inner])

    def _cut(self, y0: int, x0: int, edge: int) -> Iterator[tuple[tuple[int, int], Any, Any]]:
        tile = self._tile
        for row in range(max(0, y0) // tile, (y0 + edge - 1) // tile + 1):
            for column in range(max(0, x0) // tile, (x0 + edge - 1) // tile + 1):
                top, left = max(y0, row * tile), max(x0, column * tile)
                bottom, right = min(y0 + edge, (row + 1) * tile), min(x0 + edge, (column + 1) * tile)
                inner = slice(top - row * tile, bottom - row * tile), slice(left - column * tile, right - column * tile)
                outer = slice(top - y0, bottom - y0), slice(left - x0, right - x0)
                yield (row, column), inner, outer

    def finished(self, row: int, column: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Tiles that no tile after (row, column) draws on; they are let go."""
        for place in sorted(self._tiles):
            if (place[0] + 1, place[1] + 1) <= (row, column):
                yield *place, self._tiles.pop(place)


def instances(frame: Frame, tiles: Places, out: Path) -> dict[str, Any]:
    """Writes `objects.geojson` and `labels/`; returns how many objects there are, and those that were found twice."""
    writer, canvas = frame.writer(out, "uint32"), _Canvas(frame.tile)
    count = repeated = area = 0
    with geojson.writing(out / OBJECTS) as write:
        for row, column in sorted(tiles):
            patch = _stored(tiles[row, column], "uint32").copy()
            y0, x0 = row * frame.tile - frame.halo, column * frame.tile - frame.halo
            patch, again = _unclaimed(patch, canvas.get(y0, x0, len(patch)))
            repeated += again
            corner = np.array([x0, y0])
            present = np.zeros(int(patch.max(initial=0)) + 1, np.uint32)
            sizes = np.bincount(patch.reshape(-1))
            for number, rings in outlines.rings(patch).items():
                count += 1
                present[number] = count
                area += int(sizes[number])
                item = outlines.Region(1, int(sizes[number]), [ring + corner for ring in rings])
                write(frame.feature(item, "detection"))
            canvas.add(y0, x0, present[patch])
            for done in canvas.finished(row, column):
                writer.put(*done)
        for done in canvas.finished(1 << 30, 0):
            writer.put(*done)
    writer.close([], {"mpp": frame.mpp, "objects": count})
    whole = round(area * frame.mpp**2 / 1e6, 6)
    return {
        "objects": count, "repeated": repeated,
        "classes": {frame.classes[0].name: {"objects": count, "area_mm2": whole}},
    }  # fmt: skip


def _unclaimed(patch: np.ndarray, claimed: np.ndarray) -> tuple[np.ndarray, int]:
    """The patch without pixels that are another tile's objects', and without objects that lost more than half so."""
    taken = (claimed > 0) & (patch > 0)
    if not taken.any():
        return patch, 0
    whole = np.bincount(patch.reshape(-1))
    lost = np.bincount(patch[taken], minlength=len(whole))
    gone = 2 * lost > whole
    patch[taken | gone[patch]] = 0
    touched = (lost > 0) & ~gone
    if touched.any():  # what lost pixels may have fallen apart
        pieces = np.where(touched[patch], patch, 0)
        patch[(pieces > 0) & (_joined(pieces) == 0)] = 0
    return patch, int(gone.sum())
