"""Features of a slide's tiles: float16 in Zarr, uncompressed, one shard per slide; exports for other tools.

    <slide>.zarr/grids/mpp0.5_px224/coords                     (n, 2) int32, level-0 x, y
    <slide>.zarr/grids/mpp0.5_px224/features/<encoder>         (n, d) float16, one shard of chunks of (block, d)

An encoding part writes a chunk; the shard is all of them, one behind the other, and then their index. So its bytes
begin with the whole array, row by row: `read` maps them and copies nothing.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, NotFoundError, RefusedInput
from permed_compute.paths import read_json, replacing, write_json
from permed_compute.storage import shardfile

CHUNK = "features.f16"


def grid_name(mpp: float, size: int) -> str:
    return f"mpp{mpp:g}_px{size}"


def write_chunk(folder: Path, features: np.ndarray, block: int) -> None:
    """(n ≤ block, d) float16 as one Zarr chunk: little-endian, the last block padded with zeros.

    `folder` is a part's own, which is synced and published as a whole.
    """
    padded = np.zeros((block, features.shape[1]), "<f2")
    padded[: len(features)] = features
    folder.mkdir(parents=True, exist_ok=True)
    padded.tofile(folder / CHUNK)


def assemble(
    path: Path, coords: np.ndarray, chunks: Sequence[Path], *, block: int, dim: int, encoder: str,
    facts: Mapping[str, Any],
) -> None:  # fmt: skip
    """The slide's Zarr from its finished blocks, in order."""
    grid = f"grids/{grid_name(facts['target_mpp'], facts['patch_size'])}"
    for group in ("", "grids", grid, f"{grid}/features"):
        attributes = dict(facts) if group == grid else {}
        write_json(path / group / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes})
    _array(path / grid / "coords", coords.shape, coords.shape, "int32", [_BYTES], {})
    with replacing(path / grid / "coords" / "c" / "0" / "0") as temporary:
        coords.astype("<i4").tofile(temporary)
    folder = path / grid / "features" / encoder
    sharding = {"chunk_shape": [block, dim], "codecs": [_BYTES], "index_codecs": shardfile.INDEX_CODECS,
                "index_location": "end"}  # fmt: skip
    _array(
        folder, (len(coords), dim), (len(chunks) * block, dim), "float16",
        [{"name": "sharding_indexed", "configuration": sharding}], {"encoder": facts.get("encoder_digest", "")},
    )  # fmt: skip
    shardfile.write_files(folder / "c" / "0" / "0", chunks)


_BYTES: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}


def _array(
    folder: Path, shape: tuple[int, ...], chunk: tuple[int, ...], kind: str, codecs: list[dict[str, Any]],
    attributes: Mapping[str, Any],
) -> None:  # fmt: skip
    write_json(folder / "zarr.json", {
        "zarr_format": 3, "node_type": "array", "shape": list(shape), "data_type": kind, "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": codecs, "attributes": dict(attributes),
    })  # fmt: skip


def read(path: Path, grid: str = "", encoder: str = "") -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """(n, 2) coords, (n, d) float16 features, facts. Without names: the only ones there are.

    The features are a private map of the file: pages are read when they are first used, and what is written into the
    array stays with it. Raises `NotFoundError`; `RefusedInput` (SHARD_DAMAGED) where the file is not what was written.
    """
    place = _only(path / "grids", grid)
    folder = _only(place / "features", encoder)
    coords = np.fromfile(place / "coords" / "c" / "0" / "0", "<i4").reshape(-1, 2)
    about = read_json(folder / "zarr.json") or {}
    (count, dim), (rows, _) = about["shape"], about["chunk_grid"]["configuration"]["chunk_shape"]
    block = about["codecs"][0]["configuration"]["chunk_shape"][0]
    file = folder / "c" / "0" / "0"
    index = shardfile.index(file, rows // block)
    size = block * dim * 2
    if index is None or index.tolist() != [[k * size, size] for k in range(rows // block)]:
        finding = Finding("SHARD_DAMAGED", "The features are not laid out as they were written.", "refused")
        raise RefusedInput(finding, remedy="Submit the job again: its blocks are kept.")
    with file.open("rb") as opened:
        mapped = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY)
    mapped.madvise(mmap.MADV_WILLNEED)  # a training loop takes all of it: read ahead, not page by page
    features = np.frombuffer(mapped, "<f2", count * dim).reshape(count, dim)
    facts = (read_json(place / "zarr.json") or {})["attributes"]
    return coords, features, facts


def _only(folder: Path, name: str) -> Path:
    names = [name] if name else sorted(entry.name for entry in folder.glob("*") if entry.is_dir())
    if len(names) != 1 or not (folder / names[0] / "zarr.json").is_file():
        there = ", ".join(sorted(entry.name for entry in folder.glob("*") if entry.is_dir())) or "none"
        raise NotFoundError(f"The features hold no single {folder.name} {name!r}.", remedy=f"There are: {there}.")
    return folder / names[0]


def export_h5(path: Path, target: Path) -> None:
    """TRIDENT's layout: `features` (n, d) float32 and `coords` (n, 2) with the grid in attributes."""
    import h5py

    coords, features, facts = read(path)
    with replacing(target) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=features.astype(np.float32))
        told = file.create_dataset("coords", data=coords.astype(np.int64))
        for name in ("patch_size", "patch_size_level0", "overlap", "level0_width", "level0_height", "target_mpp"):
            told.attrs[name] = facts[name]
        told.attrs["name"] = path.stem
        if facts.get("objective"):
            told.attrs["level0_magnification"] = facts["objective"]
            told.attrs["target_magnification"] = facts["objective"] * facts["mpp"][0] / facts["target_mpp"]


def export_anndata(path: Path, target: Path) -> None:
    """AnnData: X float32 features, obsm['spatial'] level-0 centres of tiles, uns['tiles'] the grid."""
    import anndata
    import pandas as pd

    coords, features, facts = read(path)
    names = [f"{x}_{y}" for x, y in coords]
    made = anndata.AnnData(features.astype(np.float32), obs=pd.DataFrame(index=names))
    made.obsm["spatial"] = coords + facts["patch_size_level0"] / 2
    made.uns["tiles"] = {name: value for name, value in facts.items() if value is not None}
    with replacing(target) as temporary:
        made.write_h5ad(temporary)
