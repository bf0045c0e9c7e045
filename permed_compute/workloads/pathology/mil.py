"""Multiple-instance learning: a bag of tile features to one answer, and a weight for each tile.

    abmil      Ilse, Tomczak & Welling, ICML 2018, eq. 7 and 9: gated attention
    clam-sb    Lu et al., Nat Biomed Eng 2021: one attention branch; tiles clustered by the smooth top-1 SVM loss
    transmil   Shao et al., NeurIPS 2021: a class token among all tiles, PPEG, and Nyström attention (Xiong et al.,
               AAAI 2021)

All of them take padded bags: x (b, n, d) in any float type, mask (b, n), True where there is a tile. A bag's answer
does not depend on the padding. Details are as the papers say, not as later versions of their code do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

INSTANCE_SHARE = 0.3
"""Of the instance loss in CLAM's loss."""
_CLUSTERED = 8
"""Tiles of highest, and of lowest attention that CLAM clusters."""
_HEADS, _KERNEL, _PINV_STEPS = 8, 33, 6


@dataclass(frozen=True, slots=True)
class Answer:
    """logits: (b, outputs). attention: (b, n), of each bag 1 in all and 0 where there is no tile. instance_loss:
    CLAM's, where labels were given."""

    logits: torch.Tensor
    attention: torch.Tensor
    instance_loss: torch.Tensor | None = None


class Gated(nn.Module):
    """w · (tanh(V h) ⊙ sigmoid(U h)), softmax over the tiles of a bag. (b, n, hidden) → (b, n)."""

    def __init__(self, hidden: int, attention: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.v, self.u, self.w = nn.Linear(hidden, attention), nn.Linear(hidden, attention), nn.Linear(attention, 1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        gated = self.dropout(torch.tanh(self.v(h))) * self.dropout(torch.sigmoid(self.u(h)))
        weights: torch.Tensor = self.w(gated)[..., 0].masked_fill(~mask, -torch.inf).softmax(-1)
        return weights


class Abmil(nn.Module):
    def __init__(self, dim: int, outputs: int, hidden: int, attention: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = Gated(hidden, attention)
        self.answer = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, label: torch.Tensor | None = None) -> Answer:
        h = self.embed(x.float())
        weights = self.attend(h, mask)
        return Answer(self.answer(torch.einsum("bn,bnh->bh", weights, h)), weights)


class ClamSb(nn.Module):
    """Of each class a classifier of tiles: those of highest attention belong to the bag's class, those of lowest do
    not; to the other classes, which exclude it, those of highest do not belong either."""

    def __init__(self, dim: int, outputs: int, hidden: int, attention: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Dropout(dropout))
        self.attend = Gated(hidden, attention, dropout)
        self.answer = nn.Linear(hidden, outputs)
        self.instances = nn.ModuleList(nn.Linear(hidden, 2) for _ in range(outputs))

    def forward(self, x: torch.Tensor, mask: torch.Tensor, label: torch.Tensor | None = None) -> Answer:
        h = self.embed(x.float())
        weights = self.attend(h, mask)
        logits = self.answer(torch.einsum("bn,bnh->bh", weights, h))
        if label is None:
            return Answer(logits, weights)
        losses = [
            self._clustered(h[k, mask[k]], weights[k, mask[k]].detach(), int(label[k])) for k in range(len(h))
        ]  # fmt: skip
        return Answer(logits, weights, torch.stack(losses).mean())

    def _clustered(self, h: torch.Tensor, weights: torch.Tensor, label: int) -> torch.Tensor:
        count = min(_CLUSTERED, len(h))
        high, low = weights.topk(count).indices, weights.topk(count, largest=False).indices
        found = []
        for k, classifier in enumerate(self.instances):
            tiles = torch.cat([high, low]) if k == label else high
            wanted = torch.zeros(len(tiles), dtype=torch.long, device=h.device)
            if k == label:
                wanted[:count] = 1
            found.append(smooth_svm(classifier(h[tiles]), wanted))
        return torch.stack(found).mean()


def smooth_svm(scores: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
    """Smooth top-1 SVM loss (Berrada, Zisserman & Kumar, ICLR 2018), margin and temperature 1. (n, 2), (n,) → mean."""
    margin = 1.0 - functional.one_hot(label, scores.shape[1])
    return (torch.logsumexp(scores + margin, 1) - scores.gather(1, label[:, None])[:, 0]).mean()


# ------------------------------------------------------------------------------------------------ TransMIL


class Nystrom(nn.Module):
    """Self-attention through `landmarks` means of segments; exact where there are no more tokens than landmarks.

    (n, hidden) → (n, hidden), and the first token's attention to all, (n,), meaned over heads. A segment is
    [⌊i n / m⌋, ⌈(i + 1) n / m⌉): equal parts where m divides n, and no padding that would be attended to elsewhere.
    """

    def __init__(self, hidden: int, landmarks: int, dropout: float) -> None:
        super().__init__()
        self.landmarks, self.size = landmarks, hidden // _HEADS
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Sequential(nn.Linear(hidden, hidden), nn.Dropout(dropout))
        self.near = nn.Conv1d(_HEADS, _HEADS, _KERNEL, padding=_KERNEL // 2, groups=_HEADS, bias=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        n = len(x)
        q, k, v = self.qkv(x).view(n, 3, _HEADS, self.size).permute(1, 2, 0, 3)  # each (heads, n, size)
        q = q / math.sqrt(self.size)
        if n <= self.landmarks:
            weights = (q @ k.transpose(1, 2)).softmax(-1)
            mixed, first = weights @ v, weights[:, 0]
        else:
            ql, kl = (functional.adaptive_avg_pool1d(t.transpose(1, 2), self.landmarks).transpose(1, 2) for t in (q, k))
            to, among, back = ((a @ b.transpose(1, 2)).softmax(-1) for a, b in ((q, kl), (ql, kl), (ql, k)))
            to = to @ _pseudo_inverse(among)
            mixed, first = to @ (back @ v), (to[:, :1] @ back)[:, 0]
        # Each value among its neighbours, head by head, every component alike.
        mixed = mixed + self.near(v.permute(2, 0, 1)).permute(1, 2, 0)
        return self.out(mixed.transpose(0, 1).reshape(n, -1)), first.mean(0)


def _pseudo_inverse(a: torch.Tensor) -> torch.Tensor:
    """Moore–Penrose by six steps of Razavi et al. 2014, begun from Aᵀ / (‖A‖₁ ‖A‖∞). (heads, m, m)."""
    one = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
    z = a.transpose(1, 2) / (a.abs().sum(1).amax(-1) * a.abs().sum(2).amax(-1))[:, None, None]
    for _ in range(_PINV_STEPS):
        az = a @ z
        z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
    return z


class Ppeg(nn.Module):
    """Position from neighbours: convolutions of 7, 5 and 3 over the tiles laid out as a square. (side², hidden)."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv2d(hidden, hidden, edge, padding=edge // 2, groups=hidden) for edge in (7, 5, 3)
        )

    def forward(self, tiles: torch.Tensor, side: int) -> torch.Tensor:
        square = tiles.T.reshape(1, -1, side, side)
        total = square + sum(convolution(square) for convolution in self.convolutions)
        found: torch.Tensor = total.flatten(2)[0].T
        return found


class TransMil(nn.Module):
    """Bags one by one: each is squared by repeating its own first tiles, whose attention is added to theirs.

    A tile's attention is the class token's in both layers.
    """

    def __init__(self, dim: int, outputs: int, hidden: int, attention: int, dropout: float) -> None:
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU())
        self.token = nn.Parameter(torch.randn(1, hidden))
        self.norms = nn.ModuleList(nn.LayerNorm(hidden) for _ in range(3))
        self.layers = nn.ModuleList(Nystrom(hidden, attention, dropout) for _ in range(2))
        self.position = Ppeg(hidden)
        self.answer = nn.Linear(hidden, outputs)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, label: torch.Tensor | None = None) -> Answer:
        logits, weights = [], x.new_zeros(mask.shape, dtype=torch.float32)
        for k in range(len(x)):
            said, own = self._one(self.embed(x[k, mask[k]].float()))
            logits.append(said)
            weights[k, mask[k]] = own.float()
        return Answer(torch.stack(logits), weights)

    def _one(self, tiles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(tiles)
        side = math.isqrt(count - 1) + 1
        square = torch.cat([tiles, tiles[: side * side - count]])
        h = torch.cat([self.token, square])
        mixed, early = self.layers[0](self.norms[0](h))
        h = h + mixed
        h = torch.cat([h[:1], self.position(h[1:], side)])
        mixed, late = self.layers[1](self.norms[1](h))
        # Both looks of the class token: the second is at tiles that know of each other (decision 108). The
        # approximation may fall a little below 0.
        own = (early[1:].clamp_min(0) + late[1:].clamp_min(0)).detach()
        own = own[:count] + functional.pad(own[count:], (0, 2 * count - side * side))
        return self.answer(self.norms[2]((h + mixed)[0])), own / own.sum().clamp_min(1e-12)


MODELS: Mapping[str, Callable[..., nn.Module]] = {"abmil": Abmil, "clam-sb": ClamSb, "transmil": TransMil}


def build(definition: Mapping[str, Any]) -> nn.Module:
    """definition: model, dim, outputs, hidden, attention (of TransMIL the landmarks), dropout."""
    return MODELS[definition["model"]](**{key: value for key, value in definition.items() if key != "model"})
