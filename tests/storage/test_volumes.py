"""Boxes are what numpy slices, other Zarr readers agree, and damage is named."""

from __future__ import annotations

import os

import numpy as np
import pytest

from permed_compute.errors import RefusedInput
from permed_compute.storage import volumes
from permed_compute.storage.volumes import CHUNK, Layout, VolumeReader, shard_file, write


def made(tmp_path, shape=(70, 45, 33), dtype="int16", fill=-1000):
    random = np.random.default_rng(0)
    array = random.integers(-1000, 2000, shape).astype(dtype) if dtype != "float32" else random.random(shape, "f4")
    layout = Layout(shape, dtype, fill)
    write(tmp_path / "v.zarr", array, layout, {"said": 1}, threads=2)
    return array, VolumeReader(tmp_path / "v.zarr")


def box(array, start, size, fill):
    """The oracle: numpy, with what lies outside filled."""
    out = np.full(size, fill, array.dtype)
    low = [max(s, 0) for s in start]
    high = [max(min(s + n, m), a) for s, n, m, a in zip(start, size, array.shape, low, strict=True)]
    to = tuple(slice(a - s, b - s) for a, b, s in zip(low, high, start, strict=True))
    out[to] = array[tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
    return out


@pytest.mark.parametrize("dtype", ["int16", "uint8", "float32", "int32"])
def test_boxes_equal_numpy_inside_across_and_outside(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(volumes, "SHARD", 64)  # several shards from a small array
    array, reader = made(tmp_path, dtype=dtype, fill=0)
    assert len(reader.layout.shards) == 2
    random = np.random.default_rng(1)
    for _ in range(60):
        start, size = random.integers(-20, 75, 3), random.integers(1, 60, 3)
        assert np.array_equal(reader.read(start, size), box(array, start, tuple(size), 0))
    assert np.array_equal(reader.all(), array)


def test_another_dtype_is_converted_in_place(tmp_path):
    array, reader = made(tmp_path)
    out = np.empty((8, 8, 8), np.float32)
    assert reader.read((60, 30, 20), (8, 8, 8), out) is out
    assert np.array_equal(out, array[60:68, 30:38, 20:28])


def test_zarr_and_tensorstore_read_the_same(tmp_path):
    zarr = pytest.importorskip("zarr")
    array, reader = made(tmp_path)
    opened = zarr.open_array(reader.folder, mode="r")
    assert np.array_equal(opened[...], array)
    assert opened.attrs["said"] == 1 and opened.metadata.dimension_names == ("x", "y", "z")
    tensorstore = pytest.importorskip("tensorstore")
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(reader.folder)}}
    assert np.array_equal(tensorstore.open(spec, open=True).result().read().result(), array)


def test_chunks_that_are_all_fill_take_no_room(tmp_path):
    layout = Layout((96, 96, 96), "uint8", 0)
    array = np.zeros(layout.shape, np.uint8)
    array[40, 40, 40] = 7
    told = write(tmp_path / "v.zarr", array, layout, {})
    assert told["bytes"] < 2000 and told["files"] == 3
    reader = VolumeReader(tmp_path / "v.zarr")
    assert np.array_equal(reader.all(), array)
    empty = write(tmp_path / "e.zarr", np.zeros_like(array), layout, {})
    assert empty["files"] == 2 and not VolumeReader(tmp_path / "e.zarr").all().any()


def test_the_estimate_is_never_exceeded(tmp_path):
    _, reader = made(tmp_path)
    size, files = reader.layout.estimate()
    there = list(reader.folder.iterdir())
    assert len(there) + 1 <= files and sum(path.stat().st_size for path in there) <= size
    assert size < 2 * np.prod([n * CHUNK for n in reader.layout.grid]) + 20_000


def test_damage_is_named(tmp_path):
    _, reader = made(tmp_path)
    path = shard_file(reader.folder, (0, 0, 0))
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(RefusedInput, match="SHARD_DAMAGED"):
        VolumeReader(reader.folder).all()
    path.write_bytes(os.urandom(1000) + whole[1000:])
    with pytest.raises(RefusedInput, match="CHUNK_DAMAGED"):
        VolumeReader(reader.folder).all()
    (reader.folder / "zarr.json").write_text('{"zarr_format": 3, "shape": [3, 3]}')
    with pytest.raises(RefusedInput, match="NOT_OUR_STORE"):
        VolumeReader(reader.folder)
