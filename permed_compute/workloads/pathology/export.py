"""A store as OME-Zarr 0.4 (Zarr v2, zstd): for programs that know neither shards nor JPEG; ten times as large."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from permed_compute.paths import write_json
from permed_compute.storage.shards import FILL
from permed_compute.workloads.pathology.store import StoreSlide

_GROUP = {"zarr_format": 2}


def export_v04(store: Path, target: Path) -> None:
    """Lossless copy of the decoded pixels, (c, y, x), one chunk per tile; chunks that are absent stay absent."""
    from numcodecs.zstd import compress

    with StoreSlide(store) as slide:
        for number, level in enumerate(slide.levels):
            layout, folder = level.layout, target / str(number)
            array = {
                "zarr_format": 2, "shape": [3, layout.height, layout.width],
                "chunks": [3, layout.tile_h, layout.tile_w], "dtype": "|u1", "order": "C", "fill_value": FILL,
                "filters": None, "dimension_separator": "/",
                "compressor": {"id": "zstd", "level": 1, "checksum": False},
            }  # fmt: skip
            write_json(folder / ".zarray", array)
            for row in range(layout.rows):
                (folder / "0" / str(row)).mkdir(parents=True, exist_ok=True)
                for column in range(layout.columns):
                    tile = slide.tile(number, row, column)
                    if tile is not None:
                        packed = compress(np.ascontiguousarray(tile.transpose(2, 0, 1)), 1)
                        (folder / "0" / str(row) / str(column)).write_bytes(packed)
        write_json(target / ".zgroup", _GROUP)
        x, y = slide.about.mpp
        space = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
        datasets = [
            {"path": str(k), "coordinateTransformations": [
                {"type": "scale", "scale": [1.0, y * level.downsample, x * level.downsample]}
            ]}
            for k, level in enumerate(slide.levels)
        ]  # fmt: skip
        multiscale = {
            "version": "0.4", "name": "slide", "axes": [{"name": "c", "type": "channel"}, *space], "datasets": datasets,
        }  # fmt: skip
        write_json(target / ".zattrs", {"multiscales": [multiscale]})
