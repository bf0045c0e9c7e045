"""Lesion by lesion: which were found, what was found that is none, and how that trades against confidence (FROC).

A lesion is a connected component (26 neighbours). Predicted ones are taken from the most to the least confident; each
finds the lesion it overlaps most (by intersection over union) among those not found yet, where that is at least `iou`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

IOU = 0.1
"""Least overlap of a detection, as is usual for small lesions in 3-D (nnDetection; LUNA16 asks for the centre only)."""
RATES = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""False positives per case at which sensitivity is read; their mean is LUNA16's score (Setio et al. 2017)."""


@dataclass(frozen=True, slots=True)
class Detections:
    """Of one case. sizes_ml, found: of each true lesion. hits, alarms: confidence of each true and false positive."""

    sizes_ml: tuple[float, ...]
    found: tuple[bool, ...]
    hits: tuple[float, ...]
    alarms: tuple[float, ...]

    def as_dict(self) -> dict[str, Any]:
        return {
            "sizes_ml": list(self.sizes_ml), "found": list(self.found), "hits": list(self.hits),
            "alarms": list(self.alarms),
        }  # fmt: skip


def detect(
    truth: np.ndarray,
    predicted: np.ndarray,
    voxel_ml: float,
    probability: np.ndarray | None = None,
    *,
    iou: float = IOU,
    least_ml: float = 0.0,
) -> Detections:
    """Two bool masks. A predicted lesion's confidence is its largest probability, 1 where none is given.

    least_ml: predicted components smaller than this are no detections; true ones always count.
    """
    lesions, found_components = _components(truth), _components(predicted)
    true_sizes = np.bincount(lesions.reshape(-1))[1:]
    sizes = np.bincount(found_components.reshape(-1))[1:]
    confidence = _confidence(found_components, len(sizes), probability)
    taken = [False] * len(true_sizes)
    hits, alarms = [], []
    kept = [k for k in range(len(sizes)) if sizes[k] * voxel_ml >= least_ml]
    for k in sorted(kept, key=lambda k: (-confidence[k], k)):
        overlap = np.bincount(lesions[found_components == k + 1], minlength=len(true_sizes) + 1)[1:]
        share = overlap / (true_sizes + sizes[k] - overlap)
        free = [lesion for lesion in range(len(true_sizes)) if not taken[lesion] and overlap[lesion]]
        best = max(free, key=lambda lesion: share[lesion], default=None)
        if best is not None and share[best] >= iou:
            taken[best] = True
            hits.append(float(confidence[k]))
        else:
            alarms.append(float(confidence[k]))
    volumes = tuple(round(float(size) * voxel_ml, 6) for size in true_sizes)
    return Detections(volumes, tuple(taken), tuple(hits), tuple(alarms))


def _components(mask: np.ndarray) -> np.ndarray:
    import cc3d

    return np.asarray(cc3d.connected_components(np.ascontiguousarray(mask), connectivity=26))


def _confidence(components: np.ndarray, count: int, probability: np.ndarray | None) -> np.ndarray:
    if probability is None or not count:
        return np.ones(count)
    from scipy import ndimage

    return np.asarray(ndimage.maximum(probability, components, np.arange(1, count + 1)), float)


@dataclass(frozen=True, slots=True)
class Froc:
    """false_per_case, sensitivity: the curve, from the most confident on. score: mean sensitivity at `RATES`."""

    false_per_case: tuple[float, ...]
    sensitivity: tuple[float, ...]
    at_rates: tuple[float, ...]
    score: float
    lesions: int
    found: int
    false: int


def froc(cases: Sequence[Detections]) -> Froc | None:
    """Over all cases, those without a lesion too (their false positives count). None where there is no lesion at all.

    Sensitivity between two points of the curve is interpolated, beyond the last it stays.
    """
    lesions = sum(len(case.found) for case in cases)
    if not lesions:
        return None
    hits = np.array([value for case in cases for value in case.hits])
    alarms = np.array([value for case in cases for value in case.alarms])
    thresholds = np.unique(np.concatenate([hits, alarms]))[::-1]
    false = [0.0, *(float(np.count_nonzero(alarms >= at)) / len(cases) for at in thresholds)]
    sensitivity = [0.0, *(float(np.count_nonzero(hits >= at)) / lesions for at in thresholds)]
    at_rates = tuple(float(value) for value in np.interp(RATES, false, sensitivity))
    return Froc(
        tuple(false), tuple(sensitivity), at_rates, float(np.mean(at_rates)), lesions, len(hits), len(alarms)
    )  # fmt: skip
