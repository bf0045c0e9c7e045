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


# ------------------------------------------------------------------------------------------------ as SHELL sees it


def eho(view: np.ndarray, tissue: np.ndarray) -> dict[str, Any]:
    """What `as_eho` needs of a slide (JSON), as SHELL (lavlab-shell 0.9) takes it from an overview.

    view: (h, w, 3) uint8; tissue: (h, w) bool. Rows of the inverse stain matrix, the light, 1st and 99th percentiles.
    """
    from macenko_pca import find_stain_index, rgb_separate_stains_macenko_pca, stain_color_map

    glass = view[~tissue & (view != 255).any(2)]
    light = float(np.clip(glass.mean(dtype=np.float64), 200, 255)) if len(glass) >= 100 else 240.0
    separate: Any = rgb_separate_stains_macenko_pca
    found = np.asarray(separate(np.ascontiguousarray(view), bg_int=[light], mask_out=~tissue), np.float64)
    first, second = (find_stain_index(stain_color_map[name], found) for name in ("eosin", "hematoxylin"))
    if first == second or 2 in (first, second):
        first, second = 1, 0
    inverse = np.linalg.pinv(found)
    rows = [*(inverse[k].tolist() for k in (first, second)), [1 / 3] * 3]
    amounts = _amounts(view, light, rows)
    ranges = [np.percentile(amounts[..., k], (1, 99)).tolist() for k in range(3)]
    return {"light": light, "rows": rows, "ranges": [[a, b] if b > a + 1e-8 else [0.0, 1.0] for a, b in ranges]}


def as_eho(pixels: np.ndarray, facts: Any) -> np.ndarray:
    """(h, w, 3) uint8: eosin, haematoxylin and mean optical density, each from its 1st to its 99th percentile."""
    low, high = np.array(facts["ranges"], np.float32).T
    amounts = _amounts(pixels, facts["light"], facts["rows"])
    return np.asarray(np.clip((amounts - low) / (high - low + 1e-8), 0, 1) * 255, np.uint8)


def _amounts(pixels: np.ndarray, light: float, rows: Any) -> np.ndarray:
    """(h, w, 3) float32 of optical densities (base 10) times `rows`."""
    density = -np.log10(np.clip(np.arange(256, dtype=np.float32), 1, light) / np.float32(light))
    return np.asarray(density[pixels] @ np.array(rows, np.float32).T)
