"""Randomness that survives an interruption: derived from what is drawn for, or captured and put back.

A sample's random transforms are seeded by (seed, epoch, index), never by the state of a loader's worker: the same
sample of the same epoch is the same tensor whoever makes it, and however often. What a model draws itself (dropout)
comes from the global streams, which checkpoints carry for every rank.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive(*parts: int | str) -> int:
    """A 63-bit seed of these numbers and words: SHA-256, so that neighbours have nothing in common."""
    return int.from_bytes(hashlib.sha256(":".join(map(str, parts)).encode()).digest()[:8], "big") >> 1


def seed_all(value: int) -> None:
    """Seed the global streams of Python, numpy and torch (all devices)."""
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.manual_seed(value)


@contextmanager
def isolated(value: int) -> Iterator[None]:
    """The global CPU streams seeded with `value` inside, and afterwards as if nothing had been drawn."""
    before = _Streams.now()
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        before.put_back()


class _Streams:
    """The global CPU streams, kept for a moment."""

    def __init__(self, python: Any, numpy: Any, torch_state: torch.Tensor) -> None:
        self._python, self._numpy, self._torch = python, numpy, torch_state

    @classmethod
    def now(cls) -> _Streams:
        return cls(random.getstate(), np.random.get_state(), torch.get_rng_state())

    def put_back(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)


def capture(sources: Sequence[Any] = ()) -> dict[str, Any]:
    """Every stream as tensors and numbers: Python, numpy, torch, each CUDA device, and `sources` in their order.

    sources: objects with a numpy `RandomState` in `R`, as MONAI's `Randomizable` has.
    """
    version, words, gauss = random.getstate()
    return {
        "python": {"version": version, "words": torch.tensor(words, dtype=torch.int64), "gauss": gauss},
        "numpy": _mersenne(np.random.get_state(legacy=False)),
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "sources": [_mersenne(source.R.get_state(legacy=False)) for source in sources],
    }


def put_back(state: Mapping[str, Any], sources: Sequence[Any] = ()) -> None:
    """The inverse of `capture`. Raises `ValueError` where the number of `sources` is another one."""
    if len(sources) != len(state["sources"]):
        raise ValueError(f"{len(state['sources'])} sources of randomness were saved, {len(sources)} are there.")
    python = state["python"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    np.random.set_state(_twister(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    for source, saved in zip(sources, state["sources"], strict=True):
        source.R.set_state(_twister(saved))


def _mersenne(state: Mapping[str, Any]) -> dict[str, Any]:
    key = torch.from_numpy(state["state"]["key"].astype(np.int64))
    return {
        "key": key, "pos": int(state["state"]["pos"]), "has_gauss": int(state["has_gauss"]),
        "gauss": float(state["gauss"]),
    }  # fmt: skip


def _twister(row: Mapping[str, Any]) -> dict[str, Any]:
    key = row["key"].numpy().astype(np.uint32)
    return {
        "bit_generator": "MT19937", "state": {"key": key, "pos": row["pos"]}, "has_gauss": row["has_gauss"],
        "gauss": row["gauss"],
    }  # fmt: skip
