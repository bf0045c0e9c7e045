"""Job `pathology/train-mil`: from slides' features and patients' outcomes to a model with its card; a gang.

`inputs`: `cohort`, a table (see `cohort`); `features`, the folder that `pathology/encode` wrote.

The outcome is a patient's, so all slides of a patient are one bag, and no patient or family is on two sides of the
split, which has its share of every class (or of events) on each. The epoch is chosen by the loss over the validation
side; the figures are of the test side, which nothing was chosen by, or they are called what they are.

`params` of the job: see `PARAMS`, and `jobs/pathology/train-mil/job.yaml`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import Problem, SpecError, WorkloadError
from permed_compute.learning import splits
from permed_compute.learning.best import Best
from permed_compute.learning.evidence import Figure, digest_of
from permed_compute.learning.survival import Baseline, Outcomes
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec, parse_duration
from permed_compute.workloads.pathology import cohort, cohort_report, heads, inputs, mil_bundle
from permed_compute.workloads.pathology.cohort import TRAITS, Bags, Kind, Patient
from permed_compute.workloads.pathology.heads import HEADS, Head
from permed_compute.workloads.port import Context, Gang, Result

if TYPE_CHECKING:
    import torch
    from torch import nn

BUNDLE, SPLIT, PAGE = "bundle", "split.json", "report.html"
VERSION = "1"
_MODELS = ("abmil", "clam-sb", "transmil")
_PRECISIONS = ("float32", "bfloat16", "float16")


def _whole(least: int, most: int) -> inputs.Check:
    return lambda v: isinstance(v, int) and not isinstance(v, bool) and least <= v <= most


def _duration(value: Any) -> bool:
    try:
        return parse_duration(value) >= 0
    except ValueError:
        return False


PARAMS: dict[str, tuple[Any, inputs.Check, str]] = {
    "name": ("slide-model", lambda v: isinstance(v, str) and 0 < len(v) <= 64, "a name of up to 64 letters"),
    "head": ("classification", lambda v: v in HEADS, f"one of {', '.join(HEADS)}"),
    "model": ("abmil", lambda v: v in _MODELS, f"one of {', '.join(_MODELS)}"),
    "hidden": (512, lambda v: _whole(8, 8192)(v) and v % 8 == 0, "a multiple of 8 from 8 to 8192"),
    "attention": (256, _whole(1, 8192), "1 to 8192: units of the attention; of transmil the landmarks"),
    "dropout": (0.25, lambda v: inputs.is_number(v, 0, 0.95), "a share below 0.95"),
    "bins": (4, _whole(2, 100), "bins of time, 2 to 100"),
    "encoder": ("", lambda v: isinstance(v, str), "the name of an encoder, or ''"),
    "tiles": (4096, _whole(0, 1_000_000), "tiles of a bag in an epoch, 0 for all"),
    "batch": (8, _whole(1, 4096), "patients, at least 1"),
    "epochs": (50, _whole(1, 100_000), "at least 1"),
    "patience": (10, _whole(0, 100_000), "epochs, 0 for never"),
    "learning_rate": (2e-4, lambda v: inputs.is_number(v, 1e-9, 10), "a number above 0"),
    "weight_decay": (1e-4, lambda v: inputs.is_number(v, 0, 10), "a number from 0"),
    "precision": ("float32", lambda v: v in _PRECISIONS, f"one of {', '.join(_PRECISIONS)}"),
    "loaders": (0, _whole(0, 64), "worker processes, at least 0"),
    "checkpoint": ("10m", _duration, "a time between checkpoints, e.g. 10m"),
    "validation": (0.2, lambda v: inputs.is_number(v, 0, 0.9), "a share below 0.9"),
    "test": (0.2, lambda v: inputs.is_number(v, 0, 0.9), "a share below 0.9"),
    "folds": (0, _whole(0, 100), "0, or the number of folds"),
    "fold": (0, _whole(0, 99), "the number of a fold, from 0"),
    "repeat": (0, _whole(0, 10_000), "a number: another one, other first weights, bags and order; the split stays"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    values = inputs.checked(given, PARAMS, "pathology/train-mil")
    if values["folds"] and not values["fold"] < values["folds"]:
        problem = Problem("params.fold", f"is {values['fold']} of {values['folds']} folds, counted from 0.")
        raise SpecError("params", [problem])
    return values


# ------------------------------------------------------------------------------------------------ the data


@dataclass(frozen=True, slots=True)
class Data:
    """counts: tiles of each slide, by name."""

    sides: splits.Sides[Patient]
    head: Head
    kind: Kind
    counts: Mapping[str, int]

    @property
    def everybody(self) -> tuple[Patient, ...]:
        return (*self.sides.training, *self.sides.validation, *self.sides.test)


def data_of(params: Mapping[str, Any], ctx: Context) -> Data:
    """Raises `RefusedInput` for what cannot be learned from: see `cohort`, `survival` and `splits`."""
    found = cohort.patients(ctx)
    kind, counts = cohort.looked_at(found, params["encoder"])
    Head.fit(params["head"], found, found, params["bins"])  # what is wrong with everybody is said first
    sides = _sides(found, params, ctx.spec.seed)
    head = Head.fit(params["head"], found, sides.training, params["bins"])
    if params["head"] == "cox" and sides.validation:
        heads.outcomes_of(sides.validation)  # without an event there every epoch would look alike
    return Data(sides, head, kind, counts)


def _sides(found: Sequence[Patient], params: Mapping[str, Any], seed: int) -> splits.Sides[Patient]:
    said = sum(bool(patient.outcome.get("split")) for patient in found)
    if said:
        if said < len(found):
            raise cohort.refused("SPLIT_UNREADABLE", "Some patients have a split and others none.", "Fill the column.")
        return splits.given(found, Patient.bound, lambda patient: patient.outcome["split"])
    column = "label" if params["head"] == "classification" else "event"
    return splits.split(
        found, Patient.bound, validation=params["validation"], test=params["test"], seed=seed, fold=params["fold"],
        folds=params["folds"], stratum=lambda patient: patient.outcome[column], how=f"by patient and family, {column}",
        of="patients",
    )  # fmt: skip


@dataclass(frozen=True)
class Padded:
    """Bags to a batch: x (b, n, dim) float16 with zeros behind each bag's end, mask (b, n), and the targets."""

    targets: Mapping[str, np.ndarray]

    def __call__(self, bags: Sequence[tuple[int, np.ndarray]]) -> dict[str, torch.Tensor]:
        import torch

        most = max(len(values) for _, values in bags)
        x = np.empty((len(bags), most, bags[0][1].shape[1]), np.float16)
        mask = np.zeros((len(bags), most), bool)
        for k, (_, values) in enumerate(bags):
            x[k, : len(values)], x[k, len(values) :], mask[k, : len(values)] = values, 0, True
        rows = [index for index, _ in bags]
        own = {name: torch.from_numpy(values[rows]) for name, values in self.targets.items()}
        return {"x": torch.from_numpy(x), "mask": torch.from_numpy(mask), **own}


# ------------------------------------------------------------------------------------------------ training


def loss_of(head: Head) -> Any:
    """(model, batch) → loss; CLAM's with its share of the instance loss."""
    from permed_compute.workloads.pathology.mil import INSTANCE_SHARE

    def loss(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        answer = model(batch["x"], batch["mask"], batch.get("label"))
        own: torch.Tensor = head.loss(answer.logits, batch)
        if answer.instance_loss is None:
            return own
        both: torch.Tensor = (1 - INSTANCE_SHARE) * own + INSTANCE_SHARE * answer.instance_loss
        return both

    return loss


def answers(model: nn.Module, bags: Bags, device: str) -> np.ndarray:
    """(n, outputs) float32 logits of whole bags, one at a time: as the bundle will be used."""
    import torch

    found = []
    with torch.no_grad():
        for index in range(len(bags)):
            x = torch.from_numpy(bags[index][1])[None].to(device)
            found.append(model(x, torch.ones(x.shape[:2], dtype=torch.bool, device=device)).logits[0].float().cpu())
    return torch.stack(found).numpy()


@dataclass
class Judge:
    """The loss over the validation side after each epoch, and the weights of the epoch where it was least."""

    data: Data
    params: Mapping[str, Any]
    ctx: Context
    best: Best = field(default_factory=Best)

    def bags(self, side: Sequence[Patient]) -> Bags:
        return Bags(side, self.data.counts, 0, self.params["encoder"])

    def after_epoch(self, model: nn.Module, epoch: int) -> dict[str, float]:
        import torch

        side = self.data.sides.validation
        if not side:
            return {}
        logits = answers(model, self.bags(side), self.ctx.device)
        targets = {name: torch.from_numpy(values) for name, values in self.data.head.targets(side).items()}
        loss = float(self.data.head.loss(torch.from_numpy(logits), targets))
        self.best.offer(model, epoch, -loss)
        told = heads.at_a_glance(self.data.head, side, logits)
        return {"validation_loss": loss, **{f"validation {name}": value for name, value in told.items()}}

    def enough(self, history: Sequence[Mapping[str, float]]) -> bool:
        """No smaller validation loss for `patience` epochs."""
        known = [row["validation_loss"] for row in history if "validation_loss" in row]
        return bool(
            self.params["patience"] and known and len(known) - 1 - int(np.argmin(known)) >= self.params["patience"]
        )


class _Repeat:
    """The job's context with another seed: the split stays, everything else is drawn anew."""

    def __init__(self, ctx: Context, seed: int) -> None:
        self._ctx, self.seed = ctx, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)


def train(spec: JobSpec, ctx: Context) -> Result | None:
    """Every rank trains; the first judges what came out and writes the bundle."""
    import torch

    from permed_compute.learning import randomness
    from permed_compute.learning.training import Pace, Recipe, digest, fit
    from permed_compute.workloads.pathology import mil

    params = params_of(spec.params)
    if params["head"] == "cox" and ctx.world > 1:
        raise WorkloadError(
            "A Cox loss needs the whole batch: its risk sets cannot be shared by ranks.",
            remedy="Write `resources: {workers: 1}`, or head: discrete.",
        )
    if params["repeat"]:
        ctx = _Repeat(ctx, randomness.derive(ctx.seed, "repeat", params["repeat"]))
    with ctx.stage("look at the data"):
        data = data_of(params, ctx)
    network = {
        "model": params["model"], "dim": data.kind.dim, "outputs": data.head.outputs,
        **{name: params[name] for name in ("hidden", "attention", "dropout")},
    }  # fmt: skip
    randomness.seed_all(randomness.derive(ctx.seed, "network"))
    model = mil.build(network).to(ctx.device)
    judge = Judge(data, params, ctx)
    side = data.sides.training
    samples = Bags(side, data.counts, params["tiles"], params["encoder"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=params["learning_rate"], weight_decay=params["weight_decay"])
    steps = params["epochs"] * max(1, len(side) // params["batch"])
    recipe = Recipe(
        model, samples, loss_of(data.head), optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        collate=Padded(data.head.targets(side)), evaluate=judge.after_epoch, enough=judge.enough,
        carried={"best": judge.best},
    )  # fmt: skip
    pace = Pace(
        epochs=params["epochs"], batch=params["batch"], loaders=params["loaders"], precision=params["precision"],
        checkpoint_s=parse_duration(params["checkpoint"]), clip=12.0,
        micro=params["batch"] if params["head"] == "cox" else 0,  # a risk set is the batch, never a piece of it
    )  # fmt: skip
    with ctx.stage("train"):
        done = fit(recipe, pace, ctx)
    if done is None:
        return None
    if ctx.rank:
        return Result()
    if judge.best.weights:
        model.load_state_dict(judge.best.weights)
    model.eval()
    with ctx.stage("judge"):
        judged = _judged(judge, model, params)
    write_json(ctx.out / SPLIT, data.sides.as_dict())
    described = mil_bundle.Described(params["name"], network, data.head, data.kind, judged.baseline, judged.cut)
    facts = _facts(judge, judged, params, ctx, len(done.history))
    bundle_digest = mil_bundle.write(ctx.out / BUNDLE, model, described, mil_bundle.card(described, facts))
    cohort_report.write(
        ctx.out / PAGE,
        cohort_report.Page(
            params["name"], data.head, judged.side, judged.logits, judged.figures, risk_cut=judged.cut,
            of=mil_bundle.KINDS[judged.of].replace("**", ""), history=done.history,
        ),
    )  # fmt: skip
    metrics = {f"{judged.of} {one.measure}": one.mean for one in judged.figures if not one.trait}
    values = {
        "kind": judged.of, "bundle_digest": bundle_digest, "weights": digest(model), "epochs": len(done.history),
        "best_epoch": facts.best_epoch, "history": list(done.history), "resumed_at": done.resumed_at,
        "split": data.sides.how, "tiles": sum(data.counts.values()),
        "figures": [asdict(one) for one in judged.figures],
    }  # fmt: skip
    return Result(values, metrics)


# ------------------------------------------------------------------------------------------------ judging


@dataclass(frozen=True, slots=True)
class Judged:
    """of: held-out, chosen-by or fit. cut: median risk of training. logits: (n, outputs) of `side`."""

    of: str
    side: tuple[Patient, ...]
    logits: np.ndarray
    figures: tuple[Figure, ...]
    baseline: Baseline | None
    cut: float | None


def _judged(judge: Judge, model: nn.Module, params: Mapping[str, Any]) -> Judged:
    data, sides, device = judge.data, judge.data.sides, judge.ctx.device
    of, side = ("held-out", sides.test) if sides.test else ("chosen-by", sides.validation)
    of, side = (of, side) if side else ("fit", sides.training)
    train: Outcomes | None = None
    baseline, cut = None, None
    if data.head.is_survival:
        train = heads.outcomes_of(sides.training)
        risk = data.head.risk(answers(model, judge.bags(sides.training), device))
        cut = float(np.median(risk))
        baseline = heads.baseline_of(train, risk) if data.head.kind == "cox" else None
    logits = answers(model, judge.bags(side), device)
    figures = heads.figures(
        data.head, params["name"], side, logits, train=train, baseline=baseline, seed=judge.ctx.seed
    )
    return Judged(of, side, logits, figures, baseline, cut)


def _facts(judge: Judge, judged: Judged, params: Mapping[str, Any], ctx: Context, epochs: int) -> mil_bundle.Facts:
    data, sides = judge.data, judge.data.sides
    named = {"training": sides.training, "validation": sides.validation, "held out": sides.test}
    names = ("batch", "epochs", "patience", "learning_rate", "weight_decay", "tiles", "precision", "repeat")
    contents = [cohort.content(slide, ctx) for patient in data.everybody for slide in patient.slides]
    return mil_bundle.Facts(
        {name: (len(side), sum(len(patient.slides) for patient in side)) for name, side in named.items()},
        {trait: sorted({patient.traits[trait] for patient in sides.training}) for trait in TRAITS}, sides.how,
        digest_of(contents), {name: params[name] for name in names}, ctx.seed, epochs,
        judge.best.epoch + 1 if judge.best.weights else epochs, judged.of, judged.figures,
    )  # fmt: skip


WORKLOAD = Gang(train=train, version=VERSION)
