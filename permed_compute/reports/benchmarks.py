"""Benchmark runs for people: one page of a run, and a comparison of two."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.paths import replacing
from permed_compute.reports.charts import Bar, Group, grouped_bars
from permed_compute.reports.html import amount, number, render, scalars

_SAME = 0.05
"""Two medians this near are called the same even where each run's own spread is smaller: other days differ by that."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One case in two runs. ratio: new ÷ old; verdict: better, worse, same, new or gone."""

    benchmark: str
    group: str
    case: str
    unit: str
    old: float | None
    new: float | None
    ratio: float | None
    verdict: str


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Compared]:
    """Every case of either run, in the order of the new one. `better` or `worse` only where the two runs' ranges
    (min–max) do not touch and the medians differ by more than 5 %."""
    before, after = dict(_figures(old)), dict(_figures(new))
    return [_compared(key, before.get(key), after.get(key)) for key in [*after, *(k for k in before if k not in after)]]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What makes two runs hard to compare: another machine, other versions, a quick run beside a full one."""
    told = []
    for what in ("machine", "packages"):
        a, b = (run.get(what) or {} for run in (old, new))
        names = sorted(name for name in {*a, *b} if a.get(name) != b.get(name))
        told += [f"{what}: {name} was {a.get(name, 'absent')}, is {b.get(name, 'absent')}" for name in names]
    if bool(old.get("quick")) != bool(new.get("quick")):
        told.append("one of the runs is a quick one")
    return told


def failures(run: Mapping[str, Any]) -> list[str]:
    """What broke in a run, one sentence each."""
    told = []
    for benchmark in run["benchmarks"]:
        if benchmark.get("error"):
            told.append(f"{benchmark['name']}: {benchmark['error']}")
        for group in benchmark["groups"]:
            broken = [case for case in group["cases"] if case.get("error")]
            told += [f"{benchmark['name']}, {group['group']}, {case['name']}: {case['error']}" for case in broken]
    return told


def render_benchmark_page(run: Mapping[str, Any], path: Path) -> Path:
    """Write the run as one self-contained page."""
    benchmarks = [
        {**benchmark, "groups": [_shown(group) for group in benchmark["groups"]], "chart": _chart(benchmark)}
        for benchmark in run["benchmarks"]
    ]
    goals = [goal for benchmark in benchmarks for group in benchmark["groups"] for goal in group["goals"]]
    page = render(
        "benchmarks.html.j2",
        run=run,
        benchmarks=benchmarks,
        goals=goals,
        machine=[(name, amount(value, name)) for name, value in scalars(run.get("machine") or {})],
        packages=sorted((run.get("packages") or {}).items()),
        failures=failures(run),
    )
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def figure(value: float, unit: str) -> str:
    """The figure with its unit, in four significant digits (a benchmark knows no more); seconds below one as ms."""
    if unit == "s" and abs(value) < 1:
        value, unit = value * 1000, "ms"
    return f"{number(float(f'{value:.4g}'))}\u202f{unit}"


def spread(case: Mapping[str, Any], unit: str) -> str:
    """`768.9 – 883.7 jobs/s`: least and most, with the unit once where both have the same."""
    low, high = (figure(case[end], unit).split("\u202f") for end in ("min", "max"))
    left = low[:-1] if low[-1] == high[-1] else low
    return "\u202f".join(left) + " – " + "\u202f".join(high)


def _figures(run: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], dict[str, Any]]]:
    for benchmark in run["benchmarks"]:
        for group in benchmark["groups"]:
            for case in group["cases"]:
                if case.get("n"):
                    row = {**case, "unit": group["unit"], "better": group["better"]}
                    yield (benchmark["name"], group["group"], case["name"]), row


def _compared(key: tuple[str, str, str], old: dict[str, Any] | None, new: dict[str, Any] | None) -> Compared:
    unit = (new or old or {})["unit"]
    if old is None or new is None:
        values = (old["median"] if old else None, new["median"] if new else None)
        return Compared(*key, unit, *values, None, "new" if old is None else "gone")
    ratio = new["median"] / old["median"] if old["median"] else None
    apart = new["min"] > old["max"] or new["max"] < old["min"]
    verdict = "same"
    if ratio is not None and apart and abs(ratio - 1) > _SAME:
        verdict = "better" if (ratio > 1) == (new["better"] == "higher") else "worse"
    return Compared(*key, unit, old["median"], new["median"], ratio, verdict)


def _shown(group: Mapping[str, Any]) -> dict[str, Any]:
    """The group with each figure in words, and ours ÷ the first peer."""
    unit = group["unit"]
    peers = [case["median"] for case in group["cases"] if case["peer"] and case.get("median")]
    rows = []
    for case in group["cases"]:
        row = {**case, "note": case.get("error") or case.get("left_out") or ""}
        if case.get("n"):
            row["figure"] = figure(case["median"], unit)
            row["range"] = spread(case, unit)
            row["memory"] = f"{number(round(case['rss_mib']))}\u202fMiB"
            if peers and not case["peer"]:
                row["against"] = f"{case['median'] / peers[0]:.2f} ×"
        rows.append(row)
    return {**group, "cases": rows}


def _chart(benchmark: Mapping[str, Any]) -> str:
    groups = []
    for group in benchmark["groups"]:
        bars = [
            Bar(
                case["name"],
                case["median"],
                figure(case["median"], group["unit"]),
                case["min"],
                case["max"],
                "peer" if case["peer"] else "accent",
            )
            for case in group["cases"]
            if case.get("n")
        ]
        if bars:
            groups.append(Group(group["group"], bars, f"{group['better']} is better"))
    return grouped_bars(groups, f"{benchmark['title']}: medians, with the range from least to most") if groups else ""
