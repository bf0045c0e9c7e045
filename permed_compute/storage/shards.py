"""Sharded arrays of image tiles: Zarr v3 `sharding_indexed` (ZEP 2), written and read without decoding a tile.

    <level>/zarr.json                 written last of the level's own files, so that its presence means a known layout
    <level>/c/0/<row>/<column>        one shard: 8 × 8 tiles' bytes, then 64 (offset, length) uint64 and their CRC-32C

A shard is published by rename, so one that exists is whole; its index is checked all the same where it is read.
A shard of which every tile is absent has no file: readers see `fill_value`. Logical axes are (c, y, x), a stored
tile's are (y, x, c).
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from permed_compute.errors import Finding, RefusedInput
from permed_compute.storage import shardfile

SIDE = 8
"""Tiles along an edge of a shard."""
FILL = 255
"""White: what brightfield shows where nothing was scanned."""


@dataclass(frozen=True, slots=True)
class Layout:
    """One level: pixels, tile size, and how a tile's bytes decode.

    coding `jpeg`: `tables` (abbreviated JPEG tables, or b'') and `rgb` (the stream holds RGB, not YCbCr).
    coding `zstd`: raw (y, x, c) bytes, compressed.
    """

    width: int
    height: int
    tile_w: int
    tile_h: int
    coding: Literal["jpeg", "zstd"] = "jpeg"
    tables: bytes = b""
    rgb: bool = False

    @property
    def rows(self) -> int:
        return -(-self.height // self.tile_h)

    @property
    def columns(self) -> int:
        return -(-self.width // self.tile_w)

    @property
    def shard_rows(self) -> int:
        return -(-self.rows // SIDE)

    @property
    def shard_columns(self) -> int:
        return -(-self.columns // SIDE)

    @property
    def shards(self) -> list[tuple[int, int]]:
        """(row, column) of every shard, in order."""
        return [(row, column) for row in range(self.shard_rows) for column in range(self.shard_columns)]

    def tiles_of(self, shard: tuple[int, int]) -> list[tuple[int, int] | None]:
        """The 64 (row, column) of a shard's tiles in stored order; None beyond the level's edge."""
        inside = [(shard[0] * SIDE + k // SIDE, shard[1] * SIDE + k % SIDE) for k in range(SIDE * SIDE)]
        return [(r, c) if r < self.rows and c < self.columns else None for r, c in inside]

    def as_zarr(self) -> dict[str, Any]:
        """The level's `zarr.json`."""
        if self.coding == "jpeg":
            colours: dict[str, Any] = {"colorspace_data": "RGB"}
            if self.rgb:
                colours["colorspace_jpeg"] = "RGB"
            if self.tables:
                colours["tables"] = base64.b64encode(self.tables).decode()
            inner: list[dict[str, Any]] = [{"name": "imagecodecs_jpeg", "configuration": colours}]
        else:
            inner = [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1, "checksum": False}}]
        tile = [3, self.tile_h, self.tile_w]
        sharding = {
            "chunk_shape": tile,
            "codecs": [{"name": "transpose", "configuration": {"order": [1, 2, 0]}}, *inner],
            "index_codecs": shardfile.INDEX_CODECS,
            "index_location": "end",
        }
        return {
            "zarr_format": 3, "node_type": "array", "shape": [3, self.height, self.width], "data_type": "uint8",
            "chunk_grid": {"name": "regular",
                           "configuration": {"chunk_shape": [3, self.tile_h * SIDE, self.tile_w * SIDE]}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": FILL, "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
            "dimension_names": ["c", "y", "x"], "attributes": {},
        }  # fmt: skip

    @classmethod
    def of_zarr(cls, row: Mapping[str, Any]) -> Layout:
        """The layout that `as_zarr` wrote. Raises `RefusedInput` (NOT_OUR_STORE) for any other array."""
        try:
            (sharding,) = (codec["configuration"] for codec in row["codecs"])
            _, *inner = sharding["codecs"]
            tile, name = sharding["chunk_shape"], inner[-1]["name"]
            colours = inner[-1].get("configuration", {})
            layout = cls(
                row["shape"][2], row["shape"][1], tile[2], tile[1], "zstd" if name == "zstd" else "jpeg",
                base64.b64decode(colours.get("tables", "")), colours.get("colorspace_jpeg") == "RGB",
            )  # fmt: skip
        except (KeyError, ValueError, TypeError, IndexError):
            layout = None
        if layout is None or layout.as_zarr()["codecs"] != row["codecs"]:
            finding = Finding("NOT_OUR_STORE", "The array is not laid out as a slide store's level.", "refused")
            raise RefusedInput(finding, remedy="Open it with zarr; `permed convert` makes stores that this reads.")
        return layout


def shard_file(level: Path, shard: tuple[int, int]) -> Path:
    return level / "c" / "0" / str(shard[0]) / str(shard[1])


def write_shard(path: Path, tiles: Sequence[bytes | memoryview | None]) -> int:
    """Publish one shard from its 64 tiles in stored order; returns the bytes written (0: all absent, no file)."""
    return shardfile.write(path, tiles)


def whole(path: Path) -> bool:
    """Whether the file is a shard with a sound index that stays inside it."""
    return shardfile.whole(path, SIDE * SIDE)


def stored_tiles(level: Path, layout: Layout) -> list[tuple[int, int]]:
    """(row, column) of the tiles that exist, shard by shard, from the indexes alone. Raises `RefusedInput`."""
    found: list[tuple[int, int]] = []
    for shard in layout.shards:
        index = shardfile.index(shard_file(level, shard), SIDE * SIDE)
        if index is not None:
            numbers = shardfile.present(index).tolist()
            found += [(shard[0] * SIDE + k // SIDE, shard[1] * SIDE + k % SIDE) for k in numbers]
    return found


class ShardReader:
    """Stored tiles of one level through memory maps. Threads may share it; at most 256 shards are mapped at a time."""

    def __init__(self, level: Path, layout: Layout) -> None:
        self.layout = layout
        self._shards = shardfile.Shards(lambda shard: shard_file(level, cast("tuple[int, int]", shard)), SIDE * SIDE)
        self.close = self._shards.close

    def tile(self, row: int, column: int) -> memoryview | None:
        """The tile's bytes (a view into the map), or None where it is absent."""
        return self._shards.chunk((row // SIDE, column // SIDE), row % SIDE * SIDE + column % SIDE)
