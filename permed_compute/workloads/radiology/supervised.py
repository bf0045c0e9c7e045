"""What every training on scans shares: params, a look at the data, the network, the choice of the epoch, and the end.

A task (`train` for labels of voxels, `classify` for labels of studies) says what a sample is, what is wrong, how it is
judged and what its bundle says; `Course` is that, ready to begin. The loop is `permed_compute.learning.training.fit`.

A network is chosen by the validation scans; the figures are those of the test scans, which nothing was chosen by.
Without test scans they are called what they are: chosen by, or a fit.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.learning.best import Best
from permed_compute.paths import write_json
from permed_compute.spec import parse_duration
from permed_compute.workloads.port import Context, Result
from permed_compute.workloads.radiology import publish
from permed_compute.workloads.radiology.evaluate import TRAITS
from permed_compute.workloads.radiology.splits import Scan, Split

if TYPE_CHECKING:
    from torch import nn

    from permed_compute.learning.order import Samples
    from permed_compute.learning.training import Loss, Trained

DATASET = "dataset"
BUNDLE, SPLIT = "bundle", "split.json"
SPACING_SHARE = 0.1
"""By which a scan's spacing may differ from the median, along any axis."""
_VALUES = 20_000
"""Of each structure that are looked at, per scan."""
_PRECISIONS = ("float32", "bfloat16", "float16")

Params = Mapping[str, tuple[Any, Callable[[Any], bool], str]]
"""By name: default, what it must satisfy, and that in words."""


# ------------------------------------------------------------------------------------------------ params


def number(least: float, most: float = float("inf"), *, whole: bool = False) -> Callable[[Any], bool]:
    kinds = int if whole else (int, float)
    return lambda v: isinstance(v, kinds) and not isinstance(v, bool) and least <= v <= most


def _duration(value: Any) -> bool:
    try:
        return parse_duration(value) >= 0
    except ValueError:
        return False


def is_network(value: Any) -> bool:
    """A configuration with nothing to run in it: MONAI evaluates texts that begin with $, and looks up those with @."""
    plain = isinstance(value, Mapping) and isinstance(value.get("_target_"), str) and value["_target_"].isidentifier()
    return bool(plain and not any(sign in json.dumps(value) for sign in ('"$', '"@', '"%')))


NETWORK_WORDS = "a bundle's network_def: {_target_: one of monai.networks.nets, …}, no expressions"

PARAMS: Params = {
    "intensity": ([], lambda v: isinstance(v, list) and len(v) in (0, 2) and v == sorted(set(v)), "[low, high], or []"),
    "batch": (4, number(1, 4096, whole=True), "samples, at least 1"),
    "epochs": (100, number(1, 100_000, whole=True), "at least 1"),
    "patience": (20, number(0, 100_000, whole=True), "epochs, 0 for never"),
    "learning_rate": (1e-3, number(1e-9, 10), "a number above 0"),
    "precision": ("float32", lambda v: v in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
    "loaders": (0, number(0, 64, whole=True), "worker processes, at least 0"),
    "checkpoint": ("10m", _duration, "a time between checkpoints, e.g. 10m"),
    "overlap": (0.25, number(0, 0.9), "a share below 0.9"),
    "validation": (0.2, number(0, 0.9), "a share below 0.9"),
    "test": (0.2, number(0, 0.9), "a share below 0.9"),
    "split_by": ("patient", lambda v: v in ("patient", "site"), "patient or site"),
    "hold_out": ([], lambda v: isinstance(v, list) and all(isinstance(site, str) for site in v), "a list of sites"),
    "fold": (0, number(0, 99, whole=True), "the number of a fold, from 0"),
    "folds": (0, number(0, 100, whole=True), "0, or the number of folds"),
}
"""What a training on scans takes, whatever it learns."""


def checked(given: Mapping[str, Any], params: Params) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [Problem(f"params.{name}", f"is none of {list(params)}.") for name in given if name not in params]
    values = {name: given.get(name, default) for name, (default, _, _) in params.items()}
    problems += [
        Problem(f"params.{name}", f"is {values[name]!r}, not {words}.")
        for name, (_, test, words) in params.items()
        if not test(values[name])
    ]
    if not problems and values["folds"] and not values["fold"] < values["folds"]:
        problems.append(Problem("params.fold", f"is {values['fold']} of {values['folds']} folds, counted from 0."))
    if problems:
        raise SpecError("params", problems)
    return values


# ------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True, slots=True)
class Seen:
    """Of one scan: spacing in mm and voxels along R, A, S; some values, of each structure by label, 0 of everything."""

    spacing: np.ndarray
    shape: tuple[int, ...]
    values: Mapping[int, np.ndarray]


def look(samples: Samples, seed: int, structures: Sequence[int] = ()) -> list[Seen]:
    """A sample of each scan, in RAS."""
    from monai.data.utils import affine_to_spacing

    from permed_compute.learning.order import Seeded

    drawn, found = Seeded(samples, seed), []
    for k in range(len(samples)):
        sample = drawn[0, k]
        image = sample["image"].as_tensor().numpy()
        values = {0: image.reshape(-1)[:: max(7, image.size >> 18)].copy()}
        if structures:
            label = sample["label"].as_tensor().numpy()[0]
            values |= {one: image[:, label == one].reshape(-1)[:_VALUES] for one in structures}
        found.append(Seen(affine_to_spacing(sample["image"].affine).numpy(), image.shape[1:], values))
    return found


def range_of(seen: Sequence[Seen]) -> tuple[float, float]:
    """0.5 to 99.5 % of all voxels, widened to those of every structure: a small bright lesion must not be clipped.

    Raises `WorkloadError` where there is one intensity only.
    """
    ends = []
    for one in seen[0].values:
        values = np.concatenate([scan.values[one] for scan in seen])
        if values.size:
            ends.append(np.percentile(values, (0.5, 99.5)))
    low, high = np.min(ends, axis=0)[0], np.max(ends, axis=0)[1]
    if not low < high:
        raise WorkloadError("The training scans have one intensity only.", remedy="Check that they are the images.")
    return float(low), float(high)


def refuse_other_spacing(found: Sequence[Scan], seen: Sequence[Seen], median: np.ndarray) -> None:
    """Raises `RefusedInput` SPACING_DIFFERS: patches are not resampled."""
    for scan, one in zip(found, seen, strict=True):
        apart = float(np.abs(one.spacing / median - 1).max())
        if apart > SPACING_SHARE:
            numbers = {"spacing_mm": np.round(one.spacing, 4).tolist(), "median_mm": np.round(median, 4).tolist()}
            sentence = f"A scan's spacing differs from the others' by {100 * apart:.0f} %."
            remedy = "Resample the scans to one spacing first, or train on those that agree."
            raise RefusedInput(Finding("SPACING_DIFFERS", sentence, "refused", scan.name, numbers), remedy=remedy)


def channels_of(found: Sequence[Scan]) -> int:
    """Raises `WorkloadError` where the scans do not have equally many images."""
    if len({len(scan.case.images) for scan in found}) > 1:
        raise WorkloadError("Scans have different numbers of images.", remedy="Give each the same modalities.")
    return len(found[0].case.images)


def oriented(keys: Sequence[str]) -> Any:
    from monai.transforms.compose import Compose
    from monai.transforms.spatial.dictionary import Orientationd

    return Compose([Orientationd(tuple(keys), axcodes="RAS", labels=publish.AXES)])


def scaled(intensity: tuple[float, float]) -> Any:
    """Clipped to it, then 0 to 1."""
    from monai.transforms.intensity.dictionary import ScaleIntensityRanged

    return ScaleIntensityRanged("image", *intensity, 0.0, 1.0, clip=True)


def varied(keys: Sequence[str]) -> list[Any]:
    """Flips, brightness, contrast and noise."""
    from monai.transforms.intensity.dictionary import RandGaussianNoised, RandScaleIntensityd, RandShiftIntensityd
    from monai.transforms.spatial.dictionary import RandFlipd

    return [
        *(RandFlipd(tuple(keys), prob=0.5, spatial_axis=axis) for axis in range(3)),
        RandScaleIntensityd("image", factors=0.1, prob=0.5),
        RandShiftIntensityd("image", offsets=0.05, prob=0.5),
        RandGaussianNoised("image", prob=0.3, std=0.02),
    ]


# ------------------------------------------------------------------------------------------------ the network


_ENDS = {"in": ("in_channels", "n_input_channels"), "out": ("out_channels", "num_classes")}
"""How MONAI's networks call what the data decide."""


def defined(network: Mapping[str, Any], channels: int, outputs: int) -> dict[str, Any]:
    """The bundle's `network_def`, with what the data decide filled in under the names that the network has for it.

    Raises `WorkloadError` where it has none.
    """
    kind = _kind(network)
    known = inspect.signature(kind).parameters
    found = {"spatial_dims": 3} if "spatial_dims" in known else {}
    for end, value in (("in", channels), ("out", outputs)):
        name = next((name for name in _ENDS[end] if name in known), None)
        if name is None:
            raise WorkloadError(
                f"{network['_target_']} has no argument for channels {end}.",
                remedy=f"Use a network with {' or '.join(_ENDS[end])}, e.g. UNet, DenseNet, SEResNet50.",
            )
        found[name] = value
    return {**network, **found}


def network_of(definition: Mapping[str, Any]) -> nn.Module:
    """Raises `WorkloadError` where MONAI has no such network, or it does not take these arguments."""
    kind = _kind(definition)
    try:
        made: nn.Module = kind(**{key: value for key, value in definition.items() if key != "_target_"})
    except (TypeError, ValueError, AssertionError) as error:
        raise WorkloadError(
            f"{definition['_target_']} cannot be made of `network`: {error}.", remedy="See its arguments in MONAI."
        ) from None
    return made


def _kind(definition: Mapping[str, Any]) -> Any:
    from monai.networks import nets

    kind = getattr(nets, definition["_target_"], None)
    if kind is None or not callable(kind):
        raise WorkloadError(f"MONAI has no network {definition['_target_']!r}.", remedy="See monai.networks.nets.")
    return kind


# ------------------------------------------------------------------------------------------------ a course


class Judge(Protocol):
    """Answers for whole scans as the bundle will, and scores them."""

    best: Best

    def after_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        """Figures of the validation scans, shared by the ranks; offers the weights to `best`."""
        ...

    def score_of(self, figures: Mapping[str, float]) -> float | None:
        """What the epoch is chosen by, of what `after_epoch` returned: higher is better, None where nothing is said."""
        ...

    def report(self, model: nn.Module, found: Sequence[Scan], kind: str) -> dict[str, Any]:
        """All figures of these scans, with their page in `ctx.out`. kind: `judged_by`."""
        ...


@dataclass(frozen=True, slots=True)
class Course:
    """A training, ready to begin: what is learned from, by what, and how it is judged."""

    split: Split
    definition: Mapping[str, Any]
    samples: Samples
    collate: Callable[[list[Any]], Any]
    loss: Loss
    judge: Judge


@dataclass(frozen=True, slots=True)
class Fitted:
    """A network after its training, with its last weights; `judge.best` has those of its best epoch."""

    course: Course
    model: nn.Module
    done: Trained

    @property
    def judge(self) -> Judge:
        return self.course.judge


def fitted(course: Course, params: Mapping[str, Any], ctx: Context) -> Fitted | None:
    """Train by these (complete) params; None where it was asked to stop. No test scan is looked at."""
    import torch

    from permed_compute.learning import randomness
    from permed_compute.learning.training import Pace, Recipe, fit

    randomness.seed_all(randomness.derive(ctx.seed, "network"))
    model, judge = network_of(course.definition).to(ctx.device), course.judge
    optimizer = torch.optim.AdamW(model.parameters(), lr=params["learning_rate"])
    steps = params["epochs"] * max(1, len(course.samples) // params["batch"])

    def enough(history: Sequence[Mapping[str, float]]) -> bool:
        """No better validation score for `patience` epochs."""
        known = [score for row in history if (score := judge.score_of(row)) is not None]
        return bool(params["patience"] and known and len(known) - 1 - int(np.argmax(known)) >= params["patience"])

    recipe = Recipe(
        model, course.samples, course.loss, optimizer,
        scheduler=torch.optim.lr_scheduler.PolynomialLR(optimizer, steps, power=0.9), collate=course.collate,
        evaluate=judge.after_epoch, enough=enough, carried={"best": judge.best},
    )  # fmt: skip
    pace = Pace(
        epochs=params["epochs"], batch=params["batch"], loaders=params["loaders"], precision=params["precision"],
        checkpoint_s=parse_duration(params["checkpoint"]), clip=12.0,
    )  # fmt: skip
    with ctx.stage("train"):
        done = fit(recipe, pace, ctx)
    return None if done is None else Fitted(course, model, done)


def summed(values: np.ndarray, ctx: Context) -> np.ndarray:
    """Over all ranks."""
    import torch

    if ctx.world == 1:
        return values
    total = torch.from_numpy(values)
    torch.distributed.all_reduce(total)
    return total.numpy()


# ------------------------------------------------------------------------------------------------ the end


@dataclass(frozen=True, slots=True)
class Left:
    """What a task makes of a report. metrics: named without their kind; figures: as `Result` has them."""

    bundle: publish.Made
    metrics: Mapping[str, float]
    figures: Sequence[tuple[str, str]] = ()


Describe = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Left]
"""(kind, report, facts) → what is left behind."""


def finished(
    made: Fitted | None, params: Mapping[str, Any], told: Sequence[str], ctx: Context, describe: Describe
) -> Result | None:
    """Every rank has trained; the first judges what came out and writes the bundle. told: params its card names."""
    from permed_compute.learning.training import digest

    if made is None:
        return None
    if ctx.rank:
        return Result()
    split, model, best, history = made.course.split, made.model, made.judge.best, made.done.history
    if best.weights:
        model.load_state_dict(best.weights)
    model.eval()
    with ctx.stage("judge"):
        kind, judged = judged_by(split)
        report = made.judge.report(model, judged, kind)
    write_json(ctx.out / SPLIT, split.as_dict())
    facts = {
        **_facts(split), "epochs": len(history), "best_epoch": best.epoch + 1 if best.weights else len(history),
        "training": {name: params[name] for name in told}, "seed": ctx.seed, "ranks": ctx.world,
    }  # fmt: skip
    left = describe(kind, report, facts)
    values = {
        "kind": kind, "bundle_digest": publish.write(ctx.out / BUNDLE, model, left.bundle), "weights": digest(model),
        "epochs": len(history), "best_epoch": facts["best_epoch"], "history": list(history), "report": report,
        "resumed_at": made.done.resumed_at, "split": split.how,
    }  # fmt: skip
    return Result(values, {f"{kind}_{name}": value for name, value in left.metrics.items()}, left.figures)


def judged_by(split: Split) -> tuple[str, tuple[Scan, ...]]:
    """What the figures are of: held-out scans; else those it was chosen by; else those it was trained on."""
    if split.test:
        return "held-out", split.test
    return ("chosen-by", split.validation) if split.validation else ("fit", split.training)


def _facts(split: Split) -> dict[str, Any]:
    """What the card says of data and split; counts, no names."""
    everyone = [*split.training, *split.validation, *split.test]
    sides = {"training": split.training, "validation": split.validation, "held out": split.test}
    return {
        "scans": len(everyone), "patients": len({scan.subject for scan in everyone}),
        "traits": {trait: sorted({scan.traits[trait] for scan in split.training}) for trait in TRAITS},
        "sides": {name: [len(side), len({scan.subject for scan in side})] for name, side in sides.items()},
        "how": split.how, "data_digest": publish.digest_of([value for scan in everyone for value in scan.digests]),
    }  # fmt: skip
