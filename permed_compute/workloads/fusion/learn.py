"""One training: from the rows of training people to a `Member`, which answers for anybody with whatever is known."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from permed_compute.errors import WorkloadError
from permed_compute.learning.alone import alone
from permed_compute.learning.randomness import derive
from permed_compute.learning.survival import (
    Baseline,
    Bins,
    Outcomes,
    cox_loss,
    curve,
    discrete_loss,
    risk_of_curve,
)
from permed_compute.learning.training import Loss, Pace, Recipe, fit
from permed_compute.workloads.fusion.network import Fusion, InMemory, Projection, Shape
from permed_compute.workloads.fusion.people import Cohort
from permed_compute.workloads.port import Context

COX, DISCRETE, BINARY = "cox", "discrete", "binary"


@dataclass(frozen=True, slots=True)
class How:
    """How a network is made and trained; what a job's params say of it."""

    head: str = COX
    bins: int = 10
    components: int = 8
    width: int = 16
    epochs: int = 60
    batch: int = 512
    learning_rate: float = 0.01
    weight_decay: float = 0.1
    dropout: float = 0.3
    modality_dropout: float = 0.3


@dataclass(frozen=True, slots=True)
class Answer:
    """score: (people,), higher is sooner or likelier; of survival in standard deviations of the training people's
    risk, of classification the probability. curve: (people, times) survival, None of classification. weights:
    (people, modalities)."""

    score: np.ndarray
    curve: np.ndarray | None
    weights: np.ndarray


@dataclass(frozen=True, slots=True)
class Member:
    """A trained network with all that turns values into an answer. centre: mean and deviation of its training risk."""

    names: tuple[str, ...]
    head: str
    projections: Mapping[str, Projection]
    net: Fusion
    centre: tuple[float, float] = (0.0, 1.0)
    baseline: Baseline | None = None
    bins: Bins | None = None
    last: float = 0.0
    """Longest follow-up of its training people: where the last bin ends."""

    def answer(self, values: Mapping[str, np.ndarray], mask: np.ndarray, times: np.ndarray) -> Answer:
        """values: by modality (people, columns); mask: (people, modalities), in the order of `names`."""
        logits, weights = self._logits(values, mask)
        if self.head == BINARY:
            return Answer(1 / (1 + np.exp(-logits[:, 0])), None, weights)
        if self.head == COX:
            assert self.baseline is not None
            curves = self.baseline.curve(logits[:, 0], times)
        else:
            curves = self._between(logits, times)
        return Answer((self._risk(logits) - self.centre[0]) / self.centre[1], curves, weights)

    def _logits(self, values: Mapping[str, np.ndarray], mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        device = self.net.head.weight.device
        self.net.eval()
        with torch.no_grad():
            x = torch.from_numpy(projected(self.projections, self.names, values)).to(device)
            logits, weights = self.net.weighed(x, torch.from_numpy(mask).to(device))
        return logits.double().cpu().numpy(), weights.double().cpu().numpy()

    def _risk(self, logits: np.ndarray) -> np.ndarray:
        if self.head == COX:
            return np.asarray(logits[:, 0])
        return risk_of_curve(curve(torch.from_numpy(logits)).numpy())

    def _between(self, logits: np.ndarray, times: np.ndarray) -> np.ndarray:
        """Survival falls evenly within a bin."""
        assert self.bins is not None
        ends = [0.0, *self.bins.edges, self.last]
        at_ends = curve(torch.from_numpy(logits)).numpy()
        return np.stack([np.interp(times, ends, [1.0, *row]) for row in at_ends])

    def state(self) -> dict[str, Any]:
        """Tensors, numbers and words: what `torch.save` writes and `weights_only` reads."""
        return {
            "names": list(self.names), "head": self.head,
            "shape": asdict(self.net.shape) | {"sizes": list(self.net.shape.sizes)},
            "net": {name: value.detach().cpu().contiguous() for name, value in self.net.state_dict().items()},
            "projections": {
                name: {part: torch.from_numpy(getattr(one, part)) for part in ("mean", "scale", "weights")}
                for name, one in self.projections.items()
            },
            "centre": list(self.centre), "last": self.last,
            "baseline": None if self.baseline is None else [list(self.baseline.time), list(self.baseline.hazard)],
            "bins": None if self.bins is None else list(self.bins.edges),
        }  # fmt: skip

    @classmethod
    def of(cls, state: Mapping[str, Any], device: str = "cpu") -> Member:
        shape = Shape(**{**state["shape"], "sizes": tuple(state["shape"]["sizes"])})
        net = Fusion(shape, 0, device)
        net.load_state_dict(state["net"])
        projections = {
            name: Projection(*(parts[part].numpy() for part in ("mean", "scale", "weights")))
            for name, parts in state["projections"].items()
        }
        baseline = None if state["baseline"] is None else Baseline(*map(tuple, state["baseline"]))
        bins = None if state["bins"] is None else Bins(tuple(state["bins"]))
        low, high = state["centre"]
        return cls(tuple(state["names"]), state["head"], projections, net, (low, high), baseline, bins, state["last"])


def projected(
    projections: Mapping[str, Projection], names: Sequence[str], values: Mapping[str, np.ndarray]
) -> np.ndarray:
    """(people, sum of outputs) float32, one modality beside the other."""
    return np.concatenate([projections[name].of(values[name]) for name in names], axis=1)


# ------------------------------------------------------------------------------------------------ training


def learn(cohort: Cohort, rows: np.ndarray, names: Sequence[str], how: How, seed: int, ctx: Context) -> Member:
    """Trained on these rows, of people who have one of these modalities at least. Nothing is chosen by anybody else.

    Raises `WorkloadError` where it was asked to stop.
    """
    columns = [list(cohort.modalities).index(name) for name in names]
    rows = rows[cohort.mask[rows][:, columns].any(axis=1)]
    values = {name: cohort.values[name][rows] for name in names}
    mask = cohort.mask[rows][:, columns]
    projections = {name: Projection.fit(values[name][mask[:, k]], how.components) for k, name in enumerate(names)}
    outcomes = cohort.outcomes.of(rows) if cohort.outcomes is not None else None
    bins = None
    if how.head == DISCRETE and outcomes is not None:
        bins = Bins.fit(outcomes.time, outcomes.event, how.bins)
    shape = Shape(
        tuple(projections[name].outputs for name in names), how.width, bins.count if bins else 1, how.dropout,
        how.modality_dropout,
    )  # fmt: skip
    net = Fusion(shape, derive(seed, "network"), ctx.device)
    inputs = torch.from_numpy(projected(projections, names, values)), torch.from_numpy(mask)
    samples = InMemory((*inputs, *_targets(cohort, rows, bins)), min(how.batch, len(rows)), derive(seed, "training"))
    done = fit(recipe_of(net, samples, how), pace_of(how, samples), alone(ctx, samples.seed))
    if done is None:
        raise WorkloadError("The training was stopped.", remedy="`permed resume` trains this part again.")
    last = 0.0 if outcomes is None else float(outcomes.time.max())
    made = Member(tuple(names), how.head, projections, net, bins=bins, last=last)
    return made if outcomes is None else _settled(made, values, mask, outcomes)


def recipe_of(net: Fusion, samples: InMemory, how: How) -> Recipe:
    """What is trained: AdamW, its rate falling to nothing over the epochs; all samples lie in memory."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=how.learning_rate, weight_decay=how.weight_decay, fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, how.epochs * (len(samples) // samples.batch))
    return Recipe(net, samples, loss_of(how.head), optimizer, scheduler, feed=samples.batches)


def pace_of(how: How, samples: InMemory) -> Pace:
    return Pace(epochs=how.epochs, batch=samples.batch, checkpoint_s=0)


def _targets(cohort: Cohort, rows: np.ndarray, bins: Bins | None) -> list[torch.Tensor]:
    if cohort.outcomes is None:
        positive = max(cohort.labels)
        return [torch.tensor([cohort.labels[row] == positive for row in rows], dtype=torch.float32)]
    own = cohort.outcomes.of(rows)
    time = torch.from_numpy(bins.index(own.time) if bins else own.time)
    return [time, torch.from_numpy(own.event)]


def loss_of(head: str) -> Loss:
    """(network, (x, mask, targets …)) → mean loss."""

    def cox(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        x, mask, time, event = batch
        return cox_loss(net(x, mask)[:, 0], time, event)

    def discrete(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        x, mask, index, event = batch
        return discrete_loss(net(x, mask), index, event)

    def binary(net: torch.nn.Module, batch: Any) -> torch.Tensor:
        x, mask, label = batch
        return torch.nn.functional.binary_cross_entropy_with_logits(net(x, mask)[:, 0], label)

    return {COX: cox, DISCRETE: discrete, BINARY: binary}[head]


def _settled(made: Member, values: Mapping[str, np.ndarray], mask: np.ndarray, outcomes: Outcomes) -> Member:
    """With the scale of its risk, and of Cox with the hazard of a person of risk 0."""
    logits, _ = made._logits(values, mask)
    risk = made._risk(logits)
    spread = float(risk.std())
    baseline = Baseline.fit(outcomes, logits[:, 0]) if made.head == COX else None
    return Member(
        made.names, made.head, made.projections, made.net, (float(risk.mean()), spread if spread > 1e-9 else 1.0),
        baseline, made.bins, made.last,
    )  # fmt: skip
