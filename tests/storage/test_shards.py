"""Shards as files: what zarr-python reads from them, what damage shows, what absent tiles cost."""

from __future__ import annotations

import numpy as np
import pytest
import zarr

from permed_compute.errors import RefusedInput
from permed_compute.paths import write_json
from permed_compute.storage.shards import SIDE, Layout, ShardReader, shard_file, whole, write_shard


def stored(folder, layout, tiles):
    """A level whose tiles are these, {(row, column): (y, x, 3)}; zstd, so that every byte is known."""
    from numcodecs.zstd import compress

    write_json(folder / "zarr.json", layout.as_zarr())
    for shard in layout.shards:
        packed = [
            bytes(compress(np.ascontiguousarray(tiles[place]), 1)) if place in tiles else None
            for place in layout.tiles_of(shard)
        ]
        write_shard(shard_file(folder, shard), packed)


@pytest.fixture
def level(tmp_path):
    layout = Layout(300, 170, 16, 16, "zstd")
    random = np.random.default_rng(0)
    tiles = {
        (r, c): random.integers(0, 255, (16, 16, 3), np.uint8)
        for r in range(layout.rows) for c in range(layout.columns) if (r + c) % 3
    }  # fmt: skip
    stored(tmp_path, layout, tiles)
    return tmp_path, layout, tiles


def test_zarr_python_reads_what_was_written(level):
    folder, layout, tiles = level
    array = zarr.open_array(folder, mode="r")
    assert array.shape == (3, 170, 300) and array.metadata.dimension_names == ("c", "y", "x")
    seen = array[:].transpose(1, 2, 0)
    for row in range(layout.rows):
        for column in range(layout.columns):
            part = seen[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            expected = tiles.get((row, column), np.full((16, 16, 3), 255, np.uint8))
            assert np.array_equal(part, expected[: part.shape[0], : part.shape[1]])


def test_the_reader_gives_the_stored_bytes_and_none_for_absent_ones(level):
    from numcodecs.zstd import decompress

    folder, layout, tiles = level
    reader = ShardReader(folder, layout)
    for row in range(layout.rows):
        for column in range(layout.columns):
            tile = reader.tile(row, column)
            assert (tile is None) == ((row, column) not in tiles)
            if tile is not None:
                assert np.array_equal(np.frombuffer(decompress(tile), np.uint8).reshape(16, 16, 3), tiles[row, column])


def test_a_layout_survives_its_own_metadata():
    for layout in (Layout(9, 8, 4, 2, "jpeg", b"\xff\xd8tables\xff\xd9", True), Layout(9, 8, 4, 4, "zstd")):
        assert Layout.of_zarr(layout.as_zarr()) == layout


def test_an_array_of_somebody_else_is_refused(tmp_path):
    zarr.create_array(tmp_path / "a", shape=(3, 64, 64), chunks=(3, 16, 16), dtype="uint8")
    import json

    with pytest.raises(RefusedInput, match="NOT_OUR_STORE"):
        Layout.of_zarr(json.loads((tmp_path / "a" / "zarr.json").read_text()))


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damage_to_an_index_shows(level, damage):
    folder, layout, _ = level
    file = shard_file(folder, (0, 0))
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-20] ^= 1
    file.write_bytes({"cut": data[:-10], "flip": data, "empty": b""}[damage])
    assert not whole(file) and whole(shard_file(folder, (1, 2)))
    with pytest.raises(RefusedInput, match="SHARD_DAMAGED"):
        ShardReader(folder, layout).tile(0, 1)


def test_a_shard_without_tiles_has_no_file(tmp_path):
    assert write_shard(tmp_path / "x", [None] * SIDE * SIDE) == 0
    assert not (tmp_path / "x").exists()
