"""Gantry tilt and uneven gaps corrected, on request only: what dcm2niix writes as `_Tilt` and `_Eq`, computed alike.

Tilted slices are moved along their columns until they stand above each other (linear between rows, padded where
nothing was scanned), then new slices are interpolated at one gap. The grid starts at the first slice's first row. No
detail comes back that was not scanned: where slices lay 7 mm apart they still do. Never for series with holes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from permed_compute.errors import Finding, RefusedInput
from permed_compute.workloads.radiology import geometry, read
from permed_compute.workloads.radiology.geometry import Slice
from permed_compute.workloads.radiology.read import Series, Volume

CORRECTED = ("GANTRY_TILT", "UNEVEN_GAPS")
SIDEWAYS_PIXELS = 0.1
"""A stack that also leans along its rows is not a tilted gantry."""
MOST_TIMES = 2
"""Slices are at most doubled (dcm2niix)."""


def assemble(series: Series, threads: int = 1) -> Volume:
    """`read.assemble`, where a tilted or unevenly spaced series is straightened. `slices` is then empty.

    Raises `RefusedInput` as `read.assemble` does for everything else, and TILT_TWO_WAYS.
    """
    try:
        return read.assemble(series, threads)
    except RefusedInput as error:
        if error.finding.code not in CORRECTED:
            raise
        return _straightened(series, error.finding, threads)


def _straightened(series: Series, why: Finding, threads: int) -> Volume:
    slices, findings = read.in_order(series)
    array, notes = read.decode(slices, series.digest, threads)
    header = read.header_of(slices[0])
    steps = _steps(slices, series.digest)
    orientation = np.asarray(slices[0].orientation, float)
    between_rows, between_columns = slices[0].spacing or (0.0, 0.0)
    padding = _padding(header, slices[0])
    array, first_row = sheared(array, steps[:, 1] / between_rows, padding)
    array, gap = even(array, steps[:, 2])
    affine = np.eye(4)
    affine[:3, 0] = orientation[:3] * between_columns
    affine[:3, 1] = orientation[3:] * between_rows
    affine[:3, 2] = geometry.normal(orientation.tolist()) * gap
    affine[:3, 3] = np.asarray(slices[0].position, float) + first_row * affine[:3, 1]
    sentence = (
        f"{why.sentence} Corrected: {array.shape[2]} slices {gap:.4f} mm apart were interpolated from {len(slices)}."
    )
    numbers = {**why.numbers, "slices_made": array.shape[2], "gap_mm": round(gap, 6)}
    done = Finding(f"{why.code}_CORRECTED", sentence, "corrected", series.digest, numbers)
    return Volume(array, affine, (), header, series.digest, series.modality, (*findings, *notes, done))


def _steps(slices: Sequence[Slice], about: str) -> np.ndarray:
    """(slices, 3) mm from the first slice along its rows, columns and normal."""
    orientation = np.asarray(slices[0].orientation, float)
    positions = np.array([item.position for item in slices], float)
    axes = np.stack([orientation[:3], orientation[3:], geometry.normal(orientation.tolist())], 1)
    steps: np.ndarray = (positions - positions[0]) @ axes
    sideways = float(np.abs(steps[:, 0]).max() / (slices[0].spacing or (0, 1))[1])
    if sideways > SIDEWAYS_PIXELS:
        geometry.refuse(
            "TILT_TWO_WAYS", f"The slices also step {sideways:.2f} pixels along their rows; only a tilted gantry is"
            " corrected.", about, pixels=round(sideways, 4),
        )  # fmt: skip
    return steps


def _padding(header: Any, first: Slice) -> float | None:
    """PixelPaddingValue as a modality value: what lies next to it is not mixed with it."""
    stored = header.get("PixelPaddingValue") if header is not None else None
    return None if stored is None else float(stored) * first.slope + first.intercept


def sheared(array: np.ndarray, shift: np.ndarray, padding: float | None) -> tuple[np.ndarray, int]:
    """Each slice k moved by shift[k] rows (axis 1) onto slice 0's rows; the array grows by as many, and says how many
    rows of it lie before slice 0's first.

    array: (columns, rows, slices). Linear between rows; nearest next to `padding`. Rounded where the array is whole.
    """
    columns, rows, slices = array.shape
    before, after = int(np.ceil(max(0.0, -shift.min()))), int(np.ceil(max(0.0, shift.max())))
    fill = array.min() if padding is None else padding
    out = np.full((columns, before + rows + after, slices), fill, array.dtype)
    if not before and not after:
        return array, 0
    for k in range(slices):
        source = np.arange(-before, rows + after) - np.float32(shift[k])
        there = (source > -1) & (source <= rows - 1)
        low = np.floor(source[there]).astype(int)
        share = (source[there] - low).astype(np.float32)
        first, second = (array[:, np.clip(low + add, 0, rows - 1), k].astype(np.float32) for add in (0, 1))
        mixed = first * (1 - share) + second * share
        if padding is not None:
            beside = (first == padding) | (second == padding)
            mixed = np.where(beside, np.where(share >= 0.5, second, first), mixed)
        out[:, there, k] = _as(mixed, array.dtype)
    return out, -before


def even(array: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, float]:
    """Slices at one gap from the first to the last, linear between those at `at` (mm, ascending from 0); and the gap:
    the smallest that was or a little less, or what doubles the slices where that is larger."""
    at = at.astype(np.float32)
    gaps = np.diff(at)
    gap = np.float32(gaps.min())
    if gaps.max() - gap <= max(geometry.GAP_ABSOLUTE_MM, geometry.GAP_RELATIVE * float(np.median(gaps))):
        return array, float(at[-1]) / (len(at) - 1)
    count = min(int(np.ceil(at[-1] / gap - 1e-3)) + 1, MOST_TIMES * len(at))
    gap = np.float32(at[-1] / (count - 1))
    out = np.empty((*array.shape[:2], count), array.dtype)
    for k in range(count):
        place = np.float32(k) * gap
        high = min(int(np.searchsorted(at, place, side="left")), len(at) - 1)
        low = max(high - 1, 0)
        if low == high or place > at[high]:
            out[..., k] = array[..., high]
            continue
        share = np.float32((place - at[low]) / (at[high] - at[low]))
        mixed = array[..., low].astype(np.float32) * (np.float32(1) - share)
        out[..., k] = _as(mixed + array[..., high].astype(np.float32) * share, array.dtype)
    return out, float(gap)


def _as(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Whole types: rounded, halves away from zero as C's `round` does."""
    if np.issubdtype(dtype, np.integer):
        values = np.copysign(np.floor(np.abs(values) + np.float32(0.5)), values)
    return values.astype(dtype)
