"""Where tissue is, and what is wrong with it, from one low-resolution view of a slide.

    view = overview(reader)          RGB at about 8 µm per pixel, never more than 16 MPixel
    found = detect(view)             masks of tissue, pen, folds and blur, contours, share of each

Tissue: optical density well above glass (Otsu's threshold on the mean OD, bounded), pen and black excluded, holes
smaller than 0.02 mm² filled, specks smaller than 0.05 mm² dropped. Pen: saturated hues that no stain has (green, blue,
red ink), black. Fold: tissue far denser than its own median, and saturated. Blur: the variance of the Laplacian of a
tile's luminance (Pech-Pacheco et al., ICPR 2000) over that of the luminance, so that pale tissue is not called blurred.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.workloads.pathology import geojson
from permed_compute.workloads.pathology.reader import Reader

VIEW_MPP = 8.0
_MOST_PIXELS = 16_000_000
_OD_BOUNDS = (0.04, 0.1)
"""Otsu's threshold is kept within these: without tissue there is one mode, with dense beside pale three."""
_SPECK_UM2, _HOLE_UM2 = 50_000.0, 20_000.0


@dataclass(frozen=True)
class View:
    """(height, width, 3) uint8 of the whole slide, and the level-0 pixels that one of its pixels spans, (x, y)."""

    pixels: np.ndarray
    mpp: float
    scale: tuple[float, float]


@dataclass(frozen=True)
class Tissue:
    """Boolean masks of the view's shape. `threshold`: the optical density that parts tissue from glass."""

    view: View
    tissue: np.ndarray
    pen: np.ndarray
    fold: np.ndarray
    threshold: float

    @property
    def shares(self) -> dict[str, float]:
        """Of the whole slide: tissue, pen; of the tissue: fold."""
        area = max(1, int(self.tissue.sum()))
        return {
            "tissue_share": round(float(self.tissue.mean()), 5),
            "pen_share": round(float(self.pen.mean()), 5),
            "fold_share": round(float((self.fold & self.tissue).sum()) / area, 5),
        }

    @property
    def area_mm2(self) -> float:
        return float(self.tissue.sum()) * (self.view.mpp / 1000) ** 2


def overview(reader: Reader, mpp: float = VIEW_MPP) -> View:
    """The whole slide at `mpp` or, where that has too many pixels, coarser."""
    width, height = reader.dimensions
    um = width * reader.mpp[0], height * reader.mpp[1]
    mpp = max(mpp, (um[0] * um[1] / _MOST_PIXELS) ** 0.5, *reader.mpp)
    size = max(1, int(um[0] / mpp)), max(1, int(um[1] / mpp))
    pixels = np.empty((size[1], size[0], 3), np.uint8)
    step = 1024  # in bands, so that a slide without low levels is never decoded whole into memory
    for top in range(0, size[1], step):
        for left in range(0, size[0], step):
            part = min(step, size[0] - left), min(step, size[1] - top)
            place = left * mpp / reader.mpp[0], top * mpp / reader.mpp[1]
            pixels[top : top + part[1], left : left + part[0]] = reader.read(mpp, *place, part)
    return View(pixels, mpp, (mpp / reader.mpp[0], mpp / reader.mpp[1]))


def detect(view: View) -> Tissue:
    """Tissue, pen and folds of a view."""
    from scipy import ndimage
    from skimage import filters
    from skimage.color import rgb2hsv

    rgb = ndimage.gaussian_filter(view.pixels.astype(np.float32), (1, 1, 0))
    density = -np.log10(np.clip(rgb, 1, 255) / 255).mean(2)
    hsv = rgb2hsv(rgb / 255)
    hue, saturation, value = hsv[..., 0], hsv[..., 1], hsv[..., 2]
    green = (hue > 0.22) & (hue < 0.5) & (saturation > 0.15)
    blue = (hue >= 0.5) & (hue < 0.66) & (saturation > 0.45)
    red = ((hue < 0.04) | (hue > 0.97)) & (saturation > 0.6)
    black = (value < 0.25) & (saturation < 0.3)
    pen = ndimage.binary_opening((green | blue | red | black) & (density > _OD_BOUNDS[0]), iterations=1)
    low, high = _OD_BOUNDS
    candidates = density[~pen]
    otsu: Any = filters.threshold_otsu
    varied = candidates.size > 1 and float(np.ptp(candidates)) > 0.01
    threshold = float(np.clip(otsu(candidates), low, high)) if varied else high
    pixel = view.mpp**2
    mask = (density > threshold) & ~ndimage.binary_dilation(pen, iterations=2)
    mask = _without_specks(ndimage.binary_closing(mask, iterations=2), _SPECK_UM2 / pixel)
    mask = ~_without_specks(~mask, _HOLE_UM2 / pixel)
    inside = density[mask]
    median = float(np.median(inside)) if inside.size else 0.0
    fold = mask & (density > max(2.5 * median, 0.6)) & (saturation > 0.25)
    fold = _without_specks(fold, 4)
    return Tissue(view, mask, pen, fold, threshold)


def _without_specks(mask: np.ndarray, smallest: float) -> np.ndarray:
    """The mask without connected regions of fewer pixels."""
    from scipy import ndimage

    labels, count = ndimage.label(mask)
    if not count:
        return mask
    keep = np.bincount(labels.ravel()) >= smallest
    keep[0] = False
    return np.asarray(keep[labels])


def sharpness(tiles: np.ndarray) -> np.ndarray:
    """(n,) float32 of (n, h, w, 3) uint8: variance of the Laplacian over the variance of luminance; blurred ≲ 0.02."""
    grey = tiles @ np.array([0.299, 0.587, 0.114], np.float32)
    inner = grey[:, 1:-1, 1:-1]
    laplacian = grey[:, :-2, 1:-1] + grey[:, 2:, 1:-1] + grey[:, 1:-1, :-2] + grey[:, 1:-1, 2:] - 4 * inner
    contrast = inner.var((1, 2))
    return np.asarray(laplacian.var((1, 2)) / np.maximum(contrast, 4.0), np.float32)


# ------------------------------------------------------------------------------------------------ contours


def contours(found: Tissue) -> list[Any]:
    """shapely polygons of the tissue, with holes, in level-0 pixels, largest first."""
    from shapely import affinity
    from shapely.geometry import Polygon
    from shapely.ops import unary_union
    from skimage import measure

    outline: Any = measure.find_contours
    rings = [
        Polygon(ring[:, ::-1] - 0.5) for ring in outline(np.pad(found.tissue, 1).astype(np.uint8), 0.5)
        if len(ring) > 4
    ]  # fmt: skip
    # A ring within a ring is a hole, and within that an island: even–odd, outermost first.
    shape: Any = None
    for ring in sorted((ring.buffer(0) for ring in rings), key=lambda ring: -ring.area):
        shape = ring if shape is None else shape.symmetric_difference(ring)
    if shape is None or shape.is_empty:
        return []
    merged = unary_union([shape])
    parts = [merged] if merged.geom_type == "Polygon" else [g for g in merged.geoms if g.geom_type == "Polygon"]
    sx, sy = found.view.scale
    moved = [affinity.scale(part.simplify(1.0), sx, sy, origin=(0, 0)) for part in parts]
    return sorted((part for part in moved if not part.is_empty), key=lambda part: -part.area)


def write_geojson(path: Path, polygons: list[Any], name: str, measurements: Mapping[str, float]) -> None:
    """Annotations as QuPath reads them (`geojson`)."""
    with geojson.writing(path) as write:
        for polygon in polygons:
            rings = [np.asarray(ring.coords)[:-1] for ring in (polygon.exterior, *polygon.interiors)]
            write(geojson.feature(rings, "annotation", name, (200, 0, 0), measurements))


def picture(found: Tissue, longest: int = 640) -> np.ndarray:
    """(h, w, 3) uint8: the view, with tissue outlined in green, pen in blue, folds in orange."""
    from scipy import ndimage

    step = max(1, -(-max(found.tissue.shape) // longest))
    image = found.view.pixels[::step, ::step].copy()
    mask = found.tissue[::step, ::step]
    image[found.fold[::step, ::step]] = (255, 140, 0)
    image[found.pen[::step, ::step]] = (0, 90, 255)
    image[ndimage.binary_dilation(mask) & ~ndimage.binary_erosion(mask)] = (0, 170, 60)
    return np.ascontiguousarray(image)
