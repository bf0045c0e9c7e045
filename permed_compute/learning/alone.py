"""A part of a map as a training sees it: one rank with a seed of its own, and nothing kept in between.

For trainings that are small enough to lose: a trial of a sweep, a fold of a cross-validation.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from permed_compute.workloads.port import Context


class _Alone:
    rank, world = 0, 1

    def __init__(self, ctx: Context, seed: int) -> None:
        self._ctx, self.spec, self.seed = ctx, ctx.spec, seed

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        """Curves of many trainings are no curve."""

    def progress(self, done: int, total: int) -> None:
        """Parts are counted, not their steps."""

    def checkpoint(self, save: Any, *, keep: Any = None, beside: bool = False) -> None:
        """A part is small enough to lose."""

    def restore(self) -> Path | None:
        return None

    def agree(self, mine: bool) -> bool:
        return mine


def alone(ctx: Context, seed: int) -> Context:
    """`ctx` for one training within a part."""
    return cast(Context, _Alone(ctx, seed))
