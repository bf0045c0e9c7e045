"""The sample table: who is in it, who is never parted, who is left out, and what is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from permed_compute.errors import RefusedInput, SpecError
from permed_compute.testing.context import LocalContext
from permed_compute.workloads.fusion import people
from permed_compute.workloads.fusion.people import Asked, Cohort, Columns, Person

from .made import context, spec, table

SURVIVAL = Asked("YEARS", "EVENT", "", "FAMILY")
HEADER = ("IID", "FAMILY", "YEARS", "EVENT", "AGE", "SEX", "CODES")
ROWS = [
    ("ola", "f1", 2.5, 1, 60, "M", "HP:0001250"), ("kari", "f1", 1.5, 0, 50, "F", "HP_0001250;HP:0001263"),
    ("siri", "", 3.5, 1, "NA", "F", ""), ("gro", "", "NA", 1, 40, "M", ""), ("nils", "", 4.0, 0, 70, "", ""),
]  # fmt: skip


def cohort(
    root: Path, rows: Any = ROWS, columns: Columns = Columns(("AGE",)), more: Any = (), genes: Any = None
) -> Cohort:
    clinical = table(root / "clinical.tsv", HEADER, rows)
    expression = table(root / "genes.tsv", ("IID", "g"), genes or [(row[0], k) for k, row in enumerate(rows)])
    job = spec("fusion/train-survival", [("clinical", clinical), ("genes", expression), *more])
    return people.cohort(job, context(root, job), SURVIVAL, columns)


def hidden(name: str) -> str:
    return LocalContext.pseudonym(None, name)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------ splits


@given(
    st.lists(st.tuples(st.integers(0, 12), st.sampled_from(["0", "1"])), min_size=8, max_size=60), st.integers(0, 9),
    st.integers(2, 4),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_no_person_and_no_family_is_in_two_splits(rows: list[tuple[int, str]], seed: int, folds: int) -> None:
    found = [Person(f"p{k}", f"f{family}", stratum) for k, (family, stratum) in enumerate(rows)]
    if len({one.family for one in found}) < folds:
        return
    held: Counter[str] = Counter()
    for fold in range(folds):
        sides = people.drawn_sides(found, seed, fold, folds)
        assert not {one.family for one in sides.training} & {one.family for one in sides.validation}
        assert not {one.name for one in sides.training} & {one.name for one in sides.validation}
        assert len(sides.training) + len(sides.validation) == len(found)
        held.update(one.name for one in sides.validation)
    assert held == Counter({one.name: 1 for one in found})


def test_a_cohorts_sides_part_neither_persons_nor_families_and_share_the_events(tmp_path: Path) -> None:
    rows = [(f"id{k}", f"f{k // 2}" if k < 12 else "", 1 + k, k % 3 == 0, 50, "", "") for k in range(60)]
    rows = [(*row[:3], int(row[3]), *row[4:]) for row in rows]
    made = cohort(tmp_path, rows)
    events = []
    for fold in range(3):
        train, held = made.sides(7, fold, 3)
        assert not {made.families[k] for k in train} & {made.families[k] for k in held}
        assert sorted([*train, *held]) == list(range(60))
        assert made.outcomes is not None
        events.append(int(made.outcomes.event[held].sum()))
    assert max(events) - min(events) <= 3 and sum(events) == 20  # a family is of one stratum


# ------------------------------------------------------------------------------------------------ who is in it


def test_the_order_of_files_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    genes = [(row[0], k) for k, row in enumerate(ROWS)]
    one, other = cohort(tmp_path / "a", genes=genes), cohort(tmp_path / "b", ROWS[::-1], genes=genes[::-1])
    assert one.digest == other.digest and one.people == tuple(sorted(one.people))


def test_whoever_has_no_outcome_or_no_clinical_row_is_left_out_and_counted(tmp_path: Path) -> None:
    made = cohort(tmp_path, genes=[*((row[0], 1.0) for row in ROWS), ("stranger", 2.0)])
    assert set(made.people) == {hidden(name) for name in ("ola", "kari", "siri", "nils")}
    assert made.left_out == {"without outcome": 1, "withdrawn": 0, "in no clinical row": 1}


def test_the_mask_says_who_has_what(tmp_path: Path) -> None:
    made = cohort(tmp_path, genes=[("ola", 1.0), ("kari", "NA"), ("siri", 2.0)])
    place = {name: made.people.index(hidden(name)) for name in ("ola", "kari", "nils")}
    has = {name: made.mask[row].tolist() for name, row in place.items()}
    assert list(made.modalities) == ["clinical", "genes"]
    assert has == {"ola": [True, True], "kari": [True, False], "nils": [True, False]}


def test_words_and_codes_become_indicators_by_curie(tmp_path: Path) -> None:
    made = cohort(tmp_path, columns=Columns(("AGE",), ("SEX",), ("CODES=HP",)))
    known = made.modalities["clinical"]
    assert known.columns == ("AGE", "SEX=F", "SEX=M", "CODES=HP:0001250", "CODES=HP:0001263")
    row = {name: known.of([hidden(name)])[0] for name in ("kari", "nils")}
    assert row["kari"].tolist() == [50, 1, 0, 1, 1]
    assert row["nils"][0] == 70 and np.isnan(row["nils"][1:]).all()


# ------------------------------------------------------------------------------------------------ what is refused


def changed(row: int, column: str, value: Any) -> list[tuple[Any, ...]]:
    rows = [list(each) for each in ROWS]
    rows[row][HEADER.index(column)] = value
    return [tuple(each) for each in rows]


@pytest.mark.parametrize(
    "rows, code, who",
    [
        (changed(1, "YEARS", -1), "TIME_NEGATIVE", "kari"),
        (changed(1, "YEARS", 0), "TIME_NEGATIVE", "kari"),
        (changed(2, "EVENT", 7), "OUTCOME_UNREADABLE", "siri"),
        (changed(2, "YEARS", "long"), "NOT_A_NUMBER", "siri"),
        (changed(0, "AGE", "old"), "NOT_A_NUMBER", "ola"),
        (changed(0, "CODES", "HP:12"), "WRONG_CODE", "ola"),
        ([*ROWS, ROWS[0]], "DUPLICATE_PEOPLE", "ola"),
        ([(*row[:3], 0, *row[4:]) for row in ROWS], "NO_EVENT", ""),
    ],
)  # fmt: skip
def test_bad_outcomes_and_cells_are_refused_by_pseudonym(rows: Any, code: str, who: str, tmp_path: Path) -> None:
    with pytest.raises(RefusedInput) as told:
        cohort(tmp_path, rows, Columns(("AGE",), (), ("CODES=HP",)), genes=[(row[0], 1.0) for row in ROWS])
    assert told.value.finding.code == code
    assert not who or hidden(who)[:12] in str(told.value)
    assert not any(f" {row[0]}" in str(told.value) for row in ROWS)


def test_a_person_of_whom_nothing_is_known_is_refused_by_pseudonym(tmp_path: Path) -> None:
    with pytest.raises(RefusedInput, match="NOTHING_KNOWN") as told:
        cohort(tmp_path, columns=Columns(), genes=[("ola", 1), ("kari", 2), ("siri", 3)])
    assert hidden("nils")[:12] in str(told.value)


def test_modalities_of_one_name_and_those_that_are_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="two modalities are called 'genes'"):
        cohort(tmp_path, more=[("genes", tmp_path / "genes.tsv")])
    job = spec("fusion/train-survival", [("clinical", tmp_path / "clinical.tsv"), ("genes", tmp_path / "genes.tsv")])
    with pytest.raises(SpecError, match="no modality 'scans'"):
        people.modalities(job, context(tmp_path, job), only=["scans"])


# ------------------------------------------------------------------------------------------------ the withdrawn


def test_the_withdrawn_are_in_it_no_more_and_listed_for_earlier_runs(tmp_path: Path) -> None:
    before = cohort(tmp_path)
    gone = tmp_path / "withdrawn.txt"
    gone.write_text(f"# since May\nkari\n{hidden('nils')}\n")
    after = cohort(tmp_path, more=[("withdrawn", gone)])
    assert set(before.people) - set(after.people) == {hidden("kari"), hidden("nils")}
    assert after.left_out["withdrawn"] == 2 and after.digest != before.digest
    for name, with_whom in (("old", list(before.people)), ("older", [hidden("ola")])):
        (tmp_path / name).mkdir()
        (tmp_path / name / people.PEOPLE).write_text(
            f'{{"bundle": "{name}", "people": {with_whom!r}}}'.replace("'", '"')
        )
    job = spec("fusion/train-survival", [("earlier", tmp_path / "old"), ("earlier", tmp_path / "older")])
    told = people.in_earlier(job, after.withdrawn)
    assert told == [
        {"bundle": "old", "people": sorted([hidden("kari"), hidden("nils")])}, {"bundle": "older", "people": []},
    ]  # fmt: skip
    [finding] = people.finding_of(told)
    assert finding.code == "WITHDRAWN_IN_EARLIER" and finding.numbers == {"people": 2, "runs": 1}
