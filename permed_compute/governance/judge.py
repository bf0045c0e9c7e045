"""Evidence against criteria: every threshold for everybody, and again for each group that is large enough."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from permed_compute.governance.criteria import Criteria, Threshold
from permed_compute.learning.evidence import UNSAID, Evidence, Figure

MET, MISSED, FEW = "met", "missed", "few"


@dataclass(frozen=True, slots=True)
class Row:
    """One threshold, for everybody or a group. verdict: `met`, `missed`, or `few`: too few patients to judge by."""

    measure: str
    trait: str
    group: str
    patients: int
    of: str
    value: float | None
    """None where the measure is not defined."""
    least: float | None
    most: float | None
    verdict: str

    def sentence(self) -> str:
        who = f"{self.trait} {self.group}" if self.trait else "everybody"
        bound = f"at least {self.least:g}" if self.least is not None else f"at most {self.most:g}"
        if self.verdict == FEW:
            return f"{self.measure}, {who}: {self.patients} patients are too few to judge by"
        return f"{self.measure}, {who}: {shown(self.value)} ({self.of}, {self.patients} patients), {bound} is asked"


def shown(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


@dataclass(frozen=True, slots=True)
class Judged:
    rows: tuple[Row, ...]
    failures: tuple[str, ...]
    """Sentences; empty where the model passed."""

    @property
    def passed(self) -> bool:
        return not self.failures


def judge(evidence: Evidence, criteria: Criteria) -> Judged:
    """Passed is only what shows everything that is asked: a measure, a trait or patients that are not there fail it."""
    own = [figure for figure in evidence.figures if figure.model == criteria.model]
    everybody = [figure for figure in own if not figure.trait]
    rows, failures = [], []
    if evidence.unscored:
        failures.append(f"{evidence.unscored} cases have no result at all")
    if evidence.patients < criteria.least_patients:
        failures.append(f"{evidence.patients} patients, at least {criteria.least_patients} are asked")
    for threshold in criteria.thresholds:
        found = [figure for figure in everybody if figure.measure == threshold.measure]
        if not found:
            failures.append(f"the evaluation has no {threshold.measure!r} of model {criteria.model!r}")
        rows += [_row(figure, threshold, criteria.least_patients) for figure in found]
    failures += [row.sentence() for row in rows if row.verdict == FEW]
    groups = criteria.subgroups
    for trait in groups.traits:
        told = list(_of_trait(own, trait, groups.thresholds, groups.least_patients))
        rows += told
        if not any(row.verdict != FEW and row.group != UNSAID for row in told):
            failures.append(f"no group by {trait} has {groups.least_patients} patients to judge it by")
    failures += [row.sentence() for row in rows if row.verdict == MISSED]
    return Judged(tuple(rows), tuple(failures))


def _of_trait(own: Sequence[Figure], trait: str, thresholds: Sequence[Threshold], least: int) -> Iterator[Row]:
    for threshold in thresholds:
        for figure in own:
            if figure.trait == trait and figure.measure == threshold.measure:
                yield _row(figure, threshold, least)


def _row(figure: Figure, threshold: Threshold, least_patients: int) -> Row:
    """The worse end of the interval where there is one: few patients make it wide, and the threshold hard to meet."""
    end = figure.low if threshold.least is not None else figure.high
    of, value = ("mean", figure.mean) if threshold.of == "mean" or end is None else ("95 % interval", end)
    met = value >= threshold.least if threshold.least is not None else value <= (threshold.most or 0.0)
    known = None if math.isnan(value) else value  # a comparison with NaN is not met
    verdict = FEW if figure.patients < least_patients else MET if met else MISSED
    return Row(
        figure.measure, figure.trait, figure.group, figure.patients, of, known, threshold.least, threshold.most, verdict
    )
