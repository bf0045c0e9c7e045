"""In which order the samples of an epoch are seen, and by which rank: a function of (seed, epoch).

So a position is one number, and another number of ranks sees the same batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from permed_compute.errors import WorkloadError
from permed_compute.learning.randomness import derive, isolated

Key = tuple[int, int]
"""(epoch, index) of a sample."""


class Samples(Protocol):
    """A map-style dataset; its random transforms may draw from MONAI's `R` or from the global streams."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Any: ...


class Seeded(torch.utils.data.Dataset[Any]):
    """`samples`, asked by (epoch, index) and made alike each time: every source of randomness is seeded by that."""

    def __init__(self, samples: Samples, seed: int) -> None:
        self._samples, self._seed = samples, seed

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        value = derive(self._seed, "sample", epoch, index)
        # MONAI's Compose hands a seed of its own to each random transform; a dataset carries it as `transform`.
        holders: tuple[Any, ...] = (self._samples, getattr(self._samples, "transform", None))
        for holder in holders:
            if hasattr(holder, "set_random_state"):
                holder.set_random_state(seed=value % 2**32)
        with isolated(value):
            return self._samples[index]


@dataclass(frozen=True, slots=True)
class Order:
    """Batches of `batch` samples over all ranks; each rank takes every `world`-th of a batch.

    An epoch's last samples that fill no batch are left out: others each epoch, as each is shuffled anew.
    Raises `WorkloadError` where the batch cannot be shared evenly, or there are fewer samples than one batch.
    """

    samples: int
    batch: int
    seed: int
    rank: int = 0
    world: int = 1

    def __post_init__(self) -> None:
        if self.batch % self.world:
            raise WorkloadError(
                f"A batch of {self.batch} samples cannot be shared evenly by {self.world} ranks.",
                remedy="Make the batch a multiple of the number of workers.",
            )
        if self.samples < self.batch:
            raise WorkloadError(
                f"There are {self.samples} samples and a batch is {self.batch}.", remedy="Make the batch smaller."
            )

    @property
    def batches(self) -> int:
        """Per epoch."""
        return self.samples // self.batch

    @property
    def share(self) -> int:
        """Samples of a batch that one rank sees."""
        return self.batch // self.world

    def of(self, epoch: int, first: int = 0) -> Iterator[list[Key]]:
        """This rank's share of each batch of the epoch, from batch `first` on."""
        for rows in self.rows(epoch, first):
            yield [(epoch, index) for index in rows.tolist()]

    def rows(self, epoch: int, first: int = 0) -> Iterator[torch.Tensor]:
        """The same as (share,) int64, for samples that lie in memory."""
        generator = torch.Generator().manual_seed(derive(self.seed, "order", epoch))
        shuffled = torch.randperm(self.samples, generator=generator)
        for number in range(first, self.batches):
            whole = shuffled[number * self.batch : (number + 1) * self.batch]
            yield whole[self.rank :: self.world]


@dataclass(frozen=True, slots=True)
class Batches:
    """The rest of one epoch, as torch's `DataLoader` wants its `batch_sampler`."""

    order: Order
    epoch: int
    first: int

    def __iter__(self) -> Iterator[list[Key]]:
        return self.order.of(self.epoch, self.first)

    def __len__(self) -> int:
        return self.order.batches - self.first
