"""Job `radiology/evaluate`: predictions against truth, case by case, and one page that says how well and for whom.

`inputs`: `cases`, a JSON list; paths in it are relative to its folder, a volume is a store or NIfTI:

    {"labels": {"1": "lesion"}, "cases": [{"label": "t1.nii.gz", "predictions": {"ours": "p1.nii.gz"}, "subject": "7",
     "image": "i1.nii.gz", "probability": {"ours": "q1.nii.gz"}, "site": "A", "scanner": "X", "sex": "F", "age": 61}]}

Only `label`, `predictions` and `subject` must be there. `probability` is of the lesion structure (0 to 1).

A prediction that is absent, cannot be read or lies on another grid counts as one that missed everything, with a
finding: leaving it out would make the failing model look better.

`params` of the job:
    models             []         which predictions, the first is the one reported on; [] is all, by name
    nsd_mm             2.0        borders within this are called right
    lesions            0          structure that is scored lesion by lesion (FROC, calibration); 0: the lowest, -1: none
    iou                0.1        least overlap with a lesion that counts as finding it
    least_ml           0.0        predicted lesions below this are no detections
    age_edges          [18, 40, 65, 80]   where age groups begin
    worst              6          cases shown
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.learning import calibration
from permed_compute.learning.evidence import UNSAID
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import evaluation, lesions, patches, scores, volume_files
from permed_compute.workloads.radiology.read import Volume

CASES = "cases"
PICTURE, PAGE, SUMMARY = "worst.png", "evaluation.html", "evaluation.json"
VERSION = "1"
TRAITS = ("site", "scanner", "sex", "age")

_PARAMS: dict[str, Any] = {
    "models": [], "nsd_mm": 2.0, "lesions": 0, "iou": lesions.IOU, "least_ml": 0.0, "age_edges": [18, 40, 65, 80],
    "worst": 6,
}  # fmt: skip


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [Problem(f"params.{name}", f"is none of {list(_PARAMS)}.") for name in given if name not in _PARAMS]
    values = {**_PARAMS, **given}
    checks = {
        "models": isinstance(values["models"], list) and all(isinstance(name, str) for name in values["models"]),
        "nsd_mm": _is_number(values["nsd_mm"]) and values["nsd_mm"] >= 0,
        "lesions": isinstance(values["lesions"], int) and values["lesions"] >= -1,
        "iou": _is_number(values["iou"]) and 0 < values["iou"] <= 1,
        "least_ml": _is_number(values["least_ml"]) and values["least_ml"] >= 0,
        "age_edges": isinstance(values["age_edges"], list) and sorted(values["age_edges"]) == values["age_edges"],
        "worst": isinstance(values["worst"], int) and values["worst"] >= 0,
    }
    problems += [Problem(f"params.{name}", f"cannot be {values[name]!r}.") for name, good in checks.items() if not good]
    if problems:
        raise SpecError("params", problems)
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ------------------------------------------------------------------------------------------------ the list


@dataclass(frozen=True, slots=True)
class Listed:
    """The list of cases: structures by label, models (the reported one first), and the rows as they stand."""

    folder: Path
    structures: dict[int, str]
    models: list[str]
    rows: Sequence[Mapping[str, Any]]
    lesion: int
    """The label that is scored lesion by lesion, 0 for none."""


def listed(spec: JobSpec, ctx: Context) -> Listed:
    """Raises `WorkloadError` where the list cannot be used."""
    params, index = params_of(spec.params), ctx.input(CASES)
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        structures = {int(label): str(name) for label, name in found["labels"].items()}
        rows = [dict(row) for row in found["cases"]]
        named = sorted({str(model) for row in rows for model in row["predictions"]})
        complete = all(row["label"] and row["subject"] for row in rows)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        complete, rows, structures, named = False, [], {}, []
    if not complete or not rows or not structures or min(structures) < 1:
        raise WorkloadError(
            "The list of cases cannot be used.",
            remedy='Write {"labels": {"1": "name"}, "cases": [{"label", "predictions": {"model": …}, "subject"}]}.',
        )
    models = list(params["models"] or named)
    if not models or set(models) - set(named):
        raise WorkloadError("The list has no predictions of a model that is asked for.", remedy=f"It has {named}.")
    chosen = params["lesions"] or min(structures)
    if chosen != -1 and chosen not in structures:
        raise WorkloadError(f"`lesions` is {chosen}, which is no structure of the list.", remedy="See `labels`.")
    return Listed(index.parent, structures, models, rows, max(chosen, 0))


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part per case. Raises `WorkloadError` where one stands in the list twice."""
    params, given = params_of(spec.params), listed(spec, ctx)
    common = {
        "structures": {str(label): name for label, name in given.structures.items()}, "models": given.models,
        "lesion": given.lesion, **{name: params[name] for name in ("nsd_mm", "iou", "least_ml")},
    }  # fmt: skip
    if len({(given.folder / row["label"]).resolve() for row in given.rows}) < len(given.rows):
        raise WorkloadError("A case stands in the list twice.", remedy="List each case once: twice counts it twice.")
    parts: list[Part] = []
    seen: Counter[str] = Counter()
    for row in given.rows:
        part = _part(row, given, common, ctx)
        seen[part.name] += 1  # healthy people on one grid have the same truth: nothing
        parts.append(part if seen[part.name] == 1 else replace(part, name=f"{part.name}-{seen[part.name]}"))
    return parts


def _part(row: Mapping[str, Any], given: Listed, common: Mapping[str, Any], ctx: Context) -> Part:
    wanted = {"label": row["label"], "image": row.get("image")}
    wanted |= {f"predicted {model}": row["predictions"].get(model) for model in given.models}
    wanted |= {f"probability {model}": (row.get("probability") or {}).get(model) for model in given.models}
    paths = {role: given.folder / name for role, name in wanted.items() if name}
    there = {role: path for role, path in paths.items() if path.exists()}
    digests = {role: volume_files.content_digest(path, ctx) for role, path in there.items()}
    params = {**common, "roles": list(there)}
    key = hashlib.sha256("\n".join(f"{role} {digests[role]}" for role in there).encode()).hexdigest()
    return Part(
        f"case-{key[:16]}", tuple(digests.values()), params, tuple(str(path) for path in there.values()),
        ctx.pseudonym(str(row["subject"])),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ one case


@dataclass(frozen=True, slots=True)
class Case:
    """A case in memory. predicted, probability: by model; those that could not be used are not there."""

    part: Part
    truth: Volume
    image: np.ndarray | None
    predicted: Mapping[str, np.ndarray]
    probability: Mapping[str, np.ndarray]
    findings: Sequence[Finding]


def load(part: Part, ctx: Context) -> Case:
    """Raises `RefusedInput` where the truth cannot be read; a prediction that cannot is a finding."""
    paths = dict(zip(part.params["roles"], map(Path, part.sources), strict=True))
    if "label" not in paths:
        raise RefusedInput(Finding("TRUTH_MISSING", "The case's truth is not there.", "refused", part.name))
    with ctx.stage("read"):
        truth = volume_files.read(paths["label"], ctx)
        findings: list[Finding] = []
        predicted, probability = {}, {}
        for model in part.params["models"]:
            found = _like(truth, paths.get(f"predicted {model}"), ctx)
            if isinstance(found, str):
                sentence = f"The prediction {found}; it counts as one that missed everything."
                findings.append(Finding("PREDICTION_UNUSABLE", sentence, "note", part.name, {"model": model}))
            else:
                predicted[model] = found
            said = _like(truth, paths.get(f"probability {model}"), ctx)
            if not isinstance(said, str):
                probability[model] = said.astype(np.float32, copy=False)
        image = _like(truth, paths.get("image"), ctx)
    return Case(part, truth, None if isinstance(image, str) else image, predicted, probability, findings)


def _like(truth: Volume, path: Path | None, ctx: Context) -> np.ndarray | str:
    """The values on the truth's grid, or why there are none."""
    if path is None:
        return "is not there"
    try:
        found = volume_files.read(path, ctx)
    except RefusedInput as error:
        return f"cannot be read ({error.finding.code})"
    same = found.array.shape == truth.array.shape
    if not same or np.abs(found.affine_ras - truth.affine_ras).max() > patches.SAME_PLACE:
        return "lies on another grid than the truth"
    return found.array


def run(case: Case, model: None, ctx: Context) -> PartResult:
    """Scores of every structure and model; detections and calibration of the lesions; a picture."""
    params, truth = case.part.params, case.truth
    values: dict[str, Any] = {"models": {}, "spacing_mm": [round(length, 6) for length in truth.spacing]}
    nothing = np.zeros(truth.array.shape, np.uint8)
    with ctx.stage("score"):
        for name in params["models"]:
            predicted = case.predicted.get(name, nothing)
            values["models"][name] = _scored(case, name, predicted)
    with ctx.stage("picture"):
        shown = case.predicted.get(params["models"][0], nothing)
        evaluation.write_picture(truth, shown, case.image, ctx.out / PICTURE)
    return PartResult(values, case.findings)


def _scored(case: Case, name: str, predicted: np.ndarray) -> dict[str, Any]:
    params, truth = case.part.params, case.truth
    row: dict[str, Any] = {"usable": name in case.predicted, "structures": {}}
    for label in params["structures"]:
        masks = truth.array == int(label), predicted == int(label)
        row["structures"][label] = scores.score(*masks, truth.spacing, params["nsd_mm"]).as_dict()
    if params["lesion"]:
        masks = truth.array == params["lesion"], predicted == params["lesion"]
        probability = case.probability.get(name)
        row["lesions"] = lesions.detect(
            *masks, truth.voxel_ml, probability, iou=params["iou"], least_ml=params["least_ml"]
        ).as_dict()
        if probability is not None:
            row["calibration"] = calibration.counts(masks[0], probability)
    return row


# ------------------------------------------------------------------------------------------------ all of them


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """The page, its figures as JSON, and the pictures of the worst cases."""
    params, given = params_of(ctx.spec.params), listed(ctx.spec, ctx)
    parts = list(plan(ctx.spec, state, ctx))
    traits = {}
    for part, row in zip(parts, given.rows, strict=True):
        traits[part.name] = traits_of(row, params["age_edges"])
    rows = [
        evaluation.Row(done.part.name, done.part.subject, traits[done.part.name], done.values["models"])
        for done in sorted(results, key=lambda done: done.part.name)
        if done.part.name in traits
    ]
    if not rows:
        raise WorkloadError("No case could be scored.", remedy="See the findings of the parts.")
    unscored = sorted(set(traits) - {row.name for row in rows})
    report = evaluation.summarise(rows, given.structures, given.models, ctx.seed, params["worst"], unscored)
    folders = {done.part.name: done.folder for done in results}
    figures = []
    for case in report["worst"]:
        case["picture"] = f"{case['case']}.png"
        shutil.copyfile(folders[case["case"]] / PICTURE, ctx.out / case["picture"])
        figures.append((case["picture"], f"{case['case']}: {case['structure']}, Dice {case['dice']:.3f}"))
    write_json(ctx.out / SUMMARY, report)
    evaluation.evidence_of(report, [dict(zip(p.params["roles"], p.inputs, strict=True)) for p in parts]).write(ctx.out)
    evaluation.write_page(report, ctx.out, ctx.spec.name, PAGE)
    overall = report["models"][given.models[0]]
    metrics = {
        f"{given.structures[int(label)]}_{metric}": row[metric]["mean"]
        for label, row in overall["structures"].items()
        for metric in scores.METRICS
        if row[metric] is not None
    }
    return Result(report, metrics | {"missed": float(overall["missed"])}, figures)


def traits_of(row: Mapping[str, Any], edges: Sequence[float]) -> dict[str, str]:
    """What a case is grouped by; what the list does not say is a group too."""
    traits = {name: str(row[name]) if row.get(name) not in (None, "") else UNSAID for name in TRAITS}
    if traits["age"] != UNSAID:
        place = int(np.searchsorted(edges, float(row["age"]), side="right"))
        begin, end = [0, *edges][place], [*edges, None][place]
        traits["age"] = f"{begin:g} and older" if end is None else f"{begin:g} to under {end:g}"
    return traits


WORKLOAD = Map(plan=plan, load=load, run=run, reduce=reduce, version=VERSION)
