"""Classes told apart: against scikit-learn, against drawing patients one by one, and where a figure must be absent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from permed_compute.learning import classification as c
from permed_compute.learning import evidence, statistics

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is not installed")


def made(seed: int, n: int = 60, ties: int = 12) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    truth = chance.random(n) < 0.4
    return truth, np.round((chance.random(n) + 0.5 * truth) * ties) / ties


@pytest.mark.parametrize("seed", range(5))
def test_areas_are_scikit_learns_with_ties_and_weights(seed: int) -> None:
    truth, score = made(seed)
    weights = np.random.default_rng(seed).integers(0, 4, (3, len(truth))).astype(float)
    for measure, theirs in ((c.auroc, metrics.roc_auc_score), (c.average_precision, metrics.average_precision_score)):
        told = measure(truth, score, weights)
        assert told == pytest.approx([theirs(truth, score, sample_weight=row) for row in weights])


def test_the_interval_is_that_of_drawing_patients_one_by_one() -> None:
    truth, score = made(3, 40)
    patients = [f"p{k // 2}" for k in range(40)]
    told = c.estimate(c.auroc, truth, score, patients, seed=1)
    chance, drawn = np.random.default_rng(0), []
    for _ in range(800):
        rows = [2 * p + k for p in chance.integers(0, 20, 20) for k in (0, 1)]
        drawn.append(metrics.roc_auc_score(truth[rows], score[rows]))
    assert (told.cases, told.patients) == (40, 20) and told.mean == pytest.approx(metrics.roc_auc_score(truth, score))
    assert (told.low, told.high) == pytest.approx(np.quantile(drawn, [0.025, 0.975]), abs=0.03)
    assert told == c.estimate(c.auroc, truth, score, patients, seed=1)


def test_without_both_classes_there_is_no_area() -> None:
    assert c.estimate(c.auroc, [True, True], [0.1, 0.9], ["a", "b"]) is None
    assert np.isnan(c.auroc(np.ones(2, bool), np.ones(2), np.ones((1, 2)))).all()
    assert np.isnan(c.average_precision(np.ones(2, bool), np.ones(2), np.ones((1, 2)))).all()
    assert c.estimate(c.auroc, [True, False], [0.9, 0.1], ["a", "a"]).low is None  # one patient


def rows(n: int = 80) -> list[c.Row]:
    """At site `bad` the probabilities mean nothing."""
    chance = np.random.default_rng(2)
    found = []
    for k in range(n):
        there, site = bool(k % 2), "bad" if k % 4 < 2 else "good"
        known = 0.1 + 0.8 * there if site == "good" else 0.5
        probability = float(np.clip(known + 0.15 * chance.normal(), 0, 1))
        found.append(c.Row(f"case-{k:02}", f"p{k}", {"lesion": there}, {"lesion": probability}, {"site": site}))
    return found


def test_a_group_for_which_it_does_not_work_is_named(tmp_path: Path) -> None:
    report = c.summarise(rows(), ["lesion"])
    worse = [row["group"] for row in report["subgroups"] if row["worse"]]
    assert worse == ["bad"]
    [bad] = [row for row in report["subgroups"] if row["group"] == "bad"]
    assert bad["auroc"]["mean"] < 0.7 and bad["gap"]["high"] < 0
    own = report["classes"]["lesion"]
    assert own["present"] == 40 and sum(own["calibration"]["voxels"]) == 80
    assert own["brier"]["mean"] == pytest.approx(own["calibration"]["brier"])
    off = [abs(case["probability"] - case["present"]) for case in report["worst"]]
    assert off == sorted(off, reverse=True) and len({case["case"] for case in report["worst"]}) == 6
    c.write_page(report, tmp_path / "page.html", "ours", "Held-out studies.")
    page = (tmp_path / "page.html").read_text()
    assert (
        "site: bad" in page and "worse" in page and "Held-out studies." in page and report["worst"][0]["case"] in page
    )


def test_sensitivity_and_specificity_are_at_the_threshold() -> None:
    few = [
        c.Row(str(k), str(k), {"x": there}, {"x": p}, {})
        for k, (there, p) in enumerate([(True, 0.4), (True, 0.2), (False, 0.3), (False, 0.1)])
    ]
    told = c.summarise(few, ["x"], threshold=0.3)["classes"]["x"]
    assert (told["sensitivity"]["mean"], told["specificity"]["mean"]) == (0.5, 0.5)
    assert c.summarise(few, ["x"])["classes"]["x"]["sensitivity"]["mean"] == 0.0


def test_evidence_says_each_figure_of_everybody_and_each_group(tmp_path: Path) -> None:
    report = c.summarise(rows(), ["lesion"])
    told = c.evidence_of(report, "ours", "data", ["d1"])
    told.write(tmp_path)
    again = evidence.read(tmp_path)
    assert again == told and again.predictions == {"ours": ("d1",)}
    overall = {figure.measure: figure for figure in again.figures if not figure.trait}
    assert set(overall) == {f"{metric} of lesion" for metric in c.METRICS}
    assert not overall["brier of lesion"].higher_is_better
    assert {(figure.trait, figure.group) for figure in again.figures} == {("", ""), ("site", "bad"), ("site", "good")}


def test_groups_without_a_class_have_no_gap() -> None:
    same = [c.Row(row.name, row.subject, row.truth, row.probability, {"sex": "F"}) for row in rows(12)]
    assert all(row["gap"] is None for row in c.summarise(same, ["lesion"])["subgroups"])
    truth, score = made(1)
    assert c.apart(c.auroc, truth, score, [str(k) for k in range(60)], truth) is None
    assert statistics.FEW > 1
