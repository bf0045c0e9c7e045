"""Who is trained on, chosen by, and held out: never one person on two sides. For every domain.

Items that are bound to each other (by a person, a family, the bytes of an image, a site) stay together. Groups are
ordered by digest and seed: the same data are split alike everywhere, and an item that is added moves few others. With
strata, each side has its share of every stratum.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from permed_compute.errors import Finding, RefusedInput, WorkloadError


class Named(Protocol):
    @property
    def name(self) -> str:
        """By digest: the same for the same data everywhere."""
        ...


T = TypeVar("T", bound=Named)
Bound = Callable[[T], Iterable[Hashable]]
"""What an item must not be parted from: items that share one of these are on one side."""

_SAID = {
    "training": "training", "train": "training", "validation": "validation", "val": "validation", "test": "test",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Sides(Generic[T]):
    """Items on each side; `how` in words."""

    training: tuple[T, ...]
    validation: tuple[T, ...]
    test: tuple[T, ...]
    how: str

    def as_dict(self) -> dict[str, Any]:
        sides = {"training": self.training, "validation": self.validation, "test": self.test}
        return {"how": self.how, **{name: sorted(item.name for item in side) for name, side in sides.items()}}


def split(
    found: Sequence[T],
    bound: Bound[T],
    *,
    validation: float,
    test: float,
    seed: int,
    held: Callable[[T], bool] | None = None,
    stratum: Callable[[T], str] | None = None,
    fold: int = 0,
    folds: int = 0,
    how: str = "by patient",
    of: str = "people",
) -> Sides[T]:
    """Shares are of items. held: what is the test side, in place of its share. folds: validation is the fold-th of as
    many parts of what is not test, in place of its share. stratum: a group is of the one that most of it is of.

    Raises `WorkloadError` where a side that is asked for stays empty.
    """
    groups = sorted(grouped(found, bound), key=lambda group: _rank(group, seed))
    strata = _strata(groups, stratum)
    if held is not None:
        tested = [group for group in groups if any(held(item) for item in group)]
    else:
        tested = [group for own in strata for group in _share(own, test * _size(own))]
    rest = [_without(own, tested) for own in strata]
    if folds:
        chosen = _fold(rest, fold, folds)
    else:
        chosen = [
            group for own, left in zip(strata, rest, strict=True) for group in _share(left, validation * _size(own))
        ]
    sides = Sides(
        _flat(group for own in rest for group in _without(own, chosen)), _flat(chosen), _flat(tested),
        f"{how}, seed {seed}" + (f", fold {fold} of {folds}" if folds else ""),
    )  # fmt: skip
    wanted = {
        "training": (sides.training, True), "validation": (sides.validation, bool(validation or folds)),
        "test": (sides.test, bool(test or held is not None)),
    }  # fmt: skip
    empty = [name for name, (side, asked) in wanted.items() if asked and not side]
    if empty:
        raise WorkloadError(
            f"{len(found)} {of} in {len(groups)} groups leave nothing for {' and '.join(empty)}.",
            remedy="Give more patients (or sites), or smaller shares.",
        )
    return sides


def given(found: Sequence[T], bound: Bound[T], side: Callable[[T], str]) -> Sides[T]:
    """Sides as somebody else has drawn them: training, validation or test of each item.

    Raises `RefusedInput`: SPLIT_UNREADABLE, PATIENT_IN_TWO_SPLITS; `WorkloadError` where training is empty.
    """
    placed: dict[str, list[T]] = {"training": [], "validation": [], "test": []}
    parted = 0
    for group in grouped(found, bound):
        said = {_SAID.get(side(item).strip().lower(), "") for item in group}
        if "" in said:
            sentence = "A split is named that is none of training, validation, test."
            raise RefusedInput(Finding("SPLIT_UNREADABLE", sentence, "refused"), remedy="Correct the column `split`.")
        parted += len(said) > 1
        placed[said.pop()] += group
    if parted:
        sentence = f"{parted} patients or families are on two sides of the split that was given."
        raise RefusedInput(
            Finding("PATIENT_IN_TWO_SPLITS", sentence, "refused", numbers={"groups": parted}),
            remedy="Put all of a patient's (and family's) rows on one side, or leave the column out: it is then drawn.",
        )
    if not placed["training"]:
        raise WorkloadError("The split that was given leaves nothing for training.", remedy="See the column `split`.")
    return Sides(tuple(placed["training"]), tuple(placed["validation"]), tuple(placed["test"]), "as given")


def grouped(found: Sequence[T], bound: Bound[T]) -> list[list[T]]:
    """Items that are connected by what binds them, directly or through others."""
    parent = list(range(len(found)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    first: dict[Hashable, int] = {}
    for k, item in enumerate(found):
        for key in bound(item):
            parent[root(k)] = root(first.setdefault(key, k))
    groups: dict[int, list[T]] = {}
    for k, item in enumerate(found):
        groups.setdefault(root(k), []).append(item)
    return list(groups.values())


def _rank(group: Sequence[T], seed: int) -> str:
    return hashlib.sha256(f"{seed} {min(item.name for item in group)}".encode()).hexdigest()


def _strata(groups: Sequence[list[T]], stratum: Callable[[T], str] | None) -> list[list[list[T]]]:
    """Groups by stratum, in their order."""
    found: dict[str, list[list[T]]] = {}
    for group in groups:
        names = [stratum(item) for item in group] if stratum is not None else [""]
        found.setdefault(max(sorted(set(names)), key=names.count), []).append(group)
    return [found[name] for name in sorted(found)]


def _without(groups: Sequence[list[T]], taken: Sequence[list[T]]) -> list[list[T]]:
    known = {id(group) for group in taken}
    return [group for group in groups if id(group) not in known]


def _flat(groups: Iterable[list[T]]) -> tuple[T, ...]:
    return tuple(item for group in groups for item in group)


def _size(groups: Sequence[list[T]]) -> int:
    return sum(map(len, groups))


def _share(groups: Sequence[list[T]], wanted: float) -> list[list[T]]:
    """Groups from the front until they are `wanted` items, but never all of them."""
    taken: list[list[T]] = []
    while _size(taken) < wanted and len(taken) + 1 < len(groups):
        taken.append(groups[len(taken)])
    return taken


def _fold(strata: Sequence[Sequence[list[T]]], fold: int, folds: int) -> list[list[T]]:
    """Each stratum dealt to the part that has least of it; of several, to the smallest."""
    parts: list[list[list[T]]] = [[] for _ in range(folds)]
    sizes = [0] * folds
    for groups in strata:
        own = [0] * folds
        for group in groups:
            k = min(range(folds), key=lambda place: (own[place], sizes[place]))
            parts[k].append(group)
            own[k], sizes[k] = own[k] + len(group), sizes[k] + len(group)
    return parts[fold]
