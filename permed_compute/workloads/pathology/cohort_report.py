"""One page for a cohort: figures, curves, survival by risk group, tiles of highest attention, heatmaps, failures."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from permed_compute.learning import survival
from permed_compute.learning.evidence import Figure
from permed_compute.learning.statistics import FEW
from permed_compute.paths import replacing
from permed_compute.reports import charts
from permed_compute.reports.html import render
from permed_compute.workloads.pathology.cohort import Patient
from permed_compute.workloads.pathology.heads import Head, outcomes_of

LOWER, HIGHER = "lower risk", "higher risk"
_ALARMS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Page:
    """side, logits: patients with a known outcome. of: who they are, in a sentence. pictures: (caption, PNG); tops: by
    class or risk group, (patient, JPEG). failures: (patient, why). answered: patients in all."""

    name: str
    head: Head
    side: Sequence[Patient]
    logits: np.ndarray
    figures: Sequence[Figure]
    risk_cut: float | None = None
    of: str = ""
    history: Sequence[Mapping[str, float]] = ()
    pictures: Sequence[tuple[str, Path]] = ()
    tops: Mapping[str, Sequence[tuple[str, Path]]] = field(default_factory=dict)
    failures: Sequence[tuple[str, str]] = ()
    answered: int = 0


def risk_group(risk: float, cut: float) -> str:
    """cut: the median risk of the patients that the model was trained on."""
    return HIGHER if risk > cut else LOWER


def write(path: Path, page: Page) -> None:
    """Self-contained: pictures are in it."""
    has_outcomes = len(page.side) > 1
    text = render(
        "cohort.html.j2", page=page, few=FEW,
        kaplan_meier=_by_risk(page) if has_outcomes and page.head.is_survival else "",
        roc=_roc(page) if has_outcomes and not page.head.is_survival else "",
        history=_history(page.history),
        pictures=[(caption, _embedded(file, "png")) for caption, file in page.pictures],
        tops={
            name: [(patient, _embedded(file, "jpeg")) for patient, file in shown] for name, shown in page.tops.items()
        },
    )  # fmt: skip
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _embedded(file: Path, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def _by_risk(page: Page) -> Markup:
    outcomes, risk = outcomes_of(page.side, checked=False), page.head.risk(page.logits)
    cut = float(np.median(risk)) if page.risk_cut is None else page.risk_cut
    found = survival.kaplan_meier(outcomes.time, outcomes.event, [risk_group(value, cut) for value in risk])
    tones = {LOWER: "accent", HIGHER: "bad"}
    lines = [
        charts.Step(
            name, own.time.tolist(), own.survival.tolist(), f"{own.people} patients, {own.events} events", tones[name]
        )
        for name, own in found.items()
    ]  # fmt: skip
    return charts.steps(lines, "Survival by risk group")


def _roc(page: Page) -> Markup:
    """Of each class: sensitivity over the share of false alarms."""
    labels, chances = np.array([p.outcome["label"] for p in page.side]), page.head.probabilities(page.logits)
    lines = []
    for name in page.head.told:
        of_class, score = labels == name, chances[:, page.head.classes.index(name)]
        if of_class.all() or not of_class.any():
            continue
        cuts = np.unique(score)[::-1]
        hits = np.array([0.0, *((score[of_class] >= cut).mean() for cut in cuts)])
        alarms = np.array([0.0, *((score[~of_class] >= cut).mean() for cut in cuts)])
        lines.append(charts.Line(name, [float(hits[alarms <= share].max()) for share in _ALARMS]))
    return charts.curves(lines, "Receiver operating characteristic", left="no false alarm", right="all", unit="")


def _history(rows: Sequence[Mapping[str, float]]) -> Any:
    if len(rows) < 2:
        return ""
    names = [name for name in ("loss", "validation_loss") if all(name in row for row in rows)]
    lines = [charts.Line(name.replace("_", " "), [row[name] for row in rows]) for name in names]
    return charts.curves(lines, "Training", left="epoch 1", right=f"epoch {len(rows)}", unit="")
