"""Splits that leak nothing: people and families stay together, strata are shared, given sides are checked."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest

from permed_compute.errors import RefusedInput, WorkloadError
from permed_compute.learning import splits


@dataclass(frozen=True)
class Row:
    name: str
    person: str
    family: str = ""
    label: str = "a"
    side: str = ""


def bound(row: Row) -> list[tuple[str, str]]:
    return [("person", row.person), *([("family", row.family)] if row.family else [])]


def cohort() -> list[Row]:
    """60 people, every fourth with two rows, families of three among the first 15; one in five is of class b."""
    rows = [Row(f"r{k:03}", f"p{k}", f"f{k // 3}" if k < 15 else "", "b" if k % 5 == 0 else "a") for k in range(60)]
    return rows + [Row(f"again{k:03}", f"p{k}", label="b" if k % 5 == 0 else "a") for k in range(0, 60, 4)]


def drawn(seed: int = 0, **how: int) -> splits.Sides[Row]:
    return splits.split(
        cohort(), bound, validation=0.2, test=0.2, seed=seed, stratum=lambda row: row.label, **how
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [0, 4])
def test_people_and_families_are_on_one_side_and_every_side_has_its_share_of_each_class(seed: int, folds: int) -> None:
    parts = [drawn(seed, fold=fold, folds=folds) for fold in range(folds or 1)]
    for part in parts:
        sides = [part.training, part.validation, part.test]
        for key in ("person", "family"):
            known = [{getattr(row, key) for row in side} - {""} for side in sides]
            assert not known[0] & known[1] and not known[0] & known[2] and not known[1] & known[2]
        assert sorted(row.name for side in sides for row in side) == sorted(row.name for row in cohort())
        assert part.test == parts[0].test
        for side in (part.validation, part.test):
            share = Counter(row.label for row in side)["b"] / len(side)
            assert 0.05 <= share <= 0.4, share  # 0.2 of all; families of both classes stay whole
    if folds:
        validated = sorted(row.name for part in parts for row in part.validation)
        assert validated == sorted(row.name for row in cohort() if row not in parts[0].test)
        assert max(len(part.validation) for part in parts) - min(len(part.validation) for part in parts) <= 6


def test_sides_that_were_given_are_taken_or_refused() -> None:
    rows = [Row("a", "p1", side="train"), Row("b", "p1", side="Training"), Row("c", "p2", side="val")]
    sides = splits.given(rows, bound, lambda row: row.side)
    assert [row.name for row in sides.training] == ["a", "b"] and [row.name for row in sides.validation] == ["c"]
    with pytest.raises(RefusedInput, match="PATIENT_IN_TWO_SPLITS"):
        splits.given([*rows, Row("d", "p2", side="test")], bound, lambda row: row.side)
    with pytest.raises(RefusedInput, match="PATIENT_IN_TWO_SPLITS"):
        family = [Row("a", "p1", "f", side="train"), Row("b", "p2", "f", side="test")]
        splits.given(family, bound, lambda row: row.side)
    with pytest.raises(RefusedInput, match="SPLIT_UNREADABLE"):
        splits.given([Row("a", "p1", side="left")], bound, lambda row: row.side)


def test_a_side_that_stays_empty_is_said() -> None:
    with pytest.raises(WorkloadError, match="2 people in 1 groups leave nothing for validation and test"):
        splits.split([Row("a", "p"), Row("b", "p")], bound, validation=0.2, test=0.2, seed=0)
