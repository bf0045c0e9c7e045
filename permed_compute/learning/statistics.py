"""Means with confidence intervals over patients, subgroups against the rest, and two models on the same cases.

Intervals are percentile bootstraps that draw patients, not scans: two scans of one patient are no two pieces of
evidence. Every draw comes from a seed; the same scores give the same interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from permed_compute.errors import WorkloadError

DRAWS = 2000
LEVEL = 0.95
FEW = 5
"""Patients below which a subgroup's figures are called few: they say little, and may say whose they are."""
_AT_A_TIME = 1 << 24


@dataclass(frozen=True, slots=True)
class Estimate:
    """mean over `cases` scores of `patients` people; [low, high] is their 95 % interval (None below two patients)."""

    mean: float
    low: float | None
    high: float | None
    cases: int
    patients: int


def mean(values: Sequence[float], patients: Sequence[str], seed: int = 0) -> Estimate | None:
    """None where there is no value."""
    x = np.asarray(values, float)
    if not len(x):
        return None
    groups = numbered(patients)
    many = int(groups.max()) + 1
    if many < 2:
        return Estimate(float(x.mean()), None, None, len(x), many)
    sums, sizes = np.bincount(groups, x, many), np.bincount(groups, minlength=many).astype(float)
    drawn = np.concatenate([(w @ sums) / (w @ sizes) for w in draws(many, seed)])
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(x.mean()), float(low), float(high), len(x), many)


@dataclass(frozen=True, slots=True)
class Difference:
    """mean difference with its 95 % interval. p: two-sided, None where it was not tested."""

    mean: float
    low: float | None
    high: float | None
    cases: int
    p: float | None = None

    @property
    def is_clear(self) -> bool:
        """The interval leaves out zero."""
        return self.low is not None and self.high is not None and not self.low <= 0 <= self.high


def apart(
    inside: Sequence[float], outside: Sequence[float], patients: tuple[Sequence[str], Sequence[str]], seed: int = 0
) -> Difference | None:
    """Mean of a subgroup minus mean of the rest; None where one of them is empty. A patient may be in both."""
    x = np.concatenate([np.asarray(inside, float), np.asarray(outside, float)])
    if not len(inside) or not len(outside):
        return None
    groups = numbered([*patients[0], *patients[1]])
    is_in = np.arange(len(x)) < len(inside)
    difference = float(x[is_in].mean() - x[~is_in].mean())
    few = min(len(set(patients[0])), len(set(patients[1])))
    if few < 2:
        return Difference(difference, None, None, len(inside))
    many = int(groups.max()) + 1
    parts = [
        (np.bincount(groups[own], x[own], many), np.bincount(groups[own], minlength=many)) for own in (is_in, ~is_in)
    ]
    drawn = []
    for weights in draws(many, seed):
        (a, n), (b, m) = ((weights @ sums, weights @ sizes) for sums, sizes in parts)
        there = (n > 0) & (m > 0)
        drawn.append(a[there] / n[there] - b[there] / m[there])
    low, high = np.quantile(np.concatenate(drawn), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(difference, float(low), float(high), len(inside))


def paired(first: Sequence[float], second: Sequence[float], patients: Sequence[str], seed: int = 0) -> Difference:
    """second − first, case by case; p by Wilcoxon's signed ranks over patients' mean differences.

    Raises `WorkloadError` where the two are not of the same cases.
    """
    if not len(first) == len(second) == len(patients) or not len(first):
        raise WorkloadError("Two models can be compared on the same cases only.")
    from scipy.stats import wilcoxon

    change = np.asarray(second, float) - np.asarray(first, float)
    told = mean(change.tolist(), patients, seed)
    assert told is not None
    groups = numbered(patients)
    per_patient = np.bincount(groups, change) / np.bincount(groups)
    p = 1.0 if not per_patient.any() else float(wilcoxon(per_patient, zero_method="zsplit").pvalue)
    return Difference(told.mean, told.low, told.high, told.cases, p)


def numbered(patients: Sequence[str]) -> np.ndarray:
    """Of each case, the number of its patient, from 0."""
    return np.unique(np.asarray(patients), return_inverse=True)[1]


def draws(many: int, seed: int) -> list[np.ndarray]:
    """How often each patient is drawn: blocks of (draws, patients)."""
    chance = np.random.default_rng(seed)
    step = max(1, min(DRAWS, _AT_A_TIME // many))
    return [
        chance.multinomial(many, np.full(many, 1 / many), size=min(step, DRAWS - first)).astype(float)
        for first in range(0, DRAWS, step)
    ]
