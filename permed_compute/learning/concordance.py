"""Of two people, does the one who should score higher do so? One form of Harrell's and Uno's C.

Each is a weighted share of pairs (i, j) in which i should score higher than j; a tie counts half:

    Harrell C   i had the event at t_i, j was then still without it             weight 1
    Uno C       the same                                                        1 / G(t_i)², G: not yet censored

Drawing people with replacement only changes how often a pair counts, so that a bootstrap is a few matrix products and
its intervals are of the same figure, not of an approximation of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

LEVEL, RESAMPLES = 0.95, 1000
_AT_A_TIME = 1 << 22
"""Entries of a block of pairs: memory stays bounded for any number of people."""

Pairs = Callable[[slice], np.ndarray]
"""rows → (rows, n) float64: weight of each pair (i, j), 0 where the two cannot be compared."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its percentile bootstrap interval over people; None where no draw defines it."""

    value: float
    low: float | None
    high: float | None

    def as_dict(self) -> dict[str, Any]:
        return {"value": self.value, "low": self.low, "high": self.high}


def draws(people: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    """(1 + resamples, people) float64: how often each person counts; the first row is everybody once."""
    chance = np.random.default_rng(seed)
    drawn = chance.multinomial(people, np.full(people, 1 / people), size=resamples)
    return np.concatenate([np.ones((1, people)), drawn])


def estimate(figures: np.ndarray) -> Estimate | None:
    """From the figure of everybody and of each draw; None where everybody's is not defined."""
    if not np.isfinite(figures[0]):
        return None
    known = figures[1:][np.isfinite(figures[1:])]
    if not known.size:
        return Estimate(float(figures[0]), None, None)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(float(figures[0]), float(low), float(high))


def concordance(pairs: Pairs, score: np.ndarray, counts: np.ndarray) -> Estimate | None:
    """score: (n,); counts: of `draws`. None where no pair can be compared."""
    return estimate(shares(pairs, score, counts))


def shares(pairs: Pairs, score: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(draws,): the figure of everybody and of each draw, NaN where no pair can be compared. Of two scores under the
    same `counts`, the difference is paired."""
    people = len(score)
    above, all_of_them = np.zeros(len(counts)), np.zeros(len(counts))
    step = max(1, _AT_A_TIME // max(1, people))
    for first in range(0, people, step):
        rows = slice(first, min(people, first + step))
        weight = pairs(rows)
        wins = (score[rows, None] > score) + 0.5 * (score[rows, None] == score)
        above += (counts[:, rows] * (counts @ (weight * wins).T)).sum(1)
        all_of_them += (counts[:, rows] * (counts @ weight.T)).sum(1)
    return np.asarray(np.divide(above, all_of_them, out=np.full(len(counts), np.nan), where=all_of_them > 0))
