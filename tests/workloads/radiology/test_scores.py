"""Dice, NSD and HD95 against MONAI and against naive loops; a missed structure is the worst score, never none."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from monai.metrics import (  # noqa: E402
    compute_dice,
    compute_hausdorff_distance,
    compute_surface_dice,
)
from scipy.ndimage import gaussian_filter  # noqa: E402

from permed_compute.workloads.radiology import scores  # noqa: E402

SPACING = (0.9, 1.3, 2.5)
TOLERANCE = 1.5


def blobs(seed: int, shape: tuple[int, ...] = (18, 15, 11), share: float = 0.15) -> np.ndarray:
    smooth = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5)
    return smooth > np.quantile(smooth, 1 - share)


def onehot(mask: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.stack([~mask, mask])[None])


@pytest.mark.parametrize("seed", range(12))
def test_every_metric_is_monais(seed: int) -> None:
    truth, predicted = blobs(seed, share=0.05 + 0.03 * seed), blobs(seed + 100, share=0.4 - 0.03 * seed)
    found = scores.score(truth, predicted, SPACING, TOLERANCE)
    a, b = onehot(predicted), onehot(truth)
    assert found.dice == pytest.approx(float(compute_dice(a, b, include_background=False)), abs=1e-6)
    assert found.nsd == pytest.approx(float(compute_surface_dice(a, b, [TOLERANCE], spacing=SPACING)), abs=1e-6)
    expected = float(compute_hausdorff_distance(a, b, percentile=95, spacing=SPACING))
    assert found.hd95_mm == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_every_metric_is_that_of_naive_loops(seed: int) -> None:
    shape = (7, 6, 5)
    truth, predicted = blobs(seed, shape, 0.3), blobs(seed + 50, shape, 0.2)
    found = scores.score(truth, predicted, SPACING, TOLERANCE)

    def edge(mask: np.ndarray) -> list[tuple[int, ...]]:
        rows = []
        for at in product(*map(range, shape)):
            if not mask[at]:
                continue
            for axis, step in product(range(3), (-1, 1)):
                to = list(at)
                to[axis] += step
                if not 0 <= to[axis] < shape[axis] or not mask[tuple(to)]:
                    rows.append(at)
                    break
        return rows

    def distances(one: np.ndarray, other: np.ndarray) -> list[float]:
        return [
            min(sum(((p - q) * s) ** 2 for p, q, s in zip(a, b, SPACING, strict=True)) ** 0.5 for b in edge(other))
            for a in edge(one)
        ]

    there, back = distances(truth, predicted), distances(predicted, truth)
    assert found.hd95_mm == pytest.approx(max(np.percentile(there, 95), np.percentile(back, 95)))
    assert found.nsd == pytest.approx(sum(d <= TOLERANCE for d in there + back) / len(there + back))
    both = sum(truth[at] and predicted[at] for at in product(*map(range, shape)))
    assert found.dice == pytest.approx(2 * both / (truth.sum() + predicted.sum()))
    assert found.truth_ml == pytest.approx(truth.sum() * np.prod(SPACING) / 1000)


def test_equal_masks_are_perfect() -> None:
    mask = blobs(3)
    found = scores.score(mask, mask, SPACING, 0.0)
    assert (found.outcome, found.dice, found.nsd, found.hd95_mm) == ("found", 1.0, 1.0, 0.0)


@pytest.mark.parametrize("outcome", ["missed", "invented"])
def test_what_one_of_them_lacks_scores_the_worst_there_is(outcome: str) -> None:
    mask, nothing = blobs(3), np.zeros((18, 15, 11), bool)
    pair = (mask, nothing) if outcome == "missed" else (nothing, mask)
    found = scores.score(*pair, SPACING, TOLERANCE)
    assert (found.outcome, found.dice, found.nsd) == (outcome, 0.0, 0.0)
    assert found.hd95_mm == pytest.approx(np.linalg.norm(np.multiply(mask.shape, SPACING)))
    # No prediction that found anything is farther away than one that found nothing.
    corner = nothing.copy()
    corner[0, 0, 0] = True
    assert scores.score(mask, corner, SPACING, TOLERANCE).hd95_mm < found.hd95_mm


def test_what_both_lack_has_no_score() -> None:
    nothing = np.zeros((4, 4, 4), bool)
    assert scores.score(nothing, nothing, SPACING, 1.0) == scores.Score("absent", None, None, None, 0.0, 0.0)
