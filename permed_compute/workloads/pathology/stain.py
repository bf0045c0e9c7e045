"""A slide's stain: haematoxylin and eosin vectors by Macenko's method (ISBI 2009), and its application to a batch.

The fit (macenko-pca) looks at some tissue pixels of the low-resolution view, once per slide; applying it is one matrix
product per batch in optical density, which the encoder's device can do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

REFERENCE = np.array([[0.5626, 0.2159], [0.7201, 0.8012], [0.4062, 0.5581]])
"""Columns: haematoxylin, eosin (Macenko's reference slide)."""
REFERENCE_MOST = np.array([1.9705, 1.0308])
_GLASS, _BETA, _ALPHA = 240.0, 0.15, 1.0
_SDA = 255 / np.log(255)


@dataclass(frozen=True)
class Stain:
    """vectors: (3, 2) unit optical densities, haematoxylin first; most: (2,) 99th percentiles of their amounts."""

    vectors: np.ndarray
    most: np.ndarray

    def matrix(self) -> np.ndarray:
        """(3, 3) that takes an optical density of this slide to the reference stain's: od @ matrix."""
        amounts = np.linalg.pinv(self.vectors) * (REFERENCE_MOST / np.maximum(self.most, 1e-3))[:, None]
        return np.asarray((REFERENCE @ amounts).T)


def estimate(pixels: np.ndarray, *, seed: int = 0, most: int = 50_000) -> Stain | None:
    """Fit to (n, 3) uint8 tissue pixels; None where too few are stained."""
    if len(pixels) > most:
        pixels = pixels[np.random.default_rng(seed).choice(len(pixels), most, replace=False)]
    density = -np.log((pixels.astype(np.float64) + 1) / _GLASS)
    density = density[(density > _BETA).all(1)]
    if len(density) < 200:
        return None
    from macenko_pca import separate_stains_macenko_pca

    # It takes (height, width, 3) and counts optical density in 255 / ln 255, which only its least magnitude depends on.
    found: Any = separate_stains_macenko_pca(density[None] * _SDA, _BETA * _SDA, _ALPHA / 100, 1 - _ALPHA / 100)
    both = np.asarray(found, np.float64)[:, :2]
    both = both * np.sign(both.sum(axis=0))
    stains = both[:, np.argsort(-both[0])]
    if not np.isfinite(stains).all():
        return None
    amounts = np.linalg.lstsq(stains, density.T, rcond=None)[0]
    return Stain(stains, np.percentile(amounts, 99, axis=1))


def normalise(batch: np.ndarray, stain: Stain) -> np.ndarray:
    """(n, h, w, 3) uint8 of a slide → the same tiles in the reference stain. float32 inside, 16 times the batch."""
    density = -np.log((batch.astype(np.float32) + 1) / _GLASS)
    shown = _GLASS * np.exp(-(density @ stain.matrix().astype(np.float32)))
    return np.asarray(np.clip(shown, 0, 255), np.uint8)
