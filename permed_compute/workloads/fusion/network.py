"""The network: an encoder for each modality, attention over those that are there, one head; and what comes before it.

    values ─► Projection (standardise, principal components; of training people only) ─► encoder ─┐
                                                                                                  ├─► attention ─► head
    … of each modality; those that are not there have weight 0 ───────────────────────────────────┘

While it learns, a modality that is there is taken away now and then, so that no answer rests on all being there.
What is drawn comes from the network's own generator: trainings beside each other in one process do not disturb each
other, and the same seed gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from permed_compute.learning.order import Order


@dataclass(frozen=True, slots=True)
class Projection:
    """Fitted on training people: keeps columns that vary, standardises, and turns them into few components.

    mean, scale: (columns,), scale 0 where a column is left out; weights: (columns, outputs) float32.
    """

    mean: np.ndarray
    scale: np.ndarray
    weights: np.ndarray

    @property
    def outputs(self) -> int:
        return int(self.weights.shape[1])

    @classmethod
    def fit(cls, values: np.ndarray, components: int) -> Projection:
        """values: (people, columns), NaN where missing; people without any value are left out. A column that is
        constant or nowhere known is left out too; no more columns than `components` are not turned."""
        x = values[np.isfinite(values).any(axis=1)].astype(np.float64)
        known = np.isfinite(x)
        many = np.maximum(known.sum(axis=0), 1)
        mean = np.where(known, x, 0).sum(axis=0) / many
        spread = np.sqrt((np.where(known, x - mean, 0) ** 2).sum(axis=0) / many)
        scale = np.where(spread > 1e-6 * np.maximum(np.abs(mean), 1e-6), 1 / np.maximum(spread, 1e-12), 0.0)
        z = np.where(known, (x - mean) * scale, 0)
        used = np.flatnonzero(scale)
        if len(used) <= components:
            weights = np.zeros((len(mean), len(used)))
            weights[used, np.arange(len(used))] = 1.0
        else:
            weights = _components(z, components)
        return cls(mean.astype(np.float32), scale.astype(np.float32), weights.astype(np.float32))

    def of(self, values: np.ndarray) -> np.ndarray:
        """(people, outputs) float32. What is missing counts as the training people's mean."""
        z = (values - self.mean) * self.scale
        return np.asarray(np.where(np.isfinite(z), z, 0) @ self.weights, np.float32)


def _components(z: np.ndarray, count: int) -> np.ndarray:
    """(columns, components): the first has unit variance, later ones less, as in the data; signs are fixed."""
    if len(z) < z.shape[1]:
        size, left = np.linalg.eigh(z @ z.T)
        right = z.T @ left[:, ::-1][:, :count]
    else:
        size, turned = np.linalg.eigh(z.T @ z)
        right = turned[:, ::-1][:, :count]
    size = size[::-1][:count]
    right = right[:, size > 1e-9 * max(float(size[0]), 1e-30)]
    right /= np.linalg.norm(right, axis=0)
    right *= np.sign(right[np.abs(right).argmax(axis=0), np.arange(right.shape[1])])
    return np.asarray(right / np.sqrt(max(float(size[0]), 1e-30) / len(z)))


@dataclass(frozen=True, slots=True)
class Shape:
    """sizes: inputs of each modality. outputs: of the head. dropout: of an encoder's units; absent: of modalities."""

    sizes: tuple[int, ...]
    width: int
    outputs: int
    dropout: float = 0.0
    absent: float = 0.0


_QUICK = 5.0
"""Times as fast as other weights learns what a modality weighs for everybody: there is one number of each."""


class Fusion(nn.Module):
    """x: (people, sum of sizes) float32, mask: (people, modalities) bool, at least one True in each row."""

    def __init__(self, shape: Shape, seed: int, device: str = "cpu") -> None:
        super().__init__()
        self.shape = shape
        self.chance = torch.Generator(device).manual_seed(seed)
        self.encoders = nn.ModuleList(nn.Linear(size, shape.width) for size in shape.sizes)
        self.mixers = nn.ModuleList(nn.Linear(shape.width, shape.width) for _ in shape.sizes)
        self.query = nn.Linear(shape.width, shape.width)
        self.score = nn.Linear(shape.width, 1, bias=False)
        self.prior = nn.Parameter(torch.zeros(len(shape.sizes)))
        self.head = nn.Linear(shape.width, shape.outputs)
        self._draw_weights(seed)
        self.to(device)

    def _draw_weights(self, seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        for name, weights in self.named_parameters():
            if weights.ndim == 1 or name == "score.weight":  # all modalities weigh alike at first
                nn.init.zeros_(weights)
            else:
                nn.init.xavier_uniform_(weights, generator=chance)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(people, outputs): the log hazard, or logits."""
        return self.weighed(x, mask)[0]

    def weighed(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Beside it (people, modalities): how much each modality counted; a row sums to 1."""
        if self.training:
            mask = self._taken_away(mask)
        parts = torch.split(x, list(self.shape.sizes), dim=1)
        tokens = torch.stack([self._encoded(k, part) for k, part in enumerate(parts)], dim=1)
        scores = self.score(torch.tanh(self.query(tokens)))[..., 0] + _QUICK * self.prior
        weights = scores.masked_fill(~mask, -torch.inf).softmax(dim=1)
        return self.head((weights[..., None] * tokens).sum(dim=1)), weights

    def _encoded(self, k: int, part: torch.Tensor) -> torch.Tensor:
        """Linear with a small correction: few people are mostly described by the linear part."""
        linear = self._dropped(self.encoders[k](part))
        out: torch.Tensor = linear + self.mixers[k](nn.functional.gelu(linear))
        return out

    def _dropped(self, units: torch.Tensor) -> torch.Tensor:
        share = self.shape.dropout
        if not self.training or not share:
            return units
        kept = torch.rand(units.shape, generator=self.chance, device=units.device) >= share
        return units * kept / (1 - share)

    def _taken_away(self, mask: torch.Tensor) -> torch.Tensor:
        """Never all of a person's."""
        if not self.shape.absent or mask.shape[1] == 1:
            return mask
        kept = mask & (torch.rand(mask.shape, generator=self.chance, device=mask.device) >= self.shape.absent)
        return torch.where(kept.any(dim=1, keepdim=True), kept, mask)


@dataclass(frozen=True, slots=True)
class InMemory:
    """Samples that lie in memory as tensors with a row each, and their batches: a `learning.training.Feed`."""

    columns: tuple[torch.Tensor, ...]
    batch: int
    seed: int

    def __len__(self) -> int:
        return len(self.columns[0])

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        return tuple(column[index] for column in self.columns)

    def batches(self, epoch: int, first: int) -> Iterator[tuple[torch.Tensor, ...]]:
        for rows in Order(len(self), self.batch, self.seed).rows(epoch, first):
            yield tuple(column[rows] for column in self.columns)
