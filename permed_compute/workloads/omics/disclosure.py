"""Which counts of a frequency register may be published. Pure: arrays in, masks out.

A *cell* is (variant, population). What is published of a cell is AN and AC, nothing else: the number of homozygotes is
a small number where AC is not. Rules, each of which depends on published things only once its outcome is known:

1. *Small cells.* A cell is withheld where at most k of its people carry ALT, none included, or at most k carry REF. A
   reader learns no more than "at most k".
2. *Small populations.* A population of fewer than `least_people` is withheld whole.
3. *Complementary.* The total over populations is published only where no population's cell is withheld: else the
   withheld cells' sum would follow from it. (Withholding a second cell instead leaks: who knows the rule, and that the
   second is the smallest published one, narrows both down. `tests/workloads/omics/test_disclosure.py` shows it.)
4. *Differencing.* Every release counts a part of the people only: some are set aside, by chance, and who is told
   nowhere. Where somebody left or joined, at least `exchange` people leave the count and as many come in, further ones
   by chance. So a count that did not move says nothing about who left: those who came in may have made up for it. (If
   people only left, an unchanged count would tell that none of them carries the allele.) A cell that moved so far that
   the alleles of those who left, or of those who came, are known within 2k is withheld.
5. *Rounding*, where the policy says so, of AC and AN; rule 4 then looks at what was published.

Not covered: somebody who holds a person's genome can tell from very many exact frequencies whether that person is
among the people counted (Homer 2008). Restrict who reads the register, or round.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from permed_compute.errors import Problem, SpecError
from permed_compute.workloads.omics.counting import AlleleCounts


@dataclass(frozen=True, slots=True)
class Policy:
    """k: at most so many carriers are withheld. rounding: AC and AN to multiples, 1 = exact. least_people: of a
    population. exchange: so many leave and so many come in, at least, between two releases that differ; more than k."""

    name: str
    k: int
    rounding: int = 1
    least_people: int = 50
    exchange: int = 10

    def aside(self, people: int) -> int:
        """How many of a population are not counted: enough for two exchanges, and five in a hundred."""
        return max(2 * self.exchange, math.ceil(people / 20))


PRESETS = {
    # Norwegian practice (health registers, Data Protection Authority's guide): up to five people are not anonymous.
    "k5": Policy("k5", 5),
    # At most seven, and rounding to fives, as some Nordic statistics agencies publish small areas.
    "k7-rounded": Policy("k7-rounded", 7, rounding=5),
    "k10": Policy("k10", 10, least_people=100, exchange=20),
}


@dataclass(frozen=True, slots=True)
class Published:
    """(variants, populations + 1) int64, the last column the total; -1 = withheld."""

    ac: np.ndarray
    an: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """Variants that have something published."""
        return np.asarray((self.an >= 0).any(axis=1))


def publish(counted: list[AlleleCounts], people: list[int], policy: Policy) -> Published:
    """Rules 1, 2, 3 and 5 on the exact counts of each population."""
    ac = np.stack([one.ac for one in counted], axis=1)
    an = np.stack([one.an for one in counted], axis=1)
    carriers = np.stack([one.carriers for one in counted], axis=1)
    ref_carriers = np.stack([one.ref_carriers for one in counted], axis=1)
    open_cells = (carriers > policy.k) & (ref_carriers > policy.k)
    open_cells &= (np.array(people) >= policy.least_people)[None, :]
    return _shown(ac, an, open_cells, policy.rounding)


def _shown(ac: np.ndarray, an: np.ndarray, open_cells: np.ndarray, rounding: int) -> Published:
    whole = open_cells.all(axis=1)
    shown = np.column_stack([open_cells, whole])
    values = [np.column_stack([column, column.sum(axis=1)]) for column in (ac, an)]
    if rounding > 1:
        values = [(value + rounding // 2) // rounding * rounding for value in values]
    return Published(*(np.where(shown, value, -1) for value in values))


def withhold_differences(
    new: Published, earlier: Published, left: np.ndarray, joined: np.ndarray, policy: Policy
) -> tuple[Published, int]:
    """Rule 4 for one earlier release whose rows are in the same order (-1 where it had none): (new, cells withheld).

    left, joined: (variants, populations) int64, how many alleles those have, at most, who left the count since then,
    and who came into it.
    """
    both = ((new.an >= 0) & (earlier.an >= 0))[:, :-1]
    called = (new.an - earlier.an)[:, :-1]
    came = np.minimum(joined, left + called)  # where all who left were called; fewer, where AN moved otherwise
    went = came - called
    close = np.zeros_like(both)
    for before, now in ((earlier.ac, new.ac), (earlier.an - earlier.ac, new.an - new.ac)):
        moved = (now - before)[:, :-1]
        # What left is between these two: those who came in have between none and all of their alleles.
        least, most = np.maximum(0, -moved), np.minimum(went, came - moved)
        close |= most - least < 2 * policy.k
    close &= both & (left + joined > 0)
    # Withheld before and shown now: those who came in must be able to carry all of it, else those who stayed did, and
    # that the cell was withheld tells of those who left.
    opened = ((new.an >= 0) & (earlier.an < 0))[:, :-1]
    close |= opened & (np.minimum(new.ac, new.an - new.ac)[:, :-1] > joined)
    gone = np.column_stack([close, close.any(axis=1)])  # a withheld cell takes the total with it
    withheld = gone & (new.an >= 0)
    return Published(np.where(gone, -1, new.ac), np.where(gone, -1, new.an)), int(withheld.sum())


def first_count(people: frozenset[str], policy: Policy, chance: random.Random) -> frozenset[str]:
    """Who of a population is counted in a register's first release."""
    return people - _some(people, min(len(people), policy.aside(len(people))), chance)


def next_count(
    people: frozenset[str], before: frozenset[str], policy: Policy, chance: random.Random
) -> frozenset[str] | None:
    """Who is counted where `before` were and somebody left or joined; None where too few are left to exchange."""
    left = before - people
    out = policy.exchange + len(left)
    fresh = people - before
    into = max(policy.exchange, len(people) - policy.aside(len(people)) - len(before) + out)
    if into > len(fresh) or policy.exchange > len(before - left):
        return None
    return (before - left - _some(before - left, policy.exchange, chance)) | _some(fresh, into, chance)


def _some(people: Iterable[str], count: int, chance: random.Random) -> frozenset[str]:
    return frozenset(chance.sample(sorted(people), count))


def apart(now: frozenset[str], before: frozenset[str], policy: Policy) -> bool:
    """Whether two counts of a population may both be published: of the same people, or of enough others both ways."""
    return now == before or min(len(now - before), len(before - now)) >= policy.exchange


def preset(name: str) -> Policy:
    """Raises `SpecError`."""
    if name not in PRESETS:
        raise SpecError(
            "params", [Problem("params.policy", f"is {name!r}.", remedy=f"Write one of {sorted(PRESETS)}.")]
        )
    return PRESETS[name]
