"""Which scans are trained on, chosen by, and held out: never one patient on two sides.

Scans that share a patient, or the bytes of an image (one scan listed under two names), stay together, and so
do those of a site where the split is by site. Groups are ordered by digest and seed: the same data are split alike
everywhere, and a scan that is added moves few others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.errors import WorkloadError
from permed_compute.workloads.port import Context
from permed_compute.workloads.radiology.evaluate import content_digest, traits_of
from permed_compute.workloads.radiology.patches import Case


@dataclass(frozen=True, slots=True)
class Scan:
    """A labelled case of the list. subject: a pseudonym. name: by digest. traits: site, scanner, sex, age group."""

    case: Case
    subject: str
    digests: tuple[str, ...]
    traits: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"case-{hashlib.sha256(' '.join(self.digests).encode()).hexdigest()[:16]}"


def scans(index: Path, ctx: Context, age_edges: Sequence[float] = (18, 40, 65, 80)) -> list[Scan]:
    """The labelled rows of a Decathlon list's `training`. Raises `WorkloadError`; a row without subject is its own."""
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))["training"]
        labelled = [dict(row) for row in rows if row["label"] and row["image"]]
    except (OSError, ValueError, KeyError, TypeError):
        labelled = []
    if not labelled:
        raise WorkloadError(
            "The list has no labelled scans.", remedy='Write {"training": [{"image", "label", "subject"}]}.'
        )
    return [_scan(row, index.parent, ctx, age_edges) for row in labelled]


def _scan(row: Mapping[str, Any], folder: Path, ctx: Context, age_edges: Sequence[float]) -> Scan:
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    case = Case(tuple(folder / image for image in images), folder / row["label"])
    assert case.label is not None
    if not all(path.exists() for path in (*case.images, case.label)):
        raise WorkloadError("A scan of the list is not there.", remedy="Paths are relative to the list's folder.")
    digests = tuple(content_digest(path, ctx) for path in (*case.images, case.label))
    subject = ctx.pseudonym(str(row["subject"])) if row.get("subject") not in (None, "") else digests[0]
    return Scan(case, subject, digests, traits_of(row, age_edges))


@dataclass(frozen=True, slots=True)
class Split:
    """Scans on each side; `how` in words."""

    training: tuple[Scan, ...]
    validation: tuple[Scan, ...]
    test: tuple[Scan, ...]
    how: str

    def as_dict(self) -> dict[str, Any]:
        sides = {"training": self.training, "validation": self.validation, "test": self.test}
        return {"how": self.how, **{name: sorted(scan.name for scan in side) for name, side in sides.items()}}


def split(
    found: Sequence[Scan],
    *,
    validation: float,
    test: float,
    seed: int,
    by_site: bool = False,
    hold_out: Sequence[str] = (),
    fold: int = 0,
    folds: int = 0,
) -> Split:
    """Shares are of scans. hold_out: sites that are the test set, in place of a share. folds: validation is the
    fold-th of as many parts of what is not test, in place of its share.

    Raises `WorkloadError` where a side that is asked for stays empty.
    """
    groups = sorted(_groups(found, by_site), key=lambda group: _rank(group, seed))
    if hold_out:
        held = [group for group in groups if any(scan.traits.get("site") in hold_out for scan in group)]
    else:
        held = _share(groups, test * len(found))
    rest = [group for group in groups if group not in held]
    chosen = _fold(rest, fold, folds) if folds else _share(rest, validation * len(found))
    sides = [group for group in rest if group not in chosen], chosen, held
    training, validated, tested = (tuple(scan for group in side for scan in group) for side in sides)
    wanted = {
        "training": (training, True), "validation": (validated, bool(validation or folds)),
        "test": (tested, bool(test or hold_out)),
    }  # fmt: skip
    empty = [name for name, (side, asked) in wanted.items() if asked and not side]
    if empty:
        raise WorkloadError(
            f"{len(found)} scans in {len(groups)} groups leave nothing for {' and '.join(empty)}.",
            remedy="Give more patients (or sites), or smaller shares.",
        )
    how = f"by {'site' if by_site else 'patient'}, seed {seed}"
    how += f", sites held out: {', '.join(hold_out)}" if hold_out else ""
    how += f", fold {fold} of {folds}" if folds else ""
    return Split(training, validated, tested, how)


def _groups(found: Sequence[Scan], by_site: bool) -> list[list[Scan]]:
    """Scans that are connected by a patient, by bytes, or by a site."""
    parent = list(range(len(found)))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = parent[k]
        return k

    first: dict[tuple[str, str], int] = {}
    for k, scan in enumerate(found):
        keys = [("subject", scan.subject), *(("image", digest) for digest in scan.digests[:-1])]
        keys += [("site", scan.traits.get("site", ""))] if by_site else []
        for key in keys:
            parent[root(k)] = root(first.setdefault(key, k))
    groups: dict[int, list[Scan]] = {}
    for k, scan in enumerate(found):
        groups.setdefault(root(k), []).append(scan)
    return list(groups.values())


def _rank(group: Sequence[Scan], seed: int) -> str:
    return hashlib.sha256(f"{seed} {min(scan.name for scan in group)}".encode()).hexdigest()


def _share(groups: Sequence[list[Scan]], wanted: float) -> list[list[Scan]]:
    """Groups from the front until they are `wanted` scans, but never all of them."""
    taken: list[list[Scan]] = []
    while sum(map(len, taken)) < wanted and len(taken) + 1 < len(groups):
        taken.append(groups[len(taken)])
    return taken


def _fold(groups: Sequence[list[Scan]], fold: int, folds: int) -> list[list[Scan]]:
    parts: list[list[list[Scan]]] = [[] for _ in range(folds)]
    for group in groups:
        min(parts, key=lambda part: sum(map(len, part))).append(group)
    return parts[fold]
