"""Label images: OME-Zarr 0.5 (`labels/<name>`), sharded, written shard by shard from tiles.

    labels/zarr.json                the names
    labels/<name>/zarr.json         multiscales in µm, colours and names of the values; written last
    labels/<name>/0 … n             (y, x) uint8 or uint32, zstd; a shard is one tile, absent where it holds nothing

Moved into a slide store (`<slide>.ome.zarr/labels`), they are the store's own labels. Lower levels take every second
pixel, so that no value arises that was not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import read_json, write_json
from permed_compute.storage import shardfile

CHUNK = 512
"""Pixels along a chunk's edge; a tile is a whole number of them."""


@dataclass(frozen=True)
class Named:
    """What a value of the image stands for."""

    value: int
    name: str
    colour: tuple[int, int, int]


class LabelWriter:
    """Writes one label image. width, height: of level 0 in pixels; tile: edge of a shard; mpp: µm per pixel."""

    def __init__(self, folder: Path, name: str, width: int, height: int, tile: int, kind: str, mpp: float) -> None:
        self.folder, self.name, self.tile, self.mpp = folder, name, tile, mpp
        self.kind = np.dtype(kind)
        self.shapes = [(height, width)]
        while max(self.shapes[-1]) > tile:
            self.shapes.append((-(-self.shapes[-1][0] // 2), -(-self.shapes[-1][1] // 2)))

    def put(self, row: int, column: int, labels: np.ndarray) -> None:
        """(tile, tile) labels of level 0; what lies beyond the image is 0."""
        self._write(0, row, column, labels)

    def close(self, values: Sequence[Named], facts: Mapping[str, Any]) -> None:
        """Make the lower levels and say what the values mean. facts: JSON, kept beside the metadata."""
        for level in range(1, len(self.shapes)):
            rows, columns = (-(-length // self.tile) for length in self.shapes[level])
            for row in range(rows):
                for column in range(columns):
                    self._reduced(level, row, column)
        for level, shape in enumerate(self.shapes):
            write_json(self._level(level) / "zarr.json", self._array(shape))
        scales = [[self.mpp * 2**level] * 2 for level in range(len(self.shapes))]
        datasets = [
            {"path": str(level), "coordinateTransformations": [{"type": "scale", "scale": scale}]}
            for level, scale in enumerate(scales)
        ]
        axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "yx"]
        about = {
            "colors": [{"label-value": item.value, "rgba": [*item.colour, 255]} for item in values],
            "properties": [{"label-value": item.value, "class": item.name} for item in values],
            "source": {"image": "../../"},
        }
        ome = {
            "version": "0.5",
            "multiscales": [{"name": self.name, "axes": axes, "datasets": datasets}],
            "image-label": about,
        }
        write_json(self.folder / "labels" / self.name / "zarr.json", _group({"ome": ome, "permed": dict(facts)}))
        write_json(self.folder / "labels" / "zarr.json", _group({"ome": {"version": "0.5", "labels": [self.name]}}))

    # ------------------------------------------------------------------------------------- shards

    def _level(self, level: int) -> Path:
        return self.folder / "labels" / self.name / str(level)

    def _shard(self, level: int, row: int, column: int) -> Path:
        return self._level(level) / "c" / str(row) / str(column)

    def _write(self, level: int, row: int, column: int, labels: np.ndarray) -> None:
        from numcodecs.zstd import compress

        side = self.tile // CHUNK
        cut = labels.astype(self.kind).reshape(side, CHUNK, side, CHUNK).swapaxes(1, 2).reshape(-1, CHUNK, CHUNK)
        stored = [bytes(compress(np.ascontiguousarray(part), 1)) if part.any() else None for part in cut]
        shardfile.write(self._shard(level, row, column), stored)

    def _read(self, level: int, row: int, column: int) -> np.ndarray | None:
        from numcodecs.zstd import decompress

        path, side = self._shard(level, row, column), self.tile // CHUNK
        index = shardfile.index(path, side * side)
        if index is None:
            return None
        labels = np.zeros((side, CHUNK, side, CHUNK), self.kind)
        with path.open("rb") as file:
            for k in shardfile.present(index).tolist():
                file.seek(int(index[k, 0]))
                part = decompress(file.read(int(index[k, 1])))
                labels[k // side, :, k % side] = np.frombuffer(part, self.kind).reshape(CHUNK, CHUNK)
        return labels.reshape(self.tile, self.tile)

    def _reduced(self, level: int, row: int, column: int) -> None:
        half = self.tile // 2
        labels = np.zeros((self.tile, self.tile), self.kind)
        for k in range(4):
            finer = self._read(level - 1, 2 * row + k // 2, 2 * column + k % 2)
            if finer is not None:
                labels[k // 2 * half :, k % 2 * half :][:half, :half] = finer[::2, ::2]
        if labels.any():
            self._write(level, row, column, labels)

    def _array(self, shape: tuple[int, int]) -> dict[str, Any]:
        pixels = (
            {"name": "bytes", "configuration": {"endian": "little"}} if self.kind.itemsize > 1 else {"name": "bytes"}
        )
        sharding = {
            "chunk_shape": [CHUNK, CHUNK],
            "codecs": [pixels, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}],
            "index_codecs": shardfile.INDEX_CODECS,
            "index_location": "end",
        }
        return {
            "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": self.kind.name, "fill_value": 0,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [self.tile, self.tile]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["y", "x"], "attributes": {},
        }  # fmt: skip


def _group(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes)}


def thinned(folder: Path, name: str, longest: int) -> tuple[np.ndarray, int]:
    """A label image as (h, w), every n-th pixel of level 0, at most `longest` wide or high; and that n."""
    import zarr

    group: Any = zarr.open_group(folder / "labels" / name, mode="r")
    arrays = [group[each["path"]] for each in group.attrs["ome"]["multiscales"][0]["datasets"]]
    level = next((k for k, array in enumerate(arrays) if max(array.shape) <= 4 * longest), len(arrays) - 1)
    labels = np.asarray(arrays[level][:])
    step = max(1, -(-max(labels.shape) // longest))
    return labels[::step, ::step], step * 2**level


def places(folder: Path, name: str) -> Iterator[tuple[int, int]]:
    """(y, x) of the chunks of level 0 that hold something, in order of their shards."""
    level = folder / "labels" / name / "0"
    tile, _ = _laid_out(level)
    side = tile // CHUNK
    shards = sorted((int(path.parent.name), int(path.name)) for path in (level / "c").glob("*/*"))
    for row, column in shards:
        index = shardfile.index(level / "c" / str(row) / str(column), side * side)
        for k in () if index is None else shardfile.present(index).tolist():
            yield row * tile + k // side * CHUNK, column * tile + k % side * CHUNK


def chunk(folder: Path, name: str, place: tuple[int, int]) -> np.ndarray:
    """(512, 512) labels of level 0 at one of `places`."""
    from numcodecs.zstd import decompress

    level = folder / "labels" / name / "0"
    tile, kind = _laid_out(level)
    side = tile // CHUNK
    path = level / "c" / str(place[0] // tile) / str(place[1] // tile)
    index = shardfile.index(path, side * side)
    assert index is not None, "one of the places"
    k = place[0] % tile // CHUNK * side + place[1] % tile // CHUNK
    with path.open("rb") as file:
        file.seek(int(index[k, 0]))
        return np.frombuffer(decompress(file.read(int(index[k, 1]))), kind).reshape(CHUNK, CHUNK)


def _laid_out(level: Path) -> tuple[int, str]:
    about = read_json(level / "zarr.json") or {}
    return int(about["chunk_grid"]["configuration"]["chunk_shape"][0]), str(about["data_type"])
