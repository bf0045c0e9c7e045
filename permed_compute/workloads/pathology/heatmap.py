"""Where a model looked: the attention of a slide's tiles, for programs, for QuPath, and for the eye.

    <slide>.attention.zarr      OME-Zarr 0.5, (y, x) float32, one value a tile, µm; NaN where there is no tile
    <slide>.attention.geojson   a QuPath tile for each, with its attention as measurements
    <slide>.attention.png       the same over the slide, by percentile; over white where the slide is not at hand

The value is relative: 1 is what each tile would have if all of the patient's tiles weighed alike. It does not sum to
anything and compares between slides of any size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import replacing, write_json
from permed_compute.workloads.pathology import geojson
from permed_compute.workloads.pathology.tiles import Grid
from permed_compute.workloads.pathology.tissue import View

ZARR, GEOJSON, PNG = ".attention.zarr", ".attention.geojson", ".attention.png"
RELATIVE, PERCENTILE = "Attention (1 = even)", "Attention percentile"
_TILE = (
    '{"type":"Feature","geometry":{"type":"Polygon","coordinates":[[[%d,%d],[%d,%d],[%d,%d],[%d,%d],[%d,%d]]]},'
    '"properties":{"objectType":"tile","classification":{"name":"Attention","color":[%d,%d,%d]},'
    '"measurements":{"' + RELATIVE + '":%.4f,"' + PERCENTILE + '":%.4f}}}'
)
"""A feature as `geojson.feature` makes it."""
_LONGEST = 1024
_RAMP = np.array([(0.0, 48, 18, 122), (0.5, 33, 170, 160), (0.8, 250, 200, 40), (1.0, 200, 20, 20)])
"""Percentile, and its colour."""


@dataclass(frozen=True)
class Heat:
    """coords: (n, 2) level-0 corners; relative, percentile: (n,) float32; facts: of the features' grid."""

    coords: np.ndarray
    relative: np.ndarray
    facts: Mapping[str, Any]

    @property
    def step(self) -> tuple[float, float]:
        """Level-0 pixels from tile to tile, (x, y)."""
        facts = self.facts
        names = {"target_mpp": facts["target_mpp"], "size": facts["patch_size"], "overlap": facts["overlap"]}
        return Grid.of(names, (facts["mpp"][0], facts["mpp"][1])).step

    @property
    def percentile(self) -> np.ndarray:
        """(n,) float32 from 0 to 1; tiles of one value have one percentile."""
        _, inverse, counts = np.unique(self.relative, return_inverse=True, return_counts=True)
        upto = np.cumsum(counts)
        return np.asarray((upto[inverse] - 1) / max(1, len(self.relative) - 1), np.float32)

    def laid_out(self, values: np.ndarray) -> np.ndarray:
        """(rows, columns) float32 of the whole slide, one entry a tile, NaN where there is none."""
        (x, y), facts = self.step, self.facts
        rows, columns = math.ceil(facts["level0_height"] / y), math.ceil(facts["level0_width"] / x)
        grid = np.full((rows, columns), np.nan, np.float32)
        grid[np.round(self.coords[:, 1] / y).astype(int), np.round(self.coords[:, 0] / x).astype(int)] = values
        return grid


def write_zarr(path: Path, heat: Heat) -> None:
    grid, (x, y), (across, down) = heat.laid_out(heat.relative), heat.step, heat.facts["mpp"]
    array = {
        "zarr_format": 3, "node_type": "array", "shape": list(grid.shape), "data_type": "float32",
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid.shape)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}}, "fill_value": "NaN",
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}], "dimension_names": ["y", "x"],
        "attributes": {},
    }  # fmt: skip
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    scale = [{"type": "scale", "scale": [y * down, x * across]}]
    image = {"name": "attention", "axes": axes, "datasets": [{"path": "0", "coordinateTransformations": scale}]}
    with replacing(path / "0" / "c" / "0" / "0") as temporary:
        grid.astype("<f4").tofile(temporary)
    write_json(path / "0" / "zarr.json", array)
    attributes = {"ome": {"version": "0.5", "multiscales": [image]}, "permed": dict(heat.facts)}
    write_json(path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})


def write_geojson(path: Path, heat: Heat) -> None:
    """Squares of one shape, so that only numbers are put into a text: ten times as fast as objects made into JSON."""
    edge, percentile = int(heat.facts["patch_size_level0"]), heat.percentile
    rows = zip(
        heat.coords.tolist(), heat.relative.tolist(), percentile.tolist(), coloured(percentile).tolist(), strict=True
    )
    with geojson.writing(path) as put:
        for (x, y), value, rank, colour in rows:
            right, low = x + edge, y + edge
            put(_TILE % (x, y, right, y, right, low, x, low, x, y, *colour, value, rank))


def coloured(percentile: np.ndarray) -> np.ndarray:
    """(…, 3) uint8."""
    channels = [np.interp(percentile, _RAMP[:, 0], _RAMP[:, 1 + k]) for k in range(3)]
    return np.asarray(np.nan_to_num(np.stack(channels, axis=-1)).astype(np.uint8))


def picture(heat: Heat, view: View | None) -> np.ndarray:
    """(h, w, 3) uint8 of the whole slide, at most 1024 pixels along an edge."""
    width, height = heat.facts["level0_width"], heat.facts["level0_height"]
    if view is None:
        whole = max(width, height) / _LONGEST
        below = np.full((max(1, round(height / whole)), max(1, round(width / whole)), 3), 245, np.uint8)
    else:
        thin = -(-max(view.pixels.shape) // _LONGEST)
        below = view.pixels[::thin, ::thin].copy()
    grid, (x, y) = heat.laid_out(heat.percentile), heat.step
    rows = ((np.arange(below.shape[0]) + 0.5) * height / below.shape[0] / y).astype(int)
    columns = ((np.arange(below.shape[1]) + 0.5) * width / below.shape[1] / x).astype(int)
    rows, columns = np.minimum(rows, grid.shape[0] - 1), np.minimum(columns, grid.shape[1] - 1)
    colours, there = coloured(grid), np.isfinite(grid)[rows][:, columns]
    # Half of each, in bytes: a slide's view is a million pixels, and floats of it would be most of the work.
    mixed = (below >> 1) + (colours >> 1)[rows][:, columns]
    return np.asarray(np.where(there[..., None], mixed, below))
