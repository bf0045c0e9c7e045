"""The sample table: who is in the job, of which family, with what outcome, and what is known of each.

Inputs of the fusion jobs, by name:

    clinical     a table of people: outcome, family, and the columns that `clinical`, `categories`, `codes` name
    withdrawn    one identifier a line: these people are in no run any more
    earlier      results of an earlier run: which withdrawn people it was made with is told
    any other    a modality of that name; of a MuData each of its own

A person is in it by a pseudonym of this home. Whoever has no row in a modality, or nothing but missing values, does not
have that modality: that is what the mask says.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import Finding, Problem, SpecError
from permed_compute.learning.splits import Sides, split
from permed_compute.learning.survival import Outcomes, checked_classes, checked_outcomes
from permed_compute.paths import read_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.fusion import tables
from permed_compute.workloads.fusion.tables import Table
from permed_compute.workloads.omics import codes
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context

if TYPE_CHECKING:
    import pandas as pd

CLINICAL, WITHDRAWN, EARLIER, BUNDLE = "clinical", "withdrawn", "earlier", "bundle"
PEOPLE = "people.json"
_NO_MODALITY = frozenset({CLINICAL, WITHDRAWN, EARLIER, BUNDLE})


@dataclass(frozen=True, slots=True)
class Columns:
    """What of the clinical table is known of a person. codes: `column=SYSTEM`, the system as in `omics.codes`.

    levels: words and codes that have an indicator, by column; found in the table where there are none yet.
    """

    numbers: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.numbers or self.categories or self.codes)


@dataclass(frozen=True, slots=True)
class Person:
    """As `learning.splits` asks for it. stratum: what each side has its share of."""

    name: str
    family: str
    stratum: str


@dataclass(frozen=True)
class Cohort:
    """Everybody of the job, sorted by pseudonym. outcomes: of survival; labels: of classification; one is empty.

    levels: of the clinical columns. left_out: people that were not taken, counted by why.
    """

    people: tuple[str, ...]
    families: tuple[str, ...]
    modalities: Mapping[str, Table]
    outcomes: Outcomes | None = None
    labels: tuple[str, ...] = ()
    levels: Mapping[str, Sequence[str]] = field(default_factory=dict)
    left_out: Mapping[str, int] = field(default_factory=dict)
    withdrawn: frozenset[str] = frozenset()

    @cached_property
    def values(self) -> dict[str, np.ndarray]:
        """(people, columns) float32 by modality, NaN where it is not known."""
        return {name: table.of(self.people) for name, table in self.modalities.items()}

    @cached_property
    def mask(self) -> np.ndarray:
        """(people, modalities) bool: who has what."""
        return np.stack([np.isfinite(values).any(axis=1) for values in self.values.values()], axis=1)

    @cached_property
    def digest(self) -> str:
        """Of who is in it and everything that is known of them: the same wherever the files lie."""
        total = hashlib.sha256("\n".join(self.people + self.families + self.labels).encode())
        if self.outcomes is not None:
            total.update(self.outcomes.time.tobytes() + self.outcomes.event.tobytes())
        for name, values in self.values.items():
            total.update("\n".join((name, *self.modalities[name].columns)).encode() + values.tobytes())
        return total.hexdigest()

    def sides(self, seed: int, fold: int, folds: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows to train on, rows that are held out); no person and no family in both, events shared evenly."""
        strata = self.labels if self.outcomes is None else tuple(str(seen) for seen in self.outcomes.event)
        found = [Person(*row) for row in zip(self.people, self.families, strata, strict=True)]
        drawn = drawn_sides(found, seed, fold, folds)
        place = {name: row for row, name in enumerate(self.people)}
        train, held = (np.sort([place[one.name] for one in side]) for side in (drawn.training, drawn.validation))
        return train, held


def drawn_sides(found: Sequence[Person], seed: int, fold: int, folds: int) -> Sides[Person]:
    """Fold `fold` of `folds` is the validation side. Raises `WorkloadError` where a side stays empty."""
    return split(
        found, lambda one: (("person", one.name), ("family", one.family)), validation=0.0, test=0.0, seed=seed,
        fold=fold, folds=folds, stratum=lambda one: one.stratum, how="by person and family",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ modalities


def modalities(
    spec: JobSpec, ctx: Context, *, only: Sequence[str] = (), columns: Columns | None = None, repeated: str = "refuse"
) -> tuple[dict[str, Table], dict[str, Sequence[str]]]:
    """Every modality of the job by name, and the levels of its clinical columns.

    Raises `RefusedInput` as `tables.read`; `SpecError` where two have one name, or one of `only` is not there.
    """
    found: dict[str, Table] = {}
    for ref in spec.inputs:
        if ref.name in _NO_MODALITY:
            continue
        for part, table in tables.read(Path(ref.path), ctx.pseudonym, repeated=repeated).items():
            name = part or ref.name
            if name in found or name in _NO_MODALITY:
                raise SpecError("job", [Problem("inputs", f"two modalities are called {name!r}.")])
            found[name] = table
    levels: dict[str, Sequence[str]] = {}
    place = path_of(spec, CLINICAL)
    if columns and place is not None:
        rows = tables.frame(place)
        found[CLINICAL], levels = clinical(rows, tables.people(rows, ctx.pseudonym), columns)
    absent = sorted(set(only) - set(found))
    if absent or not found:
        what = f"no modality {absent[0]!r}." if absent else "no modality."
        remedy = f"There are: {', '.join(found)}." if found else "Name a table under `inputs`."
        raise SpecError("job", [Problem("inputs", what, remedy=remedy)])
    return {name: found[name] for name in sorted(found) if not only or name in only}, levels


def path_of(spec: JobSpec, name: str) -> Path | None:
    return next((Path(ref.path) for ref in spec.inputs if ref.name == name), None)


def clinical(
    rows: pd.DataFrame, names: Sequence[str], columns: Columns
) -> tuple[Table, dict[str, Sequence[str]]]:  # fmt: skip
    """Numbers as they are; an indicator for each word of a category and each code, missing where the cell is empty.

    Raises `RefusedInput` COLUMN_ABSENT, NOT_A_NUMBER, WRONG_CODE, DUPLICATE_PEOPLE, EMPTY_MODALITY.
    """
    made, titles = [tables.numbers(rows, columns.numbers, names)], list(columns.numbers)
    levels: dict[str, Sequence[str]] = {}
    worded = {name: tables.texts(rows, name) for name in columns.categories}
    for each in columns.codes:
        name, _, system = each.partition("=")
        worded[name] = codes.checked_column(tables.column_of(rows, name).tolist(), system, people=names, column=name)
    for name, cells in worded.items():
        said = [set(cell.split("|")) if name not in columns.categories else {cell} for cell in cells]
        levels[name] = tuple(columns.levels.get(name) or sorted(set().union(*said) - {""}))
        told = np.array([[level in own for level in levels[name]] for own in said], np.float32)
        told[[cell == "" for cell in cells]] = np.nan
        made.append(told.reshape(len(cells), len(levels[name])))
        titles += [f"{name}={level}" for level in levels[name]]
    return tables.once(names, titles, np.concatenate(made, axis=1)), levels


# ------------------------------------------------------------------------------------------------ everybody


@dataclass(frozen=True, slots=True)
class Asked:
    """Columns of the clinical table: the outcome by `time` and `event`, or by `label`; families where `family` is."""

    time: str = ""
    event: str = ""
    label: str = ""
    family: str = ""


def cohort(
    spec: JobSpec, ctx: Context, asked: Asked, columns: Columns, *, only: Sequence[str] = (), repeated: str = "refuse"
) -> Cohort:
    """Everybody whose outcome is known, without the withdrawn.

    Raises `SpecError`; `RefusedInput` as `modalities` and `learning.survival`, and NOTHING_KNOWN of a person.
    """
    place = path_of(spec, CLINICAL)
    if place is None:
        raise SpecError("job", [Problem("inputs", "no table `clinical`.", remedy="It has the outcome of each person.")])
    rows = tables.frame(place)
    names = tables.people(rows, ctx.pseudonym)
    tables.check_once(names)
    gone = withdrawn(spec, ctx)
    outcome = [tables.numbers(rows, [name], names)[:, 0] for name in (asked.time, asked.event) if name]
    label = tables.texts(rows, asked.label) if asked.label else []
    known = np.array([bool(text) for text in label], bool)
    if outcome:
        known = np.isfinite(np.stack(outcome)).all(axis=0)
    stays = [row for row in np.argsort(names) if known[row] and names[row] not in gone]
    family = tables.texts(rows, asked.family) if asked.family else [""] * len(rows)
    own = [f"family {ctx.pseudonym(family[row])}" if family[row] else names[row] for row in stays]
    found, levels = modalities(spec, ctx, only=only, columns=columns, repeated=repeated)
    people = tuple(names[row] for row in stays)
    outcomes, labels = None, tuple(label[row] for row in stays) if label else ()
    if outcome:
        time, event = outcome[0][stays].astype(float), outcome[1][stays]
        _check_rows(time, event, stays, people)
        outcomes = checked_outcomes(time.tolist(), event.tolist())
    else:
        classes = checked_classes(labels)
        if len(classes) != 2:
            raise refuse("NOT_TWO_CLASSES", f"Column {asked.label!r} has {len(classes)} classes, not two.")
    made = Cohort(
        people, tuple(own), found, outcomes, labels, levels,
        {"without outcome": int((~known).sum()), "withdrawn": len(gone & set(names)),
         "in no clinical row": len({one for table in found.values() for one in table.people} - set(names) - gone)},
        gone,
    )  # fmt: skip
    check_known(made.people, made.mask)
    return made


def _check_rows(time: np.ndarray, event: np.ndarray, rows: Sequence[int], people: Sequence[str]) -> None:
    """The first row that is wrong, by pseudonym, before everybody is checked at once."""
    for wrong, code, what in (
        (time <= 0, "TIME_NEGATIVE", "a time of 0 or less"),
        (~np.isin(event, (0, 1)), "OUTCOME_UNREADABLE", "an event that is neither 0 nor 1"),
    ):
        if wrong.any():
            k = int(np.argmax(wrong))
            raise refuse(
                code, f"Row {int(rows[k]) + 1} has {what} (person {people[k][:12]}).",
                remedy="Correct it, or leave the cell empty where the outcome is not known.",
                row=int(rows[k]) + 1, rows=int(wrong.sum()),
            )  # fmt: skip


def check_known(people: Sequence[str], mask: np.ndarray) -> None:
    """Raises `RefusedInput` NOTHING_KNOWN where somebody has no modality at all."""
    nothing = ~mask.any(axis=1)
    if nothing.any():
        first = people[int(np.argmax(nothing))][:12]
        raise refuse(
            "NOTHING_KNOWN", f"Of {int(nothing.sum())} people nothing is known but the outcome, first {first}.",
            remedy="Leave them out of the clinical table.", people=int(nothing.sum()),
        )  # fmt: skip


# ------------------------------------------------------------------------------------------------ the withdrawn


def withdrawn(spec: JobSpec, ctx: Context) -> frozenset[str]:
    """Pseudonyms of the people that the job's inputs `withdrawn` name."""
    lines: Iterable[str] = (
        line.strip()
        for ref in spec.inputs if ref.name == WITHDRAWN
        for line in Path(ref.path).read_text(encoding="utf-8").splitlines()
    )  # fmt: skip
    return frozenset(tables.person(line, ctx.pseudonym) for line in lines if line and not line.startswith("#"))


def in_earlier(spec: JobSpec, gone: frozenset[str]) -> list[dict[str, Any]]:
    """Of each earlier run, the withdrawn people it was made with, by pseudonym. Raises `RefusedInput`."""
    told = []
    for ref in spec.inputs:
        if ref.name != EARLIER:
            continue
        path = Path(ref.path)
        row = read_json(path / PEOPLE if path.is_dir() else path)
        if row is None or "people" not in row:
            raise refuse("TABLE_UNREADABLE", f"An earlier run has no {PEOPLE}.", remedy="Give its results folder.")
        told.append({"bundle": row.get("bundle", ""), "people": sorted(gone & set(row["people"]))})
    return told


def finding_of(earlier: Sequence[Mapping[str, Any]]) -> list[Finding]:
    """A note where an earlier run was made with somebody who has withdrawn since."""
    with_some = [row for row in earlier if row["people"]]
    if not with_some:
        return []
    many = len({one for row in with_some for one in row["people"]})
    sentence = f"{many} withdrawn people are in {len(with_some)} earlier runs; they are in this one no more."
    about = str(with_some[0]["bundle"])
    numbers = {"people": many, "runs": len(with_some)}
    return [Finding("WITHDRAWN_IN_EARLIER", sentence, "note", about, numbers)]
