"""Whether a probability means what it says: of what is called 0.8, is 80 % so?

Counted per case in bins and added up over cases, so that the whole is exact and no voxel is kept. Of patients or
studies, each is one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

BINS = 10
LEAST = 0.01
"""Voxels outside the structure below this are left out: air that is surely air would make any model look calibrated."""


def counts(truth: np.ndarray, probability: np.ndarray, least: float = LEAST) -> dict[str, list[float]]:
    """Per bin of equal width: voxels, the sum of their probabilities, those that are of the structure; and Brier's sum.

    Voxels count where the probability is at least `least` or the truth is true: 0 where all do.
    """
    there = truth | (probability >= least)
    p, y = np.clip(probability[there].astype(float), 0, 1), truth[there]
    bins = np.minimum((p * BINS).astype(int), BINS - 1)
    return {
        "voxels": np.bincount(bins, minlength=BINS).astype(float).tolist(),
        "confidence": np.bincount(bins, p, BINS).tolist(),
        "positive": np.bincount(bins, y, BINS).tolist(),
        "brier": [float(((p - y) ** 2).sum())],
    }


def summary(cases: Sequence[Mapping[str, Sequence[float]]]) -> dict[str, Any] | None:
    """Expected and maximum calibration error, Brier score and the reliability curve; None without a voxel."""
    if not cases:
        return None
    voxels, confidence, positive = (
        np.sum([case[name] for case in cases], axis=0) for name in ("voxels", "confidence", "positive")
    )
    total = float(voxels.sum())
    if not total:
        return None
    used = voxels > 0
    said, is_so = confidence[used] / voxels[used], positive[used] / voxels[used]
    gap = np.abs(said - is_so)
    return {
        "ece": float((gap * voxels[used]).sum() / total), "mce": float(gap.max()),
        "brier": float(sum(case["brier"][0] for case in cases)) / total,
        "said": said.tolist(), "is_so": is_so.tolist(), "voxels": voxels[used].tolist(),
    }  # fmt: skip
