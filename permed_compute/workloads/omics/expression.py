"""Numbers of a matrix in blocks of rows: quality, normalisation, variable features, principal components.

All sums are float64 and add up over blocks, so that a matrix of any number of rows needs the memory of one block and of
features × features of the variable ones. What comes out is scanpy's `calculate_qc_metrics`, `normalize_total`, `log1p`,
`highly_variable_genes(flavor="seurat")` and `pca`, to the tolerances in docs/omics.md.

kind of values: `counts` (normalised to `target` a row, then log1p), `log` (log1p of something already), `values`
(dense: methylation, proteins, metabolites, drug responses; NaN is missing and stands for the feature's mean).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numba
import numpy as np

KINDS = ("counts", "log", "values")
_BINS = 20
_DENSE = 0.3
"""Share of values stored above which a matrix product beats pairs of stored values."""


# --------------------------------------------------------------------------------------------- quality


@dataclass(slots=True)
class Quality:
    """Of rows: sums, numbers of features (and of them mitochondrial) that are there. Of features: rows that have it,
    sums. `values`: there = not NaN; sums are of what is there."""

    row_sum: np.ndarray
    row_features: np.ndarray
    row_mito: np.ndarray
    feature_sum: np.ndarray
    feature_rows: np.ndarray

    @classmethod
    def of(cls, block: Any, mito: np.ndarray) -> Quality:
        """Of a block of rows; `feature_*` add up over blocks, `row_*` are put together."""
        if not isinstance(block, np.ndarray):
            counted = (np.diff(block.indptr), np.bincount(block.indices, minlength=block.shape[1]))
            sums = (np.asarray(block.sum(axis=axis, dtype=np.float64)).ravel() for axis in (1, 0))
            row_sum, feature_sum = sums
            row_mito = np.asarray(block[:, mito].sum(axis=1, dtype=np.float64)).ravel() if mito.any() else 0 * row_sum
            return cls(row_sum, counted[0].astype(np.int64), row_mito, feature_sum, counted[1].astype(np.int64))
        there = ~np.isnan(block)
        known = np.where(there, block, 0)
        return cls(
            known.sum(axis=1), there.sum(axis=1), np.zeros(len(block)), known.sum(axis=0), there.sum(axis=0)
        )  # fmt: skip

    @classmethod
    def joined(cls, pieces: Sequence[Quality]) -> Quality:
        rows = {
            field.name: np.concatenate([getattr(one, field.name) for one in pieces])
            if field.name.startswith("row")
            else np.sum([getattr(one, field.name) for one in pieces], axis=0)
            for field in fields(cls)
        }
        return cls(**rows)

    def as_arrays(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def mito_percent(self) -> np.ndarray:
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.nan_to_num(100 * self.row_mito / self.row_sum))


# --------------------------------------------------------------------------------------------- moments


@dataclass(slots=True)
class Moments:
    """Of each feature over rows, values neither logged nor imputed: how many are there, sum, sum of squares."""

    rows: np.ndarray
    total: np.ndarray
    square: np.ndarray

    @classmethod
    def joined(cls, pieces: Sequence[Moments]) -> Moments:
        return cls(*(np.sum([getattr(one, field.name) for one in pieces], axis=0) for field in fields(cls)))

    @property
    def mean(self) -> np.ndarray:
        return np.asarray(self.total / np.maximum(self.rows, 1))

    @property
    def variance(self) -> np.ndarray:
        """Unbiased; 0 of a single row."""
        spread = self.square - self.rows * self.mean**2
        return np.asarray(np.maximum(spread, 0) / np.maximum(self.rows - 1, 1))


def moments(block: Any, factor: np.ndarray, kind: str) -> Moments:
    """Of a block. factor: (rows,) what a row's counts are multiplied by."""
    if kind == "values":
        there = ~np.isnan(block)
        known = np.where(there, block, 0).astype(np.float64)
        return Moments(there.sum(axis=0), known.sum(axis=0), (known**2).sum(axis=0))
    total, square = np.zeros(block.shape[1]), np.zeros(block.shape[1])
    _moments(block.indptr, block.indices, block.data, factor, kind == "log", total, square)
    return Moments(np.full(block.shape[1], block.shape[0]), total, square)


@numba.njit(nogil=True, cache=True)
def _moments(indptr, indices, data, factor, logged, total, square):  # type: ignore[no-untyped-def]
    for row in range(len(indptr) - 1):
        for at in range(indptr[row], indptr[row + 1]):
            value = np.expm1(float(data[at])) if logged else data[at] * factor[row]
            total[indices[at]] += value
            square[indices[at]] += value * value


def highly_variable(found: Moments, kind: str, count: int, allowed: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """(features,) bool of the `count` most variable ones, and columns that say why: means, dispersions,
    dispersions_norm (counts and log), else means and variances. Features that are not `allowed` are never chosen.

    Counts and log: Satija 2015 as in scanpy's flavour `seurat`: dispersion against that of the features of like mean.
    """
    import pandas as pd

    mean, variance = found.mean[allowed], found.variance[allowed]
    if kind == "values":
        score, why = variance, {"means": mean, "variances": variance}
    else:
        mean = np.where(mean == 0, 1e-12, mean)
        dispersion = variance / mean
        with np.errstate(divide="ignore"):
            dispersion = np.log(np.where(dispersion == 0, np.nan, dispersion))
        frame = pd.DataFrame({"mean": np.log1p(mean), "dispersion": dispersion})
        bins = frame.groupby(pd.cut(frame["mean"], bins=_BINS), observed=True)["dispersion"]
        middle, spread = bins.transform("mean"), bins.transform("std", ddof=1)
        alone = spread.isna()  # the only feature of its bin: its score is 1, as Seurat has it
        spread, middle = spread.where(~alone, middle), middle.where(~alone, 0.0)
        score = ((frame["dispersion"] - middle) / spread).to_numpy()
        why = {"means": frame["mean"].to_numpy(), "dispersions": dispersion, "dispersions_norm": score}
    known = np.sort(score[~np.isnan(score)])[::-1]
    least = known[min(count, len(known)) - 1] if len(known) else np.inf
    chosen = np.zeros(len(allowed), bool)
    chosen[np.flatnonzero(allowed)[np.nan_to_num(score, nan=-np.inf) >= least]] = True
    columns = {name: np.full(len(allowed), np.nan) for name in why}
    for name, values in why.items():
        columns[name][allowed] = values
    return chosen, columns


# --------------------------------------------------------------------------------------------- components


def normalised(block: Any, factor: np.ndarray, kind: str) -> Any:
    """The block as PCA and models see it: float32, log1p of normalised counts; NaN stays."""
    if kind == "values":
        return np.asarray(block, np.float32)
    made = block.astype(np.float32)
    if kind == "counts":
        lengths = np.diff(made.indptr)
        made.data = np.log1p(made.data * np.repeat(factor, lengths).astype(np.float32))
    return made


class Products:
    """Sums over normalised blocks: (chosen, chosen) products and (chosen,) values, float64.

    chosen: numbers of features; centre: of `values`, their means. Each thread adds to sums of its own, which are put
    together once: of 2,000 features they are 32 MB, and adding those up for each block took as long as the pairs.
    """

    def __init__(self, chosen: np.ndarray, centre: np.ndarray, threads: int) -> None:
        count = len(chosen)
        self._chosen, self._centre = chosen, centre
        self._product, self._total = np.zeros((count, count)), np.zeros(count)
        self._halves = [(np.zeros((count, count)), np.zeros(count)) for _ in range(max(1, threads))]

    def add(self, block: Any) -> None:
        if isinstance(block, np.ndarray):
            self._add_dense(np.nan_to_num(block[:, self._chosen].astype(np.float64) - self._centre, nan=0.0))
            return
        place = np.full(block.shape[1], -1, np.int64)
        place[self._chosen] = np.arange(len(self._chosen))
        inside = np.count_nonzero(place[block.indices] >= 0)
        if inside > _DENSE * block.shape[0] * len(self._chosen):
            self._add_dense(block[:, self._chosen].toarray().astype(np.float64))
            return
        edges = np.linspace(0, block.shape[0], len(self._halves) + 1).astype(int)

        def some(a: int, b: int, half: tuple[np.ndarray, np.ndarray]) -> None:
            _gram(block.indptr[a : b + 1], block.indices, block.data, place, *half)

        with ThreadPoolExecutor(len(self._halves)) as pool:
            list(pool.map(some, edges[:-1], edges[1:], self._halves))

    def _add_dense(self, wanted: np.ndarray) -> None:
        self._product += wanted.T @ wanted
        self._total += wanted.sum(axis=0)

    def summed(self) -> tuple[np.ndarray, np.ndarray]:
        half = np.sum([product for product, _ in self._halves], axis=0)
        pairs = half + half.T
        pairs[np.diag_indices(len(pairs))] /= 2
        return self._product + pairs, self._total + np.sum([total for _, total in self._halves], axis=0)


@numba.njit(nogil=True, cache=True)
def _gram(indptr, indices, data, place, product, total):  # type: ignore[no-untyped-def]
    """Adds each row's pairs of stored values, each pair once, on either side of the diagonal."""
    columns = np.empty(len(total), np.int64)
    values = np.empty(len(total), np.float64)
    for row in range(len(indptr) - 1):
        count = 0
        for at in range(indptr[row], indptr[row + 1]):
            column = place[indices[at]]
            if column >= 0:
                columns[count], values[count] = column, data[at]
                total[column] += data[at]
                count += 1
        for one in range(count):
            line, value = product[columns[one]], values[one]
            for two in range(one, count):
                line[columns[two]] += value * values[two]


@dataclass(frozen=True, slots=True)
class Components:
    """loadings: (chosen, components), each of unit length, its largest entry positive. variance: of the scores."""

    loadings: np.ndarray
    variance: np.ndarray
    ratio: np.ndarray
    mean: np.ndarray

    def scores(self, block: Any, chosen: np.ndarray, centre: np.ndarray | None) -> np.ndarray:
        """(rows, components) of a normalised block."""
        if isinstance(block, np.ndarray):
            assert centre is not None
            wanted = np.nan_to_num(block[:, chosen].astype(np.float64) - centre, nan=0.0)
            return np.asarray((wanted - self.mean) @ self.loadings)
        return np.asarray(block[:, chosen].astype(np.float64) @ self.loadings - self.mean @ self.loadings)


def components(product: np.ndarray, total: np.ndarray, rows: int, count: int) -> Components:
    """Principal components from summed products of `rows` rows: the largest eigenvectors of the covariance."""
    from scipy.linalg import eigh

    mean = total / rows
    covariance = (product - rows * np.outer(mean, mean)) / max(1, rows - 1)
    size = len(covariance)
    values, vectors = eigh(covariance, subset_by_index=(size - count, size - 1))
    values, vectors = np.maximum(values[::-1], 0), vectors[:, ::-1]
    vectors = vectors * np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(count)])
    return Components(vectors, values, values / max(np.trace(covariance), 1e-300), mean)
