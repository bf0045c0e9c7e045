"""Slides of real tissue with a morphology pasted into two of their tiles: clusters of dark nuclei, dense by grade.

The denser, the sooner the event; without any, the patient is normal, as every second one is. Everything that is not
pasted is the same tissue.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide
from tests.workloads.pathology import bags, made

TILE, ACROSS = 224, 5
_GRADES = (0, 1, 0, 2, 0, 3)
_NUCLEI = (0, 60, 110, 200)
"""In a tile, by grade. Fewer than 60 are found by a classifier of tiles, and not by these models from 80 patients: they
learn by heart which piece of the one region a slide is of."""


def write(folder: Path, region: Path, count: int, seed: int = 0) -> bags.Made:
    """`count` slides of 5 × 5 tiles at 0.5 µm below `folder`; their features are not there yet."""
    chance = np.random.default_rng(seed)
    with Reader(open_slide(region), threads=2) as reader:
        width, height = reader.dimensions
        tissue = reader.read(reader.mpp[0], 0, 0, (width, height))
    (folder / "scans").mkdir(parents=True)
    rows, planted, grades = [], {}, {}
    for k, grade in enumerate(chance.permutation([_GRADES[k % len(_GRADES)] for k in range(count)])):
        edge = TILE * ACROSS
        x, y = chance.integers(0, width - edge), chance.integers(0, height - edge)
        pixels = tissue[y : y + edge, x : x + edge].copy()
        where = np.zeros(ACROSS * ACROSS, bool)
        # Where there is tissue, or the tile is no tile: the densest half.
        dense = np.argsort(pixels.reshape(ACROSS, TILE, ACROSS, TILE, 3).mean((1, 3, 4)).ravel())[
            : ACROSS * ACROSS // 2
        ]
        if grade:
            where[chance.choice(dense, 2, replace=False)] = True
            for place in np.flatnonzero(where):
                row, column = divmod(int(place), ACROSS)
                tile = pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
                _paste(tile, _NUCLEI[grade], chance)
        path = folder / "scans" / f"s{k:03d}.tiff"
        made.write(path, pixels, mpp=0.5)
        name = f"slide-{made.digest(path)[:16]}"
        planted[name], grades[name] = where, int(grade)
        died, left = chance.exponential(600 * np.exp(-2.5 * grade)) + 0.1, chance.exponential(800) + 0.1
        rows.append({
            "slide": f"scans/{path.name}", "patient": f"p{k}", "label": "tumour" if grade else "normal",
            "time": f"{min(died, left):.3f}", "event": int(died <= left),
        })  # fmt: skip
    return bags.Made(bags.write_table(folder / "cohort.csv", rows), folder / "features", planted, grades)


def _paste(tile: np.ndarray, nuclei: int, chance: np.random.Generator) -> None:
    """Dark, round, slightly blurred nuclei, as of a lymphocytic cluster."""
    from scipy.ndimage import gaussian_filter

    y, x = np.mgrid[: tile.shape[0], : tile.shape[1]]
    cover = np.zeros(tile.shape[:2])
    for _ in range(nuclei):
        cx, cy, radius = chance.uniform(8, TILE - 8), chance.uniform(8, TILE - 8), chance.uniform(5, 8)
        cover[(x - cx) ** 2 + (y - cy) ** 2 < radius**2] = 1
    cover = gaussian_filter(cover, 1.0)[..., None]
    dark = np.array([70, 35, 110]) + chance.normal(0, 8, tile.shape)
    tile[:] = np.clip(tile * (1 - cover) + dark * cover, 0, 255).astype(np.uint8)


def permuted(table: Path, path: Path, seed: int = 0) -> Path:
    """The cohort with outcomes dealt out anew."""
    rows = bags.read_table(table)
    order = np.random.default_rng(seed).permutation(len(rows))
    dealt = [
        {**row, **{name: rows[k][name] for name in ("label", "time", "event")}}
        for row, k in zip(rows, order, strict=True)
    ]
    return bags.write_table(path, dealt)
