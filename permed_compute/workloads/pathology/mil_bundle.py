"""A trained model as a folder with its card: what it answers, what it learned from, how well it does, its limits.

    configs/metadata.json   name and task, as the registry of models reads them
    configs/model.json      network, head, the features that it knows, baseline hazard and cut between risk groups
    models/model.pt         tensors only
    docs/README.md          the card

The same training gives the same bytes: nothing in it knows the time, and no patient's outcome is in it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permed_compute import __version__
from permed_compute.errors import WorkloadError
from permed_compute.learning.evidence import Figure
from permed_compute.learning.survival import Baseline
from permed_compute.paths import read_json, write_json
from permed_compute.workloads.pathology.cohort import Kind
from permed_compute.workloads.pathology.heads import Head

if TYPE_CHECKING:
    from torch import nn

CONFIG, WEIGHTS, CARD = "configs/model.json", "models/model.pt", "docs/README.md"
_FORMAT = 1
KINDS = {
    "held-out": "Patients that neither training nor any choice has seen.",
    "chosen-by": "The patients by whom the epoch was chosen: **flattering, no evidence** of how it does on others.",
    "fit": "The patients it was trained on: **a fit, no evidence** of how it does on others.",
}


@dataclass(frozen=True, slots=True)
class Described:
    """A model without its weights. risk_cut: median risk of the training side, which parts the risk groups."""

    name: str
    network: Mapping[str, Any]
    head: Head
    kind: Kind
    baseline: Baseline | None = None
    risk_cut: float | None = None


def write(root: Path, model: nn.Module, told: Described, card: str) -> str:
    """Write the folder; returns its digest."""
    import torch

    for folder in ("configs", "models", "docs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(root / CONFIG, {
        "format": _FORMAT, "name": told.name, "network": dict(told.network), "head": told.head.as_dict(),
        "features": told.kind.as_dict(), "risk_cut": told.risk_cut,
        "baseline": None if told.baseline is None else asdict(told.baseline),
    })  # fmt: skip
    write_json(root / "configs" / "metadata.json", {
        "name": told.name, "version": "0.1.0", "task": f"{told.head.kind} of slides",
        "description": f"{told.network['model']} over {told.kind.encoder} features at {told.kind.mpp:g} µm.",
        "intended_use": "Research. Not validated for care.", "trained_by": f"permed_compute {__version__}",
    })  # fmt: skip
    weights = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    torch.save(weights, root / WEIGHTS)
    (root / CARD).write_text(card, encoding="utf-8")
    return digest(root)


def digest(root: Path, of_file: Callable[[Path], str] | None = None) -> str:
    """Of what is computed with: configuration and weights. Raises `WorkloadError` where the folder is no bundle."""
    if not all((root / name).is_file() for name in (CONFIG, WEIGHTS)):
        raise WorkloadError(
            "The folder is no bundle of a slide model.", remedy="Give `bundle/` of a pathology/train-mil job."
        )
    known = of_file or (lambda path: hashlib.sha256(path.read_bytes()).hexdigest())
    return hashlib.sha256("\n".join(f"{name} {known(root / name)}" for name in (CONFIG, WEIGHTS)).encode()).hexdigest()


def read(root: Path) -> Described:
    """Raises `WorkloadError`."""
    row = read_json(root / CONFIG) or {}
    if row.get("format") != _FORMAT:
        raise WorkloadError("The bundle is of another format.", remedy="Train it again with this version.")
    baseline = row["baseline"]
    return Described(
        row["name"], row["network"], Head.of(row["head"]), Kind(**row["features"]),
        None if baseline is None else Baseline(tuple(baseline["time"]), tuple(baseline["hazard"])), row["risk_cut"],
    )  # fmt: skip


def load(root: Path, device: str) -> nn.Module:
    """The network with its weights, for answers. Raises `WorkloadError` where they do not fit."""
    import torch

    from permed_compute.workloads.pathology import mil

    model = mil.build(read(root).network)
    try:
        model.load_state_dict(torch.load(root / WEIGHTS, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, OSError) as error:
        raise WorkloadError(f"The bundle's weights do not fit: {type(error).__name__}.") from None
    return model.eval().to(device)


# ------------------------------------------------------------------------------------------------ the card


@dataclass(frozen=True, slots=True)
class Facts:
    """Counts for the card, no names. sides: patients and slides of each. figures_of: a key of KINDS."""

    sides: Mapping[str, tuple[int, int]]
    traits: Mapping[str, Sequence[str]]
    how: str
    data_digest: str
    training: Mapping[str, Any]
    seed: int
    epochs: int
    best_epoch: int
    figures_of: str
    figures: Sequence[Figure]


def card(told: Described, facts: Facts) -> str:
    """In Markdown: data, split, training, figures with intervals, groups, limits."""
    sides = "\n".join(f"| {name} | {people} | {slides} |" for name, (people, slides) in facts.sides.items())
    traits = "\n".join(f"| {name} | {', '.join(groups)} |" for name, groups in facts.traits.items())
    how = ", ".join(f"{name} {value}" for name, value in facts.training.items())
    return f"""# {told.name}

{_answers(told.head)} For research; **not validated for care**: whoever uses it on patients validates it first, for
their own entity, equipment and intended use.

It reads features of **{told.kind.encoder}** (digest `{told.kind.encoder_digest[:16]}`), of tiles of
{told.kind.size} pixels at {told.kind.mpp:g} µm per pixel, and refuses others.

## Data

Digest `{facts.data_digest[:16]}`, split {facts.how}. No patient or family is on two sides.

| side | patients | slides |
|---|---|---|
{sides}

| it was trained on | |
|---|---|
{traits}

## Training

{told.network["model"]}, {json.dumps(dict(told.network))}; {how}; seed {facts.seed}. {facts.epochs} epochs were trained;
the weights are of epoch {facts.best_epoch}, by the validation loss.

## Figures

{KINDS[facts.figures_of]} 95 % intervals over patients.

{table(facts.figures)}

## Limits

* What is not in the table of what it was trained on was never tried: other sites, scanners, stains, tumours.
* Attention shows which tiles weighed most in an answer. It does not show why, and it is no segmentation.
"""


def _answers(head: Head) -> str:
    if not head.is_survival:
        return f"Tells {', '.join(head.classes)} apart, per patient."
    return "Tells who has the event sooner, per patient."


def table(figures: Sequence[Figure]) -> str:
    rows = ["| measure | of | patients | value (95 % interval) |", "|---|---|---|---|"]
    for one in figures:
        who = f"{one.trait} {one.group}" if one.trait else "everybody"
        interval = "" if one.low is None else f" ({one.low:.3f} – {one.high:.3f})"
        rows.append(f"| {one.measure} | {who} | {one.patients} | {one.mean:.3f}{interval} |")
    return "\n".join(rows) if figures else "None is defined on so few patients."
