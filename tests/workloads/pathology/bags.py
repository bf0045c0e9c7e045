"""Cohorts of made-up features: tiles of noise, a few of which carry a signal that says the class and the risk."""

from __future__ import annotations

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from permed_compute.workloads.pathology import features

ACROSS = 8
"""Tiles of a made slide's row."""


def write_features(
    folder: Path, name: str, values: np.ndarray, *, encoder: str = "made", digest: str = "0" * 64, mpp: float = 0.5
) -> Path:  # fmt: skip
    """A slide's Zarr as `pathology/encode` writes it; tiles of 64 pixels, row by row."""
    count = len(values)
    coords = np.stack([np.arange(count) % ACROSS, np.arange(count) // ACROSS], 1) * 64
    features.write_chunk(folder / f".{name}", values.astype(np.float16), count)
    facts = {
        "target_mpp": mpp, "patch_size": 64, "patch_size_level0": 64, "overlap": 0, "level0_width": ACROSS * 64 - 10,
        "level0_height": -(-count // ACROSS) * 64, "slide": name, "mpp": [mpp, mpp], "encoder": encoder,
        "encoder_digest": digest, "objective": None,
    }  # fmt: skip
    features.assemble(
        folder / f"{name}.zarr", coords, [folder / f".{name}" / features.CHUNK], block=count, dim=values.shape[1],
        encoder=encoder, facts=facts,
    )  # fmt: skip
    return folder / f"{name}.zarr"


def slide_name(text: str) -> str:
    return f"slide-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Made:
    """table: the cohort; features: their folder; planted: by slide, which tiles carry the signal; grade: by slide."""

    table: Path
    features: Path
    planted: dict[str, np.ndarray]
    grade: dict[str, int]


def cohort(
    folder: Path, count: int = 60, *, tiles: int = 40, dim: int = 12, seed: int = 0, permuted: bool = False
) -> Made:
    """Patients of grade 0 to 3; every fifth has two slides. label: tumour from grade 1 on; the higher, the sooner."""
    chance = np.random.default_rng(seed)
    grades = chance.permutation(np.arange(count) % 4)
    outcome = chance.permutation(grades) if permuted else grades
    rows, planted, known = [], {}, {}
    for k, (grade, told) in enumerate(zip(grades, outcome, strict=True)):
        died, left = chance.exponential(600 * np.exp(-2.5 * told)) + 0.1, chance.exponential(800) + 0.1
        for part in range(2 if k % 5 == 0 else 1):
            values = chance.normal(0, 1, (tiles + int(chance.integers(0, 9)), dim))
            where = np.zeros(len(values), bool)
            if grade:
                where[chance.choice(len(values), 4, replace=False)] = True
                values[where, :3] += 4
                values[where, 3] += 2 * grade
            name = slide_name(f"{seed} {k} {part}")
            write_features(folder / "features", name, values)
            planted[name], known[name] = where, int(grade)
            rows.append({
                "slide": name, "patient": f"p{k}", "label": "tumour" if told else "normal",
                "time": f"{min(died, left):.3f}", "event": int(died <= left), "site": "AB"[k % 2], "age": 30 + k % 50,
            })  # fmt: skip
    return Made(write_table(folder / "cohort.csv", rows), folder / "features", planted, known)


def write_table(path: Path, rows: list[dict[str, object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def read_table(path: Path) -> list[dict[str, object]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
