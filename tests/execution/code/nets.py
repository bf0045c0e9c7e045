"""A small real training: MONAI's random transforms on made-up volumes, a 3D network with dropout, AdamW, a schedule."""

from __future__ import annotations

import time
from typing import Any

import torch
from monai.data import Dataset
from monai.transforms import Compose, RandAdjustContrastd, RandFlipd, RandGaussianNoised, RandRotated
from torch import nn

from permed_compute import Result
from permed_compute.learning import training
from permed_compute.learning.randomness import seed_all
from permed_compute.learning.training import Pace, Recipe
from permed_compute.storage.checkpoints import Keep
from permed_compute.workloads.port import Context

EDGE = 8


def volumes(count: int) -> list[dict[str, torch.Tensor]]:
    """Blobs of random size in noise; the target is how large they are."""
    generator = torch.Generator().manual_seed(7)
    made = []
    grid = torch.stack(torch.meshgrid(*[torch.arange(EDGE)] * 3, indexing="ij")).float() - EDGE / 2
    for _ in range(count):
        radius = 1 + 2.5 * torch.rand(1, generator=generator)
        image = (grid.norm(dim=0) < radius).float()[None] + 0.1 * torch.randn(1, EDGE, EDGE, EDGE, generator=generator)
        made.append({"image": image, "size": radius / EDGE})
    return made


def recipe(count: int, seconds: float, dropout: float, batch_norm: bool, hog: float, ctx: Context) -> Recipe:
    seed_all(ctx.seed)
    transform = Compose(
        [
            RandFlipd("image", prob=0.5, spatial_axis=0),
            RandRotated("image", prob=0.8, range_x=0.4),
            RandAdjustContrastd("image", prob=0.5),
            RandGaussianNoised("image", prob=0.9, std=0.2),
        ]
    )
    norm = nn.BatchNorm3d(8) if batch_norm else nn.GroupNorm(2, 8)
    model = nn.Sequential(
        nn.Conv3d(1, 8, 3, padding=1), nn.InstanceNorm3d(8, affine=True), nn.ReLU(), nn.Dropout(dropout),
        nn.Conv3d(8, 8, 3, stride=2, padding=1), norm, nn.ReLU(), nn.Flatten(), nn.Dropout(dropout / 2),
        nn.Linear(8 * (EDGE // 2) ** 3, 1),
    ).to(ctx.device)  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    def loss(model: nn.Module, batch: Any) -> torch.Tensor:
        time.sleep(seconds)
        if hog:  # on a GPU: each sample takes that share of all its memory
            total = torch.cuda.get_device_properties(ctx.device).total_memory
            torch.empty(int(hog * total) * len(batch["image"]), dtype=torch.uint8, device=ctx.device)
        if seconds and ctx.rank == 0:
            ctx.log_metric("step", 1.0)
        return nn.functional.mse_loss(model(batch["image"].as_tensor()), batch["size"])

    return Recipe(
        model, Dataset(volumes(count), transform), loss, optimizer,
        scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50),
    )  # fmt: skip


class Interrupted:
    """`ctx`, but all ranks are asked to stop after so many steps of this attempt."""

    def __init__(self, ctx: Context, after: int) -> None:
        self._ctx, self._left = ctx, after

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def should_stop(self) -> bool:
        self._left -= 1
        return self._ctx.should_stop() or self._left == 0


def train(spec: Any, ctx: Context) -> Result | None:
    """params: samples, epochs, batch, loaders, every (steps between checkpoints), seconds per step, beside, hog, and
    after: how many steps each attempt does, the last ones all."""
    given = spec.params
    attempt = ctx.paths.number - 1 if "after" in given else 0
    if attempt < len(given.get("after", ())):
        ctx = Interrupted(ctx, given["after"][attempt])
    pace = Pace(
        epochs=given.get("epochs", 3), batch=given.get("batch", 4), loaders=given.get("loaders", 0),
        checkpoint_steps=given.get("every", 0), checkpoint_s=0, keep=Keep(2), beside=given.get("beside", True),
    )  # fmt: skip
    made = recipe(
        given.get("samples", 22), given.get("seconds", 0), given.get("dropout", 0.2), given.get("batch_norm", True),
        given.get("hog", 0), ctx,
    )  # fmt: skip
    done = training.fit(made, pace, ctx)
    if done is None:
        return None
    values = {"weights": training.digest(done.model), "history": list(done.history), "steps": done.steps}
    more = {"resumed_at": done.resumed_at, "world": ctx.world, "micro": done.micro}
    return Result(values | more | {"threads": torch.get_num_threads()})


def nothing(spec: Any, ctx: Context) -> Result:
    """What has the right of way."""
    return Result()
