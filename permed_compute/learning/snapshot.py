"""The state of a training, to files and back: tensors, numbers and words only, never a pickled object.

shared.pt (rank 0)   model, optimizer, scheduler, scaler: the same on every rank
own.pt (each rank)   its streams of randomness
position.json (rank 0)   how far it is, and what it was made with
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from permed_compute.paths import read_json, write_json

SHARED, OWN, POSITION = "shared.pt", "own.pt", "position.json"


def frozen(value: Any) -> Any:
    """A copy in main memory that later steps do not change: what may be written while training goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: frozen(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(frozen(each) for each in value)
    return value


def writer(
    shared: Mapping[str, Any] | None, own: Mapping[str, Any], position: Mapping[str, Any]
) -> Callable[[Path], None]:
    """What `ctx.checkpoint` calls. shared: None on all ranks but the first."""

    def write(folder: Path) -> None:
        torch.save(own, folder / OWN)
        if shared is not None:
            torch.save(shared, folder / SHARED)
            write_json(folder / POSITION, position)

    return write


def read_shared(checkpoint: Path) -> Mapping[str, Any]:
    return _read(checkpoint / "rank-0" / SHARED)


def read_position(checkpoint: Path) -> Mapping[str, Any]:
    return dict(read_json(checkpoint / "rank-0" / POSITION) or {})


def read_own(checkpoint: Path, rank: int) -> Mapping[str, Any] | None:
    """None where fewer ranks wrote it."""
    path = checkpoint / f"rank-{rank}" / OWN
    return _read(path) if path.exists() else None


def _read(path: Path) -> Mapping[str, Any]:
    # weights_only: a file that holds anything but tensors, numbers and words is refused, not executed.
    state: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
