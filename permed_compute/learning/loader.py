"""Batches in an order that reads a store part by part, from a loader that knows where it is.

loader = Loader(Seeded(samples, seed), Windowed(len(samples), batch=4, seed=seed, groups=groups), workers=4)
for batch in loader: …            one epoch, or the rest of one
loader.state_dict()               the position: what was handed out, not what workers have read ahead
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from permed_compute.errors import WorkloadError
from permed_compute.learning.order import Batches, Key, Order, Seeded
from permed_compute.learning.randomness import derive


@dataclass(frozen=True, slots=True)
class Windowed(Order):
    """Samples of one group (a volume, a shard) near each other, mixed within a window; another order each epoch.

    groups: of each sample, what it is read from. window: the samples that are mixed at a time: 1 reads group by group,
    the number of samples shuffles all. About window / (samples of a group) groups are in use at once.
    """

    groups: Sequence[int] = ()
    window: int = 1

    def __post_init__(self) -> None:
        Order.__post_init__(self)
        if len(self.groups) != self.samples or self.window < 1:
            raise WorkloadError(f"{self.samples} samples need a group each and a window of at least 1.")

    def of(self, epoch: int, first: int = 0) -> Iterator[list[Key]]:
        """This rank's share of each batch of the epoch, from batch `first` on."""
        mixed = list(self._mixed(epoch))
        for number in range(first, self.batches):
            whole = mixed[number * self.batch : (number + 1) * self.batch]
            yield [(epoch, index) for index in whole[self.rank :: self.world]]

    def _mixed(self, epoch: int) -> Iterator[int]:
        chance = random.Random(derive(self.seed, "window", epoch))
        names = sorted(set(self.groups))
        chance.shuffle(names)
        rank = {name: place for place, name in enumerate(names)}
        held: list[int] = []
        for index in sorted(range(self.samples), key=lambda index: rank[self.groups[index]]):
            held.append(index)
            if len(held) == self.window:
                yield _drawn(held, chance)
        while held:
            yield _drawn(held, chance)


def _drawn(held: list[int], chance: random.Random) -> int:
    place = chance.randrange(len(held))
    held[place], held[-1] = held[-1], held[place]
    return held.pop()


class Loader:
    """An epoch of batches per iteration, taken up where the position says. What comes does not depend on `workers`.

    collate: list of samples → batch; default torch's.
    """

    def __init__(
        self,
        samples: Seeded,
        order: Order,
        *,
        workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.order, self.epoch, self.batch = order, 0, 0
        self._how: dict[str, Any] = {"num_workers": workers, "collate_fn": collate, "pin_memory": pin_memory}
        self._samples = samples

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.order.batches

    def __iter__(self) -> Iterator[Any]:
        # A generator of its own: DataLoader would draw its base seed from the global stream.
        generator = torch.Generator().manual_seed(derive(self.order.seed, "loader", self.epoch))
        batches = Batches(self.order, self.epoch, self.batch)
        for batch in torch.utils.data.DataLoader(
            self._samples, batch_sampler=batches, generator=generator, **self._how
        ):  # fmt: skip
            self.batch += 1  # before it is handed out: who saves while working on it has had it
            yield batch
        self.epoch, self.batch = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        self.epoch, self.batch = int(state["epoch"]), int(state["batch"])
