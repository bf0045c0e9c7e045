"""Polygenic scores: PGS Catalog scoring files, and their variants matched with a store's.

Every row of a scoring file comes to one of these ends; a matched row names the store's row and the counted allele:

    matched            effect and other allele are ALT and REF, either way round
    flipped            the same on the other strand
    effect_only        the file has no other allele; the effect allele is REF or ALT
    ambiguous          A/T or C/G: the strand cannot be told, dropped by policy
    allele_mismatch    the position is there with other alleles
    absent             the position is not there
    no_position        the row has no chromosome or position
    complex            haplotype, diplotype, interaction, non-additive, or an allele that is no sequence
    duplicate          another row of this score has taken the variant
    ref_of_split       the effect allele is REF of a record with several ALTs: a row of the store counts one ALT only
    bad_weight         the weight is no finite number
"""

from __future__ import annotations

import csv
import gzip
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.workloads.omics.read import build_of, contig_name, refuse

MATCHED = ("matched", "flipped", "effect_only")
_COMPLEMENT = str.maketrans("ACGT", "TGCA")
_COMPLEX = ("is_haplotype", "is_diplotype", "is_interaction", "is_dominant", "is_recessive")
_AMBIGUOUS = ({"A", "T"}, {"C", "G"})


@dataclass(frozen=True, slots=True)
class ScoreRow:
    contig: str
    position: int
    effect: str
    other: str
    weight: float
    complex: bool


@dataclass(frozen=True, slots=True)
class Score:
    """A scoring file. `build`: of the positions read (harmonised ones where the file has them), '' = not said."""

    name: str
    build: str
    rows: Sequence[ScoreRow]


def read_score(path: Path) -> Score:
    """A PGS Catalog scoring file (format 1.0 and 2.0, harmonised or as its authors gave it), plain or gzipped.

    Raises `RefusedInput` SCORE_UNREADABLE where it has no effect allele or no weight column.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise refuse("SCORE_UNREADABLE", f"A scoring file cannot be read ({type(error).__name__}).") from None
    lines = text.splitlines()
    said = dict(line.lstrip("#").split("=", 1) for line in lines if line.startswith("#") and "=" in line)
    body = [line for line in lines if not line.startswith("#")]
    table = csv.DictReader(body, delimiter="\t")
    columns = table.fieldnames or []
    if "effect_allele" not in columns or "effect_weight" not in columns:
        raise refuse(
            "SCORE_UNREADABLE", "The scoring file has no columns effect_allele and effect_weight.",
            remedy="Use the PGS Catalog's format 2.0.",
        )  # fmt: skip
    harmonised = "hm_chr" in columns and "hm_pos" in columns
    place = ("hm_chr", "hm_pos") if harmonised else ("chr_name", "chr_position")
    rows = [_row(row, *place) for row in table]
    if not rows:
        raise refuse("SCORE_UNREADABLE", "The scoring file has no rows.")
    name = said.get("pgs_id") or _accession(body, columns) or path.name.split(".")[0].split("_hmPOS")[0]
    build = said.get("HmPOS_build", "") if harmonised else said.get("genome_build", "")
    return Score(name.strip(), build_of(build), rows)


def _accession(body: Sequence[str], columns: Sequence[str]) -> str:
    if "accession" not in columns or len(body) < 2:
        return ""
    return body[1].split("\t")[list(columns).index("accession")]


def _row(row: Mapping[str, Any], chromosome: str, position: str) -> ScoreRow:
    def text(name: str) -> str:
        return (row.get(name) or "").strip()

    flags = any(text(name).lower() == "true" for name in _COMPLEX) or text("effect_type") not in ("", "additive")
    effect = text("effect_allele").upper()
    other = (text("other_allele") or text("hm_inferOtherAllele") or text("reference_allele")).upper()
    if "/" in other:
        other = ""  # several were inferred
    try:
        weight = float(text("effect_weight"))
    except ValueError:
        weight = float("nan")
    at = text(position)
    return ScoreRow(
        contig_name(text(chromosome)), int(at) if at.isdigit() else 0, effect, other, weight,
        flags or not effect or bool(set(effect) - set("ACGT")),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Policy:
    ambiguous: str = "drop"
    """`drop`, or `keep`: taken as given, on the forward strand."""
    flip: bool = True
    """Try the other strand where the alleles do not fit."""


@dataclass(frozen=True)
class Match:
    """What became of each row of a score.

    status: of each row; store_row: int64, -1 = not matched; counts_ref: bool, the effect allele is REF.
    """

    score: Score
    status: np.ndarray
    store_row: np.ndarray
    counts_ref: np.ndarray

    @property
    def used(self) -> np.ndarray:
        """Rows of the score that are matched."""
        return np.flatnonzero(self.store_row >= 0)

    @property
    def rate(self) -> float:
        return len(self.used) / max(1, len(self.status))

    def reasons(self) -> dict[str, int]:
        """How many rows came to each end; sums to the rows of the file."""
        return dict(Counter(self.status.tolist()).most_common())


class Index:
    """A store's variants by position. Memory: 16 bytes a variant; alleles are read where a score has hits."""

    def __init__(self, store: GenotypeStore) -> None:
        self._store = store
        self._tables: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._contig = {name: k for k, name in enumerate(store.contigs)}
        key = store.contig().astype(np.int64) << 32 | store.position().astype(np.int64)
        self._order = np.argsort(key, kind="stable")
        self._key = key[self._order]

    def rows_at(self, scores: Sequence[ScoreRow]) -> tuple[np.ndarray, np.ndarray]:
        """(first, last) of each row's place among the sorted variants; equal = nothing there."""
        wanted = np.array(
            [self._contig.get(row.contig, -1) << 32 | row.position if row.position else -1 for row in scores], np.int64
        )
        return np.searchsorted(self._key, wanted, "left"), np.searchsorted(self._key, wanted, "right")

    def match(self, score: Score, policy: Policy) -> Match:
        first, last = self.rows_at(score.rows)
        hit = [self._order[a:b] for a, b in zip(first, last, strict=True)]
        candidates = np.unique(np.concatenate(hit)) if hit else np.zeros(0, np.int64)
        alleles, split = self._alleles(candidates)
        count = len(score.rows)
        status = np.empty(count, object)
        where, counts_ref = np.full(count, -1, np.int64), np.zeros(count, bool)
        taken: set[int] = set()
        for k, row in enumerate(score.rows):
            end, found, ref = _end_of(row, hit[k], alleles, split, policy)
            if found >= 0 and found in taken:
                end, found = "duplicate", -1
            if found >= 0:
                taken.add(found)
            status[k], where[k], counts_ref[k] = end, found, ref
        return Match(score, status, where, counts_ref)

    def _alleles(self, rows: np.ndarray) -> tuple[dict[int, tuple[str, str]], set[int]]:
        """Alleles of some rows, read by the parts of the store that have them."""
        size = self._store.layout.part_variants
        pairs: dict[int, tuple[str, str]] = {}
        split: set[int] = set()
        for part in np.unique(rows // size):
            start, stop = self._store.layout.rows(int(part))
            if int(part) not in self._tables:
                self._tables[int(part)] = (self._store.alleles(start, stop), self._store.split(start, stop))
            table, several = self._tables[int(part)]
            for row in rows[(rows >= start) & (rows < stop)]:
                ref, alt = table[row - start]
                pairs[int(row)] = (str(ref).upper(), str(alt).upper())
                if several[row - start]:
                    split.add(int(row))
        return pairs, split


def _end_of(
    row: ScoreRow, hits: np.ndarray, alleles: Mapping[int, tuple[str, str]], split: set[int], policy: Policy
) -> tuple[str, int, bool]:
    """(status, store row or -1, effect allele is REF)."""
    early = _unusable(row, hits)
    if early:
        return early, -1, False
    ways = [("matched", row.effect, row.other)]
    if policy.flip and row.other and row.effect.translate(_COMPLEMENT) != row.other:
        ways.append(("flipped", _flip(row.effect), _flip(row.other)))
    for status, effect, other in ways:
        for hit in hits.tolist():
            ref, alt = alleles[hit]
            if effect not in (ref, alt) or (other and {effect, other} != {ref, alt}):
                continue
            if {ref, alt} in _AMBIGUOUS and policy.ambiguous == "drop":
                return "ambiguous", -1, False
            if effect == ref and hit in split:
                return "ref_of_split", -1, False
            return (status if other else "effect_only"), hit, effect == ref
    return "allele_mismatch", -1, False


def _unusable(row: ScoreRow, hits: np.ndarray) -> str:
    if row.complex:
        return "complex"
    if not np.isfinite(row.weight):
        return "bad_weight"
    if not row.position or not row.contig:
        return "no_position"
    return "" if len(hits) else "absent"


def _flip(allele: str) -> str:
    """The reverse complement: of an indel too, its bases stand in reverse order on the other strand."""
    return allele.translate(_COMPLEMENT)[::-1]


def check_build(score: Score, build: str) -> None:
    """Raises `RefusedInput` WRONG_BUILD where both say their build and they differ."""
    if score.build and build and score.build != build:
        raise refuse(
            "WRONG_BUILD", f"{score.name} has positions of {score.build}; the genotypes are {build}.",
            remedy=f"Use the scoring file that is harmonised to {build}.",
        )  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """Matched scores as one matrix. `rows`: sorted rows of the store, (U,) int64; `weight`: (U, K) float64 for the
    effect allele; `counts_ref`: (U, K) bool, the effect allele is REF; `used`: (U, K) bool; `names`: (K,)."""

    names: Sequence[str]
    rows: np.ndarray
    weight: np.ndarray
    counts_ref: np.ndarray
    used: np.ndarray

    @classmethod
    def of(cls, matches: Sequence[Match]) -> Weights:
        rows = np.unique(np.concatenate([match.store_row[match.used] for match in matches] or [np.zeros(0, np.int64)]))
        shape = (len(rows), len(matches))
        weight, ref, used = np.zeros(shape), np.zeros(shape, bool), np.zeros(shape, bool)
        for k, match in enumerate(matches):
            at = np.searchsorted(rows, match.store_row[match.used])
            weight[at, k] = [match.score.rows[int(i)].weight for i in match.used]
            ref[at, k] = match.counts_ref[match.used]
            used[at, k] = True
        return cls([match.score.name for match in matches], rows, weight, ref, used)

    def between(self, start: int, stop: int) -> slice:
        """Where the store's rows start … stop stand in `rows`."""
        return slice(int(np.searchsorted(self.rows, start)), int(np.searchsorted(self.rows, stop)))
