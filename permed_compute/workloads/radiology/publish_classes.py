"""The bundle of a network that says of a study which classes are there.

`output_dir/predictions.json`: [{"image": file, "probabilities": {class: 0 to 1}}].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from permed_compute.learning.classification import METRICS
from permed_compute.workloads.radiology import publish
from permed_compute.workloads.radiology.publish import WORDS, Card, Made, Training, estimate

PREDICTIONS = "predictions.json"


@dataclass(frozen=True, slots=True)
class Answers:
    """How logits become probabilities. classes: that are answered, `places` theirs among the network's outputs.

    exclusive: exactly one of the outputs is true. edge: voxels of a window along each axis; whole: the study lies in
    one. pool: of a study's windows, `mean` or `max`.
    """

    classes: Sequence[str]
    places: Sequence[int]
    exclusive: bool
    edge: int
    whole: bool
    overlap: float
    pool: str


def made(told: Training, answers: Answers, outputs: Sequence[str]) -> Made:
    """outputs: what each of the network's outputs stands for."""
    return Made(_inference(told, answers), _metadata(told, answers, outputs), publish.card(told, _card(told, answers)))


def _inference(told: Training, answers: Answers) -> dict[str, object]:
    fit = (
        {"_target_": "ResizeWithPadOrCropd", "keys": "image", "spatial_size": [answers.edge] * 3}
        if answers.whole
        else {"_target_": "SpatialPadd", "keys": "image", "spatial_size": [answers.edge] * 3}
    )
    logits = "torch.cat([@network(part.to(@device)) for part, _ in @windows(item['image'].as_tensor()[None])])"
    activated = "softmax(1)" if answers.exclusive else "sigmoid()"
    pooled = "mean(0)" if answers.pool == "mean" else "amax(0)"
    return publish.inference(told, [fit], {
        "classes": list(answers.classes),
        "places": list(answers.places),
        "windows": {"_target_": "SlidingWindowSplitter", "patch_size": [answers.edge] * 3, "overlap": answers.overlap},
        "probabilities": f"$lambda item: {logits}.float().{activated}.{pooled}[@places].tolist()",
        "answer": "$lambda row, item: {'image': os.path.basename(str(row['image'])),"
        " 'probabilities': dict(zip(@classes, @probabilities(item)))}",
        "run": [
            "$os.makedirs(@output_dir, exist_ok=True)",
            f"$pathlib.Path(@output_dir, '{PREDICTIONS}').write_text(json.dumps("
            "[@answer(row, item) for row, item in zip(@datalist, @dataset)], indent=1))",
        ],
    }, ["$import json", "$import os", "$import pathlib"])  # fmt: skip


def _metadata(told: Training, answers: Answers, outputs: Sequence[str]) -> dict[str, object]:
    channels = next(told.network[name] for name in ("in_channels", "n_input_channels") if name in told.network)
    return publish.metadata(
        told, "classification", f"Says of a study: {', '.join(answers.classes)}.", answers.edge, channels,
        {"type": "probabilities", "format": "classes", "dtype": "float32", "num_channels": len(outputs),
         "value_range": [0, 1], "is_patch_data": not answers.whole,
         "channel_def": {str(k): name for k, name in enumerate(outputs)}},
    )  # fmt: skip


def _card(told: Training, answers: Answers) -> Card:
    spacing = " × ".join(f"{length:g}" for length in told.spacing)
    rows = []
    for name, row in told.report["classes"].items():
        gap = f"{row['calibration']['ece']:.3f}" if row["calibration"] else "none"
        figures = [estimate(row[metric]) for metric in METRICS]
        rows.append((name, f"{row['present']} of {told.report['cases']}", *figures, gap))
    columns = ("class", "present", *(WORDS[metric] for metric in METRICS), "calibration error")
    size = f"{answers.edge}³ voxels of {spacing} mm"
    parts = "the study's probability is the " + ("mean" if answers.pool == "mean" else "largest") + " of its windows'"
    return Card(
        does=f"Says of a study: {', '.join(answers.classes)}",
        what="studies",
        seen=f"whole studies in {size}" if answers.whole else f"patches of {size}; {parts}",
        loss="cross entropy" if answers.exclusive else "binary cross entropy of each class",
        read=f"A class is called present from a probability of {told.report['threshold']:g}. An AUPRC is to be read"
        " beside how often the class is there: guessing gives that share.",
        figures=publish.table(columns, rows),
        limits=(
            f"Studies are resampled to {spacing} mm"
            + (", and what lies outside the middle is cut off." if answers.whole else " first."),
            f"Intensities outside {told.intensity[0]:g} to {told.intensity[1]:g} are clipped.",
            "Probabilities hold where the classes are as frequent as in training, and as the table says.",
        ),
    )
