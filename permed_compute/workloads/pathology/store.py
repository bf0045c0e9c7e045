"""The slide store: one OME-Zarr 0.5 image (https://ngff.openmicroscopy.org/0.5) per slide, its levels in sharded JPEG.

    <name>.ome.zarr/zarr.json     group: `ome` (multiscales, µm), `permed` (source digest, origin of each level)
    <name>.ome.zarr/0 … n         levels, `storage.shards`

`zarr.json` of the group is written last: a folder without it is a conversion under way.
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import read_json
from permed_compute.storage.shards import Layout, ShardReader, stored_tiles
from permed_compute.workloads.pathology.jpeg import Stream
from permed_compute.workloads.pathology.source import About, Closing, Level, halved, refuse

SUFFIX = ".ome.zarr"


def group_metadata(about: About, levels: list[Level], record: Mapping[str, Any]) -> dict[str, Any]:
    """The group's `zarr.json`. `record`: what else the store says of its making (JSON)."""
    x, y = about.mpp
    scales = [[1.0, y * level.downsample, x * level.downsample] for level in levels]
    datasets = [
        {"path": str(k), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
        for k, scale in enumerate(scales)
    ]
    space = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
    multiscale = {"name": "slide", "axes": [{"name": "c", "type": "channel"}, *space], "datasets": datasets}
    window = {"min": 0, "max": 255, "start": 0, "end": 255}
    colours = (("red", "FF0000"), ("green", "00FF00"), ("blue", "0000FF"))
    channels = [{"label": label, "color": colour, "window": window, "active": True} for label, colour in colours]
    ome = {
        "version": "0.5", "multiscales": [multiscale],
        "omero": {"channels": channels, "rdefs": {"model": "color"}},
    }  # fmt: skip
    said = {
        "kind": about.kind, "mpp": list(about.mpp), "objective": about.objective,
        "icc": base64.b64encode(about.icc).decode(), "downsamples": [level.downsample for level in levels],
    }  # fmt: skip
    attributes = {"ome": ome, "permed": {**said, **record}}
    return {"zarr_format": 3, "node_type": "group", "attributes": attributes}


class StoredLevel:
    """Tiles of one level, also of a store that is still being written."""

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.layout = layout
        self._shards, self._stream = ShardReader(folder, layout), Stream(layout.tables, layout.rgb)

    def raw(self, row: int, column: int) -> memoryview | None:
        return self._shards.tile(row, column)

    def tile(self, row: int, column: int, halvings: int = 0, out: np.ndarray | None = None) -> np.ndarray | None:
        """See `Slide.tile`. `out`: decode in place, where it is contiguous and of that shape."""
        layout, stored = self.layout, self._shards.tile(row, column)
        if stored is None:
            return None
        try:
            if layout.coding == "jpeg":
                return self._stream.decode(stored, halvings, out)
            from numcodecs.zstd import decompress

            pixels = np.frombuffer(decompress(stored), np.uint8).reshape(layout.tile_h, layout.tile_w, 3)
        except (ValueError, RuntimeError):
            refuse("TILE_DAMAGED", "A stored tile does not decode.", "`permed verify` lists what is damaged.",
                   row=row, column=column)  # fmt: skip
        pixels = halved(pixels, halvings)
        if out is None:
            return pixels
        out[:] = pixels
        return out

    def close(self) -> None:
        self._shards.close()


class StoreSlide(Closing):
    """A converted slide. `record` is what `convert` wrote about its making."""

    def __init__(self, path: Path) -> None:
        row = read_json(path / "zarr.json") or {}
        said = row.get("attributes", {}).get("permed")
        if said is None:
            refuse("NOT_OUR_STORE", "The Zarr group is not a slide store.", "`permed convert` makes one.")
        self.path, self.record = path, said
        self.about = About(
            said["kind"], (said["mpp"][0], said["mpp"][1]), said["objective"], base64.b64decode(said["icc"])
        )
        scales: list[float] = said["downsamples"]
        layouts = [Layout.of_zarr(read_json(path / str(k) / "zarr.json") or {}) for k in range(len(scales))]
        self.levels = [
            Level(layout, scale, layout.coding == "jpeg") for layout, scale in zip(layouts, scales, strict=True)
        ]
        self._stored = [StoredLevel(path / str(k), layout) for k, layout in enumerate(layouts)]

    def raw(self, level: int, row: int, column: int) -> memoryview | None:
        return self._stored[level].raw(row, column)

    def tile_bytes(self, level: int) -> int:
        return sum(len(self.raw(level, *place) or b"") for place in stored_tiles(self.path / str(level),
                                                                                self.levels[level].layout))  # fmt: skip

    def tile(self, level: int, row: int, column: int, halvings: int = 0) -> np.ndarray | None:
        return self._stored[level].tile(row, column, halvings)

    def tile_into(self, out: np.ndarray, level: int, row: int, column: int, halvings: int) -> np.ndarray | None:
        """`tile`, decoded in place: `out` is contiguous and of the tile's shape."""
        return self._stored[level].tile(row, column, halvings, out)

    def close(self) -> None:
        for level in self._stored:
            level.close()


def present(slide: Any, level: int) -> Iterator[tuple[int, int]]:
    """(row, column) of the level's tiles that exist."""
    layout = slide.levels[level].layout
    for row in range(layout.rows):
        for column in range(layout.columns):
            if slide.raw(level, row, column) is not None:
                yield row, column


def find_slides(path: Path) -> list[Path]:
    """Slides at or below `path`: stores, folders of DICOM, and every other file, sorted; hidden ones are left out."""
    if path.is_file() or (path / "zarr.json").is_file():
        return [path]
    found: list[Path] = []
    entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
    files = [entry for entry in entries if entry.is_file()]
    dicom = [file for file in files if _is_dicom(file)]
    if dicom:
        found.append(path)
    found += [file for file in files if file not in dicom]
    for folder in entries:
        # MRXS keeps its data in a folder of the slide's name beside it.
        if folder.is_dir() and not folder.with_suffix(".mrxs").is_file():
            found += find_slides(folder)
    return found


def _is_dicom(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(132)[128:] == b"DICM"


def digest_of(path: Path, digest: Any) -> str:
    """Content digest of a slide: of its bytes, or over the sorted digests of its files. `digest(path)` → hex."""
    import hashlib

    if path.is_file():
        beside = path.with_suffix("") if path.suffix.lower() == ".mrxs" else None
        if beside is None or not beside.is_dir():
            return str(digest(path))
        files = [path, *sorted(file for file in beside.rglob("*") if file.is_file())]
    else:
        files = sorted(file for file in path.rglob("*") if file.is_file())
    return hashlib.sha256("".join(sorted(digest(file) for file in files)).encode()).hexdigest()


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Peak signal-to-noise ratio of two uint8 images in dB; infinity where they are equal."""
    error = float(np.mean((one.astype(np.float32) - other.astype(np.float32)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
