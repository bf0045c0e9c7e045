"""What is known of people, from files: a row a person, a column a number, NaN where it is not known.

    .h5mu, .h5ad, .zarr       AnnData and MuData; every modality of a MuData is a table of its own
    .tsv .csv .txt .sscore    a header, and people in a column IID; of a score file the averages alone
    .parquet                  the same, with types
    a table with a column `slide`   paths of slides' features (`pathology/encode`): the mean of a person's tiles

Identifiers become pseudonyms at once; what is one already stays. Errors name a row by its number and its pseudonym.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.workloads.omics.codes import MISSING
from permed_compute.workloads.omics.read import refuse

if TYPE_CHECKING:
    import pandas as pd

Pseudonym = Callable[[str], str]

SLIDE = "slide"
_IDS = ("IID", "#IID", "iid", "ID", "id", "subject", "person")
_NO_FEATURES = frozenset({"FID", "#FID", "SID", "case", "ALLELE_CT", "NAMED_ALLELE_DOSAGE_SUM"})
_PSEUDONYM = re.compile(r"p-[0-9a-f]{20}|[0-9a-f]{32}")
_MISSING = MISSING | {"-9"}


@dataclass(frozen=True, slots=True)
class Table:
    """people: pseudonyms, each once. values: (people, columns) float32, NaN where it is not known."""

    people: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray

    def of(self, people: Sequence[str]) -> np.ndarray:
        """(people, columns) float32 in that order; a row of NaN for those who are not in it."""
        place = {name: row for row, name in enumerate(self.people)}
        found = np.full((len(people), len(self.columns)), np.nan, np.float32)
        rows = [(k, place[name]) for k, name in enumerate(people) if name in place]
        if rows:
            to, where = np.array(rows).T
            found[to] = self.values[where]
        return found


# ------------------------------------------------------------------------------------------------ matrices


def read(path: Path, pseudonym: Pseudonym, *, repeated: str = "refuse") -> dict[str, Table]:
    """The tables of a file: by modality where it is a MuData, else one under ''.

    repeated: several rows of one person are refused, or averaged (`mean`).
    Raises `RefusedInput`: TABLE_UNREADABLE, NOT_A_NUMBER, DUPLICATE_PEOPLE, EMPTY_MODALITY, MATRIX_MISMATCH.
    """
    with _group(path) as group:
        if group is not None:
            found = {name: group["mod"][name] for name in sorted(group["mod"])} if "mod" in group else {"": group}
            return {name: _of_anndata(each, pseudonym, repeated) for name, each in found.items()}
    rows = frame(path)
    names = people(rows, pseudonym)
    if SLIDE in rows.columns:
        return {"": _slides(rows, names, path.parent)}
    columns = [name for name in rows.columns if name not in _NO_FEATURES]
    averages = [name for name in columns if name.endswith("_AVG")]
    columns = averages if path.suffix == ".sscore" and averages else columns
    return {"": once(names, columns, numbers(rows, columns, names), repeated)}


@contextmanager
def _group(path: Path) -> Iterator[Any]:
    """The HDF5 or Zarr group of an AnnData or MuData; None where the file is neither."""
    try:
        if path.suffix in (".h5mu", ".h5ad"):
            import h5py

            group = h5py.File(path, "r")
        elif path.is_dir() and path.suffix == ".zarr":
            import zarr

            group = zarr.open_group(path, mode="r")
        else:
            group = None
    except (OSError, ValueError) as error:
        raise refuse("TABLE_UNREADABLE", f"The matrix cannot be opened ({type(error).__name__}).") from None
    try:
        yield group
    finally:
        if hasattr(group, "close"):
            group.close()


def _of_anndata(group: Any, pseudonym: Pseudonym, repeated: str) -> Table:
    from anndata.io import read_elem
    from scipy.sparse import issparse

    try:
        x, obs, var = (read_elem(group[name]) for name in ("X", "obs", "var"))
    except (KeyError, ValueError, OSError) as error:
        raise refuse("TABLE_UNREADABLE", f"The file is no AnnData ({type(error).__name__}).") from None
    values = x.toarray() if issparse(x) else np.asarray(x)
    if values.shape != (len(obs), len(var)):
        raise refuse(
            "MATRIX_MISMATCH",
            f"The matrix is {' × '.join(map(str, values.shape))}, its people and columns are {len(obs)} × {len(var)}.",
            remedy="Write the file again: rows of `obs` and of `X` are the same people.",
            rows=len(obs), columns=len(var),
        )  # fmt: skip
    names = people(obs.set_axis(obs.index.astype(str)), pseudonym)
    if values.dtype.kind not in "biuf":
        who = names[0][:12] if names else "nobody"
        raise refuse("NOT_A_NUMBER", f"The matrix holds no numbers; the first row is of person {who}.", row=1)
    bad = np.isinf(values).any(axis=1) if values.dtype.kind == "f" else np.zeros(len(values), bool)
    if bad.any():
        _no_number(int(np.argmax(bad)), names, "the matrix")
    return once(names, [str(name) for name in var.index], values.astype(np.float32), repeated)


def once(names: Sequence[str], columns: Sequence[str], values: np.ndarray, repeated: str = "refuse") -> Table:
    """One row a person. Raises `RefusedInput` DUPLICATE_PEOPLE, EMPTY_MODALITY."""
    if not values.size or not np.isfinite(values).any():
        raise refuse(
            "EMPTY_MODALITY", f"The table of {len(names)} people and {len(columns)} columns holds no number.",
            remedy="Leave the input out.", rows=len(names), columns=len(columns),
        )  # fmt: skip
    if repeated != "mean":
        check_once(names)
        return Table(tuple(names), tuple(columns), np.asarray(values, np.float32))
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        rows.setdefault(name, []).append(row)
    return Table(tuple(rows), tuple(columns), np.stack([_mean(values[own]) for own in rows.values()]))


def check_once(names: Sequence[str]) -> None:
    """Raises `RefusedInput` DUPLICATE_PEOPLE."""
    first: dict[str, int] = {}
    for row, name in enumerate(names):
        if first.setdefault(name, row) != row:
            raise refuse(
                "DUPLICATE_PEOPLE", f"Rows {first[name] + 1} and {row + 1} are of one person, {name[:12]}.",
                remedy="Keep one row a person; of a modality, `repeated: mean` takes the mean.", row=row + 1,
            )  # fmt: skip


def _mean(rows: np.ndarray) -> np.ndarray:
    known = np.isfinite(rows)
    total = np.where(known, rows, 0).sum(axis=0, dtype=np.float64)
    return np.where(known.any(axis=0), total / np.maximum(known.sum(axis=0), 1), np.nan).astype(np.float32)


def _slides(rows: pd.DataFrame, names: Sequence[str], folder: Path) -> Table:
    """Mean of the tiles of each slide, and of the slides of each person."""
    from permed_compute.workloads.pathology import features

    found = [features.read(folder / str(slide))[1].mean(axis=0, dtype=np.float64) for slide in rows[SLIDE]]
    if len({len(row) for row in found}) > 1:
        raise refuse("MATRIX_MISMATCH", "Slides have features of different lengths.", remedy="Use one encoder.")
    width = len(found[0]) if found else 0
    values = np.array(found, np.float32).reshape(len(found), width)
    return once(names, [f"feature_{k:04}" for k in range(width)], values, "mean")


# ------------------------------------------------------------------------------------------------ frames


def frame(path: Path) -> pd.DataFrame:
    """A table of people as it stands, by identifier: text where the file is text. Of a matrix its `obs`.

    Raises `RefusedInput` TABLE_UNREADABLE.
    """
    import pandas as pd

    with _group(path) as group:
        if group is not None:
            from anndata.io import read_elem

            obs: pd.DataFrame = read_elem(group["obs"])
            return obs.set_axis(obs.index.astype(str))
    try:
        if path.suffix == ".parquet":
            found = pd.read_parquet(path)
        else:
            with path.open(encoding="utf-8") as file:
                header = file.readline()
            separator = "\t" if "\t" in header else "," if "," in header else r"\s+"
            found = pd.read_csv(path, sep=separator, dtype=str, keep_default_na=False, na_filter=False)
    except (OSError, ValueError) as error:
        raise refuse("TABLE_UNREADABLE", f"The table cannot be read ({type(error).__name__}).") from None
    key = next((name for name in _IDS if name in found.columns), None)
    if key is None:
        raise refuse("TABLE_UNREADABLE", "The table has no column IID.", remedy="Its first line names the columns.")
    return found.set_index(found[key].astype(str).str.strip()).drop(columns=key)


def people(rows: pd.DataFrame, pseudonym: Pseudonym) -> list[str]:
    """Of each row its person's pseudonym. Raises `RefusedInput` where a row names nobody."""
    named = [str(name).strip() for name in rows.index]
    for row, name in enumerate(named):
        if name in _MISSING:
            raise refuse("TABLE_UNREADABLE", f"Row {row + 1} names no person.", row=row + 1)
    return [person(name, pseudonym) for name in named]


def person(identifier: str, pseudonym: Pseudonym) -> str:
    """What is a pseudonym of this home already (our jobs write them) stays as it is."""
    return identifier if _PSEUDONYM.fullmatch(identifier) else pseudonym(identifier)


def numbers(rows: pd.DataFrame, columns: Sequence[str], names: Sequence[str]) -> np.ndarray:
    """(rows, columns) float64, NaN where a cell is missing. names: pseudonyms, for errors.

    Raises `RefusedInput` COLUMN_ABSENT, NOT_A_NUMBER.
    """
    import pandas as pd

    found = np.full((len(rows), len(columns)), np.nan, np.float64)
    for k, name in enumerate(columns):
        column = column_of(rows, name)
        if isinstance(column.dtype, pd.CategoricalDtype):
            column = column.astype(object)
        text = column.dtype == object or pd.api.types.is_string_dtype(column.dtype)
        missing = column.isna().to_numpy(bool)
        if text:
            column = column.astype(str).str.strip()
            missing |= column.isin(_MISSING).to_numpy(bool)
        values = pd.to_numeric(column.where(~missing), errors="coerce").to_numpy(np.float64, na_value=np.nan)
        bad = ~missing & ~np.isfinite(values)
        if bad.any():
            _no_number(int(np.argmax(bad)), names, f"column {name!r}")
        found[:, k] = values
    return found


def column_of(rows: pd.DataFrame, name: str) -> pd.Series:
    """Raises `RefusedInput` COLUMN_ABSENT."""
    if name not in rows.columns:
        raise refuse("COLUMN_ABSENT", f"The table has no column {name!r}.", remedy="Names are told apart by case.")
    return rows[name]


def texts(rows: pd.DataFrame, name: str) -> list[str]:
    """A column as words, '' where a cell is missing. Raises `RefusedInput` COLUMN_ABSENT."""
    column = column_of(rows, name)
    absent = column.isna().to_numpy(bool)
    found = [str(value).strip() for value in column]
    return ["" if gone or value in _MISSING else value for gone, value in zip(absent, found, strict=True)]


def _no_number(row: int, names: Sequence[str], where: str) -> None:
    raise refuse(
        "NOT_A_NUMBER", f"Row {row + 1} of {where} holds no number (person {names[row][:12]}).",
        remedy="Write NA where it is missing; words are `categories` or `codes` of the clinical table.", row=row + 1,
    )  # fmt: skip
