"""Matrix stores: modalities of people, samples or cells by features, as AnnData in one MuData on Zarr v3, sharded.

    matrices.zarr/                     anndata.io.read_zarr(…/mod/rna) opens a modality, mudata.read_zarr all of them
      obs  var                         every row's name (a pseudonym) and every feature's, of all modalities
      mod/<name>/
        X/{data,indices,indptr}        counts and other sparse matrices, by row (csr_matrix)
        X                              dense matrices, (rows, features); NaN where a value is missing
        obs var obsm varm uns          what was found out about rows and features

Arrays are Blosc (LZ4 behind a byte shuffle) in chunks of 16,384 stored values, 256 to a shard: a store of 60 million
values is 20 files. Counts are uint16 where they fit (uint32, float32 where they do not), column numbers uint16 up to
65,536 features, other values float32. Rows are read through memory maps by any number of threads.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from permed_compute.errors import Finding, NotFoundError, RefusedInput
from permed_compute.paths import read_json
from permed_compute.storage import shardfile
from permed_compute.storage.ledger import link_tree

STORE = "matrices.zarr"
CHUNK = 16_384
"""Stored values in a chunk, about."""
_CHUNKS = 256
"""In a shard, at most."""
_SHARD_BYTES = 64 * 1024 * 1024
_LEVEL, _SHUFFLE = 5, 1
COUNTS = ("uint16", "uint32")


# --------------------------------------------------------------------------------------------- one array


class _Stream:
    """An array of rows of `width` values that grows shard by shard; `zarr.json` is written last, by `close`."""

    def __init__(self, folder: Path, dtype: str, width: int, threads: int, *, flat: bool) -> None:
        self._folder, self._dtype, self._width, self._flat = folder, np.dtype(dtype), width, flat
        self._chunk = max(1, CHUNK // width)
        self._per = max(1, min(_CHUNKS, _SHARD_BYTES // (self._chunk * width * self._dtype.itemsize)))
        self._threads, self._rows, self._shards = max(1, threads), 0, 0
        self._held: list[np.ndarray] = []
        self._holding = 0

    def append(self, values: np.ndarray) -> None:
        """(rows,) where flat, else (rows, width)."""
        stored = np.ascontiguousarray(values, self._dtype).reshape(-1, self._width)
        self._held.append(stored)
        self._holding += len(stored)
        if self._holding >= self._chunk * self._per:
            self._flush(whole=False)

    def _flush(self, *, whole: bool) -> None:
        """Write full shards; `whole`: and what is left."""
        held = np.concatenate(self._held) if len(self._held) > 1 else self._held[0] if self._held else None
        size, at = self._chunk * self._per, 0
        while held is not None and (len(held) - at >= size or (whole and at < len(held))):
            self._write(held[at : at + size])
            at += size
        left = held[at:] if held is not None and at < len(held) else None
        self._held, self._holding = ([left], len(left)) if left is not None else ([], 0)

    def _write(self, rows: np.ndarray) -> None:
        from numcodecs import blosc

        def encoded(first: int) -> bytes:
            part = rows[first : first + self._chunk]
            if len(part) < self._chunk:
                part = np.concatenate([part, np.zeros((self._chunk - len(part), self._width), self._dtype)])
            return bytes(blosc.compress(np.ascontiguousarray(part).reshape(-1), b"lz4", _LEVEL, _SHUFFLE, 0))

        with ThreadPoolExecutor(self._threads) as pool:
            chunks: list[bytes | None] = list(pool.map(encoded, range(0, len(rows), self._chunk)))
        chunks += [None] * (self._per - len(chunks))
        place = self._folder / "c" / str(self._shards) / ("" if self._flat else "0")
        place.parent.mkdir(parents=True, exist_ok=True)
        shardfile.write(place, chunks)
        self._rows, self._shards = self._rows + len(rows), self._shards + 1

    def close(self) -> int:
        """Write what is left, and `zarr.json`; returns the rows."""
        import zarr
        from zarr.codecs import BloscCodec

        self._flush(whole=True)
        shape, chunks = (self._rows, self._width), (self._chunk, self._width)
        shards: tuple[int, ...] = (self._chunk * self._per, self._width)
        cut = 1 if self._flat else 2
        # overwrite=False keeps the shards that stand there; only the metadata is new.
        zarr.create_array(
            self._folder, shape=shape[:cut], dtype=self._dtype, chunks=chunks[:cut], shards=shards[:cut], fill_value=0,
            compressors=[BloscCodec(cname="lz4", clevel=_LEVEL, shuffle="shuffle", typesize=self._dtype.itemsize)],
            zarr_format=3, attributes={} if self._flat else {"encoding-type": "array", "encoding-version": "0.2.0"},
        )  # fmt: skip
        return self._rows


class _Array:
    """What `_Stream` wrote, read by rows. Threads may share it. Raises `RefusedInput` NOT_OUR_STORE."""

    def __init__(self, folder: Path) -> None:
        row = read_json(folder / "zarr.json") or {}
        try:
            (sharding,) = (codec["configuration"] for codec in row["codecs"])
            chunk, self.dtype = sharding["chunk_shape"], np.dtype(row["data_type"])
            shard = row["chunk_grid"]["configuration"]["chunk_shape"]
            ours = [codec["name"] for codec in sharding["codecs"]] == ["bytes", "blosc"] and shard[1:] == chunk[1:]
        except (KeyError, TypeError, ValueError):
            ours = False
        if not ours:
            finding = Finding("NOT_OUR_STORE", "The array is not laid out as a matrix store's.", "refused")
            raise RefusedInput(finding, remedy="Open it with anndata; omics/matrix makes stores that this reads.")
        self.rows, self.width = row["shape"][0], (row["shape"][1:] or [1])[0]
        self._chunk, self._per = chunk[0], shard[0] // chunk[0]
        flat = len(chunk) == 1
        name: Callable[[Any], Path] = lambda k: folder / "c" / str(k) / ("" if flat else "0")  # noqa: E731
        self._shards = shardfile.Shards(name, self._per)

    def read(self, start: int, stop: int, out: np.ndarray | None = None) -> np.ndarray:
        """Rows start … stop as (rows × width,) of the stored type, into `out` where it is given."""
        from numcodecs.blosc import decompress

        width = self.width
        into = np.empty((stop - start) * width, self.dtype) if out is None else out
        scratch: np.ndarray | None = None
        for k in range(start // self._chunk, -(-stop // self._chunk) if stop > start else start // self._chunk):
            first = k * self._chunk
            a, b = max(start, first), min(stop, first + self._chunk)
            stored = self._shards.chunk(k // self._per, k % self._per)
            to = into[(a - start) * width : (b - start) * width]
            if stored is None:
                to[...] = 0
            elif b - a == self._chunk:
                decompress(stored, to)
            else:
                scratch = np.empty(self._chunk * width, self.dtype) if scratch is None else scratch
                decompress(stored, scratch)
                to[...] = scratch[(a - first) * width : (b - first) * width]
        return into

    def close(self) -> None:
        self._shards.close()


# --------------------------------------------------------------------------------------------- one modality


class Unfit(ValueError):  # noqa: N818 - what the values are for the type
    """A block of values that the type chosen for the matrix cannot hold."""


class Writer:
    """A matrix written block of rows by block, in whatever form it comes. Nothing is held beyond a shard.

    Raises `Unfit` where a block's values do not fit `dtype`: begin again with the next of `dtypes(…)`.
    """

    def __init__(self, folder: Path, features: int, dtype: str, *, is_sparse: bool, threads: int = 1) -> None:
        self.folder, self.features, self.dtype, self.is_sparse = folder, features, dtype, is_sparse
        if is_sparse:
            numbers = "uint16" if features <= 65_536 else "uint32"
            self._data = _Stream(folder / "data", dtype, 1, threads, flat=True)
            self._indices = _Stream(folder / "indices", numbers, 1, threads, flat=True)
            self._ends = [np.zeros(1, np.int64)]
        else:
            self._values = _Stream(folder, dtype, features, threads, flat=False)
        self._stored = 0

    def append(self, block: Any) -> None:
        """csr_matrix or array, (rows, features)."""
        values = block.data if self.is_sparse else block
        if self.dtype in COUNTS:
            top = np.iinfo(self.dtype).max
            if values.size and not (values.min() >= 0 and values.max() <= top and (values == np.rint(values)).all()):
                raise Unfit(self.dtype)
        if not self.is_sparse:
            self._values.append(np.asarray(values))
            return
        self._data.append(block.data)
        self._indices.append(block.indices)
        self._ends.append(block.indptr[1:].astype(np.int64) + self._stored)
        self._stored += len(block.data)

    def close(self) -> int:
        """Complete the arrays; returns the rows."""
        if not self.is_sparse:
            return self._values.close()
        import zarr

        self._data.close()
        self._indices.close()
        ends = np.concatenate(self._ends)
        pointers = _Stream(self.folder / "indptr", "int64", 1, 1, flat=True)
        pointers.append(ends)
        pointers.close()
        group = zarr.open_group(self.folder, mode="a", zarr_format=3)
        group.attrs.update(
            {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": [len(ends) - 1, self.features]}
        )
        return len(ends) - 1


def dtypes(*, is_sparse: bool) -> tuple[str, ...]:
    """To try in this order; dense matrices have missing values and are float32."""
    return (*COUNTS, "float32") if is_sparse else ("float32",)


class Rows:
    """Rows of a matrix that `Writer` wrote, read by any number of threads; nothing but what is asked for is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shape = (read_json(folder / "zarr.json") or {}).get("attributes", {}).get("shape")
        self.is_sparse = shape is not None
        if shape is not None:
            self.data, self.indices = _Array(folder / "data"), _Array(folder / "indices")
            pointers = _Array(folder / "indptr")
            self.indptr = pointers.read(0, pointers.rows)
            self.shape: tuple[int, int] = (int(shape[0]), int(shape[1]))
            self.dtype = self.data.dtype
        else:
            self.data = _Array(folder)
            self.shape, self.dtype = (self.data.rows, self.data.width), self.data.dtype

    @property
    def stored(self) -> int:
        """Values that are stored: of a sparse matrix, those that are not zero."""
        return int(self.indptr[-1]) if self.is_sparse else self.shape[0] * self.shape[1]

    def read(self, start: int, stop: int) -> Any:
        """csr_matrix or (rows, features) array of rows start … stop, in the stored type."""
        if not self.is_sparse:
            return self.data.read(start, stop).reshape(stop - start, self.shape[1])
        a, b = int(self.indptr[start]), int(self.indptr[stop])
        pointers = (self.indptr[start : stop + 1] - a).astype(np.int32 if b - a < 2**31 else np.int64)
        numbers = self.indices.read(a, b).astype(pointers.dtype)
        return sparse.csr_matrix((self.data.read(a, b), numbers, pointers), shape=(stop - start, self.shape[1]))

    def blocks(self, rows: int, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, Any]]:
        """(first row, row behind the last, the block) in order."""
        last = self.shape[0] if stop is None else stop
        for a in range(start, last, rows):
            b = min(a + rows, last)
            yield a, b, self.read(a, b)


# --------------------------------------------------------------------------------------------- the store


@dataclass(slots=True)
class Modality:
    """What a store says of a modality beside its matrix. obs, var: pandas frames by name; matrices by name of rows
    (`obsm`) and features (`varm`); uns: JSON."""

    matrix: Path
    obs: Any
    var: Any
    obsm: Mapping[str, np.ndarray]
    varm: Mapping[str, np.ndarray]
    uns: Mapping[str, Any]


def assemble(root: Path, modalities: Mapping[str, Modality]) -> None:
    """Make the store at `root`: the matrices' files by hard links, the rest written."""
    import anndata

    shutil.rmtree(root, ignore_errors=True)
    with anndata.settings.override(auto_shard_zarr_v3=False):  # what it writes is small; what is large are our shards
        _assemble(root, modalities)


def _assemble(root: Path, modalities: Mapping[str, Modality]) -> None:
    import pandas as pd
    import zarr
    from anndata.io import write_elem

    whole = zarr.open_group(root, mode="w", zarr_format=3)
    whole.attrs.update({"encoding-type": "MuData", "encoding-version": "0.1.0", "axis": 0, "permed_matrices": 1})
    everybody = pd.Index([])
    for name, one in modalities.items():
        group = whole.create_group(f"mod/{name}", attributes={"encoding-type": "anndata", "encoding-version": "0.1.0"})
        parts: dict[str, Any] = {
            "obs": one.obs, "var": one.var, "obsm": dict(one.obsm), "varm": dict(one.varm), "uns": dict(one.uns),
            "obsp": {}, "varp": {}, "layers": {},
        }  # fmt: skip
        for key, value in parts.items():
            write_elem(group, key, value)
        files = [path.relative_to(one.matrix) for path in one.matrix.rglob("*") if path.is_file()]
        link_tree(one.matrix, root / "mod" / name / "X", sorted(files))
        everybody = everybody.union(one.obs.index, sort=False)
    features = pd.Index([f"{name}:{each}" for name, one in modalities.items() for each in one.var.index], dtype=object)
    write_elem(whole, "obs", pd.DataFrame(index=everybody))
    write_elem(whole, "var", pd.DataFrame(index=features))
    _write_maps(whole, everybody, modalities)
    whole["mod"].attrs["mod-order"] = list(modalities)


def _write_maps(whole: Any, everybody: Any, modalities: Mapping[str, Modality]) -> None:
    """Where each row and feature of the whole stands in each modality, counted from 1; 0 = nowhere (MuData's way)."""
    from anndata.io import write_elem

    rows, columns, first = {}, {}, 0
    total = sum(len(one.var) for one in modalities.values())
    for name, one in modalities.items():
        rows[name] = (one.obs.index.get_indexer(everybody) + 1).astype(np.uint32)
        place = np.zeros(total, np.uint32)
        place[first : first + len(one.var)] = np.arange(1, len(one.var) + 1)
        columns[name], first = place, first + len(one.var)
    empty: dict[str, Any] = {}
    for key, value in {"obsm": {name: at > 0 for name, at in rows.items()}, "obsmap": rows, "obsp": empty,
                       "varm": {name: at > 0 for name, at in columns.items()}, "varmap": columns, "varp": empty,
                       "uns": empty}.items():  # fmt: skip
        write_elem(whole, key, value)


class Matrix:
    """A modality of a finished store, read only."""

    def __init__(self, folder: Path, name: str) -> None:
        self.name, self.folder = name, folder

    @cached_property
    def rows(self) -> Rows:
        return Rows(self.folder / "X")

    def _element(self, key: str) -> Any:
        import zarr
        from anndata.io import read_elem

        return read_elem(zarr.open_group(self.folder, mode="r")[key])

    @cached_property
    def obs(self) -> Any:
        """A pandas frame by pseudonym."""
        return self._element("obs")

    @cached_property
    def var(self) -> Any:
        """A pandas frame by feature."""
        return self._element("var")

    def obsm(self, name: str) -> np.ndarray:
        return np.asarray(self._element(f"obsm/{name}"))

    def varm(self, name: str) -> np.ndarray:
        return np.asarray(self._element(f"varm/{name}"))

    @cached_property
    def uns(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self._element("uns")
        return found


class MatrixStore:
    """A finished store: `store["rna"]` is a `Matrix`. Raises `NotFoundError`."""

    def __init__(self, root: Path) -> None:
        row = (read_json(root / "zarr.json") or {}).get("attributes", {})
        if "permed_matrices" not in row:
            raise NotFoundError("This is not a matrix store that omics/matrix made.", remedy="Make one with it.")
        self.root = root
        order = (read_json(root / "mod" / "zarr.json") or {}).get("attributes", {}).get("mod-order", [])
        self.names: Sequence[str] = tuple(order)

    @classmethod
    def find(cls, path: Path) -> MatrixStore:
        """The store at `path`, or the one that a job left in that folder."""
        return cls(path / STORE if (path / STORE).is_dir() else path)

    def __getitem__(self, name: str) -> Matrix:
        if name not in self.names:
            raise NotFoundError(f"The store has no modality {name!r}.", remedy=f"It has: {', '.join(self.names)}.")
        return Matrix(self.root / "mod" / name, name)

    def files(self) -> list[Path]:
        return sorted(path for path in self.root.rglob("*") if path.is_file())
