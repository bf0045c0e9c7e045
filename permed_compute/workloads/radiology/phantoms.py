"""Made-up scans with lesions whose truth is known exactly: for trying a training or an evaluation, and for its tests.

    python -m permed_compute.workloads.radiology.phantoms FOLDER --count 40
    python -m permed_compute.workloads.radiology.phantoms FOLDER --count 60 --studies      a lesion is there or not

An ellipsoid body with an organ in it and none to three bright lesions in the organ, noise, and a slow change of
brightness; about every fourth patient is scanned twice. Sites differ in noise. Nothing in them is anybody.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import write_json
from permed_compute.workloads.radiology import nifti

LABELS = {"1": "organ", "2": "lesion"}
CLASSES = {"0": "no lesion", "1": "lesion"}
_SITES = (("north", "A", 22.0), ("south", "B", 34.0))
"""Name, scanner, standard deviation of the noise."""


@dataclass(frozen=True, slots=True)
class Phantom:
    """image: int16 (x, y, z); label: uint8, 0 elsewhere, 1 organ, 2 lesion; spacing in mm."""

    image: np.ndarray
    label: np.ndarray
    spacing: float
    lesions: int


def phantom(
    seed: int, edge: int = 32, *, noise: float = 25.0, lesions: int | None = None, spacing: float = 2.0
) -> Phantom:  # fmt: skip
    """The same seed is the same phantom. edge: voxels along each axis. lesions: None draws 0 to 3."""
    from scipy.ndimage import gaussian_filter

    chance = np.random.default_rng([7, seed])
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij"))

    def ellipsoid(middle: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return np.asarray((((grid - middle[:, None, None, None]) / radii[:, None, None, None]) ** 2).sum(axis=0) < 1)

    body = ellipsoid(np.zeros(3), np.array([0.92, 0.8, 0.97]))
    middle, radii = chance.uniform(-0.15, 0.15, 3), chance.uniform(0.45, 0.6, 3)
    organ = ellipsoid(middle, radii)
    label = organ.astype(np.uint8)
    wanted = int(chance.integers(0, 4)) if lesions is None else lesions
    for _ in range(wanted):
        direction = chance.normal(size=3)
        place = middle + radii * direction / np.linalg.norm(direction) * chance.uniform(0.1, 0.6)
        label[ellipsoid(place, chance.uniform(0.12, 0.2, 3)) & organ] = 2
    clean = np.where(body, 100.0, -900.0)
    clean[label == 1], clean[label == 2] = 250.0, 420.0
    slow = gaussian_filter(chance.normal(size=(edge,) * 3), edge / 4)
    image = clean + 25 * slow / max(float(np.abs(slow).max()), 1e-9) + noise * chance.normal(size=clean.shape)
    return Phantom(np.rint(image).astype(np.int16), label, spacing, wanted)


def write(folder: Path, count: int, *, seed: int = 0, edge: int = 32, studies: bool = False) -> Path:
    """`count` scans as NIfTI with a Decathlon list beside them, which is returned.

    studies: half of them have lesions, and the list says which; there is no label of voxels.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        patient = number - 1 if number % 5 == 4 else number
        chance = np.random.default_rng([11, seed, patient])
        site, scanner, noise = _SITES[patient % 2]
        lesions = (number // 2 % 2) * int(chance.integers(1, 4)) if studies else None  # not by site
        made = phantom(seed * 100_000 + number, edge, noise=noise, lesions=lesions)
        affine = np.diag([made.spacing, made.spacing, made.spacing, 1.0])
        image, label = f"image-{number:03}.nii.gz", f"label-{number:03}.nii.gz"
        nifti.write(made.image, affine, folder / image)
        if not studies:
            nifti.write(made.label, affine, folder / label)
        rows.append({
            "image": image, "label": int(made.lesions > 0) if studies else label, "subject": f"phantom-{patient}",
            "site": site, "scanner": scanner,
            "sex": "FM"[int(chance.integers(2))], "age": int(chance.integers(20, 90)),
        })  # fmt: skip
    labels = CLASSES if studies else {"0": "background", **LABELS}
    write_json(folder / "dataset.json", {"name": "phantoms", "labels": labels, "training": rows})
    return folder / "dataset.json"


def main() -> None:
    parser = argparse.ArgumentParser(description="Made-up scans with lesions of known truth.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--edge", type=int, default=32, help="voxels along each axis")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--studies", action="store_true", help="say of each whether it has a lesion, not where")
    given = parser.parse_args()
    write(given.folder, given.count, seed=given.seed, edge=given.edge, studies=given.studies)


if __name__ == "__main__":
    main()
