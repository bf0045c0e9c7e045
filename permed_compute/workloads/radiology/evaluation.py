"""What an evaluation's cases say together: figures with intervals, subgroups, worst cases, comparison; the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.learning import calibration, statistics
from permed_compute.learning.evidence import Evidence, Figure, digest_of
from permed_compute.learning.statistics import FEW
from permed_compute.paths import replacing
from permed_compute.reports.html import render
from permed_compute.workloads.radiology.lesions import RATES, Detections, froc
from permed_compute.workloads.radiology.read import Volume
from permed_compute.workloads.radiology.scores import HIGHER_IS_BETTER, METRICS

_WIDE = 360


@dataclass(frozen=True, slots=True)
class Row:
    """A scored case. traits: site, scanner, sex, age group. models: what `evaluate.run` returned of each."""

    name: str
    subject: str
    traits: Mapping[str, str]
    models: Mapping[str, Mapping[str, Any]]


def summarise(
    rows: Sequence[Row],
    structures: Mapping[int, str],
    models: Sequence[str],
    seed: int = 0,
    worst: int = 6,
    unscored: Sequence[str] = (),
) -> dict[str, Any]:
    """JSON: per model the figures, of the first the subgroups and worst cases, the first against every other one.

    unscored: cases of the list that have no result at all; they are named, and no figure speaks of them.
    """
    first = models[0]
    return {
        "cases": len(rows), "patients": len({row.subject for row in rows}), "unscored": list(unscored), "model": first,
        "names": {str(label): name for label, name in structures.items()},
        "models": {model: _of_model(rows, structures, model, seed) for model in models},
        "subgroups": _subgroups(rows, structures, first, seed),
        "worst": _worst(rows, structures, first, worst),
        "missed": _with_outcome(rows, structures, first, "missed"),
        "compared": [_compared(rows, structures, first, other, seed) for other in models[1:]],
    }  # fmt: skip


def _of_model(rows: Sequence[Row], structures: Mapping[int, str], model: str, seed: int) -> dict[str, Any]:
    per_structure: dict[str, Any] = {}
    for label in structures:
        outcomes = [row.models[model]["structures"][str(label)]["outcome"] for row in rows]
        counted = {outcome: outcomes.count(outcome) for outcome in ("found", "missed", "invented", "absent")}
        figures = {metric: _dict(_mean(rows, label, model, metric, seed)) for metric in METRICS}
        per_structure[str(label)] = {"counts": counted, **figures}
    said = [row.models[model]["calibration"] for row in rows if "calibration" in row.models[model]]
    return {
        "structures": per_structure,
        "missed": sum(row["counts"]["missed"] for row in per_structure.values()),
        "unusable": [row.name for row in rows if not row.models[model]["usable"]],
        "detection": _detection(rows, model),
        "calibration": calibration.summary(said),
    }


def _detection(rows: Sequence[Row], model: str) -> dict[str, Any] | None:
    found = [row.models[model]["lesions"] for row in rows if "lesions" in row.models[model]]
    told = froc(
        [Detections(*(tuple(each[name]) for name in ("sizes_ml", "found", "hits", "alarms"))) for each in found]
    )
    return None if told is None else asdict(told) | {"rates": RATES, "false_per_case_in_all": told.false / len(found)}


def _scores(rows: Sequence[Row], label: int, model: str, metric: str) -> tuple[list[float], list[str]]:
    """Values with their patients; `absent` has none."""
    pairs = [(row.models[model]["structures"][str(label)][metric], row.subject) for row in rows]
    kept = [(value, subject) for value, subject in pairs if value is not None]
    return [value for value, _ in kept], [subject for _, subject in kept]


def _mean(rows: Sequence[Row], label: int, model: str, metric: str, seed: int) -> statistics.Estimate | None:
    return statistics.mean(*_scores(rows, label, model, metric), seed)


def _subgroups(rows: Sequence[Row], structures: Mapping[int, str], model: str, seed: int) -> list[dict[str, Any]]:
    """Every group of every trait and structure: its figures, and how far its Dice is from everybody else's."""
    told = []
    for trait in rows[0].traits if rows else ():
        for group in sorted({row.traits[trait] for row in rows}):
            inside = [row for row in rows if row.traits[trait] == group]
            outside = [row for row in rows if row.traits[trait] != group]
            for label, name in structures.items():
                own, others = (_scores(part, label, model, "dice") for part in (inside, outside))
                gap = statistics.apart(own[0], others[0], (own[1], others[1]), seed)
                figures = {metric: _dict(_mean(inside, label, model, metric, seed)) for metric in METRICS}
                outcomes = [row.models[model]["structures"][str(label)]["outcome"] for row in inside]
                patients = len({row.subject for row in inside})
                told.append({
                    "trait": trait, "group": group, "structure": name, "cases": len(inside), "patients": patients,
                    "few": patients < FEW, "missed": outcomes.count("missed"), **figures, "gap": _dict(gap),
                    "worse": gap is not None and gap.is_clear and gap.mean < 0,
                })  # fmt: skip
    return told


def _worst(rows: Sequence[Row], structures: Mapping[int, str], model: str, most: int) -> list[dict[str, Any]]:
    """The cases with the lowest Dice of any structure, each once."""
    found = []
    for row in rows:
        scored = [
            (score["dice"], -score["hd95_mm"], label)
            for label, score in row.models[model]["structures"].items()
            if score["dice"] is not None
        ]
        if scored:
            found.append((*min(scored), row))
    found.sort(key=lambda item: (*item[:3], item[3].name))
    return [
        {
            "case": row.name, "structure": structures[int(label)], "dice": dice, "hd95_mm": -far,
            "outcome": row.models[model]["structures"][label]["outcome"], **row.traits,
        }
        for dice, far, label, row in found[:most]
    ]  # fmt: skip


def _with_outcome(rows: Sequence[Row], structures: Mapping[int, str], model: str, outcome: str) -> list[dict[str, str]]:
    return [
        {"case": row.name, "structure": name}
        for row in rows
        for label, name in structures.items()
        if row.models[model]["structures"][str(label)]["outcome"] == outcome
    ]


def _compared(rows: Sequence[Row], structures: Mapping[int, str], first: str, other: str, seed: int) -> dict[str, Any]:
    """`other` minus `first`, per structure and metric, over the cases that have a score of both.

    A case in which only one of them invented the structure has no score of the other: it counts as a Dice and NSD of 1
    and a distance of 0 there, for saying rightly that nothing is there.
    """
    told = []
    for label, name in structures.items():
        for metric in METRICS:
            pairs = []
            for row in rows:
                a, b = (row.models[model]["structures"][str(label)][metric] for model in (first, other))
                if a is None and b is None:
                    continue
                right = 1.0 if HIGHER_IS_BETTER[metric] else 0.0
                pairs.append((right if a is None else a, right if b is None else b, row.subject))
            if not pairs:
                continue
            ours, theirs, subjects = zip(*pairs, strict=True)
            difference = statistics.paired(ours, theirs, subjects, seed)
            better = (difference.mean > 0) == HIGHER_IS_BETTER[metric]
            verdict = "no clear difference" if not difference.is_clear else "better" if better else "worse"
            told.append({"structure": name, "metric": metric, **asdict(difference), "verdict": verdict})
    return {"model": other, "against": first, "rows": told}


def _dict(told: Any) -> dict[str, Any] | None:
    return None if told is None else asdict(told)


# ------------------------------------------------------------------------------------------------ what it is worth


def evidence_of(report: Mapping[str, Any], contents: Sequence[Mapping[str, str]]) -> Evidence:
    """The report in the words that every domain shares. contents: content digests of each case of the list, by role
    (`label`, `image`, `predicted MODEL`)."""
    models = list(report["models"])
    figures = [figure for model in models for figure in _overall_figures(report, model)]
    for row in report["subgroups"]:
        own = report["model"], row["structure"], row["cases"], row["patients"]
        figures += _figures(row, row["missed"], *own, row["trait"], row["group"])
    return Evidence(
        digest_of(f"{roles.get('label', '')} {roles.get('image', '')}" for roles in contents),
        report["cases"], report["patients"], len(report["unscored"]),
        {model: tuple(d for roles in contents if (d := roles.get(f"predicted {model}"))) for model in models},
        tuple(figures),
    )  # fmt: skip


def _overall_figures(report: Mapping[str, Any], model: str) -> list[Figure]:
    told, people = report["models"][model], (report["cases"], report["patients"])
    found = [Figure(model, "missed structures", False, float(told["missed"]), None, None, *people)]
    for label, row in told["structures"].items():
        found += _figures(row, row["counts"]["missed"], model, report["names"][label], *people)
    return found


def _figures(
    row: Mapping[str, Any], missed: int, model: str, structure: str, cases: int, patients: int,
    trait: str = "", group: str = "",
) -> list[Figure]:  # fmt: skip
    found = [Figure(model, f"missed of {structure}", False, float(missed), None, None, cases, patients, trait, group)]
    for metric in METRICS:
        if row[metric] is not None:
            name = f"{metric} of {structure}"
            found.append(Figure(model, name, HIGHER_IS_BETTER[metric], **row[metric], trait=trait, group=group))
    return found


# ------------------------------------------------------------------------------------------------ what is seen


def write_page(report: Mapping[str, Any], folder: Path, title: str, name: str, of: str = "") -> None:
    """One file with its pictures in it, so that it can be passed on. of: a sentence that says which cases these are."""
    import base64

    pictures = {
        case["case"]: base64.b64encode((folder / case["picture"]).read_bytes()).decode() for case in report["worst"]
    }
    page = render("evaluation.html.j2", report=report, title=title, of=of, pictures=pictures, metrics=METRICS, few=FEW)
    with replacing(folder / name) as temporary:
        temporary.write_text(page, encoding="utf-8")


def write_picture(truth: Volume, predicted: np.ndarray, image: np.ndarray | None, path: Path) -> None:
    """The axial cut on which truth and prediction differ most, twice: truth outlined, prediction outlined. No text."""
    from PIL import Image

    marks = [truth.to_ras(mask).astype(np.int32) for mask in (truth.array, predicted)]
    grey = truth.to_ras(image) if image is not None else np.zeros(marks[0].shape, np.float32)
    wrong = (marks[0] != marks[1]).sum(axis=(0, 1))
    k = int(np.argmax(wrong if wrong.any() else (marks[0] > 0).sum(axis=(0, 1))))
    low, high = np.percentile(grey[:, :, k], (1, 99.5))
    bright = np.clip((grey[:, :, k].astype(np.float32) - low) / max(float(high - low), 1e-6), 0, 1) * 200
    width, height = (n * step for n, step in zip(grey.shape[:2], truth.spacing_ras[:2], strict=True))
    scale = _WIDE / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    canvas = Image.new("RGB", (2 * size[0] + 4, size[1]))
    for place, (mark, colour) in enumerate(zip(marks, ((64, 180, 255), (255, 140, 40)), strict=True)):
        picture = np.repeat(bright.astype(np.uint8)[:, :, None], 3, axis=2)
        picture[_outline(mark[:, :, k])] = colour
        # As radiologists look: the patient's right is on the left, front is up.
        turned = np.ascontiguousarray(picture[::-1, ::-1].transpose(1, 0, 2))
        canvas.paste(Image.fromarray(turned).resize(size, Image.Resampling.NEAREST), (place * (size[0] + 4), 0))
    canvas.save(path, format="PNG")


def _outline(mark: np.ndarray) -> np.ndarray:
    padded = np.pad(mark, 1)
    same = np.ones(mark.shape, bool)
    for x, y in ((0, 1), (2, 1), (1, 0), (1, 2)):
        same &= padded[x : x + mark.shape[0], y : y + mark.shape[1]] == mark
    return np.asarray((mark > 0) & ~same)
