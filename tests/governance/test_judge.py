"""Evidence against criteria: what is not shown fails, groups are judged by themselves, few patients are called few."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from permed_compute.errors import NotFoundError, SpecError
from permed_compute.governance.criteria import Criteria, loads
from permed_compute.governance.judge import judge
from permed_compute.learning import evidence
from permed_compute.learning.evidence import Evidence, Figure

CRITERIA: dict[str, Any] = {
    "title": "Lesions", "model": "ours", "least_patients": 10,
    "intended_use": {"name": "lesion-load", "statement": "Volume of lesions in adults, read by a radiologist."},
    "thresholds": [{"measure": "dice of lesion", "least": 0.7}, {"measure": "missed of lesion", "most": 1}],
    "subgroups": {"traits": ["sex"], "thresholds": [{"measure": "dice of lesion", "least": 0.6, "of": "mean"}]},
}  # fmt: skip


def figure(measure: str, mean: float, low: float | None, high: float | None, **of: Any) -> Figure:
    return Figure("ours", measure, True, mean, low, high, **{"cases": 20, "patients": 20, **of})


def shown(*more: Figure, **changes: Any) -> Evidence:
    figures = (
        figure("dice of lesion", 0.8, 0.72, 0.86), figure("missed of lesion", 1.0, None, None),
        figure("dice of lesion", 0.85, 0.8, 0.9, trait="sex", group="F", patients=11),
        figure("dice of lesion", 0.75, 0.55, 0.8, trait="sex", group="M", patients=9), *more,
    )  # fmt: skip
    values = {"dataset": "d", "cases": 20, "patients": 20, "unscored": 0, "predictions": {"ours": ("p",)}}
    return Evidence(**{**values, "figures": figures, **changes})


def criteria(**changes: Any) -> Criteria:
    return Criteria.model_validate({**CRITERIA, **changes})


def test_what_shows_all_that_is_asked_passes() -> None:
    told = judge(shown(), criteria())
    assert told.passed and [row.verdict for row in told.rows] == ["met"] * 4


@pytest.mark.parametrize(
    ("evidence_", "asked", "failure"),
    [
        (shown(), {"thresholds": [{"measure": "dice of lesion", "least": 0.75}]}, "0.720 (95 % interval"),
        (shown(), {"thresholds": [{"measure": "missed of lesion", "most": 0}]}, "1.000 (mean, 20 patients), at most 0"),
        (shown(), {"thresholds": [{"measure": "froc", "least": 0}]}, "has no 'froc'"),
        (shown(), {"model": "theirs"}, "of model 'theirs'"),
        (shown(patients=9), {}, "9 patients, at least 10"),
        (shown(unscored=2), {}, "2 cases have no result"),
        (shown(), {"least_patients": 21}, "20 patients are too few"),
        (
            shown(),
            {"subgroups": {"traits": ["sex"], "thresholds": [{"measure": "dice of lesion", "least": 0.6}]}},
            "sex M: 0.550",
        ),
        (shown(), {"subgroups": CRITERIA["subgroups"] | {"traits": ["sex", "age"]}}, "no group by age"),
        (shown(figure("dice of lesion", float("nan"), None, None, trait="sex", group="X")), {}, "sex X: undefined"),
    ],
    ids=["interval", "count", "no measure", "no model", "patients", "unscored", "few", "group", "trait", "nan"],
)  # fmt: skip
def test_what_is_missed_or_not_shown_fails_with_a_sentence(
    evidence_: Evidence, asked: dict[str, Any], failure: str
) -> None:
    told = judge(evidence_, criteria(**asked))
    assert not told.passed and any(failure in sentence for sentence in told.failures), told.failures


def test_a_group_with_few_patients_is_not_judged_and_what_nobody_said_is_no_group() -> None:
    bad = figure("dice of lesion", 0.1, None, None, trait="sex", group="other", patients=2)
    told = judge(shown(bad), criteria())
    assert told.passed and [row.group for row in told.rows if row.verdict == "few"] == ["other"]
    only = tuple(row for row in shown().figures if not row.trait)
    unsaid = figure("dice of lesion", 0.9, 0.8, 1.0, trait="sex", group=evidence.UNSAID)
    told = judge(shown(figures=(*only, unsaid)), criteria())
    assert told.failures == ("no group by sex has 5 patients to judge it by",)


def test_evidence_comes_back_as_it_was_written(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="evidence"):
        evidence.read(tmp_path)
    shown().write(tmp_path)
    assert evidence.read(tmp_path) == shown()


def test_criteria_name_every_problem_with_its_line() -> None:
    text = """
title: Lesions
model: ours
least_patients: 1
thresholds:
  - {measure: dice of lesion}
subgroups: {traits: [sex], thresholds: [{measure: dice of lesion, least: 0.6}]}
intended_use: {name: Lesion Load, statement: too short}
colour: blue
"""
    with pytest.raises(SpecError) as caught:
        loads(text)
    where = {(problem.where, problem.line) for problem in caught.value.problems}
    assert where == {
        ("least_patients", 4), ("thresholds.0", 6), ("intended_use.name", 8), ("intended_use.statement", 8),
        ("colour", 9),
    }  # fmt: skip
