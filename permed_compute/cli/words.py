"""How jobs, times and sizes look in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import typer

from permed_compute.states import JobState

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from permed_compute.queue.port import Job

COLOURS = {
    JobState.SUCCEEDED: "green", JobState.PARTIAL: "yellow", JobState.FAILED: "red", JobState.TIMED_OUT: "red",
    JobState.CANCELLED: "dim", JobState.RUNNING: "cyan", JobState.HELD: "yellow", JobState.UNKNOWN: "magenta",
}  # fmt: skip


def state(job: Job) -> str:
    colour = COLOURS.get(job.state, "")
    return f"[{colour}]{job.state.value}[/]" if colour else job.state.value


def ago(ms: int) -> str:
    """`'3m'` since that moment; '' for 0."""
    return span(time.time() - ms / 1000) if ms else ""


def span(seconds: float) -> str:
    """3723 → `'1h02m'`."""
    whole = max(0, int(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def moment(ms: int) -> str:
    """Local time of a moment, or ''."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(ms / 1000)) if ms else ""


def size(count: float) -> str:
    """1536 → `'1.5 KiB'`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def counts(numbers: Mapping[str, int]) -> str:
    """`'17 done, 3 refused'`."""
    return ", ".join(f"{count} {name.lower()}" for name, count in numbers.items() if count)


def job_row(job: Job) -> dict[str, Any]:
    """A job for `--json`."""
    from permed_compute.queue.rows import job_row as whole

    return whole(job)


def job_lines(console: Console, jobs: Iterable[Job]) -> None:
    """A line per job: id, state, name."""
    for job in jobs:
        console.print(f"{job.id}  {state(job)}  {job.spec.name}")


def table(*columns: str) -> Table:
    from rich.table import Table

    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")  # never cut: ids and paths are there to be copied
    return made


def facts(rows: Iterable[tuple[str, Any]]) -> Table:
    """Two columns without a head: names and values, shown as they are; empty values are left out.

    A value that is to have colours is a `rich.text.Text`.
    """
    from rich.table import Table
    from rich.text import Text

    made = Table(box=None, pad_edge=False, show_header=False)
    made.add_column(style="dim", no_wrap=True)
    made.add_column(overflow="fold")
    for name, value in rows:
        if value not in ("", None):
            made.add_row(Text(name), value if isinstance(value, Text) else Text(str(value)))
    return made


def duration(text: str) -> int:
    """`'30d'` → seconds. Raises `typer.BadParameter`."""
    from permed_compute.spec import parse_duration

    try:
        return parse_duration(text)
    except ValueError as error:
        raise typer.BadParameter(f"{error}.") from None
