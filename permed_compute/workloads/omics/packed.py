"""Arithmetic on packed genotypes (`storage.genotypes`: four to a byte), compiled by Numba.

Every function takes `packed`: (rows, ceil(samples / 4)) uint8. They release the GIL and keep to one thread:
callers run several blocks beside each other, so that the sum of blocks has one order whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit

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
def _fill_lut(one: Any, two: Any, lut: Any) -> None:  # pragma: no cover - compiled
    for byte in range(256):
        for j in range(4):
            code = (byte >> (2 * j)) & 3
            lut[byte, j] = one[code]
            lut[byte, 4 + j] = two[code]


@compiled
def _score(packed: Any, first: Any, second: Any, total: Any) -> None:  # pragma: no cover - compiled
    """total += the values of both tables; 4 rows at a time, so that sums are loaded a quarter as often."""
    rows, width = packed.shape
    lut = np.empty((4, 256, 8), np.float32)
    part = np.zeros((width, 8), np.float32)
    zero = np.zeros(4, np.float32)
    since = 0
    for v in range(0, rows, 4):
        for k in range(4):
            if v + k < rows:
                _fill_lut(first[v + k], second[v + k], lut[k])
            else:
                _fill_lut(zero, zero, lut[k])
        one = packed[v]
        two = packed[min(v + 1, rows - 1)]
        three = packed[min(v + 2, rows - 1)]
        four = packed[min(v + 3, rows - 1)]
        for b in range(width):
            i0, i1, i2, i3 = one[b], two[b], three[b], four[b]
            for j in range(8):
                part[b, j] += (lut[0, i0, j] + lut[1, i1, j]) + (lut[2, i2, j] + lut[3, i3, j])
        since += 4
        if since >= 64 or v + 4 >= rows:
            # float32 sums stay short: 64 rows, then float64.
            for b in range(width):
                for j in range(8):
                    total[b, j] += part[b, j]
                    part[b, j] = 0
            since = 0


def score(packed: np.ndarray, tables: Sequence[np.ndarray], samples: int) -> np.ndarray:
    """(samples, len(tables)) float64: sum over rows of `table[row, code of the sample]`; each (rows, 4) float32.

    Two tables share a pass over the bytes and cost little more than one.
    """
    out = np.empty((samples, len(tables)))
    packed = np.ascontiguousarray(packed)
    nothing = np.zeros((len(packed), 4), np.float32)
    for k in range(0, len(tables), 2):
        first, second = (np.ascontiguousarray(table, np.float32) for table in (*tables[k : k + 2], nothing)[:2])
        total = np.zeros((packed.shape[1], 8))
        if len(packed):
            _score(packed, first, second, total)
        for j in range(min(2, len(tables) - k)):
            out[:, k + j] = total[:, 4 * j : 4 * j + 4].reshape(-1)[:samples]
    return out


MARK = 65536
"""A missing call in a table of marks: dosages and missing calls of up to 32,767 rows are told apart in one sum."""


@compiled
def _add_missing(packed: Any, columns: Any, samples: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(packed.shape[0]):
        for b in range(packed.shape[1]):
            byte = packed[v, b]
            both = byte & (byte >> 1) & 0x55
            if both:
                for j in range(4):
                    if both & (1 << (2 * j)):
                        s = 4 * b + j
                        if s < samples:
                            for k in range(columns.shape[1]):
                                out[s, k] += columns[v, k]


def missing_sums(packed: np.ndarray, columns: np.ndarray, samples: int) -> np.ndarray:
    """(samples, k) float64: sum of `columns` (rows, k) over the rows where the sample is missing."""
    out = np.zeros((samples, columns.shape[1]), np.float64)
    _add_missing(np.ascontiguousarray(packed), np.ascontiguousarray(columns, np.float64), samples, out)
    return out


@compiled
def _missing_rows(packed: Any, design: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(packed.shape[0]):
        for b in range(packed.shape[1]):
            byte = packed[v, b]
            both = byte & (byte >> 1) & 0x55
            if both:
                for j in range(4):
                    if both & (1 << (2 * j)):
                        s = 4 * b + j
                        if s < design.shape[0]:
                            for k in range(design.shape[1]):
                                out[v, k] += design[s, k]


def missing_design(packed: np.ndarray, design: np.ndarray) -> np.ndarray:
    """(rows, k) float64: sum of `design` (samples, k) over the samples that are missing in the row."""
    out = np.zeros((packed.shape[0], design.shape[1]), np.float64)
    _missing_rows(np.ascontiguousarray(packed), np.ascontiguousarray(design, np.float64), out)
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
