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

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec, parse_duration
from permed_compute.workloads.port import Context, Gang, Result
from permed_compute.workloads.radiology import evaluation, publish, scores, splits
from permed_compute.workloads.radiology.evaluate import TRAITS
from permed_compute.workloads.radiology.patches import Balanced, Samples, Whole
from permed_compute.workloads.radiology.read import Volume
from permed_compute.workloads.radiology.sliding import Windows, labels
from permed_compute.workloads.radiology.splits import Scan, Split

if TYPE_CHECKING:
    import torch
    from torch import nn

    from permed_compute.learning.training import Trained

DATASET = "dataset"
BUNDLE, SPLIT, PAGE = "bundle", "split.json", "evaluation.html"
VERSION = "1"
SPACING_SHARE = 0.1
"""By which a scan's spacing may differ from the median, along any axis."""
_VALUES = 20_000
"""Of each structure that are looked at, per scan."""
_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])
_UNET = {"_target_": "UNet", "channels": [16, 32, 64], "strides": [2, 2], "num_res_units": 1, "norm": "instance"}
_PRECISIONS = ("float32", "bfloat16", "float16")


# ------------------------------------------------------------------------------------------------ params


def _number(least: float, most: float = float("inf"), *, whole: bool = False) -> Callable[[Any], bool]:
    kinds = int if whole else (int, float)
    return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and least <= v <= most


def _duration(value: Any) -> bool:
    try:
        return parse_duration(value) >= 0
    except ValueError:
        return False


def _is_network(value: Any) -> bool:
    """A configuration with nothing to run in it: MONAI evaluates texts that begin with $, and looks up those with @."""
    plain = isinstance(value, Mapping) and isinstance(value.get("_target_"), str) and value["_target_"].isidentifier()
    return bool(plain and not any(sign in json.dumps(value) for sign in ('"$', '"@', '"%')))


PARAMS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "name": ("segmentation", lambda v: isinstance(v, str) and 0 < len(v) <= 64, "a name of up to 64 letters"),
    "network": (
        _UNET,
        _is_network,
        "a bundle's network_def: {_target_: one of monai.networks.nets, …}, no expressions",
    ),
    "patch": (64, _number(8, 512, whole=True), "voxels, 8 to 512"),
    "per_volume": (2, _number(1, 1000, whole=True), "patches of each scan in an epoch, at least 1"),
    "foreground": (0.75, _number(0, 1), "a share from 0 to 1"),
    "intensity": ([], lambda v: isinstance(v, list) and len(v) in (0, 2) and v == sorted(set(v)), "[low, high], or []"),
    "batch": (4, _number(1, 4096, whole=True), "samples, at least 1"),
    "epochs": (100, _number(1, 100_000, whole=True), "at least 1"),
    "patience": (20, _number(0, 100_000, whole=True), "epochs, 0 for never"),
    "learning_rate": (1e-3, _number(1e-9, 10), "a number above 0"),
    "precision": ("float32", lambda v: v in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
    "loaders": (0, _number(0, 64, whole=True), "worker processes, at least 0"),
    "checkpoint": ("10m", _duration, "a time between checkpoints, e.g. 10m"),
    "overlap": (0.25, _number(0, 0.9), "a share below 0.9"),
    "pictures": (10, _number(0, 100_000, whole=True), "epochs between pictures, 0 for none"),
    "validation": (0.2, _number(0, 0.9), "a share below 0.9"),
    "test": (0.2, _number(0, 0.9), "a share below 0.9"),
    "split_by": ("patient", lambda v: v in ("patient", "site"), "patient or site"),
    "hold_out": ([], lambda v: isinstance(v, list) and all(isinstance(site, str) for site in v), "a list of sites"),
    "fold": (0, _number(0, 99, whole=True), "the number of a fold, from 0"),
    "folds": (0, _number(0, 100, whole=True), "0, or the number of folds"),
    "nsd_mm": (2.0, _number(0), "mm"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [Problem(f"params.{name}", f"is none of {list(PARAMS)}.") for name in given if name not in PARAMS]
    values = {name: given.get(name, default) for name, (default, _, _) in PARAMS.items()}
    problems += [
        Problem(f"params.{name}", f"is {values[name]!r}, not {words}.")
        for name, (_, test, words) in PARAMS.items()
        if not test(values[name])
    ]
    if not problems and values["folds"] and not values["fold"] < values["folds"]:
        problems.append(Problem("params.fold", f"is {values['fold']} of {values['folds']} folds, counted from 0."))
    if problems:
        raise SpecError("params", problems)
    return values


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


@dataclass(frozen=True, slots=True)
class _Seen:
    """spacing: mm along R, A, S. values: some, of each structure by label, 0 of everything."""

    spacing: np.ndarray
    values: Mapping[int, np.ndarray]


def data_of(params: Mapping[str, Any], ctx: Context) -> Data:
    """Split the list, and look at a patch of every scan. Raises `WorkloadError`, `RefusedInput` SPACING_DIFFERS."""
    index = ctx.input(DATASET)
    found = splits.scans(index, ctx)
    structures = _structures(index)
    split = splits.split(
        found, validation=params["validation"], test=params["test"], seed=ctx.seed,
        by_site=params["split_by"] == "site", hold_out=params["hold_out"], fold=params["fold"], folds=params["folds"],
    )  # fmt: skip
    if len({len(scan.case.images) for scan in found}) > 1:
        raise WorkloadError("Scans have different numbers of images.", remedy="Give each the same modalities.")
    everyone = [*split.training, *split.validation, *split.test]
    seen = _seen(everyone, structures, params["patch"], ctx.seed)
    trained = seen[: len(split.training)]
    spacing = np.median([scan.spacing for scan in trained], axis=0)
    _refuse_other_spacing(everyone, [scan.spacing for scan in seen], spacing)
    low, high = params["intensity"] or _range(trained)
    if not low < high:
        raise WorkloadError("The training scans have one intensity only.", remedy="Check that they are the images.")
    x, y, z = (round(float(length), 4) for length in spacing)
    return Data(split, structures, len(found[0].case.images), (float(low), float(high)), (x, y, z))


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


def _seen(found: Sequence[Scan], structures: Mapping[int, str], patch: int, seed: int) -> list[_Seen]:
    """Of one patch of each scan, around a voxel of some structure."""
    from monai.data.utils import affine_to_spacing

    from permed_compute.learning.order import Seeded

    cut = Balanced((patch,) * 3, dict.fromkeys(structures, 1.0))
    samples = Seeded(Samples([scan.case for scan in found], cut, transform=_oriented()), seed)
    rows = []
    for k in range(len(samples)):
        sample = samples[0, k]
        image, label = sample["image"].as_tensor().numpy(), sample["label"].as_tensor().numpy()[0]
        values = {one: image[:, label == one].reshape(-1)[:_VALUES] for one in structures}
        rows.append(_Seen(affine_to_spacing(sample["image"].affine).numpy(), {0: image.reshape(-1)[::7], **values}))
    return rows


def _range(seen: Sequence[_Seen]) -> tuple[float, float]:
    """0.5 to 99.5 % of all voxels, widened to those of every structure: a small bright lesion must not be clipped."""
    ends = []
    for one in seen[0].values:
        values = np.concatenate([scan.values[one] for scan in seen])
        if values.size:
            ends.append(np.percentile(values, (0.5, 99.5)))
    low, high = np.min(ends, axis=0)[0], np.max(ends, axis=0)[1]
    return float(low), float(high)


def _refuse_other_spacing(found: Sequence[Scan], spacings: Sequence[np.ndarray], median: np.ndarray) -> None:
    for scan, spacing in zip(found, spacings, strict=True):
        apart = float(np.abs(spacing / median - 1).max())
        if apart > SPACING_SHARE:
            numbers = {"spacing_mm": np.round(spacing, 4).tolist(), "median_mm": np.round(median, 4).tolist()}
            sentence = f"A scan's spacing differs from the others' by {100 * apart:.0f} %."
            remedy = "Resample the scans to one spacing first, or train on those that agree."
            raise RefusedInput(Finding("SPACING_DIFFERS", sentence, "refused", scan.name, numbers), remedy=remedy)


def _oriented() -> Any:
    from monai.transforms.compose import Compose
    from monai.transforms.spatial.dictionary import Orientationd

    return Compose([Orientationd(("image", "label"), axcodes="RAS", labels=publish.AXES)])


def _plain(data: Data, *more: Any) -> Any:
    from monai.transforms.compose import Compose
    from monai.transforms.intensity.dictionary import ScaleIntensityRanged

    low, high = data.intensity
    return Compose([_oriented(), ScaleIntensityRanged("image", low, high, 0.0, 1.0, clip=True), *more])


def training_samples(data: Data, params: Mapping[str, Any]) -> Samples:
    """Patches: `foreground` of them around a voxel of some structure, each structure as often as the others."""
    from monai.transforms.intensity.dictionary import RandGaussianNoised, RandScaleIntensityd, RandShiftIntensityd
    from monai.transforms.spatial.dictionary import RandFlipd

    transform = _plain(
        data,
        *(RandFlipd(("image", "label"), prob=0.5, spatial_axis=axis) for axis in range(3)),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.05, prob=0.5),
        RandGaussianNoised("image", prob=0.3, std=0.02),
    )
    share = params["foreground"] / len(data.structures)
    weights = {0: 1 - params["foreground"], **dict.fromkeys(data.structures, share)}
    cut = Balanced((params["patch"],) * 3, weights, params["per_volume"])
    return Samples([scan.case for scan in data.split.training], cut, transform=transform)


def collate(samples: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    import torch

    return {key: torch.stack([sample[key].as_tensor() for sample in samples]) for key in ("image", "label")}


# ------------------------------------------------------------------------------------------------ the network


def network_of(definition: Mapping[str, Any]) -> nn.Module:
    """Raises `WorkloadError` where MONAI has no such network, or it does not take these arguments."""
    from monai.networks import nets

    kind = getattr(nets, definition["_target_"], None)
    if kind is None:
        raise WorkloadError(f"MONAI has no network {definition['_target_']!r}.", remedy="See monai.networks.nets.")
    try:
        made: nn.Module = kind(**{key: value for key, value in definition.items() if key != "_target_"})
    except (TypeError, ValueError, AssertionError) as error:
        raise WorkloadError(
            f"{definition['_target_']} cannot be made of `network`: {error}.", remedy="See its arguments in MONAI."
        ) from None
    return made


def defined(params: Mapping[str, Any], data: Data) -> dict[str, Any]:
    """The bundle's `network_def`, its channels filled in from the data."""
    channels = {"spatial_dims": 3, "in_channels": data.channels, "out_channels": len(data.structures) + 1}
    return {**params["network"], **channels}


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


@dataclass
class Best:
    """The weights of the epoch with the highest score; a checkpoint carries them."""

    score: float = -1.0
    epoch: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def offer(self, model: nn.Module, epoch: int, score: float) -> None:
        if score > self.score:
            self.score, self.epoch = score, epoch
            self.weights = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "epoch": self.epoch, "weights": self.weights}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.epoch, self.weights = state["score"], state["epoch"], dict(state["weights"])


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
        import torch

        sums = np.zeros((2, len(self.data.structures)))
        for number, scan in enumerate(self.data.split.validation):
            if number % self.ctx.world != self.ctx.rank:
                continue
            truth, image, found = self.segmented(model, scan)
            dice = [_dice(truth.array == label, found == label) for label in self.data.structures]
            sums += np.array([[value or 0.0, value is not None] for value in dice], float).T
            if number == 0 and self.params["pictures"] and (epoch + 1) % self.params["pictures"] == 0:
                picture = self.ctx.scratch / "picture.png"
                evaluation.write_picture(truth, found, image, picture)
                self.ctx.log_artifact(picture, f"epoch-{epoch + 1:04}.png")
        if self.ctx.world > 1:
            total = torch.from_numpy(sums)
            torch.distributed.all_reduce(total)
            sums = total.numpy()
        there = sums[1] > 0
        if not there.any():
            return {}
        per_structure = np.divide(sums[0], sums[1], where=there, out=np.zeros(len(there)))
        score = float(per_structure[there].mean())
        self.best.offer(model, epoch, score)
        names = list(self.data.structures.values())
        return {"dice": score, **{f"dice_{name}": float(per_structure[k]) for k, name in enumerate(names) if there[k]}}

    def enough(self, history: Sequence[Mapping[str, float]]) -> bool:
        """No better validation score for `patience` epochs."""
        known = [row["dice"] for row in history if "dice" in row]
        return bool(
            self.params["patience"] and known and len(known) - 1 - int(np.argmax(known)) >= self.params["patience"]
        )

    def report(self, model: nn.Module, found: Sequence[Scan]) -> dict[str, Any]:
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
        evaluation.write_page(report, self.ctx.out, self.params["name"], PAGE)
        return report


def _first(out: Any) -> Any:
    """The full-resolution head of what a network returns."""
    return out[0] if isinstance(out, list | tuple) else out


def _dice(truth: np.ndarray, found: np.ndarray) -> float | None:
    """None where both are empty; 0 where one is."""
    sizes = int(np.count_nonzero(truth)) + int(np.count_nonzero(found))
    return 2 * int(np.count_nonzero(truth & found)) / sizes if sizes else None


# ------------------------------------------------------------------------------------------------ the job


@dataclass(frozen=True, slots=True)
class Fitted:
    """A network after its training, with its last weights; `judge.best` has those of its best epoch."""

    data: Data
    definition: Mapping[str, Any]
    model: nn.Module
    judge: Judge
    done: Trained


def fitted(params: Mapping[str, Any], ctx: Context) -> Fitted | None:
    """Train by these (complete) params; None where it was asked to stop. No test scan is looked at."""
    import torch

    from permed_compute.learning import randomness
    from permed_compute.learning.training import Pace, Recipe, fit

    with ctx.stage("look at the data"):
        data = data_of(params, ctx)
    definition = defined(params, data)
    randomness.seed_all(randomness.derive(ctx.seed, "network"))
    model = network_of(definition).to(ctx.device)
    judge = Judge(data, params, ctx)
    samples = training_samples(data, params)
    optimizer = torch.optim.AdamW(model.parameters(), lr=params["learning_rate"])
    steps = params["epochs"] * max(1, len(samples) // params["batch"])
    recipe = Recipe(
        model, samples, supervised_loss(), optimizer,
        scheduler=torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9), collate=collate,
        evaluate=judge.after_epoch, enough=judge.enough, carried={"best": judge.best},
    )  # fmt: skip
    pace = Pace(
        epochs=params["epochs"], batch=params["batch"], loaders=params["loaders"], precision=params["precision"],
        checkpoint_s=parse_duration(params["checkpoint"]), clip=12.0,
    )  # fmt: skip
    with ctx.stage("train"):
        done = fit(recipe, pace, ctx)
    return None if done is None else Fitted(data, definition, model, judge, done)


def train(spec: JobSpec, ctx: Context) -> Result | None:
    """Every rank trains; the first judges what came out and writes the bundle."""
    from permed_compute.learning.training import digest

    params = params_of(spec.params)
    made = fitted(params, ctx)
    if made is None:
        return None
    if ctx.rank:
        return Result()
    data, definition, model, judge, done = made.data, made.definition, made.model, made.judge, made.done
    if judge.best.weights:
        model.load_state_dict(judge.best.weights)
    model.eval()
    with ctx.stage("judge"):
        kind, judged = _judged(data.split)
        report = judge.report(model, judged)
    write_json(ctx.out / SPLIT, data.split.as_dict())
    told = publish.Training(
        params["name"], definition, data.structures, data.intensity, data.spacing, params["patch"], params["overlap"],
        kind, report, _facts(data, params, ctx, done.history, judge.best),
    )  # fmt: skip
    bundle_digest = publish.write(ctx.out / BUNDLE, model, told)
    metrics = {
        f"{kind}_{name}_{metric}": report["models"][params["name"]]["structures"][str(label)][metric]["mean"]
        for label, name in data.structures.items()
        for metric in scores.METRICS
        if report["models"][params["name"]]["structures"][str(label)][metric] is not None
    }
    values = {
        "kind": kind, "bundle_digest": bundle_digest, "weights": digest(model), "epochs": len(done.history),
        "best_epoch": judge.best.epoch + 1, "history": list(done.history), "report": report,
        "resumed_at": done.resumed_at, "split": data.split.how,
    }  # fmt: skip
    figures = [(case["picture"], f"{case['case']}: {case['structure']}") for case in report["worst"]]
    return Result(values, metrics, figures)


def _judged(split: Split) -> tuple[str, tuple[Scan, ...]]:
    """What the figures are of: held-out scans; else those it was chosen by; else those it was trained on."""
    if split.test:
        return "held-out", split.test
    return ("chosen-by", split.validation) if split.validation else ("fit", split.training)


def _facts(
    data: Data, params: Mapping[str, Any], ctx: Context, history: Sequence[Mapping[str, float]], best: Best
) -> dict[str, Any]:
    """What the card says of data, split and training; counts, no names."""
    split = data.split
    everyone = [*split.training, *split.validation, *split.test]
    sides = {"training": split.training, "validation": split.validation, "held out": split.test}
    names = ("batch", "epochs", "patience", "learning_rate", "precision", "per_volume", "foreground")
    return {
        "scans": len(everyone), "patients": len({scan.subject for scan in everyone}),
        "traits": {trait: sorted({scan.traits[trait] for scan in split.training}) for trait in TRAITS},
        "sides": {name: [len(side), len({scan.subject for scan in side})] for name, side in sides.items()},
        "how": split.how, "data_digest": publish.digest_of([value for scan in everyone for value in scan.digests]),
        "epochs": len(history), "best_epoch": best.epoch + 1 if best.weights else len(history),
        "training": {name: params[name] for name in names},
        "seed": ctx.seed, "ranks": ctx.world,
    }  # fmt: skip


WORKLOAD = Gang(train=train, version=VERSION)
