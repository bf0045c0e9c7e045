"""What a cross-validation says: figures of people that a model never saw, of the fusion and of each modality alone.

A person is answered for once in every repetition, by a model that neither the person nor a relative was in; the mean
over the repetitions is the person's answer, as the bundle's members answer together. Intervals are over people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from permed_compute.learning import classification, concordance, survival
from permed_compute.learning.concordance import Estimate
from permed_compute.workloads.fusion.people import Cohort

FUSION = "fusion"
AUROC, BRIER = "auroc", "brier"
GROUPS = ("low", "middle", "high")
FEW = 10
"""People below which no figure is given: it would say little, and perhaps whose it is."""


@dataclass(frozen=True, slots=True)
class Answers:
    """Of the held-out people. scores: by view (repetitions, people), NaN where a view has no answer; curves the same
    with times last. Views: `fusion`, `alone NAME`, `without NAME`, `permuted NAME` (permutations averaged outside)."""

    scores: Mapping[str, np.ndarray]
    curves: Mapping[str, np.ndarray]
    times: np.ndarray

    def rows(self, view: str) -> np.ndarray:
        return np.flatnonzero(np.isfinite(self.scores[view]).all(axis=0))

    def score(self, view: str, rows: np.ndarray) -> np.ndarray:
        return np.asarray(self.scores[view][:, rows].mean(axis=0))


def times_of(cohort: Cohort) -> np.ndarray:
    """Up to 20 times between the first tenth of the events and the last; empty of classification."""
    if cohort.outcomes is None:
        return np.zeros(0)
    seen = cohort.outcomes.time[cohort.outcomes.event]
    return np.unique(np.quantile(seen, np.linspace(0.1, 0.9, 20)))


def report(cohort: Cohort, answers: Answers, *, seed: int, resamples: int) -> dict[str, Any]:
    """JSON: rows of figures, the best single modality and how the fusion compares with it, and what rests on what."""
    measured = _Measured(cohort, answers, seed, resamples)
    names = list(cohort.modalities)
    alone = [row for name in names if (row := measured.row(f"alone {name}", name)) is not None]
    best = max(alone, key=lambda row: row["figures"][measured.lead]["value"], default=None)
    told: dict[str, Any] = {
        "lead": measured.lead, "people": len(cohort.people), "families": len(set(cohort.families)),
        "events": int(measured.truth.sum()), "fusion": measured.row(FUSION, FUSION), "alone": alone,
        "best_alone": None if best is None else best["name"],
        "without": [row for name in names if (row := measured.row(f"without {name}", name)) is not None],
        "importance": [measured.importance(name) for name in names],
        "left_out": dict(cohort.left_out), "has": dict(zip(names, cohort.mask.sum(axis=0).tolist(), strict=True)),
    }  # fmt: skip
    if cohort.outcomes is not None:
        told["groups"] = _groups(cohort, answers)
    return told


class _Measured:
    """Figures of one cohort's answers; the lead figure is Harrell's C, or AUROC."""

    def __init__(self, cohort: Cohort, answers: Answers, seed: int, resamples: int) -> None:
        self.cohort, self.answers, self.seed, self.resamples = cohort, answers, seed, resamples
        self.lead = AUROC if cohort.outcomes is None else survival.HARRELL
        labels = np.array(cohort.labels)
        self.truth = labels == max(cohort.labels) if cohort.outcomes is None else cohort.outcomes.event

    def row(self, view: str, name: str) -> dict[str, Any] | None:
        """Figures of a view, and the fusion's lead minus the view's on the same people; None of few people, or where
        all of them ended alike."""
        rows = self.answers.rows(view) if view in self.answers.scores else np.zeros(0, int)
        if len(rows) < FEW or not self.truth[rows].any():
            return None
        figures = self._figures(view, rows)
        if figures[self.lead] is None:
            return None
        found = {"name": name, "people": len(rows), "events": int(self.truth[rows].sum())}
        told = {**found, "figures": survival.as_rows(figures)}
        if view != FUSION:
            apart = self._compared(rows, self.answers.score(FUSION, rows), self.answers.score(view, rows))
            told["fusion_minus"] = None if apart is None else apart.as_dict()
        return told

    def _figures(self, view: str, rows: np.ndarray) -> dict[str, Estimate | None]:
        score = self.answers.score(view, rows)
        if self.cohort.outcomes is None:
            truth = self.truth[rows]
            counts = concordance.draws(len(rows), self.seed, self.resamples)
            return {
                AUROC: concordance.estimate(classification.auroc(truth, score, counts)),
                BRIER: concordance.estimate(counts @ (score - truth) ** 2 / counts.sum(axis=1)),
            }
        curve = self.answers.curves[view][:, rows].mean(axis=0) if view in self.answers.curves else None
        return survival.scores(
            self.cohort.outcomes, self.cohort.outcomes.of(rows), score, curve, self.answers.times, seed=self.seed,
            resamples=self.resamples,
        )  # fmt: skip

    def _compared(self, rows: np.ndarray, first: np.ndarray, second: np.ndarray) -> Estimate | None:
        if self.cohort.outcomes is not None:
            return survival.compared(
                self.cohort.outcomes.of(rows), first, second, seed=self.seed, resamples=self.resamples
            )
        own, counts = self.truth[rows], concordance.draws(len(rows), self.seed, self.resamples)
        one, other = (classification.auroc(own, score, counts) for score in (first, second))
        return concordance.estimate(one - other)

    def importance(self, name: str) -> dict[str, Any]:
        """How much of the lead figure is lost where the people's rows of a modality are exchanged: mean over
        repetitions and permutations, and the least and most of any."""
        lost = []
        whole = self.answers.scores[FUSION]
        rows = self.answers.rows(FUSION)
        for view, permuted in self.answers.scores.items():
            if view.rpartition(" ")[0] == f"permuted {name}":
                lost += [self._lead(rows, whole[k]) - self._lead(rows, permuted[k]) for k in range(len(whole))]
        return {"name": name, "mean": float(np.mean(lost)), "least": min(lost), "most": max(lost)} if lost else {
            "name": name, "mean": None, "least": None, "most": None
        }  # fmt: skip

    def _lead(self, rows: np.ndarray, score: np.ndarray) -> float:
        if self.cohort.outcomes is None:
            return float(classification.auroc(self.truth[rows], score[rows], np.ones((1, len(rows))))[0])
        own = self.cohort.outcomes.of(rows)
        told = survival.scores(own, own, score[rows], resamples=0)[survival.HARRELL]
        return float("nan") if told is None else told.value


def cuts_of(scores: np.ndarray) -> list[float]:
    """Between the thirds of the held-out people's risk."""
    return [float(cut) for cut in np.quantile(scores, (1 / 3, 2 / 3))]


def group_of(scores: np.ndarray, cuts: Sequence[float]) -> list[str]:
    return [GROUPS[k] for k in np.searchsorted(cuts, scores, side="right")]


def _groups(cohort: Cohort, answers: Answers) -> dict[str, Any]:
    """Kaplan–Meier by thirds of the held-out risk."""
    assert cohort.outcomes is not None
    rows = answers.rows(FUSION)
    risk, own = answers.score(FUSION, rows), cohort.outcomes.of(rows)
    cuts = cuts_of(risk)
    curves = survival.kaplan_meier(own.time, own.event, group_of(risk, cuts))
    return {
        "cuts": cuts,
        "curves": {
            name: {
                "time": curves[name].time.tolist(), "survival": curves[name].survival.tolist(),
                "people": curves[name].people, "events": curves[name].events,
            }
            for name in GROUPS if name in curves
        },
    }  # fmt: skip
