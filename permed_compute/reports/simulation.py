"""Pages for people who set quotas: what a policy would do to whom, and who used what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permed_compute.paths import replacing
from permed_compute.reports.charts import Bar, Group, Line, curves, grouped_bars, horizontal_bars
from permed_compute.reports.html import number, render, seconds

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("completion_mean_s", "Completion, mean", "s"), ("completion_p50_s", "p50", "s"), ("completion_p99_s", "p99", "s"),
    ("wait_mean_s", "Wait, mean", "s"), ("wait_p99_s", "p99", "s"), ("utilisation", "In use", "%"),
    ("goodput", "Goodput", "%"), ("waste", "Waste", "%"), ("preemptions", "Preemptions", ""),
    ("deadlines_missed", "Deadlines missed", ""), ("idle_lent", "Idle lent", "%"),
    ("fragmentation", "Unplaceable", "%"), ("jain_regions", "Jain, regions", ""),
)  # fmt: skip
"""What the comparison shows: key of the summary, heading, unit."""


def shown(value: Any, unit: str) -> str:
    """The figure as the table prints it."""
    if unit == "s":
        return seconds(value)
    if unit == "%":
        return f"{100 * value:.1f} %"
    return number(value)


def render_simulation_page(report: Mapping[str, Any], path: Path) -> Path:
    """Write the report (`permed simulate --json` prints the same) as one self-contained page."""
    runs: Sequence[Mapping[str, Any]] = report["runs"]
    last = runs[0]["series"]["hours"][-1] if runs and runs[0]["series"]["hours"] else 0.0
    axis = {"left": "0 h", "right": f"{number(float(last))} h"}
    charts = [
        ("Jobs waiting", curves(_lines(runs, "waiting"), "Jobs waiting over time", unit="jobs", **axis)),
        ("Share of the pool in use", curves(_lines(runs, "busy"), "Share in use over time", unit="", **axis)),
    ]
    charts += [
        (f"Mean wait by {by}", grouped_bars(_by_group(runs, by), f"Mean wait by {by}"))
        for by in ("band", "region", "sector", "account") if by in runs[0]["groups"]
    ]  # fmt: skip
    page = render(
        "simulation.html.j2", report=report, runs=runs, charts=charts, shifts=report["shifts"],
        columns=[heading for _, heading, _ in COLUMNS],
        rows=[(run["policy"], [shown(run[key], unit) for key, _, unit in COLUMNS]) for run in runs],
    )  # fmt: skip
    return _written(page, path)


def _lines(runs: Sequence[Mapping[str, Any]], what: str) -> list[Line]:
    return [
        Line(run["policy"], run["series"][what], "accent" if place == 0 else "peer") for place, run in enumerate(runs)
    ]


def _by_group(runs: Sequence[Mapping[str, Any]], by: str) -> list[Group]:
    names = sorted({row["name"] for run in runs for row in run["groups"][by]})
    found = [{row["name"]: row for row in run["groups"][by]} for run in runs]
    return [
        Group(
            name,
            [
                Bar(
                    run["policy"], rows[name]["wait_mean"], seconds(rows[name]["wait_mean"]),
                    tone="accent" if place == 0 else "peer",
                )
                for place, (run, rows) in enumerate(zip(runs, found, strict=True)) if name in rows
            ],
            f"{max(rows[name]['jobs'] for rows in found if name in rows)} jobs",
        )
        for name in names
    ]  # fmt: skip


def render_usage_page(report: Mapping[str, Any], path: Path) -> Path:
    """Write `permed report usage` as one self-contained page."""
    rows = report["rows"]
    bars = [
        Bar(" · ".join(str(row[name]) for name in report["by"]), row["gpu_hours"], f"{row['gpu_hours']:.1f} GPU-hours")
        for row in rows[:30]
    ]
    page = render(
        "usage.html.j2", report=report, rows=rows, chart=horizontal_bars(bars, "GPU-hours"), by=report["by"],
        figures=[name for name in (rows[0] if rows else {}) if name not in report["by"]],
    )  # fmt: skip
    return _written(page, path)


def _written(page: str, path: Path) -> Path:
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path
