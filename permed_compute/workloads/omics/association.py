"""Association of one variant at a time: linear regression; for a binary trait Wald, Firth, score and SPA tests.

All take packed genotypes of the people analysed, count the minor allele (so that float32 sums of a rare variant have
few terms) and give float64. A row whose test cannot be made has NaN and a code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import special

from permed_compute.workloads.omics import packed as bits
from permed_compute.workloads.omics.packed import compiled

_TILE, _TILE_BYTES = 128, 2048
_RARE = 12
"""A minor allele with fewer copies than one for so many people is summed over its carriers."""
_ALIASED = 1e-4
"""Share of a genotype's variation that covariates must leave: below it, float32 products say nothing."""
_SPA_FROM = 2.0
"""|z| from which the saddlepoint replaces the normal approximation (Dey 2017)."""


@dataclass(frozen=True, slots=True)
class Tested:
    """Of each row: effect of a copy of A1, its standard error, statistic, p, people used.

    a1_alt: A1 is ALT (else REF). error: '' or CONST (no variation), COLLINEAR, NOT_CONVERGED. method: which test.
    """

    beta: np.ndarray
    se: np.ndarray
    statistic: np.ndarray
    p: np.ndarray
    people: np.ndarray
    a1_alt: np.ndarray
    frequency: np.ndarray
    error: np.ndarray
    method: np.ndarray


@dataclass(frozen=True, slots=True)
class _Coded:
    """Counts of the minor allele: (rows, 4) int64 by code, sums and sums of squares over the called."""

    counts: np.ndarray
    alt: np.ndarray
    total: np.ndarray
    squares: np.ndarray
    called: np.ndarray

    @classmethod
    def of(cls, packed: np.ndarray, people: int) -> _Coded:
        counted = bits.counts(packed, people)
        called = counted[:, :3].sum(axis=1)
        ac = counted[:, 1] + 2 * counted[:, 2]
        alt = 2 * ac <= 2 * called  # a tie: ALT
        doubles = np.where(alt, counted[:, 2], counted[:, 0])
        return cls(counted, alt, counted[:, 1] + 2 * doubles, counted[:, 1] + 4 * doubles, called)

    def table(self, missing: np.ndarray | float = 0.0) -> np.ndarray:
        table = np.where(self.alt[:, None], [0.0, 1.0, 2.0, 0.0], [2.0, 1.0, 0.0, 0.0])
        table[:, 3] = missing
        return table.astype(np.float32)

    @property
    def frequency(self) -> np.ndarray:
        return np.asarray(self.total / np.maximum(2 * self.called, 1))


def _products(packed: np.ndarray, table: np.ndarray, right: np.ndarray, device: str) -> np.ndarray:
    """(rows, k) float64: genotypes (by `table`) times `right` (people, k), in tiles that stay in the cache.

    The narrow side stands first and is filled up to eight columns: as libraries are, that is four times as fast.
    """
    import torch

    if device != "cpu":
        from permed_compute.workloads.omics import device as gpu

        return gpu.products(packed, table, right, device)
    packed = np.ascontiguousarray(packed)
    width = packed.shape[1]
    given = torch.zeros(-(-right.shape[1] // 8) * 8, 4 * width)
    given[: right.shape[1], : len(right)] = torch.from_numpy(np.ascontiguousarray(right.T, np.float32))
    out = np.zeros((len(packed), right.shape[1]))
    room = np.empty(_TILE * 4 * min(width, _TILE_BYTES), np.float32)
    for first in range(0, width, _TILE_BYTES):
        last = min(first + _TILE_BYTES, width)
        for row in range(0, len(packed), _TILE):
            end = min(row + _TILE, len(packed))
            tile = room[: (end - row) * 4 * (last - first)].reshape(end - row, -1)
            bits.unpack_table(packed[row:end], table[row:end], first, tile)
            found = given[:, 4 * first : 4 * last] @ torch.from_numpy(tile).T
            out[row:end] += found.numpy()[: right.shape[1]].T
    return out


def _minor_products(packed: np.ndarray, coded: _Coded, right: np.ndarray, device: str) -> np.ndarray:
    """(rows, k) float64: copies of the minor allele, none where missing, times `right` (people, k).

    Rows of few carriers are summed over these, in float64; the others are products.
    """
    rare = (coded.total <= len(right) // _RARE) & (device == "cpu")
    out = np.empty((len(packed), right.shape[1]))
    if rare.any():
        out[rare] = bits.gather(bits.split(packed[rare], len(right), ~coded.alt[rare])[0], right)
    if not rare.all():
        out[~rare] = _products(packed[~rare], coded.table()[~rare], right, device)
    return out


# --------------------------------------------------------------------------------------------- linear


@dataclass(frozen=True)
class LinearNull:
    """The phenotype without its covariates.

    basis: (people, k) orthonormal, its first column constant; residual: (people,).
    """

    basis: np.ndarray
    residual: np.ndarray

    @classmethod
    def of(cls, y: np.ndarray, covariates: np.ndarray) -> LinearNull:
        basis, _ = np.linalg.qr(covariates)
        basis[:, 0] = 1 / np.sqrt(len(y))
        residual = y - y.mean()
        for _ in range(2):  # twice is enough (Kahan)
            residual = residual - basis @ (basis.T @ residual)
        return cls(basis, residual)


def linear(packed: np.ndarray, null: LinearNull, device: str = "cpu") -> Tested:
    """Least squares on the people called, row by row exact: sums over all, less those over the missing."""
    people, k = null.basis.shape
    coded = _Coded.of(packed, people)
    scale, spread = np.sqrt(people), float(np.sqrt(np.mean(null.residual**2))) or 1.0
    products = _minor_products(packed, coded, np.column_stack([null.basis * scale, null.residual / spread]), device)
    on_basis = products[:, :k] / scale
    on_basis[:, 0] = coded.total / scale  # whole numbers, without rounding
    on_y = products[:, k] * spread
    gg = coded.squares.astype(np.float64)
    yy = np.full(len(packed), float(null.residual @ null.residual))
    solved, own = on_basis.copy(), np.zeros(len(packed))
    some = np.flatnonzero(coded.counts[:, 3])
    if len(some):
        first, second = np.triu_indices(k)
        pairs = null.basis[:, first] * null.basis[:, second]
        missing = bits.split(packed[some], people)[1]
        lost = bits.gather(missing, np.column_stack([pairs, null.basis * null.residual[:, None], null.residual**2]))
        gram = np.zeros((len(some), k, k))
        gram[:, first, second] = gram[:, second, first] = -lost[:, : len(first)]
        gram[:, np.arange(k), np.arange(k)] += 1
        b = -lost[:, len(first) : len(first) + k]
        yy[some] -= lost[:, -1]
        try:
            both = np.linalg.solve(gram, np.stack([on_basis[some], b], axis=2))
        except np.linalg.LinAlgError:
            both = np.stack(
                [np.linalg.pinv(one) @ two for one, two in zip(gram, np.stack([on_basis[some], b], 2), strict=True)]
            )
        solved[some] = both[:, :, 0]
        on_y[some] -= np.einsum("vk,vk->v", on_basis[some], both[:, :, 1])
        own[some] = np.einsum("vk,vk->v", b, both[:, :, 1])
    denominator = gg - np.einsum("vk,vk->v", on_basis, solved)
    degrees = coded.called - k - 1
    flat = (coded.total == 0) | (degrees < 1)
    aliased = ~flat & (denominator < _ALIASED * gg)
    bad = flat | aliased
    with np.errstate(invalid="ignore", divide="ignore"):
        beta = np.where(bad, np.nan, on_y / denominator)
        left = np.maximum(yy - own - beta**2 * denominator, 0)
        se = np.sqrt(left / degrees / denominator)
        t = beta / se
        p = 2 * special.stdtr(degrees, -np.abs(t))
    error = np.where(flat, "CONST", np.where(aliased, "COLLINEAR", ""))
    return Tested(beta, se, t, p, coded.called, coded.alt, coded.frequency, error, np.full(len(p), "LINEAR"))


# --------------------------------------------------------------------------------------------- binary


@compiled
def _fit(  # noqa: C901 - compiled: calls between kernels would have to carry every array
    x: Any, y: Any, offset: Any, firth: Any, beta: Any, covariance: Any
) -> Any:  # pragma: no cover - compiled
    """Maximum (penalised) likelihood by Fisher scoring. 0 = converged, 1 = not, 2 = singular."""
    n, k = x.shape
    mu = np.empty(n)
    beta[:] = 0.0
    # Where an allele is in cases only, the penalised likelihood's maximum is approached by a constant factor a step.
    limit = 400 if firth else 60
    damp = 1.0
    last = np.zeros(k)
    for _ in range(limit):
        info = np.zeros((k, k))
        for i in range(n):
            eta = offset[i]
            for a in range(k):
                eta += x[i, a] * beta[a]
            mu[i] = 1.0 / (1.0 + np.exp(-eta))
            w = mu[i] * (1.0 - mu[i])
            for a in range(k):
                wa = w * x[i, a]
                for b in range(a + 1):
                    info[a, b] += wa * x[i, b]
        for a in range(k):
            for b in range(a):
                info[b, a] = info[a, b]
        if not np.isfinite(info).all() or np.linalg.cond(info) > 1e12:
            return 2
        inverse = np.linalg.inv(info)
        gradient = np.zeros(k)
        for i in range(n):
            r = y[i] - mu[i]
            if firth:
                h = 0.0
                for a in range(k):
                    inner = 0.0
                    for b in range(k):
                        inner += inverse[a, b] * x[i, b]
                    h += x[i, a] * inner
                r += h * mu[i] * (1.0 - mu[i]) * (0.5 - mu[i])
            for a in range(k):
                gradient[a] += x[i, a] * r
        change = inverse @ gradient
        largest = np.abs(change).max()
        if (change * last).sum() < 0 and largest > 0.5 * np.abs(last).max():
            damp *= 0.5  # it swings about the maximum (Firth's, of an allele that one person carries)
        last[:] = change
        change *= damp
        if damp * largest > 5.0:
            change *= 5.0 / (damp * largest)
        beta += change
        covariance[:, :] = inverse
        if largest < (1e-6 if firth else 1e-9):
            return 0
        if np.abs(beta).max() > 200.0:
            return 1
    return 1


@compiled
def _fit_rows(packed: Any, alt: Any, x: Any, y: Any, offset: Any, firth: Any, out: Any) -> None:  # pragma: no cover
    """out (rows, 3): effect, standard error, code of `_fit`; on the people called in each row."""
    n, k = x.shape
    for v in range(packed.shape[0]):
        full = np.empty((n, k + 1))
        outcome = np.empty(n)
        shift = np.empty(n)
        m = 0
        for s in range(n):
            code = (packed[v, s >> 2] >> (2 * (s & 3))) & 3
            if code == 3:
                continue
            for a in range(k):
                full[m, a] = x[s, a]
            full[m, k] = code if alt[v] else 2 - code
            outcome[m] = y[s]
            shift[m] = offset[s]
            m += 1
        beta = np.zeros(k + 1)
        covariance = np.zeros((k + 1, k + 1))
        out[v, 2] = _fit(full[:m], outcome[:m], shift[:m], firth, beta, covariance)
        out[v, 0] = beta[k]
        out[v, 1] = np.sqrt(covariance[k, k]) if covariance[k, k] > 0 else np.nan


@dataclass(frozen=True)
class LogisticNull:
    """The binary trait (0, 1) explained by covariates alone. x: (people, k); mu, weight: (people,); offset: LOCO's."""

    x: np.ndarray
    y: np.ndarray
    offset: np.ndarray
    mu: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, y: np.ndarray, covariates: np.ndarray, offset: np.ndarray | None = None) -> LogisticNull:
        """Raises `ValueError` where the covariates tell the cases apart by themselves."""
        shift = np.zeros(len(y)) if offset is None else offset
        beta, covariance = np.zeros(covariates.shape[1]), np.zeros((covariates.shape[1],) * 2)
        x = np.ascontiguousarray(covariates)
        if _fit(x, y, shift, False, beta, covariance):
            raise ValueError("separated")
        return cls(x, y, shift, special.expit(x @ beta + shift), covariance)

    @property
    def weight(self) -> np.ndarray:
        return np.asarray(self.mu * (1 - self.mu))


def logistic(packed: np.ndarray, null: LogisticNull, test: str, device: str = "cpu") -> Tested:
    """`wald` or `firth`: each row fitted on its own people. `score`, `spa`: missing genotypes count as the mean."""
    coded = _Coded.of(packed, len(null.y))
    flat = coded.total == 0
    if test in ("wald", "firth"):
        out = np.full((len(packed), 3), np.nan)
        rows = np.flatnonzero(~flat)
        fitted = np.empty((len(rows), 3))
        _fit_rows(
            np.ascontiguousarray(packed[rows]), coded.alt[rows], null.x, null.y, null.offset, test == "firth", fitted
        )
        out[rows] = fitted
        beta = np.where(out[:, 2] == 0, out[:, 0], np.nan)
        se = np.where(out[:, 2] == 0, out[:, 1], np.nan)
        z = beta / se
        p = 2 * special.ndtr(-np.abs(z))
        error = np.where(
            flat, "CONST", np.where(out[:, 2] == 1, "NOT_CONVERGED", np.where(out[:, 2] == 2, "COLLINEAR", ""))
        )
        return Tested(beta, se, z, p, coded.called, coded.alt, coded.frequency, error, np.full(len(p), test.upper()))
    return _score(packed, null, coded, flat, device, spa=test == "spa")


def _score(
    packed: np.ndarray, null: LogisticNull, coded: _Coded, flat: np.ndarray, device: str, *, spa: bool
) -> Tested:
    mean = 2 * coded.frequency
    table = coded.table(mean)
    people = len(null.y)
    weighted = null.x * null.weight[:, None]
    products = _products(packed, table, np.column_stack([null.y - null.mu, weighted, null.weight]), device)
    # g'Wg: squares of the codes need a table of their own.
    gwg = _products(packed, (table.astype(np.float64) ** 2).astype(np.float32), null.weight[:, None], device)[:, 0]
    k = null.x.shape[1]
    u = products[:, 0]
    variance = gwg - np.einsum("vk,kl,vl->v", products[:, 1 : k + 1], null.inverse, products[:, 1 : k + 1])
    aliased = ~flat & (variance <= _ALIASED * gwg)
    with np.errstate(invalid="ignore", divide="ignore"):
        z = np.where(flat | aliased, np.nan, u / np.sqrt(variance))
        beta, se = u / variance, 1 / np.sqrt(variance)
        p = 2 * special.ndtr(-np.abs(z))
    method = np.full(len(p), "SCORE", object)
    if spa:
        for row in np.flatnonzero(np.abs(z) > _SPA_FROM):
            g = table[row].astype(np.float64)[bits.unpack(packed[row : row + 1], people)[0]]
            g = g - null.x @ (null.inverse @ (weighted.T @ g))
            better = saddlepoint(g, null.mu, float(g @ (null.y - null.mu)))
            if np.isfinite(better):
                p[row] = better
                method[row] = "SPA"
                # An effect's error that agrees with p, as SAIGE has it.
                se[row] = abs(beta[row]) / max(-special.ndtri(better / 2), 1e-12)
    beta, se = np.where(np.isnan(z), np.nan, beta), np.where(np.isnan(z), np.nan, se)
    error = np.where(flat, "CONST", np.where(aliased, "COLLINEAR", ""))
    return Tested(beta, se, z, p, coded.called, coded.alt, coded.frequency, error, method)


def saddlepoint(g: np.ndarray, mu: np.ndarray, score: float) -> float:
    """Two-sided p of a score Σ g (y − mu) with y Bernoulli(mu): Barndorff-Nielsen's form (Dey 2017). NaN = no root."""
    return _tail(g, mu, abs(score), 1.0) + _tail(g, mu, abs(score), -1.0)


def _tail(g: np.ndarray, mu: np.ndarray, score: float, sign: float) -> float:
    out = np.empty(1)
    _one_tail(np.ascontiguousarray(sign * g), mu, score, out)
    return float(out[0])


@compiled
def _one_tail(g: Any, mu: Any, q: Any, out: Any) -> None:  # pragma: no cover - compiled
    """out[0] = P(Σ g (y − mu) ≥ q)."""
    most = 0.0
    for i in range(g.shape[0]):
        most += g[i] * (1 - mu[i]) if g[i] > 0 else -g[i] * mu[i]
    if q >= most:
        out[0] = 0.0 if q > most * (1 + 1e-12) else np.nan
        return
    low, high, t = 0.0, 1e4, 0.0
    for _ in range(200):
        slope, curve = -q, 0.0
        for i in range(g.shape[0]):
            e = g[i] * t
            m = mu[i] / (mu[i] + (1 - mu[i]) * np.exp(-e)) if e > -500 else 0.0
            slope += g[i] * (m - mu[i])
            curve += g[i] * g[i] * m * (1 - m)
        if slope > 0:
            high = t
        else:
            low = t
        new = t - slope / curve if curve > 0 else (low + high) / 2
        if not (low < new < high):
            new = (low + high) / 2
        if abs(new - t) < 1e-12 * max(1.0, abs(t)):
            t = new
            break
        t = new
    k, curve = 0.0, 0.0
    for i in range(g.shape[0]):
        e = g[i] * t
        k += (
            e + np.log(mu[i] + (1 - mu[i]) * np.exp(-e)) if e > 0 else np.log(1 - mu[i] + mu[i] * np.exp(e))
        ) - e * mu[i]
        m = mu[i] / (mu[i] + (1 - mu[i]) * np.exp(-e)) if e > -500 else 0.0
        curve += g[i] * g[i] * m * (1 - m)
    gain = 2 * (t * q - k)
    if gain <= 0 or curve <= 0:
        out[0] = np.nan
        return
    w = np.sqrt(gain)
    v = t * np.sqrt(curve)
    r = w + np.log(v / w) / w
    out[0] = 0.5 * _erfc(r / np.sqrt(2.0))


@compiled
def _erfc(x: Any) -> Any:  # pragma: no cover - compiled
    return math.erfc(x)
