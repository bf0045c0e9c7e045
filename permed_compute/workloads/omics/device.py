"""The two products of packed genotypes on a torch device: bytes are shipped as they lie, and unpacked there.

A byte over the bus is four genotypes. The same functions run with `device="cpu"`, where tests compare them with the
compiled kernels; on the CPU these are faster and are what jobs use.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

_TILE_BYTES = 64 << 20
"""Packed bytes unpacked at a time: the device holds 16 times as much in float32, 32 times in float64."""


def _tiles(packed: np.ndarray, device: str) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(first sample, behind the last, codes (rows, samples) uint8): whole rows of some samples."""
    rows, width = packed.shape
    whole = torch.from_numpy(np.ascontiguousarray(packed)).to(device)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=device)
    step = max(1, _TILE_BYTES // max(1, rows))
    for first in range(0, width, step):
        last = min(first + step, width)
        yield 4 * first, 4 * last, ((whole[:, first:last, None] >> shifts) & 3).flatten(1)


def score(packed: np.ndarray, copies: np.ndarray, absent: np.ndarray, samples: int, device: str) -> np.ndarray:
    """As `packed.score`: (samples, k) float64. The products are float32 without TF32; call it with 1,000 rows or so."""
    out = np.empty((4 * packed.shape[1], copies.shape[1]))
    given, instead = (torch.from_numpy(np.ascontiguousarray(one, np.float32)).to(device) for one in (copies, absent))
    for first, last, codes in _tiles(packed, device):
        missing = codes == 3
        sums = codes.masked_fill(missing, 0).float().T @ given + missing.float().T @ instead
        out[first:last] = sums.cpu().numpy()
    return out[:samples]


def products(packed: np.ndarray, table: np.ndarray, right: np.ndarray, device: str) -> np.ndarray:
    """(rows, k) float64: genotypes (by `table`, (rows, 4)) times `right` (people, k).

    In float64: a rare allele's effect needs it, and the product is so narrow that memory decides.
    """
    people, columns = right.shape
    given = torch.zeros((4 * packed.shape[1], columns), dtype=torch.float64)
    given[:people] = torch.from_numpy(np.ascontiguousarray(right, np.float64))
    given = given.to(device)
    none, one, two, gone = (
        torch.from_numpy(np.ascontiguousarray(table[:, code, None], np.float64)).to(device) for code in range(4)
    )
    out = torch.zeros((len(packed), columns), dtype=torch.float64, device=device)
    for first, last, codes in _tiles(packed, device):
        low, high = (codes & 1).double(), (codes >> 1).double()
        values = none + (one - none) * low + (two - none) * high + (gone - one - two + none) * (low * high)
        out += values @ given[first:last]
    return np.asarray(out.cpu().numpy())
