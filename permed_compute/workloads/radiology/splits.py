"""Which scans are trained on, chosen by, and held out: never one patient on two sides.

Scans that share a patient, or the bytes of an image (one scan listed under two names), stay together, and so
do those of a site where the split is by site. How they are then drawn: `permed_compute.learning.splits`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.errors import WorkloadError
from permed_compute.learning import splits
from permed_compute.workloads.port import Context
from permed_compute.workloads.radiology import volume_files
from permed_compute.workloads.radiology.evaluate import traits_of
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
    return [scan_of(row, index.parent, ctx, age_edges) for row in labelled]


def scan_of(
    row: Mapping[str, Any], folder: Path, ctx: Context, age_edges: Sequence[float] = (18, 40, 65, 80), said: str = ""
) -> Scan:
    """said: what is known of the whole scan, in place of a label's file. Raises `WorkloadError`."""
    images = row["image"] if isinstance(row["image"], list) else [row["image"]]
    case = Case(tuple(folder / image for image in images), None if said else folder / row["label"])
    there = (*case.images, *([case.label] if case.label else []))
    if not all(path.exists() for path in there):
        raise WorkloadError("A scan of the list is not there.", remedy="Paths are relative to the list's folder.")
    digests = tuple(volume_files.content_digest(path, ctx) for path in there)
    digests += (hashlib.sha256(said.encode()).hexdigest(),) if said else ()
    subject = ctx.pseudonym(str(row["subject"])) if row.get("subject") not in (None, "") else digests[0]
    return Scan(case, subject, digests, traits_of(row, age_edges))


Split = splits.Sides[Scan]


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
    stratum: Callable[[Scan], str] | None = None,
) -> Split:
    """Shares are of scans. hold_out: sites that are the test set, in place of a share. See `learning.splits.split`."""

    def bound(scan: Scan) -> list[tuple[str, str]]:
        keys = [("subject", scan.subject), *(("image", digest) for digest in scan.digests[:-1])]
        return [*keys, ("site", scan.traits.get("site", ""))] if by_site else keys

    how = f"by {'site' if by_site else 'patient'}" + (f", sites held out: {', '.join(hold_out)}" if hold_out else "")
    return splits.split(
        found, bound, validation=validation, test=test, seed=seed, fold=fold, folds=folds, how=how, of="scans",
        held=(lambda scan: scan.traits.get("site") in hold_out) if hold_out else None, stratum=stratum,
    )  # fmt: skip
