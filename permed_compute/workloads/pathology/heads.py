"""What a bag's outputs mean: a class, a Cox risk, or discrete-time hazards; with the loss and the figures of each.

classification   outputs: a logit for each class of the column `label`
cox              output: log hazard; columns `time` and `event`
discrete         outputs: a logit for the hazard in each bin of time; the same columns
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.learning import classification, survival
from permed_compute.learning.evidence import Figure
from permed_compute.learning.survival import Baseline, Bins, Outcomes
from permed_compute.workloads.pathology.cohort import TRAITS, Patient

if TYPE_CHECKING:
    import torch

HEADS = ("classification", "cox", "discrete")
_TIMES = 20
"""Of the steps of a stored baseline hazard: no patient's time can be read off it."""


@dataclass(frozen=True, slots=True)
class Head:
    """kind: of HEADS. classes: of classification. bins: of discrete. Fitted on the training side alone."""

    kind: str
    classes: tuple[str, ...] = ()
    bins: Bins | None = None

    @classmethod
    def fit(cls, kind: str, everybody: Sequence[Patient], training: Sequence[Patient], bins: int) -> Head:
        """Raises `RefusedInput` where the outcomes of everybody, or of training, cannot be learned from."""
        if kind == "classification":
            survival.checked_classes([patient.outcome.get("label", "") for patient in training])
            return cls(kind, survival.checked_classes([patient.outcome.get("label", "") for patient in everybody]))
        outcomes_of(everybody)
        own = outcomes_of(training)
        return cls(kind, bins=Bins.fit(own.time, own.event, bins) if kind == "discrete" else None)

    @property
    def outputs(self) -> int:
        if self.kind == "classification":
            return len(self.classes)
        return self.bins.count if self.bins is not None else 1

    @property
    def told(self) -> tuple[str, ...]:
        """Classes that figures are of: of two the second alone, because the first's say the same."""
        return self.classes[1:] if len(self.classes) == 2 else self.classes

    @property
    def is_survival(self) -> bool:
        return self.kind != "classification"

    def as_dict(self) -> dict[str, Any]:
        return {
            "kind": self.kind, "classes": list(self.classes),
            "edges": None if self.bins is None else list(self.bins.edges),
        }  # fmt: skip

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Head:
        edges = row["edges"]
        return cls(str(row["kind"]), tuple(row["classes"]), None if edges is None else Bins(tuple(edges)))

    # --------------------------------------------------------------------------------------- training

    def targets(self, cohort: Sequence[Patient]) -> dict[str, np.ndarray]:
        """Arrays of one entry a patient: label; or time, event and, of discrete, bin."""
        if not self.is_survival:
            return {"label": np.array([self.classes.index(patient.outcome["label"]) for patient in cohort], np.int64)}
        own = outcomes_of(cohort, checked=False)
        found = {"time": own.time.astype(np.float32), "event": own.event}
        return found | ({"bin": self.bins.index(own.time)} if self.bins is not None else {})

    def loss(self, logits: torch.Tensor, targets: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean over the batch; of Cox over its events."""
        from torch.nn.functional import cross_entropy

        if self.kind == "classification":
            return cross_entropy(logits.float(), targets["label"])
        if self.kind == "cox":
            return survival.cox_loss(logits[:, 0], targets["time"], targets["event"])
        return survival.discrete_loss(logits, targets["bin"], targets["event"])

    # --------------------------------------------------------------------------------------- answers

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """(n, classes) float64."""
        shifted = np.exp(logits.astype(float) - logits.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))

    def curve(self, logits: np.ndarray) -> np.ndarray:
        """(n, bins) float64, of discrete."""
        import torch

        return np.asarray(survival.curve(torch.from_numpy(logits)).numpy(), float)

    def risk(self, logits: np.ndarray) -> np.ndarray:
        """(n,) float64: higher is sooner."""
        return logits[:, 0].astype(float) if self.kind == "cox" else survival.risk_of_curve(self.curve(logits))


def outcomes_of(cohort: Sequence[Patient], *, checked: bool = True) -> Outcomes:
    """Raises `RefusedInput` where they are checked and cannot be used."""
    times = [patient.outcome.get("time", "") for patient in cohort]
    events = [patient.outcome.get("event", "") for patient in cohort]
    if checked:
        return survival.checked_outcomes(times, events)
    return Outcomes(np.array(times, float), np.array([survival.was_seen(value) for value in events], bool))


def baseline_of(outcomes: Outcomes, risk: np.ndarray) -> Baseline:
    """Breslow's, at quantiles of the times of events."""
    whole = Baseline.fit(outcomes, risk)
    kept = np.unique(np.linspace(0, len(whole.time) - 1, min(_TIMES, len(whole.time))).round().astype(int))
    return Baseline(tuple(whole.time[k] for k in kept), tuple(whole.hazard[k] for k in kept))


# ------------------------------------------------------------------------------------------------ figures


def at_a_glance(head: Head, cohort: Sequence[Patient], logits: np.ndarray) -> dict[str, float]:
    """AUROC of each class, or Harrell's C, without intervals; what is not defined is left out."""
    if head.is_survival:
        own = outcomes_of(cohort, checked=False)
        found = survival.scores(own, own, head.risk(logits), resamples=0)[survival.HARRELL]
        return {} if found is None else {survival.HARRELL: found.value}
    labels, chances = np.array([patient.outcome["label"] for patient in cohort]), head.probabilities(logits)
    everybody = np.ones((1, len(cohort)))
    told = {
        f"auroc of {name}": float(
            classification.auroc(labels == name, chances[:, head.classes.index(name)], everybody)[0]
        )
        for name in head.told
    }
    return {name: value for name, value in told.items() if np.isfinite(value)}


def figures(
    head: Head, model: str, cohort: Sequence[Patient], logits: np.ndarray, *, train: Outcomes | None = None,
    baseline: Baseline | None = None, seed: int = 0,
) -> tuple[Figure, ...]:  # fmt: skip
    """Of everybody, and of each group by site, scanner, sex and age; what is not defined is left out.

    logits: (n, outputs). train: whose censoring weighs the survival figures; the cohort's own where it is not given.
    """
    if not head.is_survival:
        rows = _rows(head, cohort, head.probabilities(logits))
        return classification.evidence_of(classification.summarise(rows, head.told, seed=seed), model, "").figures

    def of(rows: np.ndarray, trait: str = "", group: str = "") -> list[Figure]:
        own = outcomes_of([cohort[k] for k in rows], checked=False)
        risk = head.risk(logits[rows])
        curve, times = None, None
        if head.bins is not None:
            curve, times = head.curve(logits[rows]), head.bins.edges
        elif baseline is not None:
            curve, times = baseline.curve(risk, baseline.time), baseline.time
        scored = survival.scores(train or own, own, risk, curve, times, seed=seed)
        return [
            Figure(
                model, name, survival.HIGHER_IS_BETTER[name], told.value, told.low, told.high, len(rows), len(rows),
                trait, group,
            )
            for name, told in scored.items()
            if told is not None
        ]  # fmt: skip

    found = of(np.arange(len(cohort)))
    for trait in TRAITS:
        said = np.array([patient.traits[trait] for patient in cohort])
        for group in sorted(set(said)):
            found += of(np.flatnonzero(said == group), trait, str(group))
    return tuple(found)


def _rows(head: Head, cohort: Sequence[Patient], chances: np.ndarray) -> list[classification.Row]:
    return [
        classification.Row(
            patient.name, patient.subject, {name: patient.outcome["label"] == name for name in head.classes},
            dict(zip(head.classes, map(float, own), strict=True)), patient.traits,
        )
        for patient, own in zip(cohort, chances, strict=True)
    ]  # fmt: skip
