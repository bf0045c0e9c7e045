"""The weights of the epoch with the highest score; a checkpoint carries them (`training.Recipe.carried`)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


@dataclass
class Best:
    """score: what has to be exceeded; epoch: counted from 0. weights: none until something was offered."""

    score: float = -math.inf
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
