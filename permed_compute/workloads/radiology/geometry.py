"""Where the slices of a series lie, and whether they form one regular volume. Numbers only; reads no file.

A regular volume is what DICOM PS3.3 C.7.6.2.1.1 makes possible and does not promise: every slice has one orientation,
one spacing and one matrix, and the positions step evenly along the normal. Instance numbers, slice locations and
declared spacings promise nothing and are only compared with what was measured. Each refusal names its numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from permed_compute.errors import Finding, RefusedInput

GAP_RELATIVE = 0.01
GAP_ABSOLUTE_MM = 0.02
"""A gap may differ from the regular one by the larger of 1 % and 0.02 mm: above the rounding of DS text, far below a
slice."""
SAME_PLACE_MM = 0.01
TILT_DEGREES = 0.1
TILT_OFFSET_MM = 0.05
"""Tilt is seen where the stack leans by more than the angle and by more than the length; a short stack of rounded
positions leans by an angle alone."""
DRIFT_OF_GAP = 0.1
"""No slice lies further from its place in the regular grid than this share of a gap."""
ORIENTATION = 1e-4
"""Direction cosines are the same within this; unit length and right angle within ten times as much."""
LISTED = 200
"""Lists in a finding stop here; the counts beside them do not."""
_RESAMPLE = "Ingest it with `tilt: correct` (permed convert --tilt correct), which resamples it, and keep the original."


@dataclass(frozen=True, slots=True)
class Slice:
    """One image plane, as its header has it. Lengths in mm, patient axes LPS (x to left, y to back, z to head).

    source, frame: where its pixels are (`read.open_source`); frame counts from 0, None in a single-frame image.
    spacing: (between rows, between columns), the order of DICOM's PixelSpacing. None: the header does not say.
    """

    source: str
    digest: str
    frame: int | None
    sop_class: str
    sop_instance: str
    rows: int
    columns: int
    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    slope: float = 1.0
    intercept: float = 0.0
    photometric: str = "MONOCHROME2"
    samples: int = 1
    modality_lut: bool = False
    frame_of_reference: str = ""
    patient: str = field(default="", repr=False)
    number: int | None = None
    expected: int | None = None
    thickness: float | None = None
    declared_gap: float | None = None
    tilt: float = 0.0
    localiser: bool = False
    overlong: bool = False
    native: tuple[int, int, int, bool] | None = None
    """Where uncompressed little-endian pixels stand in the source: offset, bits allocated, bits stored, signed."""
    unreadable: str = ""
    """Keyword of the first geometry attribute whose text is not numbers."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Slices that form a regular volume, in order along the normal. `affine`: (column, row, slice, 1) → LPS mm."""

    slices: tuple[Slice, ...]
    affine: np.ndarray
    findings: tuple[Finding, ...]


def refuse(code: str, sentence: str, about: str, remedy: str = "", **numbers: Any) -> NoReturn:
    """Raise `RefusedInput` with that finding."""
    finding = Finding(code=code, sentence=sentence, severity="refused", about=about, numbers=numbers)
    raise RefusedInput(finding, remedy=remedy)


def normal(orientation: Sequence[float]) -> np.ndarray:
    """Unit normal of a plane from ImageOrientationPatient: row direction × column direction."""
    cosines = np.asarray(orientation, dtype=float)
    across: np.ndarray = np.cross(cosines[:3], cosines[3:])
    return np.asarray(across / np.linalg.norm(across))


def without_localisers(slices: Sequence[Slice], about: str) -> tuple[list[Slice], list[Finding]]:
    """Planes that call themselves LOCALIZER (ImageType value 3) are set aside where others remain."""
    kept = [item for item in slices if not item.localiser]
    if not kept or len(kept) == len(slices):
        return list(slices), []
    count = len(slices) - len(kept)
    sentence = f"{count} localiser image(s) inside the series were set aside; {len(kept)} slices remain."
    return kept, [Finding("LOCALISER_SET_ASIDE", sentence, "corrected", about, {"localisers": count})]


def check_uniform(slices: Sequence[Slice], about: str) -> None:
    """Refuse slices that cannot belong to one grid: what differs, and by how much."""
    _check_readable(slices, about)
    patients = len({item.patient for item in slices})
    if patients > 1:
        refuse(
            "MIXED_PATIENTS", f"The series holds images of {patients} patient identifiers.", about, patients=patients
        )
    places = {item.frame_of_reference for item in slices}
    if len(places) > 1:
        refuse(
            "MIXED_FRAME_OF_REFERENCE", f"The series has {len(places)} frames of reference; their positions cannot be"
            " compared.", about, frames_of_reference=len(places),
        )  # fmt: skip
    matrices = sorted({(item.rows, item.columns) for item in slices})
    if len(matrices) > 1:
        refuse(
            "MIXED_MATRIX", f"The series has {len(matrices)} image sizes.", about,
            rows=[m[0] for m in matrices[:LISTED]], columns=[m[1] for m in matrices[:LISTED]],
        )  # fmt: skip
    _check_directions(slices, about)
    spacings = np.array([item.spacing for item in slices])
    if np.ptp(spacings, axis=0).max() > 1e-4 * spacings.min():
        refuse(
            "MIXED_SPACING", "The pixel spacing differs between slices.", about,
            min_mm=spacings.min(axis=0).tolist(), max_mm=spacings.max(axis=0).tolist(),
        )  # fmt: skip


def _check_readable(slices: Sequence[Slice], about: str) -> None:
    garbled = [item for item in slices if item.unreadable]
    if garbled:
        refuse(
            "ATTRIBUTE_UNREADABLE", f"{garbled[0].unreadable} of {len(garbled)} slice(s) is not a list of numbers.",
            about, slices=len(garbled), of=len(slices),
        )  # fmt: skip
    bare = [item for item in slices if item.position is None or item.orientation is None or item.spacing is None]
    if bare:
        if any(item.frame is not None for item in bare):
            sentence = (
                f"{len(bare)} of {len(slices)} frames of a multi-frame image have no position, orientation and spacing."
            )
            refuse("MULTIFRAME_NO_GEOMETRY", sentence, about, frames=len(bare), of=len(slices))
        sentence = (
            f"{len(bare)} of {len(slices)} slices lack ImagePositionPatient, ImageOrientationPatient or PixelSpacing."
        )
        refuse("NO_GEOMETRY", sentence, about, slices=len(bare), of=len(slices))
    coloured = [item for item in slices if item.samples != 1 or not item.photometric.startswith("MONOCHROME")]
    if coloured:
        refuse(
            "NOT_GREYSCALE", f"{len(coloured)} of {len(slices)} slices are not greyscale.", about, slices=len(coloured)
        )
    if any(item.modality_lut for item in slices):
        refuse(
            "MODALITY_LUT", "The pixel values go through a table (ModalityLUTSequence), which is not supported.", about
        )
    wrong = [item for item in slices if item.slope == 0]
    if wrong:
        refuse("RESCALE_INVALID", f"RescaleSlope of {len(wrong)} slice(s) is zero.", about, slices=len(wrong))


def _check_directions(slices: Sequence[Slice], about: str) -> None:
    cosines = np.array([item.orientation for item in slices])
    rows, columns = cosines[:, :3], cosines[:, 3:]
    lengths = np.concatenate([np.linalg.norm(rows, axis=1), np.linalg.norm(columns, axis=1)])
    slant = np.abs(np.sum(rows * columns, axis=1)).max()
    if np.abs(lengths - 1).max() > 10 * ORIENTATION or slant > 10 * ORIENTATION:
        refuse(
            "ORIENTATION_INVALID", "ImageOrientationPatient is not two unit vectors at a right angle.", about,
            length_min=float(lengths.min()), length_max=float(lengths.max()), dot_product_max=float(slant),
        )  # fmt: skip
    first = cosines[0]
    if np.abs(cosines - first).max() > ORIENTATION:
        normals = np.cross(rows, columns)
        angles = np.degrees(np.arccos(np.clip(normals @ normals[0], -1, 1)))
        groups = len(np.unique(np.round(cosines / (10 * ORIENTATION)), axis=0))
        odd = int((np.abs(cosines - first).max(axis=1) > ORIENTATION).sum())
        refuse(
            "MIXED_ORIENTATION", f"The series has slices of {groups} orientations, up to {angles.max():.1f}° apart.",
            about, orientations=groups, angle_max_degrees=float(angles.max()), unlike_the_first=odd, slices=len(slices),
        )  # fmt: skip
    if min(min(item.spacing or (0,)) for item in slices) <= 0:
        refuse("SPACING_INVALID", "PixelSpacing is not above zero.", about)


def check_instances(slices: Sequence[Slice], about: str) -> None:
    """Refuse different planes that bear one SOP instance UID: one of them is not what it says."""
    names = [(item.sop_instance, item.frame) for item in slices if item.sop_instance]
    twice = len(names) - len(set(names))
    if twice:
        refuse(
            "DUPLICATE_SOP_UID", f"{twice} slice(s) bear the SOP instance UID of a slice elsewhere.", about,
            "Export the series again from its archive.", duplicates=twice, slices=len(slices),
        )  # fmt: skip


def ordered(slices: Sequence[Slice]) -> list[Slice]:
    """By projection of the position on the normal, ascending; ties by digest and frame, so that the order is one."""
    across = normal(slices[0].orientation or ())
    return sorted(slices, key=lambda s: (float(np.dot(s.position or (), across)), s.digest, s.frame or 0))


def same_place(slices: Sequence[Slice]) -> list[list[int]]:
    """Groups of two or more indices of ordered slices that lie at one position (within 0.01 mm)."""
    positions = np.array([item.position for item in slices])
    groups: list[list[int]] = []
    current = [0]
    for index in range(1, len(slices)):
        if np.linalg.norm(positions[index] - positions[current[0]]) <= SAME_PLACE_MM:
            current.append(index)
            continue
        groups.append(current)
        current = [index]
    return [group for group in [*groups, current] if len(group) > 1]


def regular(slices: Sequence[Slice], about: str) -> Stack:
    """The stack of ordered slices without duplicates, or `RefusedInput` with tilt, gaps and missing slices measured."""
    if len(slices) < 2:
        refuse("SINGLE_SLICE", "The series has one slice; a volume needs at least two.", about, slices=len(slices))
    positions = np.array([item.position for item in slices])
    across = normal(slices[0].orientation or ())
    gaps = np.diff(positions @ across)
    numbers: dict[str, Any] = {
        "slices": len(slices), "gap_min_mm": round(float(gaps.min()), 6),
        "gap_median_mm": round(float(np.median(gaps)), 6), "gap_max_mm": round(float(gaps.max()), 6),
    }  # fmt: skip
    _check_tilt(slices, positions, across, numbers, about)
    _check_gaps(gaps, numbers, about)
    _check_drift(positions, numbers, about)
    return Stack(tuple(slices), _affine(slices[0], positions), tuple(_notes(slices, float(gaps.mean()), about)))


def _check_tilt(
    slices: Sequence[Slice], positions: np.ndarray, across: np.ndarray, numbers: dict[str, Any], about: str
) -> None:
    step = positions[-1] - positions[0]
    along = float(step @ across)
    offset = float(np.linalg.norm(step - along * across))
    tilt = float(np.degrees(np.arctan2(offset, abs(along))))
    if tilt <= TILT_DEGREES or offset <= TILT_OFFSET_MM:
        return
    declared = slices[0].tilt
    uneven = numbers["gap_max_mm"] - numbers["gap_min_mm"] > _tolerance(numbers["gap_median_mm"])
    refuse(
        "GANTRY_TILT",
        f"The slices are sheared: they step {tilt:.2f}° away from their normal ({offset:.1f} mm over the stack;"
        f" GantryDetectorTilt says {declared:g}°), with gaps of {numbers['gap_min_mm']:.2f} to"
        f" {numbers['gap_max_mm']:.2f} mm.",
        about, _RESAMPLE,
        tilt_degrees=round(tilt, 4), declared_tilt_degrees=declared, offset_mm=round(offset, 4), uneven_gaps=uneven,
        **numbers,
    )  # fmt: skip


def _tolerance(gap: float) -> float:
    return max(GAP_ABSOLUTE_MM, GAP_RELATIVE * gap)


def _check_gaps(gaps: np.ndarray, numbers: dict[str, Any], about: str) -> None:
    unit = float(gaps.min())
    if gaps.max() - unit <= _tolerance(float(np.median(gaps))):
        return
    between = f"gaps of {unit:.3f} to {gaps.max():.3f} mm (median {np.median(gaps):.3f})"
    # Holes are whole multiples of the smallest gap; a smallest gap near the tolerance proves nothing.
    times = np.round(gaps / unit).astype(int) if unit > 4 * GAP_ABSOLUTE_MM else np.zeros(len(gaps), dtype=int)
    holes = np.flatnonzero(times > 1)
    if unit > 4 * GAP_ABSOLUTE_MM and np.all(np.abs(gaps - times * unit) <= times * _tolerance(unit)):
        missing = int((times - 1).sum())
        refuse(
            "MISSING_SLICES", f"{missing} slice(s) are missing in {holes.size} place(s): {between}.", about,
            "Fetch the whole series again.", missing=missing, places=int(holes.size),
            after_index=holes[:LISTED].tolist(), missing_there=(times[holes] - 1)[:LISTED].tolist(), **numbers,
        )  # fmt: skip
    odd = np.flatnonzero(np.abs(gaps - np.median(gaps)) > _tolerance(float(np.median(gaps))))
    refuse(
        "UNEVEN_GAPS", f"The slices do not step evenly: {between}.", about,
        _RESAMPLE,
        uneven=int(odd.size), after_index=odd[:LISTED].tolist(), **numbers,
    )  # fmt: skip


def _check_drift(positions: np.ndarray, numbers: dict[str, Any], about: str) -> None:
    grid = positions[0] + np.linspace(0, 1, len(positions))[:, None] * (positions[-1] - positions[0])
    drift = np.linalg.norm(positions - grid, axis=1)
    if drift.max() > max(GAP_ABSOLUTE_MM, DRIFT_OF_GAP * numbers["gap_median_mm"]):
        worst = int(drift.argmax())
        refuse(
            "OFF_GRID", f"Slices lie up to {drift.max():.3f} mm from a straight, even line.", about,
            drift_max_mm=round(float(drift.max()), 6), at_index=worst, **numbers,
        )  # fmt: skip


def _affine(first: Slice, positions: np.ndarray) -> np.ndarray:
    orientation = np.asarray(first.orientation, dtype=float)
    between_rows, between_columns = first.spacing or (0.0, 0.0)
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * between_columns
    affine[:3, 1] = orientation[3:] * between_rows
    affine[:3, 2] = (positions[-1] - positions[0]) / (len(positions) - 1)
    affine[:3, 3] = positions[0]
    return affine


# ---------------------------------------------------------------------- what a reader must know, but may go on with


def _notes(slices: Sequence[Slice], gap: float, about: str) -> list[Finding]:
    notes = [_incomplete(slices, about), _instance_order(slices, about), _rescale(slices, about)]
    first = slices[0]
    if abs(first.tilt) > TILT_DEGREES:
        sentence = f"GantryDetectorTilt says {first.tilt:g}°, but the positions step along the normal; positions count."
        notes.append(Finding("TILT_DECLARED", sentence, "note", about, {"declared_tilt_degrees": first.tilt}))
    if first.declared_gap is not None and abs(abs(first.declared_gap) - gap) > _tolerance(gap):
        sentence = f"SpacingBetweenSlices says {first.declared_gap:g} mm, the positions {gap:.4f} mm; positions count."
        numbers = {"declared_mm": first.declared_gap, "measured_mm": round(gap, 6)}
        notes.append(Finding("SPACING_DECLARED_DIFFERS", sentence, "note", about, numbers))
    overlong = sum(item.overlong for item in slices)
    if overlong:
        sentence = f"Decimal texts longer than the 16 characters that DICOM allows, in {overlong} slices; read in full."
        notes.append(Finding("OVERLONG_DECIMAL", sentence, "note", about, {"slices": overlong}))
    if not first.frame_of_reference:
        sentence = "The series names no frame of reference; results get one of their own."
        notes.append(Finding("NO_FRAME_OF_REFERENCE", sentence, "note", about))
    return [note for note in notes if note is not None]


def _incomplete(slices: Sequence[Slice], about: str) -> Finding | None:
    """Slices cut off at an end leave no gap: only the numbering or ImagesInAcquisition can tell, where they are there.

    Not seen: slices missing after the last number, in a series without ImagesInAcquisition.
    """
    given = [item.number for item in slices if item.number is not None]
    found: dict[str, Any] = {}
    if len(set(given)) == len(slices):
        low, high = min(given), max(given)
        if low > 1:
            found["first_number"] = low
        if high - low + 1 > len(slices):
            found["numbers_not_there"] = high - low + 1 - len(slices)
    expected = max((item.expected or 0 for item in slices), default=0)
    if expected > len(slices):
        found["images_in_acquisition"] = expected
    if not found:
        return None
    what = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items())
    sentence = f"The even stack of {len(slices)} slices may be part of a longer one: {what}."
    return Finding("INCOMPLETE_SUSPECTED", sentence, "note", about, {"slices": len(slices), **found})


def _instance_order(slices: Sequence[Slice], about: str) -> Finding | None:
    numbers = [item.number for item in slices if item.number is not None]
    if len(numbers) < len(slices):
        return None
    steps = np.diff(numbers)
    backwards = int(min((steps <= 0).sum(), (steps >= 0).sum()))
    if not backwards:
        return None
    sentence = f"InstanceNumber does not follow the positions ({backwards} steps the other way); positions count."
    return Finding("INSTANCE_NUMBER_DISORDER", sentence, "note", about, {"steps": backwards})


def _rescale(slices: Sequence[Slice], about: str) -> Finding | None:
    slopes = [item.slope for item in slices]
    intercepts = [item.intercept for item in slices]
    if len(set(slopes)) == 1 and len(set(intercepts)) == 1:
        return None
    sentence = "The rescale slope or intercept differs between slices; each slice was scaled by its own."
    numbers = {
        "slope_min": min(slopes), "slope_max": max(slopes),
        "intercept_min": min(intercepts), "intercept_max": max(intercepts),
    }  # fmt: skip
    return Finding("RESCALE_VARIES", sentence, "note", about, numbers)
