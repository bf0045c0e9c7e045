"""Radiomics by the Image Biomarker Standardisation Initiative (IBSI, arXiv:1612.07003): its tags, codes, definitions.

    features(image, mask, spacing, levels) -> {tag: value}        of one structure, as `stat.mean`
    discretise(image, mask, …) -> levels                          grey levels from 1, 0 outside
    CODES                                                         tag → IBSI's permanent code, as Q4LE

Only features that were checked against IBSI's digital phantom are here, and a test holds every one of them to its
tolerance: morphology, intensity statistics, histogram, and in 3D over all directions (merged, IAZD) co-occurrence, and
size zones (26 neighbours). Nothing is resampled: neighbours along a longer axis of a voxel are further away.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

CODES: Mapping[str, str] = {
    "morph.vol": "RNU0", "morph.approx.vol": "YEKZ", "morph.area": "C0JK", "morph.av": "2PR5", "morph.comp.1": "SKGS",
    "morph.comp.2": "BQWJ", "morph.sph.dispr": "KRCK", "morph.sphericity": "QCFX", "morph.asphericity": "25C7",
    "morph.com": "KLMA", "morph.diam": "L0JK", "morph.pca.major": "TDIC", "morph.pca.minor": "P9VJ",
    "morph.pca.least": "7J51", "morph.pca.elongation": "Q3CK", "morph.pca.flatness": "N17B",
    "stat.mean": "Q4LE", "stat.var": "ECT3", "stat.skew": "KE2A", "stat.kurt": "IPH6", "stat.median": "Y12H",
    "stat.min": "1GSF", "stat.P10": "QG58", "stat.P90": "8DWT", "stat.max": "84IY", "stat.iqr": "SALO",
    "stat.range": "2OJQ", "stat.mad": "4FUA", "stat.rmad": "1128", "stat.medad": "N72L", "stat.cov": "7TET",
    "stat.qcod": "9S40", "stat.energy": "N8CA", "stat.rms": "5ZWQ",
    "ih.entropy": "TLU2", "ih.uniformity": "BJ5W",
    "cm.joint.max": "GYBY", "cm.joint.avg": "60VM", "cm.joint.var": "UR99", "cm.joint.entr": "TU9B",
    "cm.diff.avg": "TF7R", "cm.diff.var": "D3YU", "cm.diff.entr": "NTRS", "cm.sum.avg": "ZGXS", "cm.sum.var": "OEEB",
    "cm.sum.entr": "P6QZ", "cm.energy": "8ZQL", "cm.contrast": "ACUI", "cm.dissimilarity": "8S9J",
    "cm.inv.diff": "IB1Z", "cm.inv.diff.norm": "NDRX", "cm.inv.diff.mom": "WF0Z", "cm.inv.diff.mom.norm": "1QCO",
    "cm.inv.var": "E8JP", "cm.corr": "NI2N", "cm.auto.corr": "QWB0", "cm.clust.tend": "DG8W", "cm.clust.shade": "7NFM",
    "cm.clust.prom": "AE86", "cm.info.corr.1": "R8DG", "cm.info.corr.2": "JN9H",
    "szm.sze": "5QRC", "szm.lze": "48P8", "szm.lgze": "XMSY", "szm.hgze": "5GN9", "szm.szlge": "5RAI",
    "szm.szhge": "HW1V", "szm.lzlge": "YH51", "szm.lzhge": "J17V", "szm.glnu": "JNSA", "szm.glnu.norm": "Y1RO",
    "szm.zsnu": "4JP3", "szm.zsnu.norm": "VB3A", "szm.z.perc": "P30P", "szm.gl.var": "BYLV", "szm.zs.var": "3NSA",
    "szm.zs.entr": "GU8N",
}  # fmt: skip
"""Of every feature that is computed, in the order of the table."""

_DIRECTIONS = [
    (x, y, z) for x in (-1, 0, 1) for y in (-1, 0, 1) for z in (-1, 0, 1) if (x, y, z) > (0, 0, 0)
]  # one of each opposite pair


def features(
    image: np.ndarray, mask: np.ndarray, spacing: tuple[float, float, float], levels: np.ndarray
) -> dict[str, float]:
    """image: intensities. mask: bool, not empty. spacing: mm per voxel. levels: `discretise`. All of one shape (3D).

    Units: mm, mm², mm³ for `morph`; the image's for `stat`. A value that is not defined (the correlation of one grey
    level) is NaN.
    """
    box = _box(mask)
    image, mask, levels = image[box].astype(np.float64), mask[box], levels[box]
    found = morphology(image, mask, spacing) | statistics(image[mask]) | histogram(levels[mask])
    found |= cooccurrence(levels) | zones(levels)
    return {tag: float(found[tag]) for tag in CODES}


def discretise(
    image: np.ndarray, mask: np.ndarray, *, bins: int = 0, width: float = 0.0, lowest: float | None = None
) -> np.ndarray:
    """Grey levels from 1 within the mask, 0 outside; int32. Fixed bin number (IBSI K15C), or fixed bin size (Q3RU) from
    `lowest` on, by default the structure's own minimum."""
    values = image[mask].astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if width:
        begin = low if lowest is None else lowest
        found = np.floor((values - begin) / width) + 1
        found = np.maximum(found, 1)
    elif high > low:
        found = np.minimum(np.floor(bins * (values - low) / (high - low)) + 1, bins)
    else:
        found = np.ones_like(values)
    levels = np.zeros(image.shape, np.int32)
    levels[mask] = found
    return levels


def _box(mask: np.ndarray) -> tuple[slice, ...]:
    return tuple(slice(int(places.min()), int(places.max()) + 1) for places in np.nonzero(mask))


# ------------------------------------------------------------------------------------------------ morphology


def morphology(image: np.ndarray, mask: np.ndarray, spacing: tuple[float, float, float]) -> dict[str, float]:
    """Of the mesh at 0.5 of the mask, and of the voxels' centres."""
    from skimage import measure as mesh

    from permed_compute.workloads.radiology.measure import diameter

    vertices, faces, _, _ = mesh.marching_cubes(np.pad(mask, 1).astype(np.float32), 0.5, spacing=spacing)  # type: ignore[no-untyped-call]
    a, b, c = (vertices[faces[:, k]].astype(np.float64) for k in range(3))
    volume = abs(float(np.einsum("ij,ij->", a, np.cross(b, c)))) / 6
    area = float(mesh.mesh_surface_area(vertices, faces))  # type: ignore[no-untyped-call]
    sphere = 36 * np.pi * volume**2  # A³ of a sphere of that volume
    points = np.argwhere(mask) * np.asarray(spacing)
    centre = points.mean(axis=0)
    weights = image[mask]
    shift = (
        np.linalg.norm(centre - (points * weights[:, None]).sum(axis=0) / weights.sum()) if weights.sum() else np.nan
    )
    spread = np.maximum(np.linalg.eigvalsh((points - centre).T @ (points - centre) / max(len(points) - 1, 1)), 0.0)
    least, minor, major = 4 * np.sqrt(spread)
    return {
        "morph.vol": volume, "morph.approx.vol": len(points) * float(np.prod(spacing)), "morph.area": area,
        "morph.av": area / volume, "morph.comp.1": volume / (np.sqrt(np.pi) * area**1.5),
        "morph.comp.2": sphere / area**3, "morph.sph.dispr": area / np.cbrt(sphere),
        "morph.sphericity": np.cbrt(sphere) / area, "morph.asphericity": area / np.cbrt(sphere) - 1,
        "morph.com": float(shift), "morph.diam": diameter(mask, np.diag([*spacing, 1.0])),
        "morph.pca.major": major, "morph.pca.minor": minor, "morph.pca.least": least,
        "morph.pca.elongation": minor / major if major else np.nan,
        "morph.pca.flatness": least / major if major else np.nan,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ first order


def statistics(x: np.ndarray) -> dict[str, float]:
    """Of the intensities as they are."""
    mean, variance = float(x.mean()), float(x.var())
    p10, p25, median, p75, p90 = np.percentile(x, (10, 25, 50, 75, 90))
    robust = x[(x >= p10) & (x <= p90)]
    centred = x - mean
    return {
        "stat.mean": mean, "stat.var": variance,
        "stat.skew": float((centred**3).mean()) / variance**1.5 if variance else 0.0,
        "stat.kurt": float((centred**4).mean()) / variance**2 - 3 if variance else 0.0,
        "stat.median": median, "stat.min": x.min(), "stat.P10": p10, "stat.P90": p90, "stat.max": x.max(),
        "stat.iqr": p75 - p25, "stat.range": np.ptp(x), "stat.mad": np.abs(centred).mean(),
        "stat.rmad": np.abs(robust - robust.mean()).mean(), "stat.medad": np.abs(x - median).mean(),
        "stat.cov": np.sqrt(variance) / mean if mean else np.nan,
        "stat.qcod": (p75 - p25) / (p75 + p25) if p75 + p25 else np.nan,
        "stat.energy": (x**2).sum(), "stat.rms": np.sqrt((x**2).mean()),
    }  # fmt: skip


def histogram(levels: np.ndarray) -> dict[str, float]:
    p = np.bincount(levels)[1:] / len(levels)
    return {"ih.entropy": _entropy(p), "ih.uniformity": float((p**2).sum())}


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log2(p)).sum())


# ------------------------------------------------------------------------------------------------ texture


def cooccurrence(levels: np.ndarray) -> dict[str, float]:
    """Grey levels of neighbours at distance 1, both ways, over all 13 directions in one matrix (IAZD)."""
    many = int(levels.max())
    counts = np.zeros((many + 1, many + 1))
    for direction in _DIRECTIONS:
        one, other = _shifted(levels, direction)
        inside = (one > 0) & (other > 0)
        flat = one[inside].astype(np.int64) * (many + 1) + other[inside]
        counts += np.bincount(flat, minlength=counts.size).reshape(counts.shape)
    counts = (counts + counts.T)[1:, 1:]
    p = counts / counts.sum() if counts.any() else np.full_like(counts, np.nan)
    i, j = np.meshgrid(np.arange(1, many + 1.0), np.arange(1, many + 1.0), indexing="ij")
    apart, joint = np.abs(i - j), i + j
    marginal = p.sum(axis=1)
    mean = float((i * p).sum())
    variance = float(((i - mean) ** 2 * p).sum())
    difference = np.bincount(apart.astype(int).ravel(), p.ravel(), many)
    total = np.bincount(joint.astype(int).ravel(), p.ravel(), 2 * many + 1)
    k_difference, k_total = np.arange(len(difference)), np.arange(len(total))
    both = np.outer(marginal, marginal)
    seen = both > 0
    entropy, independent = _entropy(p), _entropy(both)
    crossed = float(-(p[seen] * np.log2(both[seen])).sum())
    marginal_entropy = _entropy(marginal)
    mean_difference, mean_total = float(k_difference @ difference), float(k_total @ total)
    tendency = joint - 2 * mean
    with np.errstate(divide="ignore"):
        inverse = np.where(apart > 0, 1 / apart**2, 0.0)
    return {
        "cm.joint.max": p.max(), "cm.joint.avg": mean, "cm.joint.var": variance, "cm.joint.entr": entropy,
        "cm.diff.avg": mean_difference, "cm.diff.var": ((k_difference - mean_difference) ** 2 * difference).sum(),
        "cm.diff.entr": _entropy(difference), "cm.sum.avg": mean_total,
        "cm.sum.var": ((k_total - mean_total) ** 2 * total).sum(), "cm.sum.entr": _entropy(total),
        "cm.energy": (p**2).sum(), "cm.contrast": (apart**2 * p).sum(), "cm.dissimilarity": (apart * p).sum(),
        "cm.inv.diff": (p / (1 + apart)).sum(), "cm.inv.diff.norm": (p / (1 + apart / many)).sum(),
        "cm.inv.diff.mom": (p / (1 + apart**2)).sum(), "cm.inv.diff.mom.norm": (p / (1 + (apart / many) ** 2)).sum(),
        "cm.inv.var": (p * inverse).sum(),
        "cm.corr": ((i * j * p).sum() - mean**2) / variance if variance else np.nan,
        "cm.auto.corr": (i * j * p).sum(), "cm.clust.tend": (tendency**2 * p).sum(),
        "cm.clust.shade": (tendency**3 * p).sum(), "cm.clust.prom": (tendency**4 * p).sum(),
        "cm.info.corr.1": (entropy - crossed) / marginal_entropy if marginal_entropy else np.nan,
        "cm.info.corr.2": np.sqrt(max(0.0, 1 - np.exp(-2 * (independent - entropy)))),
    }  # fmt: skip


def _shifted(levels: np.ndarray, direction: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Each voxel beside its neighbour in that direction, where it has one."""
    here = tuple(slice(max(0, -step), n - max(0, step)) for step, n in zip(direction, levels.shape, strict=True))
    there = tuple(slice(max(0, step), n - max(0, -step)) for step, n in zip(direction, levels.shape, strict=True))
    return levels[here], levels[there]


def zones(levels: np.ndarray) -> dict[str, float]:
    """Zones of one grey level that touch by face, edge or corner: level i, size j."""
    from scipy.ndimage import label

    sizes, grey = [], []
    for level in np.unique(levels[levels > 0]):
        named, _ = label(levels == level, structure=np.ones((3, 3, 3)))
        found = np.bincount(named.ravel())[1:]
        sizes.append(found)
        grey.append(np.full(len(found), level))
    i, j = np.concatenate(grey).astype(np.float64), np.concatenate(sizes).astype(np.float64)
    by_level, by_size = np.unique(i, return_counts=True)[1], np.unique(j, return_counts=True)[1]
    pairs = np.unique(np.stack([i, j]), axis=1, return_counts=True)[1]
    count = len(i)
    mean = np.mean
    return {
        "szm.sze": mean(1 / j**2), "szm.lze": mean(j**2), "szm.lgze": mean(1 / i**2), "szm.hgze": mean(i**2),
        "szm.szlge": mean(1 / (i * j) ** 2), "szm.szhge": mean((i / j) ** 2), "szm.lzlge": mean((j / i) ** 2),
        "szm.lzhge": mean((i * j) ** 2), "szm.glnu": (by_level**2).sum() / count,
        "szm.glnu.norm": (by_level**2).sum() / count**2, "szm.zsnu": (by_size**2).sum() / count,
        "szm.zsnu.norm": (by_size**2).sum() / count**2, "szm.z.perc": count / np.count_nonzero(levels),
        "szm.gl.var": float(i.var()), "szm.zs.var": float(j.var()), "szm.zs.entr": _entropy(pairs / count),
    }  # fmt: skip
