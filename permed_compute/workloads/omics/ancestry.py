"""Principal components of ancestry, their projection, and KING's robust kinship, out of packed genotypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from permed_compute.workloads.omics import packed as bits

_TILE = 256


@dataclass(frozen=True, slots=True)
class Components:
    """scores: (samples, k) unit columns; eigenvalues: (k,) of Z'Z / variants; loadings: (variants, k).
    frequency: ALT's, (variants,).

    change: the last relative change of an eigenvalue; iterations: passes made.
    """

    scores: np.ndarray
    eigenvalues: np.ndarray
    loadings: np.ndarray
    frequency: np.ndarray
    change: float
    iterations: int


def _table(frequency: np.ndarray) -> np.ndarray:
    """(rows, 4) float32: a genotype standardised by √(2 p (1 − p)) (Patterson 2006); missing = the mean = 0."""
    spread = np.sqrt(np.maximum(2 * frequency * (1 - frequency), 1e-12))
    table = (np.array([0.0, 1.0, 2.0, 0.0]) - 2 * frequency[:, None]) / spread[:, None]
    table[:, 3] = 0
    return np.asarray(table, np.float32)


def frequencies(packed: np.ndarray, samples: int) -> np.ndarray:
    """ALT frequency of each row among the called."""
    counted = bits.counts(packed, samples)
    known = np.maximum(2 * counted[:, :3].sum(axis=1), 1)
    return np.asarray((counted[:, 1] + 2 * counted[:, 2]) / known)


def _tiles(packed: np.ndarray, table: np.ndarray) -> Iterator[tuple[int, int, torch.Tensor]]:
    width = packed.shape[1]
    room = np.empty((_TILE, 4 * width), np.float32)
    for row in range(0, len(packed), _TILE):
        end = min(row + _TILE, len(packed))
        view = room[: end - row]
        bits.unpack_table(packed[row:end], table[row:end], 0, view)
        yield row, end, torch.from_numpy(view)


def principal_components(
    packed: np.ndarray, samples: int, count: int, *, tolerance: float = 1e-7, most: int = 100, seed: int = 0
) -> Components:
    """The first `count` components: subspace iteration until no eigenvalue changes by more than `tolerance`.

    The eigenvalues' error is the square of the vectors', so that 1e-7 leaves 3e-4 in a well separated vector.
    """
    packed = np.ascontiguousarray(packed)
    frequency = frequencies(packed, samples)
    table = _table(frequency)
    wide = min(samples, count + max(10, count))
    padded = 4 * packed.shape[1]
    start = np.random.default_rng(seed).normal(size=(samples, wide))
    basis, _ = np.linalg.qr(start)
    before = np.zeros(count)
    change, passes = np.inf, 0
    values = before
    while passes < most and change > tolerance:
        image = np.zeros((samples, wide))
        given = torch.zeros(padded, wide)
        given[:samples] = torch.from_numpy(basis.astype(np.float32))
        for _, _, tile in _tiles(packed, table):
            tile[:, samples:] = 0
            image += (tile.T @ (tile @ given)).numpy()[:samples]
        small = basis.T @ image
        values, turn = np.linalg.eigh((small + small.T) / 2)
        values = values[::-1][:count]
        basis, _ = np.linalg.qr(image @ turn[:, ::-1])
        change = float(np.max(np.abs(values - before) / np.maximum(values, 1e-12)))
        before, passes = values, passes + 1
    scores = _rayleigh(packed, table, basis, samples)[:, :count]
    loadings = np.zeros((len(packed), count))
    given = torch.zeros(padded, count)
    given[:samples] = torch.from_numpy(scores.astype(np.float32))
    for row, end, tile in _tiles(packed, table):
        tile[:, samples:] = 0
        loadings[row:end] = (tile @ given).numpy()
    signs = np.sign(loadings[np.abs(loadings).argmax(axis=0), np.arange(count)])
    return Components(scores * signs, values / len(packed), loadings * signs, frequency, change, passes)


def _rayleigh(packed: np.ndarray, table: np.ndarray, basis: np.ndarray, samples: int) -> np.ndarray:
    given = torch.zeros(4 * packed.shape[1], basis.shape[1])
    given[:samples] = torch.from_numpy(basis.astype(np.float32))
    small = np.zeros((basis.shape[1], basis.shape[1]))
    for _, _, tile in _tiles(packed, table):
        tile[:, samples:] = 0
        image = (tile @ given).numpy().astype(np.float64)
        small += image.T @ image
    _, turn = np.linalg.eigh(small)
    return np.asarray(basis @ turn[:, ::-1])


def project(packed: np.ndarray, samples: int, frequency: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """(samples, k): people placed on components of others: regression of their genotypes on the loadings.

    Rows must be those of the loadings, in their order and counting the same ALT. Missing genotypes count as the mean.
    """
    packed = np.ascontiguousarray(packed)
    given = torch.from_numpy(np.ascontiguousarray(loadings.T, np.float32))
    found = np.zeros((loadings.shape[1], 4 * packed.shape[1]))
    for row, end, tile in _tiles(packed, _table(frequency)):
        found += (given[:, row:end] @ tile).numpy()
    return np.asarray(found[:, :samples].T / (loadings**2).sum(axis=0))


@dataclass(frozen=True, slots=True)
class Kinship:
    """Pairs of two groups: (one, two) float32; of one group with itself it is symmetric.

    `variants` are those where both are called.
    """

    kinship: np.ndarray
    het_het: np.ndarray
    ibs0: np.ndarray
    variants: np.ndarray


_MARKS = {"het": [0, 1, 0, 0], "ref": [1, 0, 0, 0], "alt": [0, 0, 1, 0], "known": [1, 1, 1, 0]}


def king(packed: np.ndarray, samples: int, others: np.ndarray | None = None, other_samples: int = 0) -> Kinship:
    """KING-robust kinship between families (Manichaikul 2010, equation 11; as plink2 has it), missing calls by pairs.

    Of all pairs in one group, or between it and `others` (the same rows). Memory: six matrices of one × two float32.
    Sums of ones stay exact in float32 up to 16 million variants.
    """
    size = samples, samples if others is None else other_samples
    het_het, ibs0, called, first_het, second_het = (torch.zeros(*size) for _ in range(5))
    rows = 2048
    for start in range(0, len(packed), rows):
        one = _indicators(packed[start : start + rows], samples)
        two = one if others is None else _indicators(others[start : start + rows], other_samples)
        het_het += one["het"].T @ two["het"]
        ibs0 += one["ref"].T @ two["alt"] + one["alt"].T @ two["ref"]
        called += one["known"].T @ two["known"]
        first_het += one["het"].T @ two["known"]
        second_het += one["known"].T @ two["het"]
    least = torch.minimum(first_het, second_het)
    differing = 4 * ibs0 + first_het + second_het - 2 * het_het
    kinship = 0.5 - differing / (4 * torch.clamp(least, min=1))
    kinship[least == 0] = float("nan")
    return Kinship(kinship.numpy(), het_het.numpy(), ibs0.numpy(), called.numpy())


def _indicators(block: np.ndarray, samples: int) -> dict[str, torch.Tensor]:
    block = np.ascontiguousarray(block)
    one = np.ones((len(block), 1), np.float32)
    found = {}
    for name, values in _MARKS.items():
        view = np.empty((len(block), 4 * block.shape[1]), np.float32)
        bits.unpack_table(block, one * np.array(values, np.float32), 0, view)
        found[name] = torch.from_numpy(view)[:, :samples]
    return found
