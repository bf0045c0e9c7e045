"""Allele counts that know about sex chromosomes, and the exact test of Hardy–Weinberg equilibrium."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.packed import compiled

# Genome Reference Consortium: pseudo-autosomal regions of X, where men have two copies as well.
_PAR = {
    "GRCh37": ((60001, 2699520), (154931044, 155260560)),
    "GRCh38": ((10001, 2781479), (155701383, 156030895)),
}
AUTOSOME, X, Y, MITOCHONDRION = range(4)


def kind_of(contig: Sequence[str], position: np.ndarray, build: str = "") -> np.ndarray:
    """int8 of each row: AUTOSOME (two copies in everybody), X, Y or MITOCHONDRION. X's ends count as autosome where
    the build is known."""
    names = {"X": X, "Y": Y, "MT": MITOCHONDRION}
    kind = np.array([names.get(name, AUTOSOME) for name in contig], np.int8)
    for low, high in _PAR.get(build, ()):
        kind[(kind == X) & (position >= low) & (position <= high)] = AUTOSOME
    return kind


@dataclass(frozen=True, slots=True)
class AlleleCounts:
    """Of each row, among the people chosen. int64.

    ac, an: copies of ALT, and of any allele. carriers: people with at least one ALT; ref_carriers: at least one REF.
    het, hom_ref, hom_alt: among those who have two copies. missing: people without a call who should have one.
    """

    ac: np.ndarray
    an: np.ndarray
    carriers: np.ndarray
    ref_carriers: np.ndarray
    het: np.ndarray
    hom_ref: np.ndarray
    hom_alt: np.ndarray
    missing: np.ndarray

    @classmethod
    def joined(cls, pieces: Sequence[AlleleCounts]) -> AlleleCounts:
        return cls(*(np.concatenate([getattr(piece, name) for piece in pieces]) for name in cls.__slots__))

    def as_arrays(self) -> dict[str, np.ndarray]:
        return {name: getattr(self, name) for name in self.__slots__}


def allele_counts(packed: np.ndarray, kind: np.ndarray, sex: np.ndarray, chosen: np.ndarray) -> AlleleCounts:
    """Counts among the people where the bool array `chosen` is true.

    Outside the pseudo-autosomal regions a man has one copy of X, a woman none of Y, everybody one of the mitochondrion.
    A heterozygous call where one copy is expected counts as missing. Who has no sex on record counts as a woman.
    """
    everybody = bits.counts(packed, len(chosen)) if chosen.all() else bits.counts_of(packed, chosen)
    two, one = everybody.copy(), np.zeros_like(everybody)
    for where, doubles, singles in (
        (kind == X, chosen & (sex != 1), chosen & (sex == 1)),
        (kind == Y, np.zeros_like(chosen), chosen & (sex == 1)),
        (kind == MITOCHONDRION, np.zeros_like(chosen), chosen),
    ):
        if where.any():
            two[where] = bits.counts_of(packed[where], doubles)
            one[where] = bits.counts_of(packed[where], singles)
    ref, het, alt, missing = two.T
    one_ref, one_het, one_alt, one_missing = one.T
    return AlleleCounts(
        ac=het + 2 * alt + one_alt, an=2 * (ref + het + alt) + one_ref + one_alt, carriers=het + alt + one_alt,
        ref_carriers=ref + het + one_ref, het=het, hom_ref=ref, hom_alt=alt, missing=missing + one_missing + one_het,
    )  # fmt: skip


@compiled
def _hwe(het: Any, hom1: Any, hom2: Any, out: Any) -> None:  # pragma: no cover - compiled
    for v in range(het.shape[0]):
        rare = 2 * min(hom1[v], hom2[v]) + het[v]
        people = het[v] + hom1[v] + hom2[v]
        if people == 0 or rare == 0:
            out[v] = 1.0
            continue
        # The most likely number of heterozygotes is the middle; probabilities are told relative to it.
        mid = int(rare * (2.0 * people - rare) / (2.0 * people))
        if (mid % 2) != (rare % 2):
            mid += 1
        size = rare + 1
        prob = np.zeros(size)
        prob[mid] = 1.0
        total = 1.0
        h = mid
        r = (rare - mid) // 2
        c = people - mid - r
        while h > 1:
            prob[h - 2] = prob[h] * h * (h - 1.0) / (4.0 * (r + 1.0) * (c + 1.0))
            total += prob[h - 2]
            if prob[h - 2] < 1e-300:
                break
            h -= 2
            r += 1
            c += 1
        h = mid
        r = (rare - mid) // 2
        c = people - mid - r
        while h <= rare - 2:
            prob[h + 2] = prob[h] * 4.0 * r * c / ((h + 2.0) * (h + 1.0))
            total += prob[h + 2]
            if prob[h + 2] < 1e-300:
                break
            h += 2
            r -= 1
            c -= 1
        seen = prob[het[v]] * (1 + 1e-7)  # equal by rounding only counts as equal
        tail = 0.0
        for k in range(size):
            if prob[k] <= seen:
                tail += prob[k]
        out[v] = min(1.0, tail / total)


def hwe_exact(het: np.ndarray, hom_ref: np.ndarray, hom_alt: np.ndarray) -> np.ndarray:
    """float64 p of each row: Wigginton, Cutler and Abecasis 2005, two-sided, without mid-p."""
    out = np.empty(len(het))
    _hwe(het.astype(np.int64), hom_ref.astype(np.int64), hom_alt.astype(np.int64), out)
    return out
