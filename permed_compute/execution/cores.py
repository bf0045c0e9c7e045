"""Which cores of this machine an attempt may run on: whole cores to itself, fractions sharing one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from permed_compute.paths import AttemptPaths

WHOLE = 1000

Shares = dict[int, int]
"""Core → thousandths of it."""


def cores_file(paths: AttemptPaths) -> Path:
    """The choice as JSON, written before the launch; absent where the executor does not know the node."""
    return paths.root / "cores.json"


def choose(cores: Sequence[int], taken: Iterable[Mapping[int, int]], cpu_milli: Sequence[int]) -> Shares:
    """Cores for workers of `cpu_milli` each, beside what live attempts have `taken`.

    Whole cores come from the emptiest, a fraction goes where it fills a core that is already shared. More is asked
    than there is only where admission offers more than the machine has: then the emptiest are shared.
    """
    load = dict.fromkeys(cores, 0)
    for shares in taken:
        for core, share in shares.items():
            if core in load:
                load[core] += share
    mine: Shares = {}
    for share in sorted(_pieces(cpu_milli), reverse=True):
        core = _place(load, share)
        load[core] += share
        mine[core] = mine.get(core, 0) + share
    return mine


def _pieces(cpu_milli: Sequence[int]) -> list[int]:
    pieces = [WHOLE for asked in cpu_milli for _ in range(asked // WHOLE)]
    return pieces + [asked % WHOLE for asked in cpu_milli if asked % WHOLE]


def _place(load: Mapping[int, int], share: int) -> int:
    fits = [core for core in load if load[core] + share <= WHOLE]
    if fits:
        return max(fits, key=lambda core: (load[core], -core))
    return min(load, key=lambda core: (load[core], core))
