"""Every benchmark that stands in the folder loads, names its goals, and runs in its quick form."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is no installed package

from benchmarks import harness
from permed_compute.cli.bench import load_benchmarks

MODULES = load_benchmarks(Path(__file__).resolve().parents[2] / "benchmarks", [])

# Groups without a peer in the same run: admission's are measured against published figures and scaling only; a round of
# our controller, and the network's share of our own batch, have none.
WITHOUT_A_PEER = {
    ("admission", "a trace on the virtual clock"),
    ("admission", "admissions through SQLite"),
    ("admission", "cost by jobs waiting"),
    ("admission", "makespan with Kueue's run times"),
    ("admission", "one decision"),
    ("gang", "50 running jobs"),
    ("radiology_batch", "3 studies on a GPU"),
    ("radiology_batch", "3 studies on a GPU, busy"),
    ("radiology_batch", "3 studies, share of wall time outside the network"),
    ("pathology_convert", "all levels, MB of pixels per CPU-s"),
}
STARTS_SERVERS = {"submit", "overhead", "latency", "omics", "pathology_encode"}


@pytest.mark.parametrize("name", MODULES)
def test_every_benchmark_says_what_it_is_for_and_measures_ours_in_each_group(name: str) -> None:
    module = MODULES[name]
    cases = module.cases(True)
    assert module.TITLE
    assert "Goal" in module.WHY
    for group in {case.group for case in cases}:
        members = [case for case in cases if case.group == group]
        assert {case.peer for case in members} == ({False} if (name, group) in WITHOUT_A_PEER else {True, False})
        assert len({case.name for case in members}) == len(members)
        assert name not in STARTS_SERVERS or all(case.close is not None for case in members)


def test_the_goals_are_those_that_were_promised() -> None:
    limits = {case.limit for case in MODULES["submit"].cases(True) if case.limit}
    assert limits == {500, 4000, 10_000}
    assert [case.ratio for case in MODULES["overhead"].cases(True) if case.ratio] == [1.05]
    assert {case.ratio for case in MODULES["latency"].cases(True) if case.group.startswith("warm")} == {None, 1.0}


@pytest.mark.ray
@pytest.mark.soak  # half a minute; the benchmark itself refuses other sums whenever it is run
@pytest.mark.timeout(600)
def test_both_sides_of_the_overhead_compute_the_same() -> None:
    pytest.importorskip("ray")
    [report] = harness.run({"overhead": MODULES["overhead"]}, quick=True, repeats=1)["benchmarks"]
    assert not report["error"]
    [group] = report["groups"]
    assert [case.get("error") for case in group["cases"]] == [None] * 3
    assert all(case["median"] > 0 for case in group["cases"])
