"""Job `omics/vae`: a small variational autoencoder over a modality of a matrix store; a gang.

`inputs`: `matrices`, a store of `omics/matrix`.

Counts have a negative binomial likelihood with the row's own sum as its size (as scVI, without batches); other values
a normal one, in which missing values count nothing. Rows come block-shuffled from the store (`learning.rows`): what is
trained on needs never fit into memory. The figures are a fit: nothing is held out.

`params` of the job: see `Params`, and `jobs/omics/vae/job.yaml`.

Results: `latent.parquet` (rows by pseudonym × latent), `vae.pt` and `vae.json` (weights, and what they take in).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec, parse_duration
from permed_compute.storage.matrices import Matrix, MatrixStore
from permed_compute.workloads.omics import plots
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.port import Context, Gang, Result

if TYPE_CHECKING:
    import torch
    from torch import nn

INPUT = "matrices"
LATENT, WEIGHTS, ABOUT = "latent.parquet", "vae.pt", "vae.json"
VERSION = "1"


@dataclass(frozen=True, slots=True)
class Params:
    modality: str = ""
    features: str = "variable"
    latent: int = 10
    hidden: int = 128
    beta: float = 1.0
    batch: int = 256
    block: int = 256
    window: int = 64
    epochs: int = 20
    learning_rate: float = 1e-3
    precision: str = "float32"
    checkpoint: str = "10m"

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        """Raises `SpecError` naming every parameter that is wrong."""
        checked = Checked("omics/vae", given, cls)
        checked.one_of("features", "variable", "all")
        checked.one_of("precision", "float32", "bfloat16", "float16")
        for name, most in (("latent", 1000), ("hidden", 100_000), ("batch", 1_000_000), ("epochs", 100_000)):
            checked.between(name, 1, most)
        checked.between("learning_rate", 1e-9, 10)
        checked.between("beta", 0, 1000)
        try:
            parse_duration(given.get("checkpoint", "10m"))
        except ValueError as error:
            checked.problem("checkpoint", f"{error}.")
        return checked.done()


def network(features: int, params: Params, kind: str) -> nn.Module:
    """x (rows, features) → (mean loss over its rows, latent means). Counts as they are; values standardised."""
    import torch
    from torch import nn
    from torch.nn import functional

    counted = kind == "counts"

    class Vae(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Linear(features, params.hidden), nn.LayerNorm(params.hidden), nn.ReLU())
            self.latent = nn.Linear(params.hidden, 2 * params.latent)
            self.decoder = nn.Sequential(
                nn.Linear(params.latent, params.hidden), nn.LayerNorm(params.hidden), nn.ReLU()
            )
            self.out = nn.Linear(params.hidden, features)
            self.spread = nn.Parameter(torch.zeros(features))  # log of dispersion, or of variance

        def encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            seen = torch.nan_to_num(x)
            if counted:
                size = seen.sum(1, keepdim=True).clamp(min=1)
                seen = torch.log1p(seen / size * 1e4)
            middle, log_variance = self.latent(self.encoder(seen)).chunk(2, dim=1)
            return middle, log_variance.clamp(-15, 15)

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            middle, log_variance = self.encode(x)
            z = middle + torch.randn_like(middle) * torch.exp(log_variance / 2)
            out = self.out(self.decoder(z))
            likelihood = self.counts(x, out) if counted else self.values(x, out)
            divergence = 0.5 * (middle**2 + log_variance.exp() - 1 - log_variance).sum(1)
            return (params.beta * divergence - likelihood).mean(), middle

        def counts(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            mean = functional.softmax(out, dim=1) * x.sum(1, keepdim=True) + 1e-8
            theta = self.spread.exp()
            shared = torch.log(theta + mean)
            chance = theta * (self.spread - shared) + x * (torch.log(mean) - shared)
            ways = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
            return (chance + ways).sum(1)

        def values(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            there = ~torch.isnan(x)
            error = (torch.nan_to_num(x) - out) ** 2 / self.spread.exp() + self.spread
            return -0.5 * (error * there).sum(1)

    return Vae()


@dataclass(frozen=True, slots=True)
class _View:
    """What of a modality is trained on. kept: rows; columns: features; middle, scale: of values, else 0 and 1."""

    matrix: Matrix
    kind: str
    kept: np.ndarray
    columns: np.ndarray
    middle: np.ndarray
    scale: np.ndarray

    def tensor(self, batch: np.ndarray) -> torch.Tensor:
        import torch

        made = torch.from_numpy(np.asarray(batch, np.float32))
        return made if self.kind == "counts" else (made - torch.from_numpy(self.middle)) / torch.from_numpy(self.scale)


def _view(store: MatrixStore, params: Params) -> _View:
    """Raises `NotFoundError`, `WorkloadError`."""
    if not params.modality and len(store.names) != 1:
        raise WorkloadError(
            f"The store has {len(store.names)} modalities.",
            remedy=f"Write `params: {{modality: …}}`, one of {', '.join(store.names)}.",
        )
    matrix = store[params.modality or store.names[0]]
    kind = str(matrix.uns["permed"]["kind"])
    chosen = matrix.var["highly_variable" if params.features == "variable" else "kept"].to_numpy(bool)
    kept, columns = np.flatnonzero(matrix.obs["kept"].to_numpy(bool)), np.flatnonzero(chosen)
    middle, scale = np.zeros(len(columns), np.float32), np.ones(len(columns), np.float32)
    if kind != "counts":
        middle, scale = _moments(matrix, kept, columns)
    return _View(matrix, kind, kept, columns, middle, scale)


def _moments(matrix: Matrix, kept: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    total, square, count = (np.zeros(len(columns)) for _ in range(3))
    for block in _dense(matrix, columns, kept):
        there = ~np.isnan(block)
        known = np.where(there, block, 0).astype(np.float64)
        total, square, count = total + known.sum(0), square + (known**2).sum(0), count + there.sum(0)
    mean = total / np.maximum(count, 1)
    spread = np.sqrt(np.maximum(square / np.maximum(count, 1) - mean**2, 0))
    return mean.astype(np.float32), np.where(spread > 0, spread, 1).astype(np.float32)


def _dense(matrix: Matrix, columns: np.ndarray, kept: np.ndarray) -> Iterator[np.ndarray]:
    """The kept rows' columns in order, float32."""
    wanted = np.zeros(matrix.rows.shape[0], bool)
    wanted[kept] = True
    for a, b, block in matrix.rows.blocks(max(1, min(4096, 4_000_000 // matrix.rows.shape[1]))):
        some = block[wanted[a:b]][:, columns]
        yield np.asarray(some.toarray() if matrix.rows.is_sparse else some, np.float32)


def train(spec: JobSpec, ctx: Context) -> Result | None:
    """Every rank trains; the first writes weights and latents."""
    import torch

    from permed_compute.learning import randomness
    from permed_compute.learning.rows import Blocked, RowLoader
    from permed_compute.learning.training import Pace, Recipe, digest, fit

    params = Params.of(spec.params)
    view = _view(MatrixStore.find(ctx.input(INPUT)), params)
    randomness.seed_all(randomness.derive(ctx.seed, "network"))
    model: Any = network(len(view.columns), params, view.kind).to(ctx.device)
    order = Blocked(len(view.kept), params.batch, ctx.seed, ctx.rank, ctx.world, params.block, params.window)
    everything = len(view.kept) == view.matrix.rows.shape[0]
    loader = RowLoader(
        view.matrix.rows, order, kept=None if everything else view.kept, columns=view.columns, threads=ctx.threads
    )  # fmt: skip
    recipe = Recipe(
        model, _Counted(len(view.kept)), _loss, torch.optim.Adam(model.parameters(), lr=params.learning_rate),
        feed=_feed(loader.batches, view.tensor),
    )  # fmt: skip
    pace = Pace(
        epochs=params.epochs, batch=params.batch, precision=params.precision, clip=100.0,
        checkpoint_s=parse_duration(params.checkpoint),
    )  # fmt: skip
    with ctx.stage("train"):
        done = fit(recipe, pace, ctx)
    if done is None:
        return None
    if ctx.rank:
        return Result()
    model.eval()
    with ctx.stage("encode"), torch.no_grad():
        blocks = (view.tensor(block).to(ctx.device) for block in _dense(view.matrix, view.columns, view.kept))
        latent = np.concatenate([model.encode(block)[0].cpu().numpy() for block in blocks])
    _write(latent, model, view, params, ctx)
    plots.scatter(latent[:, 0], latent[:, 1 % latent.shape[1]], ctx.out / "latent.png", ("latent 1", "latent 2"))
    losses = [row["loss"] for row in done.history]
    values = {
        "kind": "fit", "weights": digest(model), "rows": len(view.kept), "features": len(view.columns),
        "history": list(done.history), "resumed_at": done.resumed_at,
        "likelihood": "negative binomial" if view.kind == "counts" else "normal",
    }  # fmt: skip
    return Result(values, {"loss": losses[-1]}, [("latent.png", f"Latent of {len(latent)} rows")])


class _Counted:
    """How many samples there are; the feed gives them."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Any:
        raise IndexError(index)


def _loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(batch)[0]
    return loss


def _feed(
    batches: Callable[[int, int], Iterator[np.ndarray]], tensor: Callable[[np.ndarray], torch.Tensor]
) -> Callable[[int, int], Iterator[torch.Tensor]]:
    return lambda epoch, first: (tensor(batch) for batch in batches(epoch, first))


def _write(latent: np.ndarray, model: nn.Module, view: _View, params: Params, ctx: Context) -> None:
    import pandas as pd
    import torch

    names: Sequence[str] = [f"latent{k + 1}" for k in range(latent.shape[1])]
    pd.DataFrame(latent, index=view.matrix.obs.index[view.kept], columns=names).to_parquet(ctx.out / LATENT)
    torch.save({name: tensor.cpu() for name, tensor in model.state_dict().items()}, ctx.out / WEIGHTS)
    about = {
        "modality": view.matrix.name, "kind": view.kind, "features": list(view.matrix.var.index[view.columns]),
        "middle": view.middle.tolist(), "scale": view.scale.tolist(), "latent": params.latent, "hidden": params.hidden,
    }  # fmt: skip
    write_json(ctx.out / ABOUT, about)


WORKLOAD = Gang(train=train, version=VERSION)
