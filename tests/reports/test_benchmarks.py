from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from permed_compute.reports.benchmarks import compare, differences, failures, figure, render_benchmark_page


def measured(name: str, low: float, median: float, high: float, *, peer: bool = False) -> dict[str, Any]:
    return {
        "name": name, "peer": peer, "n": 3, "median": median, "min": low, "max": high, "wall_s": 1.0, "cpu_s": 2.0,
        "rss_mib": 512.3,
    }  # fmt: skip


def run(*cases: dict[str, Any], better: str = "higher", unit: str = "jobs/s", **more: Any) -> dict[str, Any]:
    group = {"group": "submits", "unit": unit, "better": better, "cases": list(cases), "goals": []}
    benchmark = {"name": "submit", "title": "Submitting", "why": "Users wait.", "error": "", "groups": [group]}
    return {"date": "2026-11-21", "quick": False, "repeats": 3, "benchmarks": [benchmark]} | more


@pytest.mark.parametrize(
    ("new", "better", "verdict"),
    [
        ((120, 125, 130), "higher", "better"),
        ((120, 125, 130), "lower", "worse"),
        ((70, 75, 80), "higher", "worse"),
        ((70, 75, 80), "lower", "better"),
        ((108, 125, 130), "higher", "same"),  # the ranges touch
        ((111, 104, 112), "higher", "same"),  # apart, but by less than 5 %
    ],
)
def test_a_verdict_needs_ranges_apart_and_more_than_five_percent(new, better, verdict) -> None:
    [row] = compare(run(measured("ours", 90, 100, 110), better=better), run(measured("ours", *new), better=better))
    assert row.verdict == verdict
    assert row.ratio == pytest.approx(new[1] / 100)


def test_cases_that_came_and_went_are_said() -> None:
    rows = compare(
        run(measured("old", 1, 2, 3), measured("both", 1, 2, 3)),
        run(measured("both", 1, 2, 3), measured("new", 1, 2, 3)),
    )
    assert [(row.case, row.verdict) for row in rows] == [("both", "same"), ("new", "new"), ("old", "gone")]


def test_a_case_without_figures_compares_as_absent() -> None:
    broken = {"name": "ours", "peer": False, "n": 0, "error": "ValueError: x"}
    [row] = compare(run(measured("ours", 1, 2, 3)), run(broken))
    assert row.verdict == "gone"
    assert failures(run(broken)) == ["submit, submits, ours: ValueError: x"]


def test_another_machine_is_said() -> None:
    old, new = (
        run(machine={"cpus": 2}, packages={"ray": "1"}),
        run(machine={"cpus": 4}, packages={"ray": "1"}, quick=True),
    )
    assert differences(old, new) == ["machine: cpus was 2, is 4", "one of the runs is a quick one"]
    assert differences(old, old) == []


def test_figures_have_four_digits_and_their_unit() -> None:
    assert figure(1234.567, "jobs/s").replace("\u202f", " ") == "1 235 jobs/s"
    assert figure(0.0421, "s").replace("\u202f", " ") == "42.1 ms"
    assert figure(2.0512, "s").replace("\u202f", " ") == "2.051 s"
    assert figure(1.23456, "×").replace("\u202f", " ") == "1.235 ×"


def test_the_page_has_figures_ratio_goals_and_reasons(tmp_path: Path) -> None:
    report = run(
        measured("ours", 590, 600, 610),
        measured("bare", 290, 300, 310, peer=True),
        {"name": "other", "peer": True, "n": 0, "left_out": "other is <not> installed"},
        {"name": "bad", "peer": False, "n": 0, "error": "ValueError: x"},
        machine={"cpus": 2},
        commit="702f1d9aaaaaaaa",
    )
    report["benchmarks"][0]["groups"][0]["goals"] = [
        {"case": "ours", "goal": "≥ 500/s", "met": True},
        {"case": "ours", "goal": "≥ 5000/s", "met": False},
    ]
    page = render_benchmark_page(report, tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    text = page.replace("\u202f", " ")
    for words in (
        "600 jobs/s",
        "590 – 610 jobs/s",
        "2.00 ×",
        "met",
        "missed",
        "1 of 2",
        "702f1d9aaaaa",
        "512 MiB",
    ):
        assert words in text, words
    assert "other is &lt;not&gt; installed" in text
    assert "submit, submits, bad: ValueError: x" in text
    assert text.count('class="bar accent"') == 1 and text.count('class="bar peer"') == 1
