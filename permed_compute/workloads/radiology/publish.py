"""A trained network as a MONAI bundle with its card: what it learned from, how well it does, where it was never tried.

    configs/metadata.json, configs/inference.json    `python -m monai.bundle run --config_file configs/inference.json`
    models/model.pt                                  tensors only
    docs/README.md                                   the card

What all bundles share; `publish_labels` and `publish_classes` say the rest. The same training gives the same bytes:
nothing in it knows the time.
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

if TYPE_CHECKING:
    from torch import nn

AXES = (("L", "R"), ("P", "A"), ("I", "S"))
"""Each axis of RAS, from where to where."""
_KINDS = {
    "held-out": "Held-out {what}, of patients that neither training nor any choice has seen.",
    "chosen-by": "The {what} by which the epoch was chosen: flattering, no evidence of how it does on others.",
    "fit": "A fit, not an evaluation: the {what} it was trained on. No evidence of how it does on others.",
}


def sentence(kind: str, what: str) -> str:
    """Of what the figures are."""
    return _KINDS[kind].format(what=what)


@dataclass(frozen=True, slots=True)
class Made:
    """A bundle to be written: `configs/inference.json`, `configs/metadata.json` and the card."""

    inference: Mapping[str, Any]
    metadata: Mapping[str, Any]
    card: str


@dataclass(frozen=True, slots=True)
class Training:
    """What is known of a network. spacing: mm along R, A, S. kind: of what scans `report` is (`supervised.judged_by`);
    facts: of data, split and training (`supervised.finished`)."""

    name: str
    network: Mapping[str, Any]
    intensity: tuple[float, float]
    spacing: tuple[float, float, float]
    kind: str
    report: Mapping[str, Any]
    facts: Mapping[str, Any]


def write(root: Path, model: nn.Module, made: Made) -> str:
    """Write the bundle's folder; returns its digest."""
    import torch

    for folder in ("configs", "models", "docs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(root / bundle.CONFIG, made.inference)
    write_json(root / "configs" / "metadata.json", made.metadata)
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    torch.save(weights, root / bundle.WEIGHTS)
    (root / "docs" / "README.md").write_text(made.card, encoding="utf-8")
    return bundle.check(root).digest


def digest_of(digests: Sequence[str]) -> str:
    """Of a set of contents, in whatever order."""
    return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()


def inference(
    told: Training, last: Sequence[Mapping[str, Any]], rest: Mapping[str, Any], imports: Sequence[str] = ()
) -> dict[str, Any]:
    """`configs/inference.json`: one image a time; needs no package but MONAI.

    last: transforms behind those that every network needs. rest: inferer, postprocessing, `run`.
    """
    low, high = told.intensity
    return {
        "imports": ["$import glob", "$import torch", *imports],
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
                *last,
                {"_target_": "EnsureTyped", "keys": "image"},
            ],
        },
        "dataset": {"_target_": "Dataset", "data": "@datalist", "transform": "@preprocessing"},
        "initialize": [
            "$@network.load_state_dict(torch.load(@bundle_root + '/models/model.pt', map_location=@device,"
            " weights_only=True))",
            "$@network.eval()",
            "$torch.set_grad_enabled(False)",
        ],
        **rest,
    }  # fmt: skip


def metadata(
    told: Training, task: str, description: str, edge: int, inputs: int, outputs: Mapping[str, Any]
) -> dict[str, Any]:
    """`configs/metadata.json` as MONAI's bundle specification asks. edge: voxels of what the network is given."""
    import monai
    import numpy
    import torch

    shape = {"type": "image", "spatial_shape": [edge] * 3, "dtype": "float32"}
    return {
        "name": told.name, "version": "0.1.0", "changelog": {"0.1.0": "trained"},
        "monai_version": monai.__version__, "pytorch_version": str(torch.__version__).partition("+")[0],
        "numpy_version": numpy.__version__, "required_packages_version": {"nibabel": "5.4.0"},
        "task": task, "description": description,
        "authors": "", "copyright": "", "intended_use": "Research. Not validated for care.",
        "trained_by": f"permed_compute {__version__}",
        "network_data_format": {
            "inputs": {"image": {
                **shape, "format": "image", "modality": "", "num_channels": inputs,
                "value_range": [0, 1], "is_patch_data": True, "channel_def": {"0": "image"},
            }},
            "outputs": {"pred": dict(outputs)},
        },
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the card


@dataclass(frozen=True, slots=True)
class Card:
    """What a task says in its card. does: "Segments lesion"; what: "scans"; seen: what the network is given; loss;
    figures: Markdown; read: how to read them; limits: sentences."""

    does: str
    what: str
    seen: str
    loss: str
    read: str
    figures: str
    limits: Sequence[str]


def card(told: Training, own: Card) -> str:
    """The card in Markdown: data, split, training, figures with intervals, groups, limits."""
    facts = told.facts
    sides = "\n".join(f"| {name} | {scans} | {people} |" for name, (scans, people) in facts["sides"].items())
    traits = "\n".join(f"| {name} | {', '.join(groups)} |" for name, groups in facts["traits"].items())
    how = ", ".join(f"{name} {value}" for name, value in facts["training"].items())
    limits = "\n".join(f"* {limit}" for limit in (*own.limits, _evidence(told)))
    return f"""# {told.name}

{own.does}. For research; **not validated for care**: whoever uses it on patients
validates it first, for their own entity, equipment and intended use.

## Data

{facts["scans"]} {own.what} of {facts["patients"]} patients (digest `{facts["data_digest"][:16]}`), split \
{facts["how"]}.
No patient is on two sides; the same bytes under two names are one.

| side | {own.what} | patients |
|---|---|---|
{sides}

| it was trained on | |
|---|---|
{traits}

## Training

{told.network["_target_"]}, {own.seen}, intensities from {told.intensity[0]:g} to \
{told.intensity[1]:g}; {own.loss}; {how};
seed {facts["seed"]}, {facts["ranks"]} rank(s). {facts["epochs"]} epochs were trained; the weights are of epoch \
{facts["best_epoch"]}.

## Figures

**{sentence(told.kind, own.what)}**

{told.report["cases"]} {own.what} of {told.report["patients"]} patients; 95 % intervals over patients.
{own.read}

{own.figures}

{_worse(told)}

## Limits

* What is not in the table of what it was trained on was never tried: other sites, scanners, ages, protocols.
{limits}
"""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown."""
    head = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def estimate(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return "none"
    interval = "" if row["low"] is None else f" ({row['low']:.3f} – {row['high']:.3f})"
    return f"{row['mean']:.3f}{interval}"


def _worse(told: Training) -> str:
    """Of `subgroups`; `gap` is in the measure that the group's row is judged by."""
    worse = [row for row in told.report["subgroups"] if row["worse"]]
    if all(row["gap"] is None for row in told.report["subgroups"]):
        return "There are no two groups by site, scanner, sex or age that could be compared."
    if not worse:
        return "No group by site, scanner, sex or age is clearly worse than the others; small groups could hide one."
    rows = []
    for row in worse:
        of, name = (row["structure"], "dice") if "structure" in row else (row["class"], "auroc")
        rows.append(
            f"* **Worse** for {row['trait']} {row['group']}, {of}: {WORDS[name]} {estimate(row[name])},"
            f" {abs(row['gap']['mean']):.3f} below the others"
        )
    return "\n".join(rows)


WORDS = {"dice": "Dice", "nsd": "NSD", "hd95_mm": "HD95 (mm)", "auroc": "AUROC", "auprc": "AUPRC",
         "sensitivity": "sensitivity", "specificity": "specificity", "brier": "Brier"}  # fmt: skip


def _evidence(told: Training) -> str:
    if told.kind != "held-out":
        return "Nothing was held out: how it does on other patients is not known."
    return f"The figures rest on {told.report['patients']} patients."
