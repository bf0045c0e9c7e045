"""Which counts of a frequency register may be published. Pure: arrays in, masks out.

A *cell* is (variant, population). What is published of a cell is AN and AC, nothing else: the number of homozygotes is
a small number where AC is not. Rules, each of which depends on published things only once its outcome is known:

1. *Small cells.* A cell is withheld where at most k of its people carry ALT, none included, or at most k carry REF. A
   reader learns no more than "at most k".
2. *Small populations.* A population of fewer than `least_people` is withheld whole.
3. *Complementary.* The total over populations is published only where no population's cell is withheld: else the
   withheld cells' sum would follow from it. (Withholding a second cell instead leaks: who knows the rule, and that the
   second is the smallest published one, narrows both down. `tests/workloads/omics/test_disclosure.py` shows it.)
4. *Differencing.* Against each earlier release: where between 1 and `least_change` − 1 people joined or left a
   population, nothing is released; and a cell whose AC or REF count moved by 1 … 2k alleles since an earlier release
   that published it is withheld.
5. *Rounding*, where the policy says so, of AC and AN; rule 4 then looks at what was published.

Not covered: somebody who holds a person's genome can tell from very many exact frequencies whether that person is
among the people counted (Homer 2008). Restrict who reads the register, or round.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from permed_compute.errors import Problem, SpecError
from permed_compute.workloads.omics.counting import AlleleCounts


@dataclass(frozen=True, slots=True)
class Policy:
    """k: at most so many carriers are withheld. rounding: AC and AN to multiples, 1 = exact. least_people: of a
    population. least_change: joined and left together, between two releases, unless nobody did."""

    name: str
    k: int
    rounding: int = 1
    least_people: int = 50
    least_change: int = 20


PRESETS = {
    # Norwegian practice (health registers, Data Protection Authority's guide): up to five people are not anonymous.
    "k5": Policy("k5", 5),
    # At most seven, and rounding to fives, as some Nordic statistics agencies publish small areas.
    "k7-rounded": Policy("k7-rounded", 7, rounding=5),
    "k10": Policy("k10", 10, least_people=100, least_change=40),
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


def withhold_differences(new: Published, earlier: Published, policy: Policy) -> tuple[Published, int]:
    """Rule 4 for one earlier release whose rows are in the same order (-1 where it had none): (new, cells withheld)."""
    both = (new.an >= 0) & (earlier.an >= 0)
    alt = np.abs(new.ac - earlier.ac)
    ref = np.abs((new.an - new.ac) - (earlier.an - earlier.ac))
    limit = 2 * policy.k
    small = both & (((alt > 0) & (alt <= limit)) | ((ref > 0) & (ref <= limit)))
    # A total that moved little gives nothing away that its cells do not; a withheld cell takes the total with it.
    populations = small[:, :-1]
    gone = np.column_stack([populations, populations.any(axis=1)])
    withheld = gone & (new.an >= 0)
    return Published(np.where(gone, -1, new.ac), np.where(gone, -1, new.an)), int(withheld.sum())


def changes_allowed(now: dict[str, frozenset[str]], before: dict[str, frozenset[str]], policy: Policy) -> list[str]:
    """Populations in which too few people joined or left since an earlier release: a reason not to release."""
    everybody_now = frozenset().union(*now.values())
    everybody_before = frozenset().union(*before.values())
    moved = {
        name: len(now.get(name, frozenset()) ^ before.get(name, frozenset())) for name in now.keys() | before.keys()
    }
    moved["all"] = len(everybody_now ^ everybody_before)
    return sorted(name for name, count in moved.items() if 0 < count < policy.least_change)


def preset(name: str) -> Policy:
    """Raises `SpecError`."""
    if name not in PRESETS:
        raise SpecError(
            "params", [Problem("params.policy", f"is {name!r}.", remedy=f"Write one of {sorted(PRESETS)}.")]
        )
    return PRESETS[name]
