"""The training loop of every domain: data-parallel, interruptible at every step, and bit-identical when taken up again.

    for epoch in …:  for batch in …:  1. forward, backward; DDP averages the gradients over the ranks
                                      2. optimiser, schedule
                                      3. position += 1
                                      4. asked to stop?  checkpoint, and return None
                                      5. due?            checkpoint, and go on

Bit-identical means: on CPU, with the same ranks, threads and machine type, weights do not depend on where a training
was interrupted. What that takes, and where it is done: samples seeded by (seed, epoch, index) (`order.Seeded`); a
loader that draws nothing from the global streams; every stream of every rank in the checkpoint; and DDP that never
rebuilds its buckets (`_wrapped`): it would once, after the first step of each process, and with three ranks or more
another layout of the buckets adds in another order.
On another number of ranks the batches are the same ones, shared otherwise: sums differ in their last bits.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from permed_compute.errors import WorkloadError
from permed_compute.learning import randomness, snapshot
from permed_compute.learning.order import Batches, Order, Samples, Seeded
from permed_compute.storage.checkpoints import Keep
from permed_compute.workloads.port import Context

Loss = Callable[[nn.Module, Any], torch.Tensor]
"""(model, batch) → mean loss over the batch's samples, a scalar."""
Feed = Callable[[int, int], Iterable[Any]]
"""(epoch, first batch) → this rank's batches of the rest of the epoch, as tensors: the same ones whenever asked."""


class Stateful(Protocol):
    """Its state is tensors, numbers, words, and lists and dicts of them."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Any, /) -> Any: ...


_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is trained. The model is on `ctx.device` already; every rank makes the same one.

    scheduler: stepped after every optimiser step. collate: samples → batch, default torch's. evaluate(model, epoch) is
    called by every rank after each epoch, and returns what to log. sources: objects with a numpy `RandomState` in `R`
    (MONAI's `Randomizable`) that the loop itself draws from, beyond the samples' own transforms. enough: asked with the
    history before each epoch; true ends the training early. carried: what else a checkpoint holds, rank 0's (the best
    weights so far, for example). feed: who makes whole batches at once (`rows.RowLoader`); `samples` then only says how
    many there are, and `loaders` and `collate` nothing.
    """

    model: nn.Module
    samples: Samples
    loss: Loss
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None
    collate: Callable[[list[Any]], Any] | None = None
    evaluate: Callable[[nn.Module, int], Mapping[str, float]] | None = None
    sources: Sequence[Any] = ()
    enough: Callable[[Sequence[Mapping[str, float]]], bool] | None = None
    carried: Mapping[str, Stateful] = field(default_factory=dict)
    feed: Feed | None = None


@dataclass(frozen=True, slots=True)
class Pace:
    """How it is trained.

    batch: samples per step over all ranks. loaders: worker processes per rank that make samples; 0: the rank itself.
    checkpoint_steps, checkpoint_s: a checkpoint each so many steps, or seconds; 0: only when asked to stop.
    beside: write checkpoints in a thread while training goes on, from a copy of the state in main memory.
    micro: samples of a forward pass; 0: the rank's whole share, on CUDA halved until it fits (`fitting`).
    clip: largest norm of the gradient; 0: any.
    """

    epochs: int
    batch: int
    loaders: int = 0
    checkpoint_steps: int = 0
    checkpoint_s: float = 600.0
    keep: Keep = field(default_factory=Keep)
    beside: bool = True
    precision: str = "float32"
    micro: int = 0
    clip: float = 0.0


@dataclass(slots=True)
class Position:
    """How far a training is: `batch` batches of `epoch` are done, `step` in all."""

    epoch: int = 0
    batch: int = 0
    step: int = 0
    sum: float = 0.0
    """Of this rank's losses in this epoch so far."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Mean loss and what `evaluate` said, per finished epoch."""


@dataclass(frozen=True, slots=True)
class Trained:
    """A training that came to its end. history: per epoch, `loss` and what `evaluate` returned."""

    model: nn.Module
    steps: int
    history: Sequence[Mapping[str, float]]
    resumed_at: int
    """The step that it was taken up at; 0 where it was not."""
    micro: int


def fit(recipe: Recipe, pace: Pace, ctx: Context) -> Trained | None:
    """Train until the last epoch; None where the attempt was asked to stop, with its checkpoint written.

    Raises `WorkloadError` where the checkpoint is of another training (other samples or another batch).
    """
    if pace.precision not in _PRECISIONS:
        raise WorkloadError(
            f"There is no precision {pace.precision!r}.", remedy=f"There are: {', '.join(_PRECISIONS)}."
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        return _Training(recipe, pace, ctx).run()
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def digest(model: nn.Module) -> str:
    """SHA-256 of the weights and buffers, names included."""
    total = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}\0".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


class _Training:
    def __init__(self, recipe: Recipe, pace: Pace, ctx: Context) -> None:
        self.recipe, self.pace, self.ctx = recipe, pace, ctx
        self.device = torch.device(ctx.device)
        self.order = Order(len(recipe.samples), pace.batch, ctx.seed, ctx.rank, ctx.world)
        self.samples = Seeded(recipe.samples, ctx.seed)
        self.at = Position()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=pace.precision == "float16")
        randomness.seed_all(randomness.derive(ctx.seed, "rank", ctx.rank))
        own = self._restore()
        self.resumed_at = self.at.step
        self.micro = pace.micro or self.order.share
        if not pace.micro and self.device.type == "cuda":
            self.micro = fitting(self._forward_alone, self.order.share, self._agree_on_least)
        self.model = _wrapped(recipe.model, ctx)
        if own is not None:  # last: making DDP may draw
            randomness.put_back(own["randomness"], recipe.sources)
        self._saved_at = time.monotonic()

    def run(self) -> Trained | None:
        self.recipe.model.train()
        while self.at.epoch < self.pace.epochs and not self._is_enough():
            for batch in self._batches():
                loss = self._step(batch)
                self.at.batch, self.at.step = self.at.batch + 1, self.at.step + 1
                self.at.sum += loss
                self.ctx.progress(self.at.step, self.pace.epochs * self.order.batches)
                if self.ctx.should_stop():
                    self._checkpoint(beside=False)
                    return None
                # An epoch is finished before its checkpoint is: what is saved is always the start of a step.
                if self.at.batch < self.order.batches and self._due():
                    self._checkpoint(beside=self.pace.beside)
            self._end_epoch()
            if self.at.epoch < self.pace.epochs and self._due():
                self._checkpoint(beside=self.pace.beside)
        return Trained(self.recipe.model, self.at.step, self.at.history, self.resumed_at, self.micro)

    def _is_enough(self) -> bool:
        return self.recipe.enough is not None and self.recipe.enough(self.at.history)

    # ------------------------------------------------------------------------------------- one step

    def _batches(self) -> Iterator[Any]:
        if self.at.batch >= self.order.batches:  # it was stopped after the last batch of an epoch
            return iter(())
        if self.recipe.feed is not None:
            return iter(self.recipe.feed(self.at.epoch, self.at.batch))
        return iter(
            torch.utils.data.DataLoader(
                self.samples, batch_sampler=Batches(self.order, self.at.epoch, self.at.batch),
                num_workers=self.pace.loaders, collate_fn=self.recipe.collate,
                # Forked anew each epoch: they inherit what is imported, and know nothing of the last one.
                multiprocessing_context="fork" if self.pace.loaders else None,
                # Its own: the loader draws a seed for its workers, and the global stream is the model's.
                generator=torch.Generator().manual_seed(0), pin_memory=self.device.type == "cuda",
            )
        )  # fmt: skip

    def _step(self, batch: Any) -> float:
        """One optimiser step; returns this rank's mean loss."""
        self.recipe.optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for part, weight, last in _micro(batch, self.order.share, self.micro):
            with self._synced(last):
                loss = self._forward(self.model, part) * weight
                torch.autograd.backward(self.scaler.scale(loss))
            total += float(loss.detach())
        if self.pace.clip:
            self.scaler.unscale_(self.recipe.optimizer)
            nn.utils.clip_grad_norm_(self.recipe.model.parameters(), self.pace.clip)
        self.scaler.step(self.recipe.optimizer)
        self.scaler.update()
        if self.recipe.scheduler is not None:
            self.recipe.scheduler.step()
        return total

    def _forward(self, model: nn.Module, batch: Any) -> torch.Tensor:
        kind = _PRECISIONS[self.pace.precision]
        with torch.autocast(self.device.type, dtype=kind, enabled=kind is not None):
            return self.recipe.loss(model, _on(batch, self.device))

    def _synced(self, last: bool) -> Any:
        """Gradients travel with the last forward pass of a step alone."""
        from contextlib import nullcontext

        if last or not isinstance(self.model, nn.parallel.DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def _forward_alone(self, micro: int) -> None:
        """Forward and backward of the first batch's first samples, leaving nothing behind."""
        kept = snapshot.frozen(dict(self.recipe.model.named_buffers()))
        with randomness.isolated(0):
            loss = self._forward(self.recipe.model, self._first(micro))
            torch.autograd.backward(loss)
        self.recipe.optimizer.zero_grad(set_to_none=True)
        for name, buffer in self.recipe.model.named_buffers():
            buffer.copy_(kept[name])

    def _first(self, micro: int) -> Any:
        if self.recipe.feed is not None:
            return _cut(next(iter(self.recipe.feed(0, 0))), 0, micro)
        keys = next(self.order.of(0))[:micro]
        collate = self.recipe.collate or torch.utils.data.default_collate
        return collate([self.samples[key] for key in keys])

    def _agree_on_least(self, micro: int) -> int:
        """The smallest of all ranks' answers: as long as anybody's is below, half of it is tried."""
        size = self.order.share
        while self.ctx.agree(micro < size):
            size //= 2
        return size

    # ------------------------------------------------------------------------------------- epochs

    def _end_epoch(self) -> None:
        mean = self._mean(self.at.sum / self.order.batches)
        row = {"loss": mean}
        if self.recipe.evaluate is not None:
            self.recipe.model.eval()
            with torch.no_grad(), randomness.isolated(randomness.derive(self.ctx.seed, "evaluate", self.at.epoch)):
                row |= self.recipe.evaluate(self.recipe.model, self.at.epoch)
            self.recipe.model.train()
        if self.ctx.rank == 0:
            for name, value in row.items():
                self.ctx.log_metric(name, value, step=self.at.epoch + 1)
        self.at.history.append(row)
        self.at.epoch, self.at.batch, self.at.sum = self.at.epoch + 1, 0, 0.0

    def _mean(self, value: float) -> float:
        if self.ctx.world == 1:
            return value
        total = torch.tensor([value], dtype=torch.float64)  # on CPU: gangs on GPUs have gloo beside nccl
        torch.distributed.all_reduce(total)
        return float(total) / self.ctx.world

    # ------------------------------------------------------------------------------------- checkpoints

    def _due(self) -> bool:
        if self.pace.checkpoint_steps and self.at.step % self.pace.checkpoint_steps == 0:
            return True
        late = bool(self.pace.checkpoint_s) and time.monotonic() - self._saved_at > self.pace.checkpoint_s
        return bool(self.pace.checkpoint_s) and self.ctx.agree(late)

    def _checkpoint(self, *, beside: bool) -> None:
        shared = None
        if self.ctx.rank == 0:
            scheduler = self.recipe.scheduler
            shared = {
                "model": self.recipe.model.state_dict(), "optimizer": self.recipe.optimizer.state_dict(),
                "scheduler": scheduler.state_dict() if scheduler is not None else None,
                "scaler": self.scaler.state_dict(),
                "carried": {name: item.state_dict() for name, item in self.recipe.carried.items()},
            }  # fmt: skip
        own = {"randomness": randomness.capture(self.recipe.sources), "sum": self.at.sum}
        position = {
            "epoch": self.at.epoch, "batch": self.at.batch, "step": self.at.step, "history": list(self.at.history),
            "of": self._identity(), "micro": self.micro,
        }  # fmt: skip
        if beside:
            shared, own = snapshot.frozen(shared), snapshot.frozen(own)
        self.ctx.checkpoint(snapshot.writer(shared, own, position), keep=self.pace.keep, beside=beside)
        self._saved_at = time.monotonic()

    def _restore(self) -> Mapping[str, Any] | None:
        """Take up the newest checkpoint; returns this rank's own part of it where it has one."""
        found = self.ctx.restore()
        if found is None:
            return None
        position = snapshot.read_position(found)
        if position["of"] != self._identity():
            differs = [name for name, value in self._identity().items() if position["of"].get(name) != value]
            raise WorkloadError(
                f"The checkpoint is of another training: {', '.join(differs)} differ.",
                remedy="Submit it as a new job; `permed resume` goes on with the same data and batch.",
            )
        shared = snapshot.read_shared(found)
        self.recipe.model.load_state_dict(shared["model"])
        self.recipe.optimizer.load_state_dict(shared["optimizer"])
        if self.recipe.scheduler is not None:
            self.recipe.scheduler.load_state_dict(shared["scheduler"])
        self.scaler.load_state_dict(shared["scaler"])
        for name, item in self.recipe.carried.items():
            item.load_state_dict(shared["carried"][name])
        saved = _ranks_of(found)
        self.at = Position(position["epoch"], position["batch"], position["step"], 0.0, list(position["history"]))
        if saved == self.ctx.world:
            own = snapshot.read_own(found, self.ctx.rank)
            self.at.sum = own["sum"] if own is not None else 0.0
            return own
        # Other ranks: nobody's streams fit. Each begins its own here; the epoch's loss so far is everybody's mean.
        sums = [row["sum"] for rank in range(saved) if (row := snapshot.read_own(found, rank)) is not None]
        self.at.sum = sum(sums) / len(sums)
        randomness.seed_all(randomness.derive(self.ctx.seed, "rank", self.ctx.rank, self.at.step))
        self.ctx.log(f"taken up at step {self.at.step} by {self.ctx.world} ranks; {saved} had written the checkpoint")
        return None

    def _identity(self) -> dict[str, Any]:
        """What must not have changed for a checkpoint to fit."""
        return {"samples": len(self.recipe.samples), "batch": self.pace.batch, "seed": self.ctx.seed}


def fitting(attempt: Callable[[int], None], most: int, least_of_all: Callable[[int], int]) -> int:
    """The largest of most, most/2, … that `attempt` does not run out of device memory with, agreed by all ranks.

    Raises `WorkloadError` (code `device-memory`) where one sample does not fit.
    """
    size = most
    while True:
        try:
            attempt(size)
            return least_of_all(size)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if size == 1:
                raise DeviceMemoryError from None
            size //= 2


class DeviceMemoryError(WorkloadError):
    """One sample's forward and backward pass does not fit into the device."""

    code = "device-memory"

    def __init__(self) -> None:
        super().__init__(
            "A single sample does not fit into the GPU's memory.",
            remedy="Make the samples or the model smaller, lower the precision, or ask for a GPU with more memory"
            " (resources.gpu_memory).",
        )


def _wrapped(model: nn.Module, ctx: Context) -> nn.Module:
    if ctx.world == 1 or not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    device = torch.device(ctx.device)
    # find_unused_parameters: the only public way to keep the first layout of the buckets for good.
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[device.index or 0] if device.type == "cuda" else None, find_unused_parameters=True
    )


def _micro(batch: Any, share: int, micro: int) -> Iterator[tuple[Any, float, bool]]:
    """The batch in pieces of `micro` samples: (piece, its weight in the mean, whether it is the last)."""
    if micro >= share:
        yield batch, 1.0, True
        return
    for first, after in pairwise([*range(0, share, micro), share]):
        yield _cut(batch, first, after), (after - first) / share, after == share


def _cut(batch: Any, first: int, after: int) -> Any:
    if isinstance(batch, Mapping):
        return {key: _cut(value, first, after) for key, value in batch.items()}
    if isinstance(batch, tuple | list) and batch and isinstance(batch[0], torch.Tensor):
        return type(batch)(_cut(value, first, after) for value in batch)
    return batch[first:after]


def _on(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: _on(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple | list):
        return type(batch)(_on(value, device) for value in batch)
    return batch


def _ranks_of(checkpoint: Path) -> int:
    return len(list(checkpoint.glob("rank-*")))
