"""Survival, once for every domain: losses to train by, curves, figures with intervals, and outcomes that are refused.

Times are in any unit, as long as it is one; an event is True where it was seen, False where follow-up ended before.

Losses and figures are defined as torchsurv and scikit-survival define them, and held against both in the tests; why
they are no dependencies: docs/decisions/092.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import Finding, RefusedInput
from permed_compute.learning.concordance import RESAMPLES, Estimate, concordance, draws, estimate, shares

if TYPE_CHECKING:
    import torch

HARRELL, UNO, IBS = "harrell_c", "uno_c", "ibs"
HIGHER_IS_BETTER = {HARRELL: True, UNO: True, IBS: False}


# ------------------------------------------------------------------------------------------------ outcomes


@dataclass(frozen=True, slots=True)
class Outcomes:
    """time: (n,) float64, above 0; event: (n,) bool. One row a person."""

    time: np.ndarray
    event: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def of(self, rows: Sequence[int] | np.ndarray) -> Outcomes:
        return Outcomes(self.time[rows], self.event[rows])


def checked_outcomes(time: Sequence[Any], event: Sequence[Any], *, about: str = "") -> Outcomes:
    """Raises `RefusedInput`: OUTCOME_UNREADABLE, TIME_NEGATIVE (0 too), NO_EVENT, ONE_TIME."""
    try:
        seen = np.array([was_seen(value) for value in event], bool)
        times = np.array([float(value) for value in time], float)
    except (KeyError, TypeError, ValueError):
        raise _refused(
            "OUTCOME_UNREADABLE", "A time is no number, or an event is none of 0, 1, true, false.", about,
            "Write the time as a number and the event as 1 (seen) or 0 (follow-up ended).",
        ) from None  # fmt: skip
    if len(times) != len(seen) or not np.isfinite(times).all():
        raise _refused("OUTCOME_UNREADABLE", "A time or an event is missing.", about, "Leave out who has no follow-up.")
    wrong = int((times <= 0).sum())
    if wrong:
        raise _refused(
            "TIME_NEGATIVE", f"{wrong} times are 0 or negative.", about,
            "Count from the start of follow-up; leave out who has none.", rows=wrong, least=float(times.min()),
        )  # fmt: skip
    if not seen.any():
        raise _refused(
            "NO_EVENT", f"None of {len(seen)} people had the event: there is nothing to learn.", about,
            "Check the column `event`: 1 is seen, 0 is censored.", people=len(seen),
        )  # fmt: skip
    if len(np.unique(times)) < 2:
        raise _refused("ONE_TIME", "All times are the same: nobody comes before another.", about, "Check the times.")
    return Outcomes(times, seen)


def checked_classes(labels: Sequence[str], *, about: str = "") -> tuple[str, ...]:
    """The classes, sorted. Raises `RefusedInput`: LABEL_MISSING, ONE_CLASS."""
    empty = sum(not label for label in labels)
    if empty:
        raise _refused("LABEL_MISSING", f"{empty} have no label.", about, "Leave them out.", rows=empty)
    classes = tuple(sorted(set(labels)))
    if len(classes) < 2:
        raise _refused(
            "ONE_CLASS", f"All {len(labels)} have one label: there is nothing to tell apart.", about,
            "Add people of another class.", people=len(labels),
        )  # fmt: skip
    return classes


_SAID = {"1": True, "0": False, "true": True, "false": False, "1.0": True, "0.0": False}


def was_seen(value: Any) -> bool:
    """An event as tables write it. Raises `KeyError`."""
    return _SAID[str(value).strip().lower()]


def _refused(code: str, sentence: str, about: str, remedy: str, **numbers: Any) -> RefusedInput:
    return RefusedInput(Finding(code, sentence, "refused", about, numbers), remedy=remedy)


# ------------------------------------------------------------------------------------------------ losses


def cox_loss(risk: torch.Tensor, time: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Negative partial log likelihood per event, Efron's ties; 0 where there is no event. risk: (n,) log hazard.

    The risk set is the batch: the mean over parts of a batch is not the loss of the batch.
    """
    import torch

    if not bool(event.any()):
        return risk.sum() * 0.0
    order = torch.argsort(time)
    # Only differences of risks count: the largest taken off, none overflows.
    log_hazard = (risk.double() - risk.detach().double().max())[order]
    seen = event.bool()[order]
    place = torch.unique_consecutive(time[order], return_inverse=True)[1]
    hazard, times = log_hazard.exp(), int(place[-1]) + 1
    at_risk = _summed(hazard, place, times).flip(0).cumsum(0).flip(0)
    tied = _summed(hazard * seen, place, times)
    many = _summed(seen.double(), place, times)
    # Of the people with the event at one time, the k-th of m sees k / m of their hazard gone (Efron 1977).
    before = (many.cumsum(0) - many)[place]
    share = (seen.double().cumsum(0) - 1 - before)[seen] / many[place][seen]
    left = at_risk[place][seen] - share * tied[place][seen]
    return ((left.log() - log_hazard[seen]).sum() / seen.sum()).float()


def _summed(values: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
    """(count,): the sum of the values at each place."""
    return values.new_zeros(count).index_add(0, place, values)


@dataclass(frozen=True, slots=True)
class Bins:
    """Time cut at `edges`, ascending: bin k is (edges[k - 1], edges[k]], the last one has no end."""

    edges: tuple[float, ...]

    @classmethod
    def fit(cls, time: np.ndarray, event: np.ndarray, n: int) -> Bins:
        """Up to `n` bins with as many events in each; fewer where few times differ."""
        seen = np.asarray(time, float)[np.asarray(event, bool)]
        cuts = np.unique(np.quantile(seen, np.linspace(0, 1, n + 1)[1:-1]))
        return cls(tuple(float(cut) for cut in cuts if cut < seen.max()))

    @property
    def count(self) -> int:
        return len(self.edges) + 1

    def index(self, time: np.ndarray) -> np.ndarray:
        """(n,) int64: the bin that each time lies in."""
        return np.searchsorted(np.asarray(self.edges), np.asarray(time, float), side="left").astype(np.int64)


def discrete_loss(logits: torch.Tensor, bins_index: torch.Tensor, event: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood of discrete-time hazards. logits: (n, bins) of the hazard in each bin, given that
    it was reached (Gensheimer & Narasimhan 2019; Zadeh & Schmid 2020).

    Who is censored in a bin counts as having come through it, as in a Kaplan–Meier estimate over the bins.
    """
    import torch
    from torch.nn.functional import logsigmoid

    place = bins_index.long()[:, None]
    through = logsigmoid(-logits.float())
    before = torch.arange(logits.shape[1], device=logits.device)[None] < place
    survived = (through * before).sum(1)
    last = torch.where(event.bool()[:, None], logsigmoid(logits.float()), through).gather(1, place)[:, 0]
    return -(survived + last).mean()


# ------------------------------------------------------------------------------------------------ curves


def curve(logits: torch.Tensor) -> torch.Tensor:
    """(n, bins): the chance to be without the event at the end of each bin."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(-logits.float()).cumsum(1).exp()


def risk_of_curve(survival: np.ndarray) -> np.ndarray:
    """(n,): minus the mean of the curve; higher is sooner."""
    return np.asarray(-np.asarray(survival, float).mean(axis=1))


@dataclass(frozen=True, slots=True)
class Baseline:
    """Breslow's cumulative baseline hazard: what turns a Cox risk into a curve. time: ascending, of events."""

    time: tuple[float, ...]
    hazard: tuple[float, ...]

    @classmethod
    def fit(cls, outcomes: Outcomes, risk: np.ndarray) -> Baseline:
        weight = np.exp(np.asarray(risk, float))
        times, inverse = np.unique(outcomes.time, return_inverse=True)
        at_risk = np.bincount(inverse, weight)[::-1].cumsum()[::-1]
        events = np.bincount(inverse, outcomes.event)
        own = events > 0
        total = np.cumsum(events[own] / at_risk[own])
        return cls(tuple(map(float, times[own])), tuple(map(float, total)))

    def curve(self, risk: np.ndarray, times: Sequence[float] | np.ndarray) -> np.ndarray:
        """(n, times): the chance to be without the event after each time."""
        place = np.searchsorted(np.asarray(self.time), np.asarray(times, float), side="right")
        hazard = np.concatenate([[0.0], self.hazard])[place]
        return np.asarray(np.exp(-np.exp(np.asarray(risk, float))[:, None] * hazard))


@dataclass(frozen=True, slots=True)
class Curve:
    """A step function, 1 before the first time: `survival[k]` holds from `time[k]` on. at_risk: just before it."""

    time: np.ndarray
    survival: np.ndarray
    at_risk: np.ndarray
    people: int
    events: int

    def at(self, time: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self.time, np.asarray(time, float), side="right")
        return np.asarray(np.concatenate([[1.0], self.survival])[place])


def kaplan_meier(time: np.ndarray, event: np.ndarray, groups: Sequence[str] | None = None) -> dict[str, Curve]:
    """A curve for each group; of everybody, under '', where there are none."""
    times, seen = np.asarray(time, float), np.asarray(event, bool)
    names = np.asarray(groups if groups is not None else [""] * len(times))
    return {str(name): _estimated(times[names == name], seen[names == name]) for name in np.unique(names)}


def _estimated(time: np.ndarray, event: np.ndarray, *, of_censoring: bool = False) -> Curve:
    """Product-limit estimate. of_censoring: of not being censored; events at the same time come before."""
    times, inverse = np.unique(time, return_inverse=True)
    leaving = np.bincount(inverse)
    events = np.bincount(inverse, event).astype(int)
    at_risk = leaving[::-1].cumsum()[::-1]
    if of_censoring:
        at_risk, lost = at_risk - events, leaving - events
    else:
        lost = events
    share = np.divide(lost, at_risk, out=np.zeros(len(times)), where=at_risk > 0)
    return Curve(times, np.cumprod(1 - share), at_risk, len(time), int(event.sum()))


# ------------------------------------------------------------------------------------------------ figures


def scores(
    train: Outcomes, test: Outcomes, risk: np.ndarray, curve: np.ndarray | None = None,
    times: Sequence[float] | np.ndarray | None = None, *, seed: int = 0, resamples: int = RESAMPLES,
) -> dict[str, Estimate | None]:  # fmt: skip
    """Harrell's C, Uno's C and the integrated Brier score of `test`, each with its interval over people.

    risk: (n,), higher is sooner. curve: (n, ≥ times) survival at `times`, ascending; without it there is no IBS.
    Censoring is that of `train`; what lies beyond its last time, or the test's for the IBS, is left out. None where a
    figure is not defined.
    """
    counts = draws(len(test), seed, resamples)
    uncensored = _estimated(train.time, train.event, of_censoring=True)
    known = uncensored.at(test.time)
    usable = test.event & (known > 0) & (test.time <= train.time.max())
    weight = np.divide(1.0, known**2, out=np.zeros(len(test)), where=usable)
    values = np.asarray(risk, float)
    later = _later(test)
    found: dict[str, Estimate | None] = {
        HARRELL: concordance(lambda rows: later(rows).astype(float), values, counts),
        UNO: concordance(lambda rows: later(rows) * weight[rows, None], values, counts),
        IBS: None,
    }
    if curve is not None and times is not None:
        found[IBS] = _integrated_brier(train, test, np.asarray(curve, float), np.asarray(times, float), counts)
    return found


def compared(
    test: Outcomes, first: np.ndarray, second: np.ndarray, *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate | None:
    """Harrell's C of the first risk minus that of the second: the same people, drawn together."""
    counts, later = draws(len(test), seed, resamples), _later(test)
    one, other = (
        shares(lambda rows: later(rows).astype(float), np.asarray(risk, float), counts) for risk in (first, second)
    )
    return estimate(one - other)


def _later(test: Outcomes) -> Any:
    """rows → (rows, n) bool: i had the event, and j was then still without it."""

    def pairs(rows: slice) -> np.ndarray:
        time, own = test.time, test.time[rows, None]
        return np.asarray(test.event[rows, None] & ((time > own) | ((time == own) & ~test.event)))

    return pairs


def _integrated_brier(
    train: Outcomes, test: Outcomes, survival: np.ndarray, times: np.ndarray, counts: np.ndarray
) -> Estimate | None:
    """Graf et al. 1999, integrated by trapezoids between the first and the last time."""
    kept = (times >= test.time.min()) & (times < test.time.max()) & (times <= train.time.max())
    if kept.sum() < 2:
        return None
    times, survival = times[kept], survival[:, : len(kept)][:, kept]
    uncensored = _estimated(train.time, train.event, of_censoring=True)
    at_time, at_end = uncensored.at(times), uncensored.at(test.time)
    gone = (test.time[:, None] <= times) & test.event[:, None]
    there = test.time[:, None] > times
    loss = survival**2 * gone * _inverse(at_end)[:, None] + (1 - survival) ** 2 * there * _inverse(at_time)
    own = np.trapezoid(loss, times, axis=1) / (times[-1] - times[0])
    return estimate(counts @ own / counts.sum(1))


def _inverse(chance: np.ndarray) -> np.ndarray:
    return np.asarray(np.divide(1.0, chance, out=np.zeros(len(chance)), where=chance > 0))


def as_rows(found: Mapping[str, Estimate | None]) -> dict[str, dict[str, Any] | None]:
    return {name: None if one is None else one.as_dict() for name, one in found.items()}
