"""Matrices as they come: AnnData and MuData (HDF5 or Zarr), TSV, CSV and Parquet, each as blocks of rows.

Rows are people, samples or cells; columns are features (genes, CpGs, proteins, metabolites, drugs). Nothing is held
whole but names; a table whose rows are features is turned round through a file in the scratch folder.

What cannot be read is a `RefusedInput` that names the row by pseudonym, a feature by its column's number:

    MATRIX_UNREADABLE DUPLICATE_SAMPLES DUPLICATE_FEATURES EMPTY_MODALITY MATRIX_MISMATCH NOT_A_NUMBER COLUMN_ABSENT
    BY_COLUMN
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import NotFoundError, RefusedInput
from permed_compute.workloads.omics.read import refuse

ORIENTATIONS = ("samples", "features")
_TABLES = (".tsv", ".csv", ".txt", ".tsv.gz", ".csv.gz", ".txt.gz", ".parquet")
_CONTAINERS = (".h5ad", ".h5mu", ".zarr")
_NAN = ["", "NA", "na", "NaN", "nan", "N/A", "null", "."]
_TEXT_BYTES = 32 * 1024 * 1024
"""Of a table's rows that are read at a time."""

Pseudonym = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Source:
    """One modality as it comes. rows: identifiers, in order; obs: a pandas frame of what else is said of them.

    blocks(rows): the matrix in order, as csr_matrix where `is_sparse`, else float arrays with NaN.
    """

    name: str
    rows: Sequence[str]
    features: Sequence[str]
    obs: Any
    is_sparse: bool
    blocks: Callable[[int], Iterator[Any]]


@dataclass(frozen=True, slots=True)
class How:
    """How a file is read. layer: of an AnnData, instead of X; `raw` for its raw matrix. orientation: what the rows of
    a table are. scratch: where a table of features is turned round."""

    layer: str = ""
    orientation: str = "samples"
    scratch: Path = Path()


def files_of(path: Path) -> list[Path]:
    """The file, or every file of a Zarr folder. Raises `NotFoundError` where the name's ending is not known."""
    _ending(path)
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _ending(path: Path) -> str:
    for end in (*_TABLES, *_CONTAINERS):
        if path.name.lower().endswith(end):
            return end
    known = ", ".join((*_CONTAINERS, *_TABLES))
    raise NotFoundError("The matrix's name has no ending that is known.", remedy=f"Known: {known}.")


def names(path: Path, name: str) -> list[str]:
    """The modalities in a file: a MuData's own, else `name`."""
    if _ending(path) not in _CONTAINERS:
        return [name]
    with _container(path) as root:
        return sorted(root["mod"]) if "mod" in root else [name]


@contextmanager
def opened(path: Path, name: str, how: How, pseudonym: Pseudonym) -> Iterator[Source]:
    """A modality of a file, its names checked; its blocks may be read inside."""
    if _ending(path) in _CONTAINERS:
        with _container(path) as root:
            yield _checked(_anndata(root["mod"][name] if "mod" in root else root, name, how), pseudonym)
    else:
        yield _checked(_table(path, name, how, pseudonym), pseudonym)


def _checked(found: Source, pseudonym: Pseudonym) -> Source:
    name = found.name
    if not found.rows or not found.features:
        raise refuse(
            "EMPTY_MODALITY", f"Modality {name!r} has {len(found.rows)} rows and {len(found.features)} features."
        )
    _unique(found.rows, pseudonym)
    _unique_features(found.features)
    return found


def _unique(rows: Sequence[str], pseudonym: Pseudonym) -> None:
    seen: set[str] = set()
    for number, row in enumerate(rows, 1):
        if row in seen:
            raise refuse(
                "DUPLICATE_SAMPLES", f"Row {number} repeats an id that stands above it, {pseudonym(row)[:12]};"
                f" {len(rows) - len(set(rows))} do.",
                remedy="Give every sample or cell an id of its own.", row=number,
            )  # fmt: skip
        seen.add(row)


def _unique_features(features: Sequence[str]) -> None:
    twice = len(features) - len(set(features))
    if twice:
        seen: set[str] = set()
        first = next(k for k, name in enumerate(features) if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise refuse(
            "DUPLICATE_FEATURES", f"{twice} feature names stand twice, first that of column {first + 1}.",
            remedy="Name features by a stable id, or call adata.var_names_make_unique().", features=twice,
        )  # fmt: skip


# --------------------------------------------------------------------------------------------- AnnData


@contextmanager
def _container(path: Path) -> Iterator[Any]:
    import h5py
    import zarr

    try:
        root: Any = zarr.open_group(path, mode="r") if path.is_dir() else h5py.File(path, "r")
    except (OSError, ValueError, KeyError) as error:
        raise refuse("MATRIX_UNREADABLE", f"The file cannot be opened ({type(error).__name__}).") from None
    try:
        yield root
    finally:
        if isinstance(root, h5py.File):
            root.close()


def _anndata(group: Any, name: str, how: How) -> Source:
    from anndata.io import read_elem

    try:
        obs = read_elem(group["obs"])
        var = read_elem(group["raw/var" if how.layer == "raw" else "var"])
        key = "X" if not how.layer else "raw/X" if how.layer == "raw" else f"layers/{how.layer}"
        if key not in group:
            raise refuse("MATRIX_UNREADABLE", f"Modality {name!r} has no {key}.", remedy="`layer:` names what to read.")
        matrix = group[key]
    except RefusedInput:
        raise
    except Exception as error:  # noqa: BLE001 - anndata raises whatever its readers meet in a broken file
        raise refuse("MATRIX_UNREADABLE", f"Modality {name!r} is no AnnData ({type(error).__name__}).") from None
    rows, features = [str(each) for each in obs.index], [str(each) for each in var.index]
    is_sparse = "indptr" in matrix if hasattr(matrix, "keys") else False
    if is_sparse and "csc" in str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", ""))):
        raise refuse("BY_COLUMN", f"Modality {name!r} is stored by column.", remedy="Write adata.X.tocsr() first.")
    shape = tuple(int(n) for n in (matrix.attrs.get("shape", ()) if is_sparse else matrix.shape))
    if (shape and shape != (len(rows), len(features))) or (is_sparse and matrix["indptr"].shape[0] != len(rows) + 1):
        told = f"{shape[0]} × {shape[1]}" if shape else "not by its rows"
        raise refuse(
            "MATRIX_MISMATCH",
            f"Modality {name!r} has {len(rows)} rows and {len(features)} features by name; its matrix is {told}.",
            rows=len(rows), features=len(features),
        )  # fmt: skip

    def blocks(size: int) -> Iterator[Any]:
        yield from (_sparse_blocks if is_sparse else _dense_blocks)(matrix, (len(rows), len(features)), size)

    return Source(name, rows, features, obs, is_sparse, blocks)


def _sparse_blocks(matrix: Any, shape: tuple[int, int], size: int) -> Iterator[Any]:
    from scipy import sparse

    pointers = np.asarray(matrix["indptr"][:], np.int64)
    for start in range(0, shape[0], size):
        stop = min(start + size, shape[0])
        a, b = int(pointers[start]), int(pointers[stop])
        parts = matrix["data"][a:b], matrix["indices"][a:b].astype(np.int32), pointers[start : stop + 1] - a
        block = sparse.csr_matrix(parts, shape=(stop - start, shape[1]))
        block.sum_duplicates()
        block.eliminate_zeros()
        yield block


def _dense_blocks(matrix: Any, shape: tuple[int, int], size: int) -> Iterator[Any]:
    for start in range(0, shape[0], size):
        yield np.asarray(matrix[start : start + size], np.float64)


# --------------------------------------------------------------------------------------------- tables


def _table(path: Path, name: str, how: How, pseudonym: Pseudonym) -> Source:
    import pandas as pd

    own, other, chunks = _parquet(path) if path.name.endswith(".parquet") else _text(path)
    turned = how.orientation == "features"
    if turned:  # a chunk holds some features of everybody: written down the columns of a file of floats
        ids: list[str] = []
        place = how.scratch / f"turned-{name}.f32"
        whole = np.memmap(place, np.float32, "w+", shape=(max(1, len(other)), max(1, own)))
        for first, labels, values in _numbers(chunks, pseudonym, other, turned=True):
            whole[:, first : first + len(labels)] = values.T
            ids += labels
        rows, features = list(other), ids

        def blocks(size: int) -> Iterator[Any]:
            for start in range(0, len(rows), size):
                yield np.asarray(whole[start : start + size], np.float64)

    else:
        rows, features = [str(label) for first, labels, _ in chunks() for label in labels], list(other)

        def blocks(size: int) -> Iterator[Any]:
            for _, _, values in _numbers(chunks, pseudonym, other, turned=False):
                for start in range(0, len(values), size):
                    yield values[start : start + size]

    return Source(name, rows, features, pd.DataFrame(index=rows), False, blocks)


_Chunks = Callable[[], Iterator[tuple[int, list[str], Any]]]
"""→ (number of the first row, the rows' names, a pandas frame of the other columns)."""


def _text(path: Path) -> tuple[int, list[str], _Chunks]:
    """Rows, names of the other columns, chunks."""
    import pandas as pd

    plain_or_not = gzip.open if path.name.endswith(".gz") else open
    with plain_or_not(path, "rt", encoding="utf-8") as file:
        first = file.readline().rstrip("\r\n")
        rows = sum(1 for line in file if line.strip())
        longest = len(first)
    separator = "\t" if "\t" in first else ","
    header = [cell.strip().strip('"') for cell in first.split(separator)]
    if len(header) < 2:
        raise refuse("MATRIX_UNREADABLE", "The table has no header with a column of ids and others.")
    at_a_time = max(1, _TEXT_BYTES // max(1, 8 * len(header), longest))

    def chunks() -> Iterator[tuple[int, list[str], Any]]:
        seen = 0
        try:
            read = pd.read_csv(
                path, sep=separator, header=None, skiprows=1, names=range(len(header)), index_col=0, dtype={0: str},
                na_values=_NAN, keep_default_na=False, chunksize=at_a_time, low_memory=False,
            )  # fmt: skip
            with read:
                for frame in read:
                    yield seen, [str(label) for label in frame.index], frame
                    seen += len(frame)
        except (pd.errors.ParserError, UnicodeDecodeError) as error:
            raise refuse(
                "MATRIX_UNREADABLE", f"The table cannot be read behind row {seen + 1} ({type(error).__name__}).",
                remedy="Every row has as many cells as the header.", row=seen + 1,
            ) from None  # fmt: skip

    return rows, header[1:], chunks


def _parquet(path: Path) -> tuple[int, list[str], _Chunks]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise refuse("MATRIX_UNREADABLE", f"The table cannot be opened ({type(error).__name__}).") from None
    columns = file.schema_arrow.names
    texts = [
        field.name for field in file.schema_arrow if pa.types.is_string(field.type) or field.type == "large_string"
    ]
    key = next((name for name in texts if name.startswith("__index") or name == columns[0]), None)
    if key is None:
        raise refuse("MATRIX_UNREADABLE", "The table's first column holds no ids (text).")
    others = [name for name in columns if name != key]
    at_a_time = max(1, _TEXT_BYTES // max(1, 8 * len(columns)))

    def chunks() -> Iterator[tuple[int, list[str], Any]]:
        seen = 0
        for batch in file.iter_batches(batch_size=at_a_time):
            frame = batch.to_pandas().reset_index()
            labels = [str(label) for label in frame[key]]
            yield seen, labels, frame[others]
            seen += len(labels)

    return file.metadata.num_rows, others, chunks


def _numbers(
    chunks: _Chunks, pseudonym: Pseudonym, others: Sequence[str], *, turned: bool
) -> Iterator[tuple[int, list[str], np.ndarray]]:
    """Chunks as float64. Raises `RefusedInput` NOT_A_NUMBER, with row and column by number, the person by pseudonym."""
    import pandas as pd

    for first, labels, frame in chunks():
        made = (
            frame.apply(pd.to_numeric, errors="coerce")
            if any(kind.kind not in "fiub" for kind in frame.dtypes)
            else frame
        )
        values = made.to_numpy(np.float64, na_value=np.nan)
        wrong = np.isinf(values) | (np.isnan(values) & frame.notna().to_numpy())
        if wrong.any():
            row, column = (int(k[0]) for k in np.nonzero(wrong))
            person = others[column] if turned else labels[row]
            raise refuse(
                "NOT_A_NUMBER",
                f"Row {first + row + 2}, column {column + 2} holds no number (sample {pseudonym(person)[:12]});"
                f" {int(wrong.sum())} cells do not.",
                remedy="Write NA where a value is missing.", row=first + row + 2, column=column + 2,
            )  # fmt: skip
        yield first, labels, values
