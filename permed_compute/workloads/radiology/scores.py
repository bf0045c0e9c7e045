"""How well one structure is segmented: Dice, normalised surface distance (NSD), and the 95 % Hausdorff distance (HD95).

A structure that one of the two masks lacks scores the worst there is (0, 0, the diagonal of the field of view), never
NaN: a mean that drops it gets better where a model fails (MONAI#9095). Where both lack it, nothing was to be found and
nothing was: it has no score, and is counted as such.

Borders are voxels with a neighbour outside across a face (or at the image's edge); distances are between their centres,
in mm. Definitions: Maier-Hein et al., Metrics reloaded (2024); NSD: Nikolov et al. (2021); HD95 is the larger of both
directed 95th percentiles, as MONAI takes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

Outcome = Literal["found", "missed", "invented", "absent"]
"""found: both have it. missed: only the truth. invented: only the prediction. absent: neither."""

METRICS = ("dice", "nsd", "hd95_mm")
HIGHER_IS_BETTER = {"dice": True, "nsd": True, "hd95_mm": False}


@dataclass(frozen=True, slots=True)
class Score:
    """One structure of one case. The three figures are None only where `outcome` is `absent`."""

    outcome: Outcome
    dice: float | None
    nsd: float | None
    hd95_mm: float | None
    truth_ml: float
    predicted_ml: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def score(truth: np.ndarray, predicted: np.ndarray, spacing: Sequence[float], tolerance_mm: float) -> Score:
    """Two bool masks of one shape, spacing in mm; NSD counts borders within `tolerance_mm` of each other."""
    voxel_ml = float(np.prod(spacing)) / 1000
    sizes = int(np.count_nonzero(truth)), int(np.count_nonzero(predicted))
    volumes = sizes[0] * voxel_ml, sizes[1] * voxel_ml
    if not all(sizes):
        if not any(sizes):
            return Score("absent", None, None, None, 0.0, 0.0)
        worst = float(np.linalg.norm(np.multiply(truth.shape, spacing)))
        return Score("missed" if sizes[0] else "invented", 0.0, 0.0, worst, *volumes)
    box = _box_of(truth | predicted)
    truth, predicted = truth[box], predicted[box]
    shared = int(np.count_nonzero(truth & predicted))
    to_predicted, to_truth = _border_distances(truth, predicted, spacing)
    within = np.count_nonzero(to_predicted <= tolerance_mm) + np.count_nonzero(to_truth <= tolerance_mm)
    hd95 = max(float(np.percentile(to_predicted, 95)), float(np.percentile(to_truth, 95)))
    nsd = within / (len(to_predicted) + len(to_truth))
    return Score("found", 2 * shared / sum(sizes), nsd, hd95, *volumes)


def _box_of(mask: np.ndarray) -> tuple[slice, ...]:
    found = []
    for axis in range(mask.ndim):
        marked = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        found.append(slice(int(marked[0]), int(marked[-1]) + 1))
    return tuple(found)


def _border_distances(a: np.ndarray, b: np.ndarray, spacing: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """mm from each border voxel of `a` to the nearest of `b`, and the other way."""
    from scipy.spatial import cKDTree

    first, second = (np.argwhere(border(mask)) * np.asarray(spacing, float) for mask in (a, b))
    return cKDTree(second).query(first)[0], cKDTree(first).query(second)[0]


def border(mask: np.ndarray) -> np.ndarray:
    """Voxels of the mask that touch the outside across a face; the image's edge is outside."""
    padded = np.pad(mask, 1)
    inner = mask.copy()
    middle = slice(1, -1)
    for axis in range(mask.ndim):
        for shifted in (slice(None, -2), slice(2, None)):
            inner &= padded[tuple(shifted if other == axis else middle for other in range(mask.ndim))]
    return np.asarray(mask & ~inner)
