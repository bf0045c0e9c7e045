"""What is measured of a segmented structure: volume, largest diameter and, in PET, SUVmax, SUVmean and SUVpeak."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import numpy as np

from permed_compute.workloads.radiology.read import Volume

PEAK_ML = 1.0


@dataclass(frozen=True, slots=True)
class Measurements:
    """Of one segment. SUVs in g/ml, None where the volume is not PET in SUV; diameter 0 of an empty segment."""

    voxels: int
    volume_ml: float
    diameter_mm: float
    suv_max: float | None = None
    suv_mean: float | None = None
    suv_peak: float | None = None

    def as_dict(self) -> dict[str, float | int]:
        """Those that there are, rounded to what they are worth."""
        return {name: round(value, 4) for name, value in asdict(self).items() if value is not None}


def measure(mask: np.ndarray, volume: Volume, suv: np.ndarray | None = None) -> Measurements:
    """`mask`: bool, shape of `volume.array`. `suv`: the same shape, body-weight SUV in g/ml, of PET only."""
    voxels = int(np.count_nonzero(mask))
    figures = Measurements(voxels, voxels * volume.voxel_ml, diameter(mask, volume.affine_lps))
    if suv is None or not voxels:
        return figures
    inside = suv[mask]
    return Measurements(
        figures.voxels, figures.volume_ml, figures.diameter_mm,
        float(inside.max()), float(inside.mean(dtype=np.float64)), peak(mask, suv, volume.spacing),
    )  # fmt: skip


def diameter(mask: np.ndarray, affine: np.ndarray) -> float:
    """Maximum 3D diameter of the mesh in mm (IBSI L0JK): between the furthest points of the surface; 0 where empty.

    The vertices of a marching-cubes mesh of a mask at 0.5 are the centres of the faces between a voxel inside and its
    neighbour outside, so no mesh is made. Only corners of the convex hull can be furthest apart.
    """
    faces = _face_centres(mask)
    if not len(faces):
        return 0.0
    points = faces @ affine[:3, :3].T
    corners = points[_hull(points)]
    best = 0.0
    for start in range(0, len(corners), 512):  # blocks: thousands of corners squared do not fit
        block = corners[start : start + 512]
        apart = np.linalg.norm(block[:, None] - corners[None], axis=2)
        best = max(best, float(apart.max()))
    return best


def _face_centres(mask: np.ndarray) -> np.ndarray:
    """(faces, 3) in voxel indices."""
    found = []
    for axis in range(3):
        padded = np.pad(mask.astype(np.int8), [(1, 1) if a == axis else (0, 0) for a in range(3)])
        between = np.argwhere(np.diff(padded, axis=axis) != 0).astype(float)
        between[:, axis] -= 0.5
        found.append(between)
    return np.concatenate(found)


def _hull(points: np.ndarray) -> np.ndarray:
    from scipy.spatial import ConvexHull

    # A voxel has six faces that span all three directions, so the hull is never flat.
    return np.asarray(ConvexHull(points).vertices)


def peak(mask: np.ndarray, suv: np.ndarray, spacing: tuple[float, float, float]) -> float:
    """SUVpeak: the highest mean over a 1 ml sphere centred on a voxel of the structure (Wahl 2009, PERCIST).

    The sphere's voxels are those whose centres it holds; where it reaches out of the image, those inside count.
    """
    from scipy.signal import fftconvolve

    sphere = _sphere(spacing)
    reach = [length // 2 for length in sphere.shape]
    corners = np.argwhere(mask)
    box = tuple(
        slice(max(0, int(low) - r), int(high) + r + 1)
        for low, high, r in zip(corners.min(0), corners.max(0), reach, strict=True)
    )
    values = suv[box].astype(np.float64)
    total = fftconvolve(values, sphere, mode="same")
    count = fftconvolve(np.ones_like(values), sphere, mode="same")
    return float((total / np.maximum(np.rint(count), 1))[mask[box]].max())


def _sphere(spacing: tuple[float, float, float]) -> np.ndarray:
    radius = (3000.0 * PEAK_ML / (4 * np.pi)) ** (1 / 3)
    reach = [int(radius / length) for length in spacing]
    grid = np.meshgrid(
        *[np.arange(-r, r + 1) * length for r, length in zip(reach, spacing, strict=True)], indexing="ij"
    )
    return np.asarray(sum(axis**2 for axis in grid) <= radius**2, dtype=np.float64)
