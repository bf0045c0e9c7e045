"""Job `radiology/train-classification`: a MONAI network from studies with labels to a bundle with its card; a gang.

`inputs`: `dataset`, a list as MONAI's for classification; rows have `subject` and, where known, `site`, `scanner`,
`sex`, `age`; an image is a store or NIfTI, several are channels:

    {"labels": {"0": "no lesion", "1": "lesion"}, "training": [{"image": "i1.nii.gz", "label": 1, "subject": "7"}]}

`label` is one class, or a list of those that are there ([] for none of them), in all rows alike.

`view: whole` brings each study to a cube of `size` voxels, of the finest spacing in which the largest training study
fits; what is larger loses its margins. `view: patches` learns from patches with the study's label, at the spacing as it
is (others are refused); of a study's windows `pool` is taken. The epoch is chosen by the log loss of the validation
studies, which a model that is sure and wrong cannot please.

`params` of the job: see `PARAMS`, and `jobs/radiology/train-classification/job.yaml`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from permed_compute.errors import WorkloadError
from permed_compute.learning import classification
from permed_compute.learning.best import Best
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, Gang, Result
from permed_compute.workloads.radiology import publish, publish_classes, splits, supervised
from permed_compute.workloads.radiology.evaluate import PAGE, SUMMARY
from permed_compute.workloads.radiology.patches import Random, Samples, Whole
from permed_compute.workloads.radiology.publish_classes import Answers
from permed_compute.workloads.radiology.splits import Scan, Split
from permed_compute.workloads.radiology.supervised import DATASET, Course, Left, number

if TYPE_CHECKING:
    import torch
    from torch import nn

    from permed_compute.learning.training import Loss

VERSION = "1"
_SURE = 1e-6
"""Probabilities are kept this far from 0 and 1 in the log loss."""
_DENSENET = {"_target_": "DenseNet", "init_features": 16, "growth_rate": 8, "block_config": [2, 2, 2]}
_TOLD = ("batch", "epochs", "patience", "learning_rate", "precision", "view")
"""Params that the card names."""

PARAMS: supervised.Params = {
    "name": ("classification", lambda v: isinstance(v, str) and 0 < len(v) <= 64, "a name of up to 64 letters"),
    "network": (_DENSENET, supervised.is_network, supervised.NETWORK_WORDS),
    "view": ("whole", lambda v: v in ("whole", "patches"), "whole or patches"),
    "size": (64, number(8, 512, whole=True), "voxels, 8 to 512"),
    "per_volume": (4, number(1, 1000, whole=True), "patches of each study in an epoch, at least 1"),
    "pool": ("mean", lambda v: v in ("mean", "max"), "mean or max"),
    "threshold": (classification.THRESHOLD, number(0, 1), "a probability"),
    **supervised.PARAMS,
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    return supervised.checked(given, PARAMS)


# ------------------------------------------------------------------------------------------------ the studies


@dataclass(frozen=True, slots=True)
class Cohort:
    """Studies with what is there in each, by the scan's name. exclusive: exactly one class is."""

    found: Sequence[Scan]
    classes: Sequence[str]
    truth: Mapping[str, tuple[bool, ...]]
    exclusive: bool


def cohort(index: Path, ctx: Context) -> Cohort:
    """Raises `WorkloadError` where the list cannot be used; a row without subject is its own."""
    try:
        told = json.loads(index.read_text(encoding="utf-8"))
        classes = [str(name) for _, name in sorted((int(place), name) for place, name in told["labels"].items())]
        rows = [dict(row) for row in told["training"] if row["image"] and row.get("label") is not None]
        places = {name: k for k, name in enumerate(classes)} | {k: k for k in range(len(classes))}
        several = {isinstance(row["label"], list) for row in rows}
        said = [sorted({places[one] for one in _listed(row["label"])}) for row in rows]
        usable = len(several) == 1 and len(classes) >= 1 and set(map(int, told["labels"])) == {*range(len(classes))}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        usable = False
    if not usable:
        raise WorkloadError(
            "The list has no studies with labels that can be used.",
            remedy='Write {"labels": {"0": "absent", "1": "present"}, "training": [{"image", "label": 1, "subject"}]};'
            " `label` is one class, or in all rows a list.",
        )
    found, truth = [], {}
    for row, there in zip(rows, said, strict=True):
        scan = splits.scan_of(row, index.parent, ctx, said=f"classes {there}")
        found.append(scan)
        truth[scan.name] = tuple(k in there for k in range(len(classes)))
    return Cohort(found, classes, truth, several == {False})


def _listed(label: Any) -> list[Any]:
    return label if isinstance(label, list) else [label]


@dataclass(frozen=True, slots=True)
class Data:
    """What the network learns from and what it must know to be used. intensity: clipped to this, then 0 to 1.

    spacing: mm along R, A, S, that studies are brought to.
    """

    split: Split
    cohort: Cohort
    channels: int
    intensity: tuple[float, float]
    spacing: tuple[float, float, float]

    @property
    def answered(self) -> list[int]:
        """Places of the classes that are reported: of two that exclude each other, the second."""
        classes = self.cohort.classes
        return [1] if self.cohort.exclusive and len(classes) == 2 else list(range(len(classes)))

    def names(self) -> list[str]:
        return [self.cohort.classes[place] for place in self.answered]


def data_of(params: Mapping[str, Any], ctx: Context) -> Data:
    """Split the list, stratified by class, and look at every study. Raises `WorkloadError`, `RefusedInput`."""
    known = cohort(ctx.input(DATASET), ctx)
    if known.exclusive and len(known.classes) > 2 and params["pool"] == "max":
        raise WorkloadError("`pool: max` has no meaning for more than two classes that exclude each other.",
                            remedy="Write `pool: mean`, or lists as labels.")  # fmt: skip
    split = splits.split(
        known.found, validation=params["validation"], test=params["test"], seed=ctx.seed,
        by_site=params["split_by"] == "site", hold_out=params["hold_out"], fold=params["fold"], folds=params["folds"],
        stratum=lambda scan: str(known.truth[scan.name]),
    )  # fmt: skip
    _refuse_one_class(split.training, known)
    everyone = [*split.training, *split.validation, *split.test]
    whole = params["view"] == "whole"
    cut = Whole() if whole else Random((params["size"],) * 3)
    looked = split.training if whole else everyone
    samples = Samples([scan.case for scan in looked], cut, transform=supervised.oriented(["image"]))
    seen = supervised.look(samples, ctx.seed)
    trained = seen[: len(split.training)]
    if whole:
        spacing = [_fitting(trained, params["size"])] * 3
    else:
        spacing = np.median([one.spacing for one in trained], axis=0).tolist()
        supervised.refuse_other_spacing(everyone, seen, np.asarray(spacing))
    low, high = params["intensity"] or supervised.range_of(trained)
    x, y, z = (round(float(length), 4) for length in spacing)
    return Data(split, known, supervised.channels_of(known.found), (float(low), float(high)), (x, y, z))


def _refuse_one_class(trained: Sequence[Scan], known: Cohort) -> None:
    counts = np.sum([known.truth[scan.name] for scan in trained], axis=0)
    missing = [name for name, count in zip(known.classes, counts, strict=True) if count in (0, len(trained))]
    if missing:
        raise WorkloadError(
            f"Of the {len(trained)} training studies all or none are {' and '.join(repr(name) for name in missing)}.",
            remedy="A class can be learned where some studies have it and others do not: give more, or another split.",
        )


def _fitting(seen: Sequence[supervised.Seen], size: int) -> float:
    """mm: the finest spacing at which the largest study fits, but no finer than any study is."""
    largest = max(float((one.spacing * one.shape).max()) for one in seen)
    return max(largest / size, min(float(one.spacing.min()) for one in seen))


# ------------------------------------------------------------------------------------------------ samples


class Labelled(Dataset[Any]):
    """`samples` with what is there in the study that each is cut from: {"image": (c, x, y, z), "target": …}."""

    def __init__(self, samples: Samples, targets: Sequence[torch.Tensor]) -> None:
        self.samples, self.targets, self.transform = samples, targets, samples.transform
        self._study = samples.groups

    def __len__(self) -> int:
        return len(self.samples)

    def set_random_state(self, seed: int | None = None, state: Any = None) -> Labelled:
        self.samples.set_random_state(seed, state)
        return self

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"image": self.samples[index]["image"].as_tensor(), "target": self.targets[self._study[index]]}


def training_samples(data: Data, params: Mapping[str, Any]) -> Labelled:
    """Whole studies or patches of them, flipped, brighter or darker, noisy."""
    scans, size = data.split.training, params["size"]
    whole = params["view"] == "whole"
    transform = _prepared(data, params, whole, *supervised.varied(["image"]))
    cut = Whole() if whole else Random((size,) * 3, params["per_volume"])
    samples = Samples([scan.case for scan in scans], cut, transform=transform)
    return Labelled(samples, [_target(data.cohort, scan) for scan in scans])


def _prepared(data: Data, params: Mapping[str, Any], whole: bool, *more: Any) -> Any:
    """As the bundle prepares a study."""
    from monai.transforms.compose import Compose
    from monai.transforms.croppad.dictionary import ResizeWithPadOrCropd
    from monai.transforms.spatial.dictionary import Spacingd

    resampled = [Spacingd("image", data.spacing, mode="bilinear")] if whole else []
    cropped = [ResizeWithPadOrCropd("image", (params["size"],) * 3)] if whole else []
    return Compose([supervised.oriented(["image"]), *resampled, supervised.scaled(data.intensity), *cropped, *more])


def _target(known: Cohort, scan: Scan) -> torch.Tensor:
    import torch

    truth = known.truth[scan.name]
    return torch.tensor(truth.index(True)) if known.exclusive else torch.tensor(truth, dtype=torch.float32)


def loss_of(known: Cohort) -> Loss:
    """Cross entropy; of classes that may be there together, binary, of each."""
    from torch.nn import functional

    one = functional.cross_entropy if known.exclusive else functional.binary_cross_entropy_with_logits
    return lambda model, batch: one(_first(model(batch["image"])).float(), batch["target"])


def _first(out: Any) -> Any:
    """The logits of what a network returns."""
    return out[0] if isinstance(out, list | tuple) else out


# ------------------------------------------------------------------------------------------------ judging


@dataclass
class Judge:
    """Answers for whole studies as the bundle will, and scores them."""

    data: Data
    params: Mapping[str, Any]
    ctx: Context
    best: Best = field(default_factory=Best)

    def __post_init__(self) -> None:
        from monai.inferers.splitter import SlidingWindowSplitter
        from monai.transforms.croppad.dictionary import SpatialPadd

        split, size = self.data.split, self.params["size"]
        everyone = {scan.name: scan.case for scan in (*split.training, *split.validation, *split.test)}
        self._place = {name: k for k, name in enumerate(everyone)}
        whole = self.params["view"] == "whole"
        more = () if whole else (SpatialPadd("image", (size,) * 3),)
        transform = _prepared(self.data, self.params, whole, *more)
        self._samples = Samples(list(everyone.values()), Whole(), transform=transform)
        self._windows = SlidingWindowSplitter((size,) * 3, self.params["overlap"])

    def probabilities(self, model: nn.Module, scan: Scan) -> np.ndarray:
        """Of each class that is answered, 0 to 1."""
        import torch

        image = self._samples[self._place[scan.name]]["image"].as_tensor().float()[None]
        with torch.no_grad():
            parts = [_first(model(part.to(self.ctx.device))) for part, _ in self._windows(image)]
        logits = torch.cat(parts).float()
        each = logits.softmax(1) if self.data.cohort.exclusive else logits.sigmoid()
        pooled = each.mean(0) if self.params["pool"] == "mean" else each.amax(0)
        return pooled[self.data.answered].cpu().numpy().astype(float)

    def after_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Log loss and mean AUROC of the validation studies, shared by the ranks; keeps the best weights."""
        scans = self.data.split.validation
        if not scans:
            return {}
        found = np.zeros((len(scans), len(self.data.answered)))
        for k in range(self.ctx.rank, len(scans), self.ctx.world):
            found[k] = self.probabilities(model, scans[k])
        found = supervised.summed(found, self.ctx)
        truth = np.array([self._truth(scan) for scan in scans])
        sure = np.clip(found, _SURE, 1 - _SURE)
        figures = {"log_loss": float(-np.where(truth, np.log(sure), np.log(1 - sure)).mean())}
        self.best.offer(model, epoch, -figures["log_loss"])
        ones = np.ones((1, len(scans)))
        areas = [float(classification.auroc(truth[:, k], found[:, k], ones)[0]) for k in range(truth.shape[1])]
        known = [area for area in areas if np.isfinite(area)]
        return figures | ({"auroc": float(np.mean(known))} if known else {})

    def _truth(self, scan: Scan) -> list[bool]:
        return [self.data.cohort.truth[scan.name][place] for place in self.data.answered]

    def score_of(self, figures: Mapping[str, float]) -> float | None:
        return -figures["log_loss"] if "log_loss" in figures else None

    def report(self, model: nn.Module, found: Sequence[Scan], kind: str) -> dict[str, Any]:
        """All figures of these studies (`classification.summarise`), their page in `ctx.out`."""
        names = self.data.names()
        rows = [
            classification.Row(
                scan.name, scan.subject, dict(zip(names, self._truth(scan), strict=True)),
                dict(zip(names, self.probabilities(model, scan).tolist(), strict=True)), scan.traits,
            )
            for scan in found
        ]  # fmt: skip
        report = classification.summarise(rows, names, threshold=self.params["threshold"], seed=self.ctx.seed)
        write_json(self.ctx.out / SUMMARY, report)
        of = publish.sentence(kind, "studies")
        classification.write_page(report, self.ctx.out / PAGE, self.params["name"], of)
        return report


# ------------------------------------------------------------------------------------------------ the job


def course(params: Mapping[str, Any], ctx: Context) -> Course:
    from torch.utils.data import default_collate

    with ctx.stage("look at the data"):
        data = data_of(params, ctx)
    definition = supervised.defined(params["network"], data.channels, len(data.cohort.classes))
    return Course(
        data.split, definition, training_samples(data, params), default_collate, loss_of(data.cohort),
        Judge(data, params, ctx),
    )  # fmt: skip


def train(spec: JobSpec, ctx: Context) -> Result | None:
    """Every rank trains; the first judges what came out and writes the bundle."""
    params = params_of(spec.params)
    begun = course(params, ctx)
    made = supervised.fitted(begun, params, ctx)
    judge = begun.judge
    assert isinstance(judge, Judge)
    data, whole = judge.data, params["view"] == "whole"

    def describe(kind: str, report: Mapping[str, Any], facts: Mapping[str, Any]) -> Left:
        told = publish.Training(params["name"], begun.definition, data.intensity, data.spacing, kind, report, facts)
        answers = Answers(
            data.names(), data.answered, data.cohort.exclusive, params["size"], whole, params["overlap"], params["pool"]
        )
        metrics = {
            f"{name}_{metric}": row[metric]["mean"]
            for name, row in report["classes"].items()
            for metric in classification.METRICS
            if row[metric] is not None
        }
        return Left(publish_classes.made(told, answers, data.cohort.classes), metrics)

    return supervised.finished(made, params, _TOLD, ctx, describe)


WORKLOAD = Gang(train=train, version=VERSION)
