"""Pruning by linkage: of two variants near each other that tell the same, the rarer is left out.

The rule is plink2's `--indep-pairwise WINDOW STEP R2`: squared correlation of genotypes over the people called in both,
windows of so many variants, the one of higher minor allele frequency stays, the first where they are equal.
"""

from __future__ import annotations

import numpy as np
import torch

from permed_compute.workloads.omics import packed as bits

_TIE = 1e-9


def independent(packed: np.ndarray, samples: int, *, window: int = 200, step: int = 50, r2: float = 0.2) -> np.ndarray:
    """(rows,) bool: which rows of one chromosome, in their order, stay."""
    rows = len(packed)
    counted = bits.counts(packed, samples)
    frequency = (counted[:, 1] + 2 * counted[:, 2]) / np.maximum(2 * counted[:, :3].sum(axis=1), 1)
    minor = np.minimum(frequency, 1 - frequency)
    stays = minor > 0
    seen = 0
    for start in range(0, rows, step):
        end = min(start + window, rows)
        if end > seen:
            near = np.flatnonzero(stays[start:end]) + start
            first_new = int(np.searchsorted(near, seen))
            _thin(near, _r2(packed[near], samples, first_new), first_new, minor, stays, r2)
        seen = end
        if end == rows:
            break
    return np.asarray(stays)


def _thin(
    near: np.ndarray, squared: np.ndarray, first_new: int, minor: np.ndarray, stays: np.ndarray, r2: float
) -> None:
    """Every row in turn takes out one row that tells the same (or itself), and again until none does: plink's order."""
    waiting = [iter((np.flatnonzero(line > r2) + first_new).tolist()) for line in squared]
    again = True
    while again:
        again = False
        for i, row in enumerate(near):
            if not stays[row]:
                continue
            j = next((j for j in waiting[i] if j > i and stays[near[j]]), None)
            if j is not None:
                stays[row if minor[row] < minor[near[j]] * (1 - _TIE) else near[j]] = False
                again = True


def _r2(packed: np.ndarray, samples: int, first_new: int) -> np.ndarray:
    """(rows, rows - first_new) float64: squared correlation of every row with each new one. The sums are whole numbers,
    exact in float32 up to four million people."""
    one = np.ones((len(packed), 1), np.float32)

    def unpacked(values: list[float]) -> torch.Tensor:
        view = np.empty((len(packed), 4 * packed.shape[1]), np.float32)
        bits.unpack_table(packed, one * np.array(values, np.float32), 0, view)
        return torch.from_numpy(view)[:, :samples]

    packed = np.ascontiguousarray(packed)
    copies, squares, known = unpacked([0, 1, 2, 0]), unpacked([0, 1, 4, 0]), unpacked([1, 1, 1, 0])

    def sums(one: torch.Tensor, two: torch.Tensor) -> np.ndarray:
        return np.asarray((one @ two[first_new:].T).double().numpy())

    n, xy = sums(known, known), sums(copies, copies)
    x, y, xx, yy = sums(copies, known), sums(known, copies), sums(squares, known), sums(known, squares)
    spread = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(np.where(spread > 0, (n * xy - x * y) ** 2 / spread, 0.0))
