"""`permed simulate` and `permed report usage`, as an admin types them."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from permed_compute.cli.exits import Exit

TRACE = "submit_s,gpus,duration_s,kind\n" + "".join(
    f"{60 * number},{1 + number % 4},{600 + 60 * number},m\n" for number in range(30)
)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    return file


def test_policies_side_by_side_in_a_table_json_and_a_page(permed, trace: Path, tmp_path: Path) -> None:
    out = tmp_path / "answer"
    answer = permed("simulate", "--trace", trace, "--policy", "now", "--policy", "fifo", "--out", out, "--json")
    assert answer.code == Exit.OK
    report = answer.json
    assert report == json.loads((out / "simulation.json").read_text())
    assert [run["policy"] for run in report["runs"]] == ["now", "fifo"]
    assert report["runs"][0]["completion_mean_s"] <= report["runs"][1]["completion_mean_s"]
    page = (out / "index.html").read_text()
    assert "Who gains, who loses" in page
    assert page.count("<svg") >= 3
    first = (out / "simulation.json").read_bytes()
    permed("simulate", "--trace", trace, "--policy", "now", "--policy", "fifo", "--out", out)
    assert (out / "simulation.json").read_bytes() == first


def test_what_to_simulate_must_be_said(permed, trace: Path) -> None:
    assert "--hospital-day" in permed("simulate").err
    assert permed("simulate", "--trace", trace, "--hospital-day").code != Exit.OK
    assert "Accounts" in permed("simulate", "--trace", trace, "--set", "nobody.gpu:nominal+=1").err


def test_usage_of_what_ran_and_its_own_history(permed, job_file: Path, tmp_path: Path) -> None:
    assert permed("run", job_file).code == Exit.OK
    file = tmp_path / "usage.csv"
    report = permed("report", "usage", "--by", "sector,flavor", "--billing", "saga", "--out", file, "--json").json
    [row] = report["rows"]
    assert (row["flavor"], row["jobs"], row["attempts"]) == ("cpu", 1, 1)
    assert 0 < row["cpu_hours"] < row["requested_cpu_hours"]
    assert row["units"] <= row["reserved_units"]
    with file.open(newline="") as table:
        assert next(csv.DictReader(table))["jobs"] == "1"
    assert permed("report", "usage", "--out", tmp_path / "usage.html").code == Exit.OK
    assert "Usage by account" in (tmp_path / "usage.html").read_text()
    assert permed("report", "usage", "--by", "colour").code != Exit.OK
    again = permed("simulate", "--history", 1, "--out", tmp_path / "again", "--json").json
    assert again["runs"][0]["ended"] == 1
