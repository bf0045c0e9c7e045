"""The work of both sides: a part that only burns CPU, and a task that says when it started. Imports nothing heavy."""

from __future__ import annotations

import os
import time
from pathlib import Path

_MASK = 2**64 - 1


def burn(steps: int, seed: int) -> int:
    """So many steps of a linear congruential generator (Knuth's MMIX constants), in pure Python on one thread."""
    value = seed
    for _ in range(steps):
        value = (value * 6364136223846793005 + 1442695040888963407) & _MASK
    return value


def stamp(path: str) -> None:
    """Write down that the work has begun, and when (seconds since 1970)."""
    now = time.time()
    new = Path(f"{path}.{os.getpid()}")
    new.write_text(repr(now), encoding="ascii")
    new.replace(path)
