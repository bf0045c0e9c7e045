"""Arithmetic on packed genotypes (`storage.genotypes`: four to a byte), compiled by Numba.

Every function takes `packed`: (rows, ceil(samples / 4)) uint8. They release the GIL and keep to one thread:
callers run several blocks beside each other, so that the sum of blocks has one order whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

# Freed at once. glibc then keeps freed blocks of up to this size; else every block of genotypes (1 MB) would be fetched
# from the kernel anew, and its page faults cost forty times the pass over it.
np.empty(24 << 20, np.uint8)

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def compiled(function: Kernel) -> Kernel:
    """How every kernel of this domain is compiled: once per machine, without the GIL, arithmetic as it is written."""
    return cast(Kernel, njit(cache=True, nogil=True)(function))


M1, M2, M4, M8 = (
    np.uint64(x) for x in (0x5555555555555555, 0x3333333333333333, 0x0F0F0F0F0F0F0F0F, 0x0101010101010101)
)
_S1, _S2, _S4, _S56 = (np.uint64(x) for x in (1, 2, 4, 56))


@compiled
def _ones(x: Any) -> Any:  # pragma: no cover - compiled
    """Number of set bits of a word that has bits at even places only."""
    x = (x & M2) + ((x >> _S2) & M2)
    x = (x + (x >> _S4)) & M4
    return (x * M8) >> _S56


@compiled
def _count_words(words: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(words.shape[0]):
        het = np.uint64(0)
        hom = np.uint64(0)
        mis = np.uint64(0)
        for w in range(words.shape[1]):
            word = words[v, w]
            low = word & M1
            high = (word >> _S1) & M1
            het += _ones(low & ~high)
            hom += _ones(high & ~low)
            mis += _ones(low & high)
        out[v, 1] = het
        out[v, 2] = hom
        out[v, 3] = mis


def _words(packed: np.ndarray) -> np.ndarray:
    rows, width = packed.shape
    wide = -(-width // 8) * 8
    if wide != width or not packed.flags.c_contiguous:
        padded = np.zeros((rows, wide), np.uint8)
        padded[:, :width] = packed
        packed = padded
    return np.asarray(packed.view(np.uint64))


def counts(packed: np.ndarray, samples: int) -> np.ndarray:
    """(rows, 4) int64: how many samples have 0, 1, 2 copies of ALT, and how many are missing."""
    out = np.zeros((packed.shape[0], 4), np.int64)
    if packed.shape[0]:
        _count_words(_words(packed), out)
    out[:, 0] = samples - out[:, 1:].sum(axis=1)
    return out


def sample_mask(chosen: np.ndarray) -> np.ndarray:
    """(ceil(samples / 4),) uint8 with both bits set of every sample where the bool array `chosen` is true."""
    wide = np.zeros(-(-len(chosen) // 4) * 4, np.uint8)
    wide[: len(chosen)] = chosen
    quads = wide.reshape(-1, 4) * np.array([3, 12, 48, 192], np.uint8)
    return np.asarray(quads.sum(axis=1, dtype=np.uint8))


def counts_of(packed: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """As `counts`, of the samples where the bool array `chosen` is true."""
    return counts(packed & sample_mask(chosen)[None, :], int(chosen.sum()))


@compiled
def _pack(codes: Any, out: Any) -> None:  # pragma: no cover - compiled
    rows, samples = codes.shape
    for v in range(rows):
        for b in range(out.shape[1]):
            byte = 0
            for j in range(4):
                s = 4 * b + j
                if s < samples:
                    code = codes[v, s]
                    if code < 0 or code > 2:
                        code = 3
                    byte |= code << (2 * j)
            out[v, b] = byte


def pack(codes: np.ndarray) -> np.ndarray:
    """(rows, samples) int8 copies of ALT, anything but 0, 1, 2 is missing → packed."""
    out = np.empty((codes.shape[0], -(-codes.shape[1] // 4)), np.uint8)
    _pack(codes, out)
    return out


@compiled
def _pack_alleles(genotype: Any, alt: Any, out: Any) -> None:  # pragma: no cover - compiled
    rows, samples, _ = genotype.shape
    for v in range(rows):
        for b in range(out.shape[1]):
            byte = 0
            for j in range(4):
                s = 4 * b + j
                if s < samples:
                    first = genotype[v, s, 0]
                    second = genotype[v, s, 1]
                    if first == -1 or second == -1 or first == -2:
                        code = 3
                    elif second == -2:
                        code = 2 if first == alt[v] else 0
                    else:
                        code = (1 if first == alt[v] else 0) + (1 if second == alt[v] else 0)
                    byte |= code << (2 * j)
            out[v, b] = byte


def pack_alleles(genotype: np.ndarray, alt: np.ndarray) -> np.ndarray:
    """(rows, samples, 2) int8 allele numbers (-1 missing, -2 no second allele) → packed copies of allele `alt[row]`.

    A half-missing call is missing; a haploid one counts as two copies or none.
    """
    out = np.empty((genotype.shape[0], -(-genotype.shape[1] // 4)), np.uint8)
    _pack_alleles(genotype, alt.astype(np.int8), out)
    return out


@compiled
def _unpack_codes(packed: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(out.shape[0]):
        for s in range(out.shape[1]):
            out[v, s] = (packed[v, s >> 2] >> (2 * (s & 3))) & 3


def unpack(packed: np.ndarray, samples: int) -> np.ndarray:
    """(rows, samples) int8: copies of ALT; 3 is missing."""
    out = np.empty((packed.shape[0], samples), np.int8)
    _unpack_codes(packed, out)
    return out


@compiled
def unpack_table(packed: Any, table: Any, first: Any, out: Any) -> None:  # pragma: no cover - compiled
    """`out` (rows, 4 k) float32: the values that `table` (rows, 4) gives for the samples in bytes first … first + k.

    Two samples at a time out of a table of 16 pairs per row: building it costs 32 stores, whatever the samples.
    """
    pairs = np.empty((16, 2), np.float32)
    width = out.shape[1] >> 2
    for v in range(packed.shape[0]):
        for nibble in range(16):
            pairs[nibble, 0] = table[v, nibble & 3]
            pairs[nibble, 1] = table[v, nibble >> 2]
        for b in range(width):
            byte = packed[v, first + b]
            low = byte & 15
            high = byte >> 4
            out[v, 4 * b] = pairs[low, 0]
            out[v, 4 * b + 1] = pairs[low, 1]
            out[v, 4 * b + 2] = pairs[high, 0]
            out[v, 4 * b + 3] = pairs[high, 1]


@compiled
def _split(words: Any, turn: Any, called: Any, missing: Any) -> None:  # pragma: no cover - compiled
    for v in range(words.shape[0]):
        turned = M1 if turn[v] else np.uint64(0)
        for w in range(words.shape[1]):
            word = words[v, w]
            low, high = word & M1, (word >> _S1) & M1
            both = low & high
            missing[v, w] = both
            called[v, w] = (low | ((high ^ (turned & ~low)) << _S1)) & ~(both | (both << _S1))


def split(packed: np.ndarray, samples: int, turn: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(called, missing), each packed and padded to whole words: copies of ALT, none where missing; 1 where missing.

    Rows where the bool array `turn` is true have copies of REF.
    """
    words = _words(packed)
    called, missing = np.empty_like(words), np.empty_like(words)
    turned = np.zeros(len(packed), bool) if turn is None else turn
    _split(words, turned, called, missing)
    if turned.any():
        _clear_behind(called.view(np.uint8), samples)
    return called.view(np.uint8), missing.view(np.uint8)


def _clear_behind(plane: np.ndarray, samples: int) -> None:
    """No copies behind the last sample, where turning has put two."""
    whole = samples // 4
    if samples % 4:
        plane[:, whole] &= (1 << 2 * (samples % 4)) - 1
        whole += 1
    plane[:, whole:] = 0


_SHORT = 64
"""Rows summed in float32 before they are added up in float64."""


@compiled
def _weigh(packed: Any, weight: Any, total: Any) -> None:  # pragma: no cover - compiled
    """total (4, width) float64 += Σ weight · copies, sample 4 b + j at [j, b]; `weight` has whole fours of rows.

    Copies are not shifted down to the lowest bits: at place j they count 4^j times as much, and the weight is divided
    by it, which is exact. So the loop over bytes has neither branch nor table, and compiles to vectors: nine times as
    fast as a table of 256 entries a row.
    """
    rows, width = packed.shape
    part = np.zeros((4, width), np.float32)
    for start in range(0, rows, _SHORT):
        for v in range(start, min(start + _SHORT, rows), 4):
            one, two = packed[v], packed[min(v + 1, rows - 1)]
            three, four = packed[min(v + 2, rows - 1)], packed[min(v + 3, rows - 1)]
            for j in range(4):
                scale = np.float32(1) / np.float32(1 << (2 * j))
                w1, w2, w3, w4 = (
                    weight[v] * scale, weight[v + 1] * scale, weight[v + 2] * scale, weight[v + 3] * scale
                )  # fmt: skip
                place = np.int32(3 << (2 * j))
                sums = part[j]
                for b in range(width):
                    sums[b] += (
                        w1 * np.float32(np.int32(one[b]) & place) + w2 * np.float32(np.int32(two[b]) & place)
                    ) + (
                        w3 * np.float32(np.int32(three[b]) & place) + w4 * np.float32(np.int32(four[b]) & place)
                    )  # fmt: skip
        for j in range(4):
            for b in range(width):
                total[j, b] += part[j, b]
                part[j, b] = 0


def score(packed: np.ndarray, copies: np.ndarray, absent: np.ndarray, samples: int) -> np.ndarray:
    """(samples, k) float64: sum over rows of `copies` (rows, k) times copies of ALT, or `absent` where it is missing.

    Weights count in float32; sums of whole numbers are exact.
    """
    called, missing = split(packed, samples)
    fours = -(-len(packed) // 4) * 4
    out = np.empty((copies.shape[1], samples))
    for k in range(copies.shape[1]):
        total = np.zeros((4, called.shape[1]))
        for plane, weights in ((called, copies), (missing, absent)):
            if weights[:, k].any():
                given = np.zeros(fours, np.float32)
                given[: len(packed)] = weights[:, k]
                _weigh(plane, given, total)
        out[k] = total.T.reshape(-1)[:samples]
    return out.T


@compiled
def _set_bits(x: Any) -> Any:  # pragma: no cover - compiled
    """How many bits are set; in this form LLVM knows it for one instruction."""
    x = x - ((x >> _S1) & M1)
    x = (x & M2) + ((x >> _S2) & M2)
    x = (x + (x >> _S4)) & M4
    return (x * M8) >> _S56


@compiled
def _scatter(words: Any, columns: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(words.shape[0]):
        for w in range(words.shape[1]):
            word = words[v, w]
            while word:
                bit = _set_bits((word & (~word + _S1)) - _S1)
                word &= word - _S1
                sample = np.int64(32 * w) + np.int64(bit >> _S1)
                copies = 1.0 + np.float64(bit & _S1)
                for k in range(columns.shape[1]):
                    out[sample, k] += copies * columns[v, k]


def scatter(plane: np.ndarray, columns: np.ndarray, samples: int, out: np.ndarray | None = None) -> np.ndarray:
    """(samples, k) float64: sum of `columns` (rows, k) times the copies of a plane of `split`, added to `out` if given.

    Costs by the copy: for rare alleles and missing calls, where a product would be over zeros.
    """
    out = np.zeros((samples, columns.shape[1])) if out is None else out
    _scatter(plane.view(np.uint64), np.ascontiguousarray(columns, np.float64), out)
    return out


@compiled
def _gather(words: Any, design: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(words.shape[0]):
        for w in range(words.shape[1]):
            word = words[v, w]
            while word:
                bit = _set_bits((word & (~word + _S1)) - _S1)
                word &= word - _S1
                sample = np.int64(32 * w) + np.int64(bit >> _S1)
                copies = 1.0 + np.float64(bit & _S1)
                for k in range(design.shape[1]):
                    out[v, k] += copies * design[sample, k]


def gather(plane: np.ndarray, design: np.ndarray) -> np.ndarray:
    """(rows, k) float64: sum of `design` (samples, k) times the copies of a plane of `split`. As `scatter`, by rows."""
    out = np.zeros((len(plane), design.shape[1]))
    _gather(plane.view(np.uint64), np.ascontiguousarray(design, np.float64), out)
    return out


@compiled
def _sample_counts(packed: Any, samples: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(packed.shape[0]):
        for s in range(samples):
            code = (packed[v, s >> 2] >> (2 * (s & 3))) & 3
            out[0, s] += code == 1
            out[1, s] += code == 3


def sample_counts(packed: np.ndarray, samples: int) -> np.ndarray:
    """(2, samples) int64: heterozygous and missing rows of each sample."""
    out = np.zeros((2, samples), np.int64)
    _sample_counts(np.ascontiguousarray(packed), samples, out)
    return out


@compiled
def _take_samples(packed: Any, where: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(packed.shape[0]):
        for b in range(out.shape[1]):
            byte = 0
            for j in range(4):
                k = 4 * b + j
                if k < where.shape[0]:
                    s = where[k]
                    byte |= ((packed[v, s >> 2] >> (2 * (s & 3))) & 3) << (2 * j)
            out[v, b] = byte


def take_samples(packed: np.ndarray, where: np.ndarray) -> np.ndarray:
    """Packed genotypes of the samples at the indices `where`, in that order."""
    out = np.empty((packed.shape[0], -(-len(where) // 4)), np.uint8)
    _take_samples(np.ascontiguousarray(packed), where.astype(np.int64), out)
    return out
