"""Job `pathology/predict`: a model's answer for each patient and slide, and where it looked; a part a patient.

`inputs`: `bundle`, what `pathology/train-mil` left; `features`, the folder that `pathology/encode` wrote, by the
encoder that the bundle knows; optionally `cohort` (see `cohort`; without it each slide is a patient's own) and
`slides`, for pictures over the slide and for its tiles of highest attention.

Where the cohort says what became of the patients, the report has figures, and `evidence.json` is what a validation
(`permed model validate`) reads: of the predictions in this job's own results.

`params` of the job:
    heatmap   true   OME-Zarr and PNG of each slide's attention
    geojson   true   tiles with their attention, for QuPath
    top       4      tiles of highest attention that are shown of a patient; needs the slides
    shown     24     pictures on the report
"""

from __future__ import annotations

import csv
import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.learning.evidence import Evidence, digest_of
from permed_compute.paths import replacing, write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.pathology import cohort, cohort_report, heads, heatmap, inputs, mil_bundle
from permed_compute.workloads.pathology.cohort import Patient, Slide, Tiles
from permed_compute.workloads.pathology.heatmap import Heat
from permed_compute.workloads.pathology.mil_bundle import Described
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

BUNDLE = "bundle"
PREDICTION, TOP, PAGE, TABLE, SLIDE_TABLE = (
    "prediction.json", "top.jpg", "report.html", "predictions.csv", "slides.csv",
)  # fmt: skip
VERSION = "2"
_TOP_PIXELS = 160
_PARAMS: dict[str, tuple[Any, inputs.Check, str]] = {
    "heatmap": (True, lambda v: isinstance(v, bool), "true or false"),
    "geojson": (True, lambda v: isinstance(v, bool), "true or false"),
    "top": (4, lambda v: isinstance(v, int) and 0 <= v <= 64, "tiles, 0 to 64"),
    "shown": (24, lambda v: isinstance(v, int) and 0 <= v <= 1000, "pictures, 0 to 1000"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    return inputs.checked(given, _PARAMS, "pathology/predict")


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part for each patient; one without features is refused by itself."""
    params = params_of(spec.params)
    mil_bundle.read(ctx.input(BUNDLE))
    return [_part(patient, params, ctx) for patient in cohort.patients(ctx)]


def _part(patient: Patient, params: Mapping[str, Any], ctx: Context) -> Part:
    contents = [cohort.content(slide, ctx) if slide.features.is_dir() else slide.name for slide in patient.slides]
    drawn = {name: params[name] for name in ("heatmap", "geojson", "top")}
    known = {"slides": [slide.name for slide in patient.slides], "pixels": [bool(s.source) for s in patient.slides]}
    return Part(
        patient.name, tuple(contents), drawn | known,
        tuple(str(path or "") for slide in patient.slides for path in (slide.features, slide.source)), patient.subject,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ load and run


@dataclass(frozen=True)
class Bag:
    part: Part
    slides: tuple[Slide, ...]
    tiles: tuple[Tiles, ...]


def load(part: Part, ctx: Context) -> Bag:
    """Raises `RefusedInput`: NO_FEATURES, ENCODER_DIFFERS, MPP_DIFFERS."""
    kind = mil_bundle.read(ctx.input(BUNDLE)).kind
    places = [Path(path) if path else None for path in part.sources]
    slides = tuple(
        Slide(name, places[2 * k] or Path(), places[2 * k + 1]) for k, name in enumerate(part.params["slides"])
    )
    with ctx.stage("read"):
        return Bag(part, slides, tuple(cohort.tiles_of(slide, kind) for slide in slides))


@dataclass(frozen=True)
class Answered:
    """said: of patient and slides, JSON. heats: of each slide."""

    bag: Bag
    said: Mapping[str, Any]
    heats: tuple[Heat, ...]


def run(bag: Bag, model: tuple[Described, Any], ctx: Context) -> Answered:
    """The patient's answer by all tiles together; each slide's by its own; attention within the patient."""
    described, network = model
    with ctx.stage("predict"):
        logits, attention = _answer(network, [tiles.values for tiles in bag.tiles], ctx.device)
        alone = [logits] if len(bag.tiles) == 1 else [_answer(network, [t.values], ctx.device)[0] for t in bag.tiles]
    ends = np.cumsum([len(tiles.values) for tiles in bag.tiles])
    relative = np.split((attention * ends[-1]).astype(np.float32), ends[:-1])
    heats = tuple(Heat(tiles.coords, own, tiles.facts) for tiles, own in zip(bag.tiles, relative, strict=True))
    said = {
        "patient": bag.part.name, "logits": [float(value) for value in logits], **_told(described, logits),
        "slides": {
            slide.name: {"tiles": len(tiles.values), **_told(described, own)}
            for slide, tiles, own in zip(bag.slides, bag.tiles, alone, strict=True)
        },
    }  # fmt: skip
    return Answered(bag, said, heats)


def finish(done: Answered, ctx: Context) -> PartResult:
    """Write what was said and where it looked."""
    write_json(ctx.out / PREDICTION, dict(done.said))
    with ctx.stage("draw"):
        _draw(done.bag, done.heats, ctx)
    return PartResult(done.said)


def _answer(network: Any, values: Sequence[np.ndarray], device: str) -> tuple[np.ndarray, np.ndarray]:
    """(outputs,) logits and (n,) attention of a bag."""
    import torch

    x = torch.from_numpy(np.concatenate(values))[None].to(device)
    with torch.inference_mode():
        answer = network(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device))
    return answer.logits[0].float().cpu().numpy(), answer.attention[0].float().cpu().numpy()


def _told(described: Described, logits: np.ndarray) -> dict[str, Any]:
    """The answer in the head's words: probability by class; or risk, its group, and the curve."""
    head, rows = described.head, logits[None]
    if not head.is_survival:
        return {"probability": dict(zip(head.classes, head.probabilities(rows)[0].round(6).tolist(), strict=True))}
    risk = float(head.risk(rows)[0])
    told: dict[str, Any] = {"risk": round(risk, 6)}
    if described.risk_cut is not None:
        told["group"] = cohort_report.risk_group(risk, described.risk_cut)
    if head.bins is not None:
        told["survival"] = {"time": list(head.bins.edges), "chance": head.curve(rows)[0, :-1].round(6).tolist()}
    elif described.baseline is not None:
        times = described.baseline.time
        chances = described.baseline.curve(np.array([risk]), times)[0]
        told["survival"] = {"time": list(times), "chance": chances.round(6).tolist()}
    return told


def _draw(bag: Bag, heats: Sequence[Heat], ctx: Context) -> None:
    """Heatmaps of every slide, and the patient's tiles of highest attention, in `ctx.out`."""
    from PIL import Image

    from permed_compute.workloads.pathology import source, tissue
    from permed_compute.workloads.pathology.reader import Reader

    params, found = bag.part.params, []
    for slide, heat in zip(bag.slides, heats, strict=True):
        view = None
        if slide.source is not None and (params["heatmap"] or params["top"]):
            x, y = heat.facts["mpp"]  # as it was encoded, also where the slide itself does not say
            with Reader(source.open_slide(slide.source, mpp=x if x == y else None), threads=ctx.threads) as reader:
                view = tissue.overview(reader) if params["heatmap"] else None
                first = np.argsort(-heat.relative, kind="stable")[: params["top"]]
                shown = reader.read_many(heat.facts["target_mpp"], heat.coords[first], heat.facts["patch_size"])
                found += [(float(heat.relative[k]), tile) for k, tile in zip(first, shown, strict=True)]
        if params["heatmap"]:
            heatmap.write_zarr(ctx.out / f"{slide.name}{heatmap.ZARR}", heat)
            Image.fromarray(heatmap.picture(heat, view)).save(ctx.out / f"{slide.name}{heatmap.PNG}", format="PNG")
        if params["geojson"]:
            heatmap.write_geojson(ctx.out / f"{slide.name}{heatmap.GEOJSON}", heat)
    if found:
        found.sort(key=lambda item: -item[0])
        edge = (_TOP_PIXELS, _TOP_PIXELS)
        strip = [np.asarray(Image.fromarray(tile).resize(edge)) for _, tile in found[: params["top"]]]
        Image.fromarray(np.concatenate(strip, axis=1)).save(ctx.out / TOP, format="JPEG", quality=90)


# ------------------------------------------------------------------------------------------------ all of them


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """Tables, the report, and where outcomes are known the evidence."""
    params, described = params_of(ctx.spec.params), mil_bundle.read(ctx.input(BUNDLE))
    everybody = {patient.name: patient for patient in cohort.patients(ctx)}
    done = [item for item in sorted(results, key=lambda item: item.part.name) if item.part.name in everybody]
    _tables(done, ctx.out)
    known = [item for item in done if _has_outcome(everybody[item.part.name], described)]
    side = [everybody[item.part.name] for item in known]
    logits = np.array([item.values["logits"] for item in known], np.float32)
    figures = _figures(described, side, logits, ctx)
    failures = sorted(ctx.missed.items())
    if figures:
        unscored = sum(_has_outcome(everybody[name], described) for name, _ in failures)
        _evidence(described, known, everybody, figures, unscored).write(ctx.out)
    pictures, tops = _shown(done, described, params["shown"])
    cohort_report.write(
        ctx.out / PAGE,
        cohort_report.Page(
            described.name, described.head, side, logits, figures, risk_cut=described.risk_cut,
            of=f"{len(side)} patients whose outcome the cohort says.", pictures=pictures, tops=tops, failures=failures,
            answered=len(done),
        ),
    )  # fmt: skip
    metrics = {one.measure: one.mean for one in figures if not one.trait}
    values = {"patients": len(done), "slides": sum(len(i.values["slides"]) for i in done), "failed": len(failures)}
    return Result(values, {**metrics, "patients": float(len(done))}, _beside(pictures, ctx))


def _has_outcome(patient: Patient, described: Described) -> bool:
    if described.head.is_survival:
        return bool(patient.outcome.get("time")) and bool(patient.outcome.get("event"))
    return patient.outcome.get("label", "") in described.head.classes


def _figures(described: Described, side: Sequence[Patient], logits: np.ndarray, ctx: Context) -> Any:
    """() where there are no two patients to tell apart. Raises `RefusedInput` for outcomes that cannot be."""
    if len(side) < 2:
        return ()
    if described.head.is_survival:
        heads.outcomes_of(side)
    return heads.figures(described.head, described.name, side, logits, baseline=described.baseline, seed=ctx.seed)


def _evidence(
    described: Described, known: Sequence[DonePart], everybody: Mapping[str, Patient], figures: Any, unscored: int
) -> Evidence:
    """dataset: features and outcomes. predictions: the files that the parts wrote."""
    truth = [f"{sorted(everybody[i.part.name].outcome.items())} {' '.join(i.part.inputs)}" for i in known]
    files = tuple(hashlib.sha256((item.folder / PREDICTION).read_bytes()).hexdigest() for item in known)
    return Evidence(digest_of(truth), len(known), len(known), unscored, {described.name: files}, figures)


def _tables(done: Sequence[DonePart], out: Path) -> None:
    for file, rows in (
        (TABLE, [(item.part.name, len(item.values["slides"]), item.values) for item in done]),
        (SLIDE_TABLE, [(name, row["tiles"], row) for item in done for name, row in item.values["slides"].items()]),
    ):
        with replacing(out / file) as new, new.open("w", newline="", encoding="utf-8") as opened:
            table = csv.writer(opened, lineterminator="\n")
            answers = [_flat(row) for _, _, row in rows]
            columns = list(answers[0]) if answers else []
            table.writerow(["patient" if file == TABLE else "slide", "slides" if file == TABLE else "tiles", *columns])
            for (name, count, _), answer in zip(rows, answers, strict=True):
                table.writerow([name, count, *(answer[column] for column in columns)])


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    if "probability" in row:
        return {f"probability {name}": value for name, value in row["probability"].items()}
    return {name: row[name] for name in ("risk", "group") if name in row}


def _shown(
    done: Sequence[DonePart], described: Described, most: int
) -> tuple[list[tuple[str, Path]], dict[str, list[tuple[str, Path]]]]:
    """Heatmaps, and strips of tiles by class or risk group: of those who were answered most surely, as many of each."""
    by_class: dict[str, list[tuple[float, DonePart]]] = {}
    for item in done:
        sure, name = _surest(item.values)
        by_class.setdefault(name, []).append((sure, item))
    pictures, tops = [], {}
    each = most // max(1, len(by_class))
    for name in sorted(by_class):
        chosen = [item for _, item in sorted(by_class[name], key=lambda pair: (-pair[0], pair[1].part.name))[:each]]
        tops[name] = [(i.part.name, i.folder / TOP) for i in chosen if (i.folder / TOP).is_file()]
        for item in chosen:
            pictures += [
                (f"{name}: {slide}", item.folder / f"{slide}{heatmap.PNG}")
                for slide in list(item.values["slides"])[:1]
                if (item.folder / f"{slide}{heatmap.PNG}").is_file()
            ]
    return pictures, {name: found for name, found in tops.items() if found}


def _surest(values: Mapping[str, Any]) -> tuple[float, str]:
    if "probability" in values:
        name = max(values["probability"], key=values["probability"].__getitem__)
        return float(values["probability"][name]), str(name)
    group = values.get("group", "")
    return (-1 if group == cohort_report.LOWER else 1) * float(values["risk"]), str(group)


def _beside(pictures: Sequence[tuple[str, Path]], ctx: Context) -> list[tuple[str, str]]:
    """Copies beside the job's page: (file, caption)."""
    found = []
    for caption, path in pictures:
        shutil.copyfile(path, ctx.out / path.name)
        found.append((path.name, caption))
    return found


def load_model(spec: JobSpec, ctx: Context) -> tuple[Described, Any]:
    place = ctx.input(BUNDLE)
    return mil_bundle.read(place), mil_bundle.load(place, ctx.device)


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return mil_bundle.digest(ctx.input(BUNDLE), ctx.digest)


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, run=run, finish=finish, reduce=reduce, model_digest=model_digest,
    version=VERSION,
)  # fmt: skip
