"""A cohort: whose slides, what became of each patient, and the features that stand for the slides.

    slide,patient,label,time,event,family,split,site,scanner,sex,age

`slide` is a slide or store, relative to the table, or its name (`slide-` and 16 digits, as `pathology/encode` gives);
only `slide` and `patient` must be there. The slides of one patient are one bag: the outcome is the patient's
(docs/decisions/091). Identifiers leave this module as pseudonyms and digests only.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, NotFoundError, RefusedInput
from permed_compute.learning.evidence import UNSAID
from permed_compute.workloads.pathology import features, store
from permed_compute.workloads.port import Context

COHORT, FEATURES, SLIDES = "cohort", "features", "slides"
TRAITS = ("site", "scanner", "sex", "age")
_OUTCOME = ("label", "time", "event")
_COLUMNS = {"slide", "patient", "family", "split", *_OUTCOME, *TRAITS}
_NAME = re.compile(r"slide-[0-9a-f]{16}")
_AGES = (18, 40, 65, 80)


@dataclass(frozen=True, slots=True)
class Slide:
    """name: by digest. features: their Zarr, which may not be there. source: the slide's pixels, where known."""

    name: str
    features: Path
    source: Path | None = None


@dataclass(frozen=True, slots=True)
class Patient:
    """name: by the slides' digests. subject, family: pseudonyms. outcome: label, time, event, split as they stand."""

    name: str
    subject: str
    family: str
    slides: tuple[Slide, ...]
    outcome: Mapping[str, str] = field(default_factory=dict)
    traits: Mapping[str, str] = field(default_factory=dict)

    def bound(self) -> list[tuple[str, str]]:
        """What a split must not part."""
        keys = [("patient", self.subject), *(("slide", slide.name) for slide in self.slides)]
        return [*keys, ("family", self.family)] if self.family else keys


@dataclass(frozen=True, slots=True)
class Kind:
    """What features are: a model knows only those that it was trained on. mpp in µm per pixel, size in pixels of it."""

    encoder: str
    encoder_digest: str
    mpp: float
    size: int
    dim: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def refused(code: str, sentence: str, remedy: str, about: str = "", **numbers: Any) -> RefusedInput:
    return RefusedInput(Finding(code, sentence, "refused", about, numbers), remedy=remedy)


# ------------------------------------------------------------------------------------------------ the table


def patients(ctx: Context) -> list[Patient]:
    """Of the inputs `cohort`, `features` and, where given, `slides`; without a cohort each slide is a patient's own.

    Raises `RefusedInput`: COHORT_UNREADABLE, SLIDE_MISSING, SLIDE_OF_TWO_PATIENTS, PATIENT_IN_TWO_SPLITS,
    OUTCOME_CONFLICTS.
    """
    folder, sources = ctx.input(FEATURES), _sources(ctx)
    if not any(ref.name == COHORT for ref in ctx.spec.inputs):
        names = sorted(path.stem for path in folder.glob("slide-*.zarr"))
        slides = [Slide(name, folder / f"{name}.zarr", sources.get(name)) for name in names]
        return [Patient(_named([slide]), slide.name, "", (slide,)) for slide in slides]
    table = ctx.input(COHORT)
    rows: dict[str, list[tuple[Slide, Mapping[str, str]]]] = {}
    owner: dict[str, str] = {}
    for row in _rows(table):
        slide = _slide(row["slide"], table.parent, folder, sources, ctx)
        if owner.setdefault(slide.name, row["patient"]) != row["patient"]:
            raise refused(
                "SLIDE_OF_TWO_PATIENTS", "A slide is listed under two patients.",
                "Correct `patient`: the same bytes are one slide.", slide.name,
            )  # fmt: skip
        rows.setdefault(row["patient"], []).append((slide, row))
    return [_patient(name, rows[name], ctx) for name in rows]


def _rows(table: Path) -> list[Mapping[str, str]]:
    try:
        with table.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            names = [str(name).strip() for name in reader.fieldnames or ()]
            rows = [_stripped(row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error, AttributeError):
        names, rows = [], []
    wrong = sorted(set(names) - _COLUMNS)
    if (
        not rows
        or not {"slide", "patient"} <= set(names)
        or wrong
        or not all(r["slide"] and r["patient"] for r in rows)
    ):
        sentence = f"The cohort cannot be read{f': no such column as {wrong[0]!r}' if wrong else ''}."
        remedy = (
            f"A CSV file whose first line names columns of {', '.join(sorted(_COLUMNS))}; slide and patient filled."
        )
        raise refused("COHORT_UNREADABLE", sentence, remedy)
    return rows


def _stripped(row: Mapping[Any, Any]) -> Mapping[str, str]:
    return {str(key).strip(): str(value or "").strip() for key, value in row.items() if key}


def _sources(ctx: Context) -> dict[str, Path]:
    """Slides of the input `slides`, by name."""
    place = next((Path(ref.path) for ref in ctx.spec.inputs if ref.name == SLIDES), None)
    found = store.find_slides(place) if place is not None else []
    return {f"slide-{store.digest_of(path, ctx.digest)[:16]}": path for path in found}


def _slide(cell: str, folder: Path, where: Path, sources: Mapping[str, Path], ctx: Context) -> Slide:
    known = _NAME.fullmatch(cell.removesuffix(".zarr"))
    if known:
        return Slide(known.group(), where / f"{known.group()}.zarr", sources.get(known.group()))
    path = folder / cell
    if not path.exists():
        raise refused(
            "SLIDE_MISSING", "A slide of the cohort is not there.",
            "Paths are relative to the table; or write the names that `features.csv` has.",
        )  # fmt: skip
    name = f"slide-{store.digest_of(path, ctx.digest)[:16]}"
    return Slide(name, where / f"{name}.zarr", path)


def _patient(identifier: str, rows: Sequence[tuple[Slide, Mapping[str, str]]], ctx: Context) -> Patient:
    slides = tuple({slide.name: slide for slide, _ in rows}.values())
    name, said = _named(slides), rows[0][1]
    for key in ("split", "family", *_OUTCOME):
        if len({row.get(key, "") for _, row in rows}) > 1:
            code = "PATIENT_IN_TWO_SPLITS" if key == "split" else "OUTCOME_CONFLICTS"
            raise refused(
                code, f"The rows of a patient differ in `{key}`.", "All slides of a patient have the patient's.", name
            )
    family = said.get("family", "")
    return Patient(
        name, ctx.pseudonym(identifier), ctx.pseudonym(family) if family else "", slides,
        {key: said.get(key, "") for key in ("split", *_OUTCOME)}, _traits(said),
    )  # fmt: skip


def _named(slides: Iterable[Slide]) -> str:
    return f"patient-{hashlib.sha256(' '.join(sorted(slide.name for slide in slides)).encode()).hexdigest()[:16]}"


def _traits(row: Mapping[str, str]) -> dict[str, str]:
    traits = {name: row.get(name) or UNSAID for name in TRAITS}
    try:
        place = int(np.searchsorted(_AGES, float(traits["age"]), side="right"))
    except ValueError:
        return traits
    ends = [0, *_AGES]
    traits["age"] = f"{ends[place]} and older" if place == len(_AGES) else f"{ends[place]} to under {ends[place + 1]}"
    return traits


# ------------------------------------------------------------------------------------------------ the features


@dataclass(frozen=True, slots=True)
class Tiles:
    """Of one slide. coords: (n, 2) level-0 corners; values: (n, dim) float16, mapped; facts: of the grid."""

    coords: np.ndarray
    values: np.ndarray
    facts: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        facts = self.facts
        return Kind(
            str(facts.get("encoder", "")), str(facts.get("encoder_digest", "")), float(facts["target_mpp"]),
            int(facts["patch_size"]), int(self.values.shape[1]),
        )  # fmt: skip


def tiles_of(slide: Slide, known: Kind | None = None, encoder: str = "") -> Tiles:
    """Raises `RefusedInput`: NO_FEATURES; against `known` also ENCODER_DIFFERS, MPP_DIFFERS; `NotFoundError` where
    there are several encoders and none is named."""
    if not slide.features.is_dir():
        raise refused(
            "NO_FEATURES", "A slide has no features.", "Run pathology/encode over it; see the findings of that job.",
            slide.name,
        )  # fmt: skip
    if known is not None and not encoder and any(slide.features.glob(f"grids/*/features/{known.encoder}")):
        encoder = known.encoder
    try:
        coords, values, facts = features.read(slide.features, encoder=encoder)
    except NotFoundError as error:
        raise refused("NO_FEATURES", error.message, f"Name one as `encoder`. {error.remedy}", slide.name) from None
    found = Tiles(coords, values, facts)
    kind = found.kind
    if not len(values):
        raise refused("NO_FEATURES", "A slide has no tile.", "Leave it out.", slide.name)
    if known is not None and kind != known:
        if (kind.encoder, kind.encoder_digest, kind.dim) != (known.encoder, known.encoder_digest, known.dim):
            raise refused(
                "ENCODER_DIFFERS", f"Features are of {kind.encoder}, not of {known.encoder} with the same weights.",
                "Encode all slides by one encoder.", slide.name, dim=kind.dim, wanted=known.dim,
            )  # fmt: skip
        raise refused(
            "MPP_DIFFERS", f"Tiles are {kind.size} pixels of {kind.mpp:g} µm, not {known.size} of {known.mpp:g} µm.",
            "Encode all slides at one resolution.", slide.name, mpp=kind.mpp, wanted=known.mpp,
        )  # fmt: skip
    return found


def content(slide: Slide, ctx: Context) -> str:
    """Digest of a slide's features: of all files, so that another encoder's in the same Zarr is another content."""
    return store.digest_of(slide.features, ctx.digest)


def looked_at(cohort: Sequence[Patient], encoder: str = "") -> tuple[Kind, dict[str, int]]:
    """What all features are, and the tiles of each slide. Raises as `tiles_of`."""
    kind: Kind | None = None
    counts: dict[str, int] = {}
    for patient in cohort:
        for slide in patient.slides:
            found = tiles_of(slide, kind, encoder)
            kind = kind or found.kind
            counts[slide.name] = len(found.values)
    if kind is None:
        raise refused("NO_FEATURES", "There is no slide with features.", "Give the folder that pathology/encode wrote.")
    return kind, counts


@dataclass(frozen=True)
class Bags:
    """A map-style dataset of bags; subsampled by the global stream, which `learning.order.Seeded` seeds."""

    cohort: Sequence[Patient]
    counts: Mapping[str, int]
    most: int = 0
    """Tiles of a bag; 0 is all."""
    encoder: str = ""

    def __len__(self) -> int:
        return len(self.cohort)

    def __getitem__(self, index: int) -> tuple[int, np.ndarray]:
        """(index, (n, dim) float16)."""
        slides = self.cohort[index].slides
        counts = [self.counts[slide.name] for slide in slides]
        total = sum(counts)
        if not self.most or total <= self.most:
            return index, _joined([tiles_of(slide, encoder=self.encoder).values for slide in slides])
        import torch

        chosen = np.sort(torch.randperm(total)[: self.most].numpy())  # in order: pages are read once
        parts, first = [], 0
        for slide, count in zip(slides, counts, strict=True):
            own = chosen[(chosen >= first) & (chosen < first + count)] - first
            if len(own):
                parts.append(tiles_of(slide, encoder=self.encoder).values[own])
            first += count
        return index, _joined(parts)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    """What is one already is not copied: it may be mapped, and is copied into its batch anyway."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)
