"""What runs now and what it really uses: the table of `permed top` and `permed status`, and looking again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from permed_compute.cli import words

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from permed_compute.cli.session import Session
    from permed_compute.paths import HomePaths

Row = dict[str, Any]

EVERY_S = 2.0
_SHOWN = 30
_STALE_MS = 60_000
"""A driver that has said nothing for so long is gone or hangs: its figures are of the past."""
_UNITS = (("s", 1), ("min", 60), ("h", 3600))


def with_use(home: HomePaths, live: Iterable[Row], now: int) -> list[Row]:
    """The live jobs' rows, each with what its attempt said last: `use` is None where it has not, or long ago.

    now: ms since 1970 UTC. One short read per job.
    """
    from permed_compute.execution.live import newest_use

    found = []
    for row in live:
        use = newest_use(home.job(row["job"]).attempt(row["attempt"])) if row["attempt"] else None
        told = None
        if use is not None and now - use.at < _STALE_MS:
            told = {
                "at": use.at, "cpus": use.cpus, "memory_mib": use.memory, "gpu_percent": use.gpu,
                "gpu_memory_mib": use.gpu_memory, "done": use.done, "total": use.total, "rate": use.rate,
                "ends": use.ends,
            }  # fmt: skip
        found.append({**row, "use": told})
    return found


def table(rows: list[Row], now: int) -> Table:
    """Of what it was granted, how much each job uses; parts (steps of a training) done, how fast, and what is left."""
    made = words.table("JOB", "NAME", "STATE", "WORKERS", "CPU", "MEMORY", "GPU", "DONE", "RATE", "LEFT", "RUNS SINCE")
    for row in rows:
        use: Mapping[str, Any] = row["use"] or {}
        made.add_row(
            row["job"], row["name"], row["state"], str(row["workers"]), _of(use.get("cpus"), row["cpus"]),
            _memory(use.get("memory_mib"), row["memory_mib"]), _gpu(use, row["gpus"]),
            f"{use['done']}/{use['total']}" if use.get("total") else "", rate(use.get("rate") or 0.0),
            words.span((use["ends"] - now) / 1000) if use.get("ends") else "", words.ago(row["since"]),
        )  # fmt: skip
    return made


def show(console: Console, rows: list[Row], now: int, most: int = _SHOWN) -> None:
    """The table, and how many jobs it leaves out."""
    if rows:
        console.print(table(rows[:most], now))
    if len(rows) > most:
        console.print(f"… and {len(rows) - most} more jobs: --json has them all")


def rate(each_s: float) -> str:
    """0.25 → `'15/min'`: so that there is something before the point."""
    if not each_s:
        return ""
    unit, per_s = next((each for each in _UNITS if each_s * each[1] >= 1), _UNITS[-1])
    return f"{each_s * per_s:.3g}/{unit}"


def _of(used: float | None, granted: float) -> str:
    return f"{granted:g}" if used is None else f"{used:.1f} of {granted:g}"


def _memory(used: int | None, granted: int) -> str:
    there = words.size(granted * 2**20)
    return there if used is None else f"{words.size(used * 2**20)} of {there}"


def _gpu(use: Mapping[str, Any], granted: float) -> str:
    if not granted:
        return ""
    said = [f"{granted:g}"]
    if use.get("gpu_percent") is not None:
        said.append(f"{use['gpu_percent']:.0f} % busy")
    if use.get("gpu_memory_mib") is not None:
        said.append(words.size(use["gpu_memory_mib"] * 2**20))
    return ", ".join(said)


def watch(
    session: Session, look: Callable[[], Any], show: Callable[[Console, Any], None],
    over: Callable[[Any], bool] = lambda value: False, every_s: float = EVERY_S,
) -> None:  # fmt: skip
    """Answer again and again until Ctrl-C, or until `over(value)`. On a terminal in place; into a pipe one after the
    other, JSON as one line each."""
    with suppress(KeyboardInterrupt):
        while True:
            value = look()
            if session.as_json:
                session.line(value)
            else:
                if session.out.is_terminal:
                    session.out.clear()
                show(session.out, value)
            if over(value):
                return
            time.sleep(every_s)
