"""A trained network as a MONAI bundle with its card: what it learned from, how well it does, where it was never tried.

    configs/metadata.json, configs/inference.json    `python -m monai.bundle run --config_file configs/inference.json`
    models/model.pt                                  tensors only
    docs/README.md                                   the card

The same training gives the same bytes: nothing in it knows the time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permed_compute import __version__
from permed_compute.paths import write_json
from permed_compute.workloads.radiology import bundle
from permed_compute.workloads.radiology.scores import METRICS

if TYPE_CHECKING:
    from torch import nn

AXES = (("L", "R"), ("P", "A"), ("I", "S"))
"""Each axis of RAS, from where to where."""
_KINDS = {
    "held-out": "Scans of patients that neither training nor any choice has seen.",
    "chosen-by": "The scans by which the epoch was chosen: **flattering, no evidence** of how it does on others.",
    "fit": "The scans it was trained on: **a fit, no evidence** of how it does on others.",
}


@dataclass(frozen=True, slots=True)
class Training:
    """What is known of a network. kind: of what scans `report` (`evaluation.summarise`) is; facts: `train._facts`."""

    name: str
    network: Mapping[str, Any]
    structures: Mapping[int, str]
    intensity: tuple[float, float]
    spacing: tuple[float, float, float]
    patch: int
    overlap: float
    kind: str
    report: Mapping[str, Any]
    facts: Mapping[str, Any]


def write(root: Path, model: nn.Module, told: Training) -> str:
    """Write the bundle's folder; returns its digest."""
    import torch

    for folder in ("configs", "models", "docs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(root / bundle.CONFIG, inference(told))
    write_json(root / "configs" / "metadata.json", metadata(told))
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    torch.save(weights, root / bundle.WEIGHTS)
    (root / "docs" / "README.md").write_text(card(told), encoding="utf-8")
    return bundle.check(root).digest


def digest_of(digests: Sequence[str]) -> str:
    """Of a set of contents, in whatever order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def inference(told: Training) -> dict[str, Any]:
    """`configs/inference.json`: one image a time; needs no package but MONAI."""
    low, high = told.intensity
    predict = "@inferer(item['image'][None].to(@device), @network)[0].cpu()"
    return {
        "imports": ["$import glob", "$import torch"],
        "bundle_root": ".",
        "dataset_dir": "data",
        "output_dir": "$@bundle_root + '/eval'",
        "datalist": "$[{'image': path} for path in sorted(glob.glob(@dataset_dir + '/*.nii*'))]",
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": dict(told.network),
        "network": "$@network_def.to(@device)",
        "preprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "LoadImaged", "keys": "image"},
                {"_target_": "EnsureChannelFirstd", "keys": "image"},
                {"_target_": "Orientationd", "keys": "image", "axcodes": "RAS"},
                {"_target_": "Spacingd", "keys": "image", "pixdim": list(told.spacing), "mode": "bilinear"},
                {"_target_": "ScaleIntensityRanged", "keys": "image", "a_min": low, "a_max": high, "b_min": 0.0,
                 "b_max": 1.0, "clip": True},
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "inferer": {
            "_target_": "SlidingWindowInferer", "roi_size": [told.patch] * 3, "sw_batch_size": 1,
            "overlap": told.overlap,
        },
        "postprocessing": {
            "_target_": "Compose",
            "transforms": [
                {"_target_": "Activationsd", "keys": "pred", "softmax": True},
                {"_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
                 "nearest_interp": False, "to_tensor": True},
                {"_target_": "AsDiscreted", "keys": "pred", "argmax": True},
                {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "separate_folder": False,
                 "output_dtype": "uint8"},
            ],
        },
        "initialize": [
            "$@network.load_state_dict(torch.load(@bundle_root + '/models/model.pt', map_location=@device,"
            " weights_only=True))",
            "$@network.eval()",
            "$torch.set_grad_enabled(False)",
        ],
        "run": ["$[@postprocessing({**item, 'pred': " + predict + "}) and None for item in @dataset]"],
    }  # fmt: skip


def metadata(told: Training) -> dict[str, Any]:
    """`configs/metadata.json` as MONAI's bundle specification asks."""
    import monai
    import numpy
    import torch

    names = {"0": "background", **{str(label): name for label, name in told.structures.items()}}
    shape = {"type": "image", "spatial_shape": [told.patch] * 3, "dtype": "float32"}
    return {
        "name": told.name, "version": "0.1.0", "changelog": {"0.1.0": "trained"},
        "monai_version": monai.__version__, "pytorch_version": str(torch.__version__).partition("+")[0],
        "numpy_version": numpy.__version__, "required_packages_version": {"nibabel": "5.4.0"},
        "task": "segmentation", "description": f"Segments {', '.join(told.structures.values())}.",
        "authors": "", "copyright": "", "intended_use": "Research. Not validated for care.",
        "trained_by": f"permed_compute {__version__}",
        "network_data_format": {
            "inputs": {"image": {
                **shape, "format": "image", "modality": "", "num_channels": told.network["in_channels"],
                "value_range": [0, 1], "is_patch_data": True, "channel_def": {"0": "image"},
            }},
            "outputs": {"pred": {
                **shape, "format": "segmentation", "num_channels": told.network["out_channels"],
                "value_range": [0, len(told.structures)], "is_patch_data": True, "channel_def": names,
            }},
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the card


def card(told: Training) -> str:
    """The card in Markdown: data, split, training, figures with intervals, groups, limits."""
    facts = told.facts
    sides = "\n".join(f"| {name} | {scans} | {people} |" for name, (scans, people) in facts["sides"].items())
    traits = "\n".join(f"| {name} | {', '.join(groups)} |" for name, groups in facts["traits"].items())
    how = ", ".join(f"{name} {value}" for name, value in facts["training"].items())
    spacing = " × ".join(f"{length:g}" for length in told.spacing)
    return f"""# {told.name}

Segments {", ".join(told.structures.values())}. For research; **not validated for care**: whoever uses it on patients
validates it first, for their own entity, equipment and intended use.

## Data

{facts["scans"]} scans of {facts["patients"]} patients (digest `{facts["data_digest"][:16]}`), split {facts["how"]}.
No patient is on two sides; the same bytes under two names are one scan.

| side | scans | patients |
|---|---|---|
{sides}

| it was trained on | |
|---|---|
{traits}

## Training

{told.network["_target_"]}, patches of {told.patch}³ voxels at {spacing} mm, intensities from {told.intensity[0]:g} to \
{told.intensity[1]:g}; Dice + cross entropy; {how};
seed {facts["seed"]}, {facts["ranks"]} rank(s). {facts["epochs"]} epochs were trained; the weights are of epoch \
{facts["best_epoch"]}.

## Figures

{_KINDS[told.kind]} {told.report["cases"]} scans of {told.report["patients"]} patients; 95 % intervals over patients.
Missed and invented structures score Dice 0, NSD 0 and the diagonal of the field of view, and are in every mean.

{_table(told)}

{_groups(told)}

## Limits

* What is not in the table of what it was trained on was never tried: other sites, scanners, ages, protocols.
* Scans were all about {spacing} mm; others are resampled to that first.
* Intensities outside {told.intensity[0]:g} to {told.intensity[1]:g} are clipped.
* {_evidence(told)}
"""


def _table(told: Training) -> str:
    columns = ("structure", "Dice", "NSD", "HD95 (mm)", "found", "missed", "invented", "rightly absent")
    rows = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for label, name in told.structures.items():
        row = told.report["models"][told.name]["structures"][str(label)]
        figures = " | ".join(_estimate(row[metric]) for metric in METRICS)
        counts = " | ".join(str(row["counts"][outcome]) for outcome in ("found", "missed", "invented", "absent"))
        rows.append(f"| {name} | {figures} | {counts} |")
    return "\n".join(rows)


def _estimate(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "none"
    interval = "" if row["low"] is None else f" ({row['low']:.3f} – {row['high']:.3f})"
    return f"{row['mean']:.3f}{interval}"


def _groups(told: Training) -> str:
    worse = [row for row in told.report["subgroups"] if row["worse"]]
    if not worse:
        return "No group by site, scanner, sex or age is clearly worse than the others; small groups could hide one."
    rows = [
        f"* **Worse** for {row['trait']} {row['group']}, {row['structure']}: Dice {_estimate(row['dice'])},"
        f" {abs(row['gap']['mean']):.3f} below the others"
        for row in worse
    ]
    return "\n".join(rows)


def _evidence(told: Training) -> str:
    if told.kind != "held-out":
        return "Nothing was held out: how it does on other patients is not known."
    return f"The figures rest on {told.report['patients']} patients."
