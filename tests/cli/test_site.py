"""`permed site`, as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permed_compute.cli import main
from permed_compute.cli.exits import Exit

JOB = """name: brain
workload: radiology/brain-extraction
data_class: green
account: nn9999k
resources: {gpus: 2, cpus: 16, memory: 64GiB, flavors: [a100]}
time_limit: 5d
"""


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("PERMED_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", "")  # no Slurm of this machine
    file = tmp_path / "job.yaml"
    file.write_text(JOB)
    return str(file)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    capsys.readouterr()
    assert main([*words, "--json"]) == Exit.OK
    value: dict[str, object] = json.loads(capsys.readouterr().out)
    return value


def test_list_names_every_site(capsys: pytest.CaptureFixture[str]) -> None:
    rows = said(capsys, "site", "list")
    assert {"saga", "betzy", "olivia", "tsd", "huntcloud", "safe", "lumi", "local"} <= {row["name"] for row in rows}  # type: ignore[index]


def test_show_gives_each_fact_its_source_and_whether_it_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    facts = {row["fact"]: row for row in said(capsys, "site", "show", "tsd")["facts"]}  # type: ignore[attr-defined]
    assert facts["partitions.accel"]["verified"] is False
    assert all("read 20" in row["source"] for row in facts.values())


def test_check_says_yes_and_what_it_rests_on(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = said(capsys, "site", "check", job, "--site", "saga")
    assert row["partition"] == "a100" and row["refusals"] == [] and row["doubts"]


def test_check_refuses_with_the_rule_and_its_page(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "check", job, "--site", "saga", "--set", "data_class=red"]) == Exit.REFUSED
    assert "DATA_CLASS" in capsys.readouterr().err
    assert (
        main(["--json", "site", "check", job, "--site", "olivia", "--set", "resources.flavors=[gpu]"]) == Exit.REFUSED
    )
    error = json.loads(capsys.readouterr().err)
    assert error["code"] == "site-refused" and {row["rule"] for row in error["refusals"]} == {"ARCH", "CONTAINER"}


def test_cost_against_what_is_left(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    row = said(capsys, "site", "cost", job, "--site", "saga", "--left", "1000", "--used", "2h")
    assert (row["billing_units"], row["reserved"], row["charged"], row["fits"]) == (16, 1920, 32, False)
    assert said(capsys, "site", "cost", job, "--site", "saga", "--left", "1920")["fits"] is True
    row = said(capsys, "site", "cost", job, "--site", "saga")
    assert row["left"] is None


def test_cost_of_the_pages_own_case(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "resources={cpus: 40, memory: 172000MiB}"]
    assert said(capsys, "site", "cost", job, "--site", "saga", *words)["billing_units"] == 43


def test_render_prints_the_file_and_nothing_else(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "render", job, "--site", "saga"]) == Exit.OK
    out = capsys.readouterr().out
    assert out.startswith("#!/bin/bash\n#SBATCH --job-name=permed-JOB-0001\n") and "--gpus-per-node=2\n" in out
    assert out.endswith("/jobs/JOB/attempts/0001\n") and " -m permed_compute.execution.allocation " in out


def test_render_refuses_what_check_refuses(job: str) -> None:
    assert main(["site", "render", job, "--site", "saga", "--account", "mine"]) == Exit.REFUSED


def test_a_script_is_checked_like_a_job(job: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "own.sh"
    script.write_text("#!/bin/bash\n#SBATCH --account=nn9999k --time=1:0:0 --partition=large --mem=10G\n")
    assert main(["site", "check", str(script), "--site", "olivia"]) == Exit.REFUSED
    assert "MEMORY_OPTION" in capsys.readouterr().err


def test_settings_name_account_and_image(
    job: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PERMED_SITE_ACCOUNT", "nn1111k")
    monkeypatch.setenv("PERMED_SITE_IMAGE", "/p/permed.sif")
    row = said(capsys, "site", "check", job, "--site", "saga")
    assert (row["account"], row["image"]) == ("nn1111k", "/p/permed.sif")


def test_without_a_site_it_asks_for_one(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["site", "check", job]) == Exit.USAGE
    assert "permed site list" in capsys.readouterr().err
