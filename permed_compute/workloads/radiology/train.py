"""Job `radiology/train-segmentation`: a MONAI network from labelled scans to a bundle with its card; a gang.

`inputs`: `dataset`, a Decathlon list as `radiology/ingest` writes it (stores or NIfTI), with `subject` and, where
known, `site`, `scanner`, `sex`, `age` in each row.

The network sees intensities clipped to a range of the training scans (or `intensity`), axes turned to RAS, spacing as
it is; scans whose spacing differs from the others' are refused, because patches are not resampled. It is chosen by the
mean Dice of the validation scans, missed structures counted; the figures are those of the test scans, which nothing
was chosen by. Without test scans they are called a fit, because that is what they are.

`params` of the job: see `PARAMS`, and `jobs/radiology/train-segmentation/job.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.learning.best import Best
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, Gang, Result
from permed_compute.workloads.radiology import evaluation, publish, publish_labels, scores, splits, supervised
from permed_compute.workloads.radiology.evaluate import PAGE, SUMMARY
from permed_compute.workloads.radiology.patches import Balanced, Samples, Whole
from permed_compute.workloads.radiology.read import Volume
from permed_compute.workloads.radiology.sliding import Windows, labels
from permed_compute.workloads.radiology.splits import Scan, Split
from permed_compute.workloads.radiology.supervised import DATASET, Course, Fitted, Left, number

if TYPE_CHECKING:
    import torch
    from torch import nn

VERSION = "2"
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNET = {"_target_": "UNet", "channels": [16, 32, 64], "strides": [2, 2], "num_res_units": 1, "norm": "instance"}
_TOLD = ("batch", "epochs", "patience", "learning_rate", "precision", "per_volume", "foreground")
"""Params that the card names."""

PARAMS: supervised.Params = {
    "name": ("segmentation", lambda v: isinstance(v, str) and 0 < len(v) <= 64, "a name of up to 64 letters"),
    "network": (_UNET, supervised.is_network, supervised.NETWORK_WORDS),
    "patch": (64, number(8, 512, whole=True), "voxels, 8 to 512"),
    "per_volume": (2, number(1, 1000, whole=True), "patches of each scan in an epoch, at least 1"),
    "foreground": (0.75, number(0, 1), "a share from 0 to 1"),
    **supervised.PARAMS,
    "pictures": (10, number(0, 100_000, whole=True), "epochs between pictures, 0 for none"),
    "nsd_mm": (2.0, number(0), "mm"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    return supervised.checked(given, PARAMS)


# ------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True, slots=True)
class Data:
    """What the network learns from and what it must know to be used. intensity: clipped to this, then 0 to 1.

    structures: names by label. spacing: mm along R, A, S, the median of the training scans.
    """

    split: Split
    structures: dict[int, str]
    channels: int
    intensity: tuple[float, float]
    spacing: tuple[float, float, float]


def data_of(params: Mapping[str, Any], ctx: Context) -> Data:
    """Split the list, and look at a patch of every scan. Raises `WorkloadError`, `RefusedInput` SPACING_DIFFERS."""
    index = ctx.input(DATASET)
    found = splits.scans(index, ctx)
    structures = _structures(index)
    split = splits.split(
        found, validation=params["validation"], test=params["test"], seed=ctx.seed,
        by_site=params["split_by"] == "site", hold_out=params["hold_out"], fold=params["fold"], folds=params["folds"],
    )  # fmt: skip
    channels = supervised.channels_of(found)
    everyone = [*split.training, *split.validation, *split.test]
    cut = Balanced((params["patch"],) * 3, dict.fromkeys(structures, 1.0))
    samples = Samples([scan.case for scan in everyone], cut, transform=supervised.oriented(("image", "label")))
    seen = supervised.look(samples, ctx.seed, list(structures))
    trained = seen[: len(split.training)]
    spacing = np.median([scan.spacing for scan in trained], axis=0)
    supervised.refuse_other_spacing(everyone, seen, spacing)
    low, high = params["intensity"] or supervised.range_of(trained)
    x, y, z = (round(float(length), 4) for length in spacing)
    return Data(split, structures, channels, (float(low), float(high)), (x, y, z))


def _structures(index: Path) -> dict[int, str]:
    """Decathlon writes {"1": name}, nnU-Net {name: 1}."""
    try:
        rows = json.loads(index.read_text(encoding="utf-8"))["labels"].items()
        pairs = [(int(a), str(b)) if str(a).isdigit() else (int(b), str(a)) for a, b in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pairs = []
    structures = {label: name for label, name in sorted(pairs) if label}
    if list(structures) != list(range(1, len(structures) + 1)) or not structures:
        raise WorkloadError("The list names no labels 1, 2 …", remedy='Write {"labels": {"0": "background", "1": …}}.')
    return structures


def _plain(data: Data, *more: Any) -> Any:
    from monai.transforms.compose import Compose

    return Compose([supervised.oriented(("image", "label")), supervised.scaled(data.intensity), *more])


def training_samples(data: Data, params: Mapping[str, Any]) -> Samples:
    """Patches: `foreground` of them around a voxel of some structure, each structure as often as the others."""
    share = params["foreground"] / len(data.structures)
    weights = {0: 1 - params["foreground"], **dict.fromkeys(data.structures, share)}
    cut = Balanced((params["patch"],) * 3, weights, params["per_volume"])
    transform = _plain(data, *supervised.varied(("image", "label")))
    return Samples([scan.case for scan in data.split.training], cut, transform=transform)


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    import torch

    return {key: torch.stack([sample[key].as_tensor() for sample in samples]) for key in ("image", "label")}


def defined(params: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """The bundle's `network_def`, its channels filled in from the data."""
    return supervised.defined(params["network"], data.channels, len(data.structures) + 1)


# ------------------------------------------------------------------------------------------------ the loss


def supervised_loss() -> Callable[[nn.Module, Any], torch.Tensor]:
    """Dice + cross entropy; with deep supervision (batch, heads, classes, …) 1, 1/2, 1/4 … of each head."""
    from monai.losses.dice import DiceCELoss

    whole = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        out = model(batch["image"])
        heads = out.unbind(1) if out.ndim == 6 else [out]
        weights = [0.5**k for k in range(len(heads))]
        total: torch.Tensor = sum(
            w * whole(head.float(), batch["label"]) for w, head in zip(weights, heads, strict=True)
        )
        return total / sum(weights)

    return loss


# ------------------------------------------------------------------------------------------------ judging


@dataclass
class Judge:
    """Segments whole scans as the bundle will, and scores them."""

    data: Data
    params: Mapping[str, Any]
    ctx: Context
    best: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        split = self.data.split
        everyone = {scan.name: scan.case for scan in (*split.training, *split.validation, *split.test)}
        self._place = {name: k for k, name in enumerate(everyone)}
        self._samples = Samples(list(everyone.values()), Whole(), transform=_plain(self.data))

    def segmented(self, model: nn.Module, scan: Scan) -> tuple[Volume, np.ndarray, np.ndarray]:
        """(truth, image, labels), in RAS on the scan's grid."""
        sample = self._samples[self._place[scan.name]]
        windows = Windows((self.params["patch"],) * 3, (self.params["overlap"],) * 3)
        image = sample["image"].as_tensor().float()
        found = labels(image.to(self.ctx.device), lambda x: _first(model(x)), windows)
        truth = Volume(sample["label"].numpy()[0], _TO_LPS @ np.asarray(sample["label"].affine), (), None)
        return truth, image[0].numpy(), found

    def after_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Mean Dice of the validation scans, shared by the ranks; keeps the best weights, draws a picture."""
        sums = np.zeros((2, len(self.data.structures)))
        for place, scan in enumerate(self.data.split.validation):
            if place % self.ctx.world != self.ctx.rank:
                continue
            truth, image, found = self.segmented(model, scan)
            dice = [_dice(truth.array == label, found == label) for label in self.data.structures]
            sums += np.array([[value or 0.0, value is not None] for value in dice], float).T
            if place == 0 and self.params["pictures"] and (epoch + 1) % self.params["pictures"] == 0:
                picture = self.ctx.scratch / "picture.png"
                evaluation.write_picture(truth, found, image, picture)
                self.ctx.log_artifact(picture, f"epoch-{epoch + 1:04}.png")
        sums = supervised.summed(sums, self.ctx)
        there = sums[1] > 0
        if not there.any():
            return {}
        per_structure = np.divide(sums[0], sums[1], where=there, out=np.zeros(len(there)))
        score = float(per_structure[there].mean())
        self.best.offer(model, epoch, score)
        names = list(self.data.structures.values())
        return {"dice": score, **{f"dice_{name}": float(per_structure[k]) for k, name in enumerate(names) if there[k]}}

    def score_of(self, figures: Mapping[str, float]) -> float | None:
        return figures.get("dice")

    def report(self, model: nn.Module, found: Sequence[Scan], kind: str) -> dict[str, Any]:
        """All figures of these scans, as `radiology/evaluate` gives them, its page and pictures in `ctx.out`."""
        rows = []
        for scan in found:
            truth, image, labelled = self.segmented(model, scan)
            structures = {
                str(label): scores.score(
                    truth.array == label, labelled == label, truth.spacing, self.params["nsd_mm"]
                ).as_dict()
                for label in self.data.structures
            }
            row = {"usable": True, "structures": structures}
            rows.append(evaluation.Row(scan.name, scan.subject, scan.traits, {self.params["name"]: row}))
            evaluation.write_picture(truth, labelled, image, self.ctx.scratch / f"{scan.name}.png")
        report = evaluation.summarise(rows, self.data.structures, [self.params["name"]], self.ctx.seed)
        for case in report["worst"]:
            case["picture"] = f"{case['case']}.png"
            self.ctx.log_artifact(self.ctx.scratch / case["picture"], case["picture"])
        write_json(self.ctx.out / SUMMARY, report)
        evaluation.write_page(report, self.ctx.out, self.params["name"], PAGE, publish.sentence(kind, "scans"))
        return report


def _first(out: Any) -> Any:
    """The full-resolution head of what a network returns."""
    return out[0] if isinstance(out, list | tuple) else out


def _dice(truth: np.ndarray, found: np.ndarray) -> float | None:
    """None where both are empty; 0 where one is."""
    sizes = int(np.count_nonzero(truth)) + int(np.count_nonzero(found))
    return 2 * int(np.count_nonzero(truth & found)) / sizes if sizes else None


# ------------------------------------------------------------------------------------------------ the job


def fitted(params: Mapping[str, Any], ctx: Context) -> Fitted | None:
    """Train by these (complete) params; None where it was asked to stop. No test scan is looked at."""
    return supervised.fitted(course(params, ctx), params, ctx)


def course(params: Mapping[str, Any], ctx: Context) -> Course:
    with ctx.stage("look at the data"):
        data = data_of(params, ctx)
    return Course(
        data.split, defined(params, data), training_samples(data, params), collate, supervised_loss(),
        Judge(data, params, ctx),
    )  # fmt: skip


def train(spec: JobSpec, ctx: Context) -> Result | None:
    """Every rank trains; the first judges what came out and writes the bundle."""
    params = params_of(spec.params)
    begun = course(params, ctx)
    made = supervised.fitted(begun, params, ctx)
    name, judge = params["name"], begun.judge
    assert isinstance(judge, Judge)
    data = judge.data

    def describe(kind: str, report: Mapping[str, Any], facts: Mapping[str, Any]) -> Left:
        told = publish.Training(name, begun.definition, data.intensity, data.spacing, kind, report, facts)
        metrics = {
            f"{structure}_{metric}": row[metric]["mean"]
            for label, structure in data.structures.items()
            for metric in scores.METRICS
            if (row := report["models"][name]["structures"][str(label)])[metric] is not None
        }
        figures = [(case["picture"], f"{case['case']}: {case['structure']}") for case in report["worst"]]
        bundle = publish_labels.made(told, data.structures, params["patch"], params["overlap"])
        return Left(bundle, metrics, figures)

    return supervised.finished(made, params, _TOLD, ctx, describe)


WORKLOAD = Gang(train=train, version=VERSION)
