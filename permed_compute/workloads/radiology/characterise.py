"""Job `radiology/radiomics`: IBSI features of every structure of every case, as tables that the omics jobs read.

`inputs`: `cases`, a JSON list; paths in it are relative to its folder, a volume is a store or NIfTI:

    {"labels": {"1": "lesion"}, "cases": [{"image": "i1.nii.gz", "label": "t1.nii.gz", "subject": "7"}]}

`params` of the job:
    bins         32      grey levels between a structure's least and greatest intensity
    bin_width    0.0     or levels of this width in the image's unit (HU, SUV): what calibrated images should have
    lowest       null    where the first of them begins; null: at the structure's least intensity

One table per structure, `radiomics-NAME.tsv`: IID (pseudonym), case, and a column per feature by its IBSI tag; NA where
a structure is not there. `radiomics.json` has the features' codes and what they were computed with.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.paths import replacing, write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import patches, radiomics, volume_files

CASES, ABOUT = "cases", "radiomics.json"
VERSION = "1"
UNEVEN = 1.05
"""Longest over shortest side of a voxel, above which texture is told to compare unlike distances."""
_PARAMS: dict[str, Any] = {"bins": 32, "bin_width": 0.0, "lowest": None}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [Problem(f"params.{name}", f"is none of {list(_PARAMS)}.") for name in given if name not in _PARAMS]
    values = {**_PARAMS, **given}
    checks = {
        "bins": isinstance(values["bins"], int) and 2 <= values["bins"] <= 1024,
        "bin_width": _is_number(values["bin_width"]) and values["bin_width"] >= 0,
        "lowest": values["lowest"] is None or (_is_number(values["lowest"]) and values["bin_width"] > 0),
    }
    problems += [Problem(f"params.{name}", f"cannot be {values[name]!r}.") for name, good in checks.items() if not good]
    if problems:
        raise SpecError("params", problems)
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _listed(ctx: Context) -> tuple[dict[int, str], list[dict[str, Any]]]:
    try:
        found = json.loads(ctx.input(CASES).read_text(encoding="utf-8"))
        names = {int(label): str(name) for label, name in found["labels"].items()}
        rows = [dict(row) for row in found["cases"]]
        complete = all(row["image"] and row["label"] and row["subject"] for row in rows) and min(names) >= 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        names, rows, complete = {}, [], False
    if not complete or not rows or len({_file(name) for name in names.values()}) < len(names):
        raise WorkloadError(
            "The list of cases cannot be used.",
            remedy='Write {"labels": {"1": "name"}, "cases": [{"image", "label", "subject"}]}; names differ.',
        )
    return names, rows


def _file(name: str) -> str:
    return f"radiomics-{re.sub(r'[^A-Za-z0-9]+', '-', name).strip('-').lower()}.tsv"


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part per case."""
    params, folder = params_of(spec.params), ctx.input(CASES).parent
    names, rows = _listed(ctx)
    parts: list[Part] = []
    seen: Counter[str] = Counter()
    for row in rows:
        paths = folder / row["image"], folder / row["label"]
        digests = tuple(volume_files.content_digest(path, ctx) for path in paths)
        name = f"case-{hashlib.sha256(' '.join(digests).encode()).hexdigest()[:16]}"
        seen[name] += 1
        part = Part(
            name,
            digests,
            {**params, "labels": sorted(names)},
            tuple(map(str, paths)),
            ctx.pseudonym(str(row["subject"])),
        )
        parts.append(part if seen[name] == 1 else replace(part, name=f"{name}-{seen[name]}"))
    return parts


@dataclass(frozen=True, slots=True)
class Case:
    part: Part
    image: np.ndarray
    label: np.ndarray
    spacing: tuple[float, float, float]


def load(part: Part, ctx: Context) -> Case:
    """Raises `RefusedInput` where a volume cannot be read, or the two lie on other grids."""
    with ctx.stage("read"):
        image, label = (volume_files.read(Path(path), ctx) for path in part.sources)
    apart = np.abs(image.affine_ras - label.affine_ras).max() if image.array.shape == label.array.shape else np.inf
    if apart > patches.SAME_PLACE:
        raise RefusedInput(Finding("OTHER_GRID", "Image and label lie on other grids.", "refused", part.name))
    return Case(part, image.array, label.array, image.spacing)


def run(case: Case, model: None, ctx: Context) -> PartResult:
    """Values by label and tag; null where a feature is not defined."""
    params, findings, values = case.part.params, [], {}
    if max(case.spacing) > UNEVEN * min(case.spacing):
        numbers = {"spacing_mm": [round(length, 6) for length in case.spacing]}
        sentence = "Voxels are longer one way: neighbours that texture compares are not equally far away."
        findings.append(Finding("UNEVEN_VOXELS", sentence, "note", case.part.name, numbers))
    for label in params["labels"]:
        mask = case.label == label
        if not mask.any():
            sentence = f"Structure {label} is not in it."
            findings.append(Finding("STRUCTURE_ABSENT", sentence, "note", case.part.name, {"label": label}))
            continue
        with ctx.stage("features"):
            levels = radiomics.discretise(
                case.image, mask, bins=params["bins"], width=params["bin_width"], lowest=params["lowest"]
            )
            found = radiomics.features(case.image, mask, case.spacing, levels)
        values[str(label)] = {tag: value if math.isfinite(value) else None for tag, value in found.items()}
    return PartResult({"features": values}, findings)


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """The tables, and what they say."""
    params, (names, _) = params_of(ctx.spec.params), _listed(ctx)
    done = sorted(results, key=lambda item: item.part.name)
    for label, name in names.items():
        with replacing(ctx.out / _file(name)) as new, new.open("w", newline="", encoding="utf-8") as file:
            table = csv.writer(file, delimiter="\t", lineterminator="\n")
            table.writerow(("IID", "case", *radiomics.CODES))
            for item in done:
                found = item.values["features"].get(str(label), {})
                row = ("NA" if (value := found.get(tag)) is None else repr(value) for tag in radiomics.CODES)
                table.writerow((item.part.subject, item.part.name, *row))
    width = {"bin_width": params["bin_width"], "lowest": params["lowest"]}
    about = {
        "features": dict(radiomics.CODES), "tables": {name: _file(name) for name in names.values()},
        "discretisation": width if params["bin_width"] else {"bins": params["bins"]}, "version": VERSION,
        "source": "IBSI reference manual, arXiv:1612.07003", "texture": "3D, all directions merged (IAZD), distance 1",
        "interpolation": "none",
    }  # fmt: skip
    write_json(ctx.out / ABOUT, about)
    return Result({"cases": len(done), "structures": list(names.values()), "features": len(radiomics.CODES)})


WORKLOAD = Map(plan=plan, load=load, run=run, reduce=reduce, version=VERSION)
