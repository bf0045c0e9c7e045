"""Tables of people: phenotypes, covariates, leave-one-chromosome-out predictions, brought into a store's order.

People are found by their identifiers' pseudonyms (or by pseudonyms written in the table). What is wrong is refused with
the row's number and the person's pseudonym, never with the identifier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.workloads.omics.read import contig_name, refuse

_MISSING = {"", "NA", "na", ".", "-9"}
_ID = ("IID", "#IID", "iid", "id", "ID")

Pseudonym = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class PeopleTable:
    """Columns as text, in the order of a store's samples; '' where a person has no row."""

    columns: dict[str, list[str]]
    rows: np.ndarray
    """(samples,) line of the file, 0 = none."""


def read_people(path: Path, store: GenotypeStore, pseudonym: Pseudonym) -> PeopleTable:
    """A table with a header and a column IID, by tabs, spaces or commas. Raises `RefusedInput`:
    TABLE_UNREADABLE, DUPLICATE_SAMPLES, NO_OVERLAP."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if not lines:
        raise refuse("TABLE_UNREADABLE", "The table is empty.")
    separator = "," if "," in lines[0] else "\t" if "\t" in lines[0] else None
    header = [name.strip() for name in lines[0].split(separator)]
    key = next((header.index(name) for name in _ID if name in header), -1)
    if key < 0:
        raise refuse("TABLE_UNREADABLE", "The table has no column IID.", remedy="Its first line names the columns.")
    place = {str(name): k for k, name in enumerate(store.sample_id)}
    columns = {name.lstrip("#"): [""] * store.samples for name in header}
    rows = np.zeros(store.samples, np.int64)
    for number, line in enumerate(lines[1:], 2):
        if not line.strip():
            continue
        fields = [field.strip() for field in line.split(separator)]
        if len(fields) != len(header):
            raise refuse(
                "TABLE_UNREADABLE", f"Row {number} has {len(fields)} columns, the header {len(header)}.", row=number
            )
        hashed = pseudonym(fields[key])
        at = place.get(hashed, place.get(fields[key], -1))
        if at < 0:
            continue
        if rows[at]:
            raise refuse(
                "DUPLICATE_SAMPLES", f"Rows {rows[at]} and {number} are of one person, {hashed[:12]}.", row=number
            )
        rows[at] = number
        for name, value in zip(columns, fields, strict=True):
            columns[name][at] = value
    if not rows.any():
        raise refuse(
            "NO_OVERLAP", f"Nobody of the {len(lines) - 1} people in the table is in the store.",
            remedy="The store must be made in the same home: pseudonyms differ between homes.", rows=len(lines) - 1,
        )  # fmt: skip
    return PeopleTable(columns, rows)


def numbers(table: PeopleTable, name: str, store: GenotypeStore) -> np.ndarray:
    """A column as (samples,) float64, NaN where it is missing (empty, NA, -9, or no row).

    Raises `RefusedInput` COLUMN_ABSENT, NOT_A_NUMBER (`nan` and `inf` written out are no numbers either).
    """
    if name not in table.columns:
        raise refuse("COLUMN_ABSENT", f"The table has no column {name!r}.", remedy="Names are told apart by case.")
    found = np.full(store.samples, np.nan)
    for k, text in enumerate(table.columns[name]):
        if text in _MISSING:
            continue
        try:
            value = float(text)
        except ValueError:
            value = np.nan
        if not np.isfinite(value):
            raise refuse(
                "NOT_A_NUMBER",
                f"Row {table.rows[k]} of column {name!r} holds no number (person {str(store.sample_id[k])[:12]}).",
                remedy="Write NA where it is missing.", row=int(table.rows[k]),
            )  # fmt: skip
        found[k] = value
    return found


def read_loco(path: Path, store: GenotypeStore, pseudonym: Pseudonym) -> dict[str, np.ndarray]:
    """regenie's .loco: a line for each chromosome, a column for each `FID_IID` → (samples,) predictions by contig.

    Raises `RefusedInput` NO_OVERLAP, LOCO_INCOMPLETE."""
    lines = [line.split() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    place = {str(name): k for k, name in enumerate(store.sample_id)}
    where = [_place_of(name, place, pseudonym) for name in lines[0][1:]]
    if max(where, default=-1) < 0:
        raise refuse("NO_OVERLAP", "Nobody of the LOCO file is in the store.")
    predictions = {}
    for row in lines[1:]:
        values = np.full(store.samples, np.nan)
        for at, text in zip(where, row[1:], strict=True):
            if at >= 0 and text not in _MISSING:
                values[at] = float(text)
        predictions[contig_name(row[0])] = values
    return predictions


def _place_of(name: str, place: dict[str, int], pseudonym: Pseudonym) -> int:
    for given in (name, name.split("_", 1)[-1], name[len(name) // 2 + 1 :]):
        for key in (pseudonym(given), given):
            if key in place:
                return place[key]
    return -1


def design(columns: Sequence[tuple[str, np.ndarray]], chosen: np.ndarray) -> np.ndarray:
    """(people, 1 + covariates) float64 of those where `chosen`, a column of ones first.

    Raises `RefusedInput` COVARIATE_CONSTANT, COVARIATES_COLLINEAR."""
    made = [np.ones(int(chosen.sum()))]
    for name, values in columns:
        mine = values[chosen]
        if np.ptp(mine) == 0:
            raise refuse("COVARIATE_CONSTANT", f"Covariate {name!r} is the same in all {len(mine)} people.")
        made.append((mine - mine.mean()) / mine.std())
    matrix = np.stack(made, axis=1)
    if np.linalg.matrix_rank(matrix, tol=1e-7 * np.sqrt(len(matrix))) < matrix.shape[1]:
        raise refuse("COVARIATES_COLLINEAR", "A covariate is a sum of others.", remedy="Leave one of them out.")
    return matrix
