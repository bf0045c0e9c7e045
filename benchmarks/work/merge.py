"""One merge in this process: `python -m benchmarks.work.merge ours|union FOLDER` prints what it took and gave."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.work.memory import most_mib
from permed_compute.workloads.pathology import geojson, merge, outlines
from permed_compute.workloads.pathology.labels import Named

TILE, MPP = 1024, 0.5
CLASSES = tuple(Named(k, f"Class {k}", (200, 40 * k, 90)) for k in (1, 2, 3))


def write_tiles(folder: Path, edge: int) -> None:
    """edge × edge tiles of a random field: class 3 in large regions, 1 and 2 in small ones within."""
    from scipy.ndimage import gaussian_filter

    random, size = np.random.default_rng(0), edge * TILE
    coarse = gaussian_filter(random.normal(0, 1, (size // 16, size // 16)).astype(np.float32), 6)
    coarse = coarse.repeat(16, 0).repeat(16, 1)
    labels = np.where(coarse > 0, 3, 0).astype(np.uint8)
    del coarse
    for value, sigma, share in ((1, 4, 0.12), (2, 9, 0.08)):
        field = gaussian_filter(random.normal(0, 1, (size, size)).astype(np.float32), sigma)
        labels[field > np.quantile(field[::7, ::7], 1 - share)] = value
    for row in range(edge):
        for column in range(edge):
            part = labels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            merge.store(folder / f"{row}-{column}.zst", part)


def _places(folder: Path) -> dict[tuple[int, int], Path]:
    named = {path: path.stem.split("-") for path in folder.glob("*.zst")}
    return {(int(row), int(column)): path for path, (row, column) in named.items()}


def _frame(folder: Path) -> merge.Frame:
    edge = round(len(_places(folder)) ** 0.5) * TILE
    return merge.Frame(TILE, 0, (edge, edge), (1.0, 1.0), MPP, "merged", CLASSES)


def ours(folder: Path, out: Path) -> None:
    merge.regions(_frame(folder), _places(folder), out, out)


def union(folder: Path, out: Path) -> None:
    """The same objects by shapely: polygons of every tile, their union by class."""
    import shapely

    frame = _frame(folder)
    polygons: dict[int, list[shapely.Polygon]] = {item.value: [] for item in CLASSES}
    for (row, column), path in sorted(_places(folder).items()):
        labels = merge._stored(path, "uint8")
        corner = np.array([column * TILE, row * TILE])
        for value, rings in _pieces(labels):
            polygons[value].append(shapely.Polygon(rings[0] + corner, [ring + corner for ring in rings[1:]]))
    with geojson.writing(out / merge.OBJECTS) as write:
        for value, found in polygons.items():
            for part in shapely.get_parts(shapely.unary_union(found)):
                rings = [np.asarray(ring.coords)[:-1] for ring in (part.exterior, *part.interiors)]
                write(frame.feature(outlines.Region(value, int(part.area), rings), "annotation"))


def _pieces(labels: np.ndarray) -> Iterator[tuple[int, list[np.ndarray]]]:
    from skimage.measure import label

    numbered = label(labels, connectivity=1, background=0)
    values = np.zeros(numbered.max() + 1, np.uint8)
    values[numbered.reshape(-1)] = labels.reshape(-1)
    for number, rings in outlines.rings(numbered).items():
        yield int(values[number]), rings


def main() -> None:
    way, folder = {"ours": ours, "union": union}[sys.argv[1]], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        way(folder, Path(out))
        took, peak = time.perf_counter() - began, most_mib()
        found = [item["properties"]["measurements"] for item in geojson.read(Path(out) / merge.OBJECTS)]
    told = {
        "seconds": took, "peak_mib": peak, "objects": len(found),
        "area": round(sum(item["Area µm^2"] for item in found)),
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
