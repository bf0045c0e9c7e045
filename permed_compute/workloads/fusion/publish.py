"""The bundle: the members of a model with what prepares their inputs, and its card. Nothing in it knows the time.

configs/metadata.json     what it is, in the words of MONAI's bundle specification
configs/fusion.json       modalities with their columns, levels of clinical words, times, cuts between risk groups
models/model.pt           tensors, numbers and words only
docs/README.md            the card
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute import __version__
from permed_compute.errors import NotFoundError, WorkloadError
from permed_compute.paths import read_json, write_json
from permed_compute.workloads.fusion import judge
from permed_compute.workloads.fusion.page import TITLES

if TYPE_CHECKING:
    from permed_compute.workloads.fusion.learn import Member
    from permed_compute.workloads.fusion.people import Cohort
    from permed_compute.workloads.fusion.train import Params

BUNDLE = "bundle"
CONFIG, WEIGHTS, CARD = "configs/fusion.json", "models/model.pt", "docs/README.md"
_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Told:
    """What a bundle is written from. members: `Member.state()` of each."""

    kind: str
    params: Params
    cohort: Cohort
    report: Mapping[str, Any]
    members: Sequence[Mapping[str, Any]]


def write(root: Path, told: Told) -> str:
    """Write the bundle's folder; returns its digest."""
    import torch

    for folder in ("configs", "models", "docs"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    write_json(root / "configs" / "metadata.json", _metadata(told))
    write_json(root / CONFIG, _config(told))
    torch.save(list(told.members), root / WEIGHTS)
    (root / CARD).write_text(card(told), encoding="utf-8")
    return digest(root)


def digest(root: Path, digest_of: Callable[[Path], str] | None = None) -> str:
    """Of every file's path and bytes. Raises `NotFoundError` where it is no bundle of ours."""
    if not (root / CONFIG).is_file() or not (root / WEIGHTS).is_file():
        raise NotFoundError("The bundle has no configs/fusion.json.", remedy="Give `bundle/` of a fusion training.")
    files = sorted(path for path in root.rglob("*") if path.is_file())
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            own = digest_of(path) if digest_of else hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(root)}\0{own}\n".encode())
    return total.hexdigest()


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle in memory. config: `configs/fusion.json`."""

    config: Mapping[str, Any]
    members: Sequence[Member]

    @property
    def times(self) -> np.ndarray:
        return np.array(self.config["times"], float)


def read(root: Path, device: str = "cpu") -> Bundle:
    """Raises `NotFoundError`, `WorkloadError`."""
    import torch

    from permed_compute.workloads.fusion.learn import Member

    config = read_json(root / CONFIG)
    if config is None:
        raise NotFoundError("The bundle has no configs/fusion.json.", remedy="Give `bundle/` of a fusion training.")
    if config.get("format") != _FORMAT:
        raise WorkloadError("The bundle is of another format.", remedy="Train it again with this version.")
    states = torch.load(root / WEIGHTS, map_location="cpu", weights_only=True)
    return Bundle(config, [Member.of(state, device) for state in states])


def _config(told: Told) -> dict[str, Any]:
    params, cohort = told.params, told.cohort
    return {
        "format": _FORMAT, "kind": told.kind, "head": told.report["head"],
        "modalities": {name: list(table.columns) for name, table in cohort.modalities.items()},
        "simulated": list(told.report["simulated"]),
        "clinical": {
            "numbers": list(params.clinical), "categories": list(params.categories), "codes": list(params.codes),
            "levels": {name: list(levels) for name, levels in cohort.levels.items()},
        },
        "times": judge.times_of(cohort).tolist(), "unit_of_time": params.time,
        "positive": max(cohort.labels) if cohort.labels else "", "repeated": params.repeated,
        "cuts": told.report["groups"]["cuts"] if "groups" in told.report else [],
    }  # fmt: skip


def _metadata(told: Told) -> dict[str, Any]:
    import torch

    return {
        "name": told.params.name, "version": "0.1.0", "changelog": {"0.1.0": "trained"}, "task": told.kind,
        "pytorch_version": str(torch.__version__).partition("+")[0], "numpy_version": np.__version__,
        "description": f"{told.kind} from {', '.join(told.cohort.modalities)}, whichever are there.",
        "authors": "", "copyright": "", "intended_use": "Research. Not validated for care.",
        "trained_by": f"permed_compute {__version__}", "data_digest": told.cohort.digest,
        "simulated_inputs": list(told.report["simulated"]),
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ the card


def card(told: Told) -> str:
    """The card in Markdown: data, split, training, figures with intervals, what is simulated, limits."""
    report, how = told.report, told.params.how(told.kind)
    rows = "\n".join(
        f"| {name} | {len(table.columns)} | {report['has'][name]} |"
        f"{' **simulated**' if name in report['simulated'] else ''} |"
        for name, table in told.cohort.modalities.items()
    )
    simulated = ", ".join(report["simulated"])
    warning = (
        f"\n**Simulated, not measured in anybody: {simulated}.** Figures that rest on it say nothing of patients.\n"
    )
    left = "; ".join(f"{why}: {count}" for why, count in report["left_out"].items())
    return f"""# {told.params.name}

A {told.kind} model over {", ".join(told.cohort.modalities)}; it answers with whichever of them are there. For research;
**not validated for care**: whoever uses it on patients validates it first, for their own entity and intended use.
{warning if simulated else ""}
## Data

{report["people"]} people of {report["families"]} families, {report["events"]} events (digest \
`{told.cohort.digest[:16]}`). Not in it: {left}.

| modality | columns | people who have it | |
|---|---|---|---|
{rows}

## Training

{len(told.members)} members, each trained on everybody: standardised, at most {how.components} components of each
modality, encoders of {how.width} units, attention over those that are there, head {report["head"]};
{how.epochs} epochs, rate {how.learning_rate:g} falling to nothing, weight decay {how.weight_decay:g}, dropout
{how.dropout:g}, modalities taken away with chance {how.modality_dropout:g}; seed {report["seed"]}. The answer is the
members' mean.

## Figures

Of people that the model had never seen, nor a relative of theirs: {report["folds"]} folds by person and family,
{report["repeats"]} repetitions, the mean of the repetitions' answers. 95 % intervals over people.

{_table(report)}

## Limits

* What is not in the table of modalities was never tried: other cohorts, equipment, panels, ages.
* A modality that is not there has no weight; how the fusion does without each one is in `report.json` of the training.
* Missing values within a modality count as the training people's mean.
* The members are trained on everybody; the figures are of models like them, trained on all folds but one.
"""


def _table(report: Mapping[str, Any]) -> str:
    names = list(report["fusion"]["figures"])
    head = ["", "people", *(TITLES[name] for name in names), "fusion minus it"]
    rows = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in (report["fusion"], *report["alone"]):
        told = [_figure(row["figures"][name]) for name in names]
        label = "**fusion**" if row is report["fusion"] else f"{row['name']} alone"
        rows.append(f"| {' | '.join([label, str(row['people']), *told, _figure(row.get('fusion_minus'))])} |")
    return "\n".join(rows)


def _figure(row: Mapping[str, Any] | None) -> str:
    if row is None:
        return ""
    return f"{row['value']:.3f}" + ("" if row["low"] is None else f" ({row['low']:.3f} – {row['high']:.3f})")
