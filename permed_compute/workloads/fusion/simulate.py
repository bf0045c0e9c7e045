"""A made-up cohort with images, slides, omics and scores, each knowing a part of what decides the outcome.

    python -m permed_compute.workloads.fusion.simulate FOLDER --people 200

Three hidden numbers of each person decide, evenly, when the event comes: one shows in a scan (size and grain of a
lesion), one in a slide (how many tiles are of a kind), one in the expression of some genes. A polygenic score knows
nothing of it. Every fifth person has a sibling; a fifth of everything is missing. Nothing in it is anybody.

`cases.json` is the input of `radiology/radiomics`, whose table is a modality; the other files are modalities as they
are. IDs are the same in all.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from permed_compute.paths import write_json
from permed_compute.workloads.pathology import features
from permed_compute.workloads.radiology import nifti

GENES, TILES, DIM = 60, 64, 16


@dataclass(frozen=True, slots=True)
class Made:
    """hidden: (people, 3) what the scan, the slide and the genes know. time in years."""

    names: tuple[str, ...]
    families: tuple[str, ...]
    hidden: np.ndarray
    time: np.ndarray
    event: np.ndarray


def people(count: int, seed: int = 0, *, strength: float = 1.0) -> Made:
    """strength: of each hidden number in the log hazard. Siblings share half of what is hidden."""
    chance = np.random.default_rng([21, seed])
    hidden = chance.normal(size=(count, 3))
    families = np.arange(count)
    for k in range(4, count, 5):
        families[k], hidden[k] = k - 1, (hidden[k - 1] + np.sqrt(3) * hidden[k]) / 2
    event_at = chance.exponential(4 * np.exp(-strength * hidden.sum(axis=1)))
    followed = chance.uniform(1, 12, count)
    return Made(
        tuple(f"sim-{k:05}" for k in range(count)), tuple(f"fam-{k:05}" for k in families), hidden,
        np.maximum(np.minimum(event_at, followed), 0.01), event_at <= followed,
    )  # fmt: skip


def scan(hidden: float, chance: np.random.Generator, edge: int = 14) -> tuple[np.ndarray, np.ndarray]:
    """(image int16, label uint8): a lesion that is larger and grainier the higher the number."""
    grid = np.stack(np.meshgrid(*[np.linspace(-1, 1, edge)] * 3, indexing="ij"))
    radius = 0.55 + 0.12 * np.tanh(hidden) + 0.01 * chance.normal()
    label = ((grid**2).sum(axis=0) < radius**2).astype(np.uint8)
    grain = np.exp(3.4 + 0.5 * hidden)
    image = 100 + 200 * label + grain * label * chance.normal(size=label.shape) + 10 * chance.normal(size=label.shape)
    return np.rint(image).astype(np.int16), label


def write(folder: Path, count: int, *, seed: int = 0, missing: float = 0.2) -> Path:
    """All files, in this folder, which is returned."""
    made = people(count, seed)
    chance = np.random.default_rng([22, seed])
    there = chance.random((count, 4)) >= missing
    there[~there.any(axis=1), 2] = True
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    ages = chance.integers(30, 90, count)
    _table(
        folder / "clinical.tsv", ("IID", "FAMILY", "YEARS", "EVENT", "AGE"),
        [(made.names[k], made.families[k], f"{made.time[k]:.5f}", int(made.event[k]), ages[k]) for k in range(count)],
    )  # fmt: skip
    _scans(folder, made, np.flatnonzero(there[:, 0]), seed)
    _slides(folder, made, np.flatnonzero(there[:, 1]), seed)
    loadings = np.where(np.arange(GENES) < GENES // 3, 1.0, 0.0) * chance.uniform(0.5, 1.0, GENES)
    genes = made.hidden[:, [2]] * loadings + chance.normal(size=(count, GENES))
    _table(
        folder / "expression.tsv", ("IID", *(f"gene_{k:02}" for k in range(GENES))),
        [(made.names[k], *(f"{value:.5f}" for value in genes[k])) for k in np.flatnonzero(there[:, 2])],
    )  # fmt: skip
    _table(
        folder / "score.sscore", ("#IID", "ALLELE_CT", "NAMED_ALLELE_DOSAGE_SUM", "SCORE1_AVG"),
        [(made.names[k], 200, 100, f"{chance.normal():.6f}") for k in np.flatnonzero(there[:, 3])],
    )  # fmt: skip
    return folder


def _table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def _scans(folder: Path, made: Made, rows: np.ndarray, seed: int) -> None:
    cases = []
    for k in rows:
        image, label = scan(made.hidden[k, 0], np.random.default_rng([23, seed, k]))
        names = {"image": f"image-{k:05}.nii.gz", "label": f"label-{k:05}.nii.gz"}
        nifti.write(image, np.diag([1.0, 1.0, 1.0, 1.0]), folder / names["image"])
        nifti.write(label, np.diag([1.0, 1.0, 1.0, 1.0]), folder / names["label"])
        cases.append({**names, "subject": made.names[k]})
    write_json(folder / "cases.json", {"labels": {"1": "lesion"}, "cases": cases})


def _slides(folder: Path, made: Made, rows: np.ndarray, seed: int) -> None:
    """Features as `pathology/encode` stores them; the share of tiles of one kind follows the hidden number."""
    listed = []
    for k in rows:
        chance = np.random.default_rng([24, seed, k])
        tiles = chance.normal(size=(TILES, DIM))
        tiles[chance.random(TILES) < 1 / (1 + np.exp(-1.5 * made.hidden[k, 1])), :4] += 2.0
        chunk = folder / "chunks" / f"{k:05}"
        features.write_chunk(chunk, tiles.astype(np.float16), TILES)
        name = f"slide-{k:05}.zarr"
        features.assemble(
            folder / name, np.zeros((TILES, 2)), [chunk / features.CHUNK], block=TILES, dim=DIM, encoder="simulated",
            facts={"target_mpp": 0.5, "patch_size": 224},
        )  # fmt: skip
        listed.append((made.names[k], name))
    _table(folder / "slides.tsv", ("IID", "slide"), listed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--people", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    write(given.folder, given.people, seed=given.seed)


if __name__ == "__main__":
    main()
