"""How well a model tells classes apart, for whom, and whether its probabilities mean what they say.

    report = summarise(rows, ["lesion"])        figures with 95 % intervals, groups, calibration, the worst errors
    evidence_of(report, …), write_page(report, …)

AUROC counts ties half (Mann-Whitney); AUPRC is average precision, the step-wise area under precision and recall. Both
say nothing where a group lacks one of the two classes, and are then absent, never 0 or 1. Intervals draw patients, as
in `statistics`; draws without both classes are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.learning import calibration, statistics
from permed_compute.learning.evidence import Evidence, Figure
from permed_compute.learning.statistics import FEW, Difference, Estimate
from permed_compute.paths import replacing
from permed_compute.reports.html import render

METRICS = ("auroc", "auprc", "sensitivity", "specificity", "brier")
HIGHER_IS_BETTER = {"auroc": True, "auprc": True, "sensitivity": True, "specificity": True, "brier": False}
THRESHOLD = 0.5

Values = Sequence[float] | np.ndarray
Measure = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(truth (n,) bool, score (n,), weights (draws, n)) → (draws,), NaN where a draw lacks one of the two classes."""


@dataclass(frozen=True, slots=True)
class Row:
    """A case (a study, a slide, a person). truth, probability: by class; traits: what it is grouped by."""

    name: str
    subject: str
    truth: Mapping[str, bool]
    probability: Mapping[str, float]
    traits: Mapping[str, str]


# ------------------------------------------------------------------------------------------------ figures


def auroc(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The chance that a case of the class scores higher than one that is not; equal scores count half. A `Measure`."""
    of_class, others = _by_score(truth, score, weights)
    below = np.cumsum(others, axis=1) - others
    with np.errstate(invalid="ignore"):
        return np.asarray((of_class * (below + others / 2)).sum(axis=1) / (of_class.sum(axis=1) * others.sum(axis=1)))


def average_precision(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Precision at each score, weighted by the recall it adds. A `Measure`."""
    of_class, others = (part[:, ::-1] for part in _by_score(truth, score, weights))
    hits, alarms = np.cumsum(of_class, axis=1), np.cumsum(others, axis=1)
    with np.errstate(invalid="ignore"):
        precision = np.divide(hits, hits + alarms, out=np.zeros_like(hits), where=hits + alarms > 0)
        found = (of_class * precision).sum(axis=1) / of_class.sum(axis=1)
    return np.where(others.sum(axis=1) > 0, found, np.nan)


def _by_score(truth: np.ndarray, score: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weight of cases of the class, and of the others, at each distinct score from the lowest: (draws, scores)."""
    order = np.argsort(score, kind="stable")
    begins = np.flatnonzero(np.r_[True, np.diff(score[order]) > 0])
    sorted_, there = weights[:, order], truth[order]
    return np.add.reduceat(sorted_ * there, begins, axis=1), np.add.reduceat(sorted_ * ~there, begins, axis=1)


def estimate(measure: Measure, truth: Values, score: Values, patients: Sequence[str], seed: int = 0) -> Estimate | None:
    """The measure with its interval; None where one of the two classes is missing."""
    y, s = np.asarray(truth, bool), np.asarray(score, float)
    if y.all() or not y.any():
        return None
    groups = statistics.numbered(patients)
    many = int(groups.max()) + 1
    told = float(measure(y, s, np.ones((1, len(y))))[0])
    drawn = np.concatenate([measure(y, s, weights[:, groups]) for weights in statistics.draws(many, seed)])
    low, high = _interval(drawn) if many > 1 else (None, None)
    return Estimate(told, low, high, len(y), many)


def apart(
    measure: Measure,
    truth: Values,
    score: Values,
    patients: Sequence[str],
    inside: Values,
    seed: int = 0,
) -> Difference | None:
    """The measure inside a group minus that of everybody else; None where one of them lacks a class."""
    y, s, own = np.asarray(truth, bool), np.asarray(score, float), np.asarray(inside, bool)
    if any(y[part].all() or not y[part].any() for part in (own, ~own)):
        return None
    groups = statistics.numbered(patients)

    def difference(weights: np.ndarray) -> np.ndarray:
        a, b = (measure(y[part], s[part], weights[:, part]) for part in (own, ~own))
        return a - b

    told = float(difference(np.ones((1, len(y))))[0])
    blocks = statistics.draws(int(groups.max()) + 1, seed)
    low, high = _interval(np.concatenate([difference(weights[:, groups]) for weights in blocks]))
    return Difference(told, low, high, int(own.sum()))


def _interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
    there = drawn[np.isfinite(drawn)]
    if not len(there):
        return None, None
    low, high = np.quantile(there, [(1 - statistics.LEVEL) / 2, (1 + statistics.LEVEL) / 2])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------ all of it


def summarise(
    rows: Sequence[Row], classes: Sequence[str], *, threshold: float = THRESHOLD, seed: int = 0, worst: int = 6
) -> dict[str, Any]:
    """JSON. A class is called present where its probability is at least `threshold`; `worst`: errors that are shown."""
    return {
        "cases": len(rows), "patients": len({row.subject for row in rows}), "threshold": threshold,
        "classes": {name: _of_class(rows, name, threshold, seed) for name in classes},
        "subgroups": [told for name in classes for told in _subgroups(rows, name, threshold, seed)],
        "worst": _worst(rows, classes, worst),
    }  # fmt: skip


def _of_class(rows: Sequence[Row], name: str, threshold: float, seed: int) -> dict[str, Any]:
    truth, score, _ = _columns(rows, name)
    return {
        "present": int(truth.sum()), **_figures_of(rows, name, threshold, seed),
        "calibration": calibration.summary([calibration.counts(truth, score, least=0.0)]),
    }  # fmt: skip


def _figures_of(rows: Sequence[Row], name: str, threshold: float, seed: int) -> dict[str, Any]:
    truth, score, patients = _columns(rows, name)

    def mean(of: np.ndarray, among: np.ndarray) -> Estimate | None:
        return statistics.mean(of[among].tolist(), [p for p, is_in in zip(patients, among, strict=True) if is_in], seed)

    found = {
        "auroc": estimate(auroc, truth, score, patients, seed),
        "auprc": estimate(average_precision, truth, score, patients, seed),
        "sensitivity": mean((score >= threshold).astype(float), truth),
        "specificity": mean((score < threshold).astype(float), ~truth),
        "brier": mean((score - truth) ** 2, np.ones(len(truth), bool)),
    }
    return {metric: None if told is None else asdict(told) for metric, told in found.items()}


def _columns(rows: Sequence[Row], name: str) -> tuple[np.ndarray, np.ndarray, list[str]]:
    truth = np.array([row.truth[name] for row in rows], bool)
    return truth, np.array([row.probability[name] for row in rows], float), [row.subject for row in rows]


def _subgroups(rows: Sequence[Row], name: str, threshold: float, seed: int) -> list[dict[str, Any]]:
    """Every group of every trait: its figures, and how far its AUROC is from everybody else's."""
    truth, score, patients = _columns(rows, name)
    told = []
    for trait in rows[0].traits if rows else ():
        for group in sorted({row.traits[trait] for row in rows}):
            inside = [row for row in rows if row.traits[trait] == group]
            people = len({row.subject for row in inside})
            is_in = [row.traits[trait] == group for row in rows]
            gap = apart(auroc, truth, score, patients, is_in, seed) if len(inside) < len(rows) else None
            told.append({
                "trait": trait, "group": group, "class": name, "cases": len(inside), "patients": people,
                "few": people < FEW, "present": sum(row.truth[name] for row in inside),
                **_figures_of(inside, name, threshold, seed), "gap": None if gap is None else asdict(gap),
                "worse": gap is not None and gap.is_clear and gap.mean < 0,
            })  # fmt: skip
    return told


def _worst(rows: Sequence[Row], classes: Sequence[str], most: int) -> list[dict[str, Any]]:
    """The cases that were furthest from the truth, each once."""
    found = []
    for row in rows:
        off, name = max((abs(row.probability[each] - row.truth[each]), each) for each in classes)
        found.append((-off, row.name, name, row))
    found.sort(key=lambda item: item[:2])
    return [
        {"case": case, "class": name, "present": row.truth[name], "probability": row.probability[name], **row.traits}
        for _, case, name, row in found[:most]
    ]


# ------------------------------------------------------------------------------------------------ for others


def evidence_of(report: Mapping[str, Any], model: str, dataset: str, predictions: Iterable[str] = ()) -> Evidence:
    """The report in the words of the gate. dataset, predictions: digests, as `Evidence` has them."""
    figures = [
        figure
        for name, row in report["classes"].items()
        for figure in _figures(row, model, name)
    ] + [
        figure
        for row in report["subgroups"]
        for figure in _figures(row, model, row["class"], row["trait"], row["group"])
    ]  # fmt: skip
    return Evidence(
        dataset, report["cases"], report["patients"], 0, {model: tuple(predictions)}, tuple(figures)
    )  # fmt: skip


def _figures(row: Mapping[str, Any], model: str, name: str, trait: str = "", group: str = "") -> list[Figure]:
    return [
        Figure(model, f"{metric} of {name}", HIGHER_IS_BETTER[metric], **row[metric], trait=trait, group=group)
        for metric in METRICS
        if row[metric] is not None
    ]


def write_page(report: Mapping[str, Any], path: Path, title: str, of: str) -> None:
    """One file. of: a sentence that says which cases these are."""
    page = render("classification.html.j2", report=report, title=title, of=of, metrics=METRICS, few=FEW)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
