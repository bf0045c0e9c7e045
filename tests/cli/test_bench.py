from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from permed_compute.cli import bench
from permed_compute.cli.session import Session
from permed_compute.errors import NotFoundError, SettingsError

TOY = '''
"""A toy."""
from benchmarks.harness import Case

TITLE = "Toy"
WHY = "To test."
SPEED = {speed}


def cases(quick):
    return [
        Case("speed", "ours", "1/s", "higher", lambda: 10.0 * SPEED, goal="≥ 5/s", limit=5),
        Case("speed", "peer", "1/s", "higher", lambda: 8.0, peer=True),
    ]
'''
BROKEN = TOY.replace("lambda: 8.0", "lambda: 1 / 0")


@pytest.fixture
def toys(tmp_path: Path) -> Path:
    folder = tmp_path / "toys"
    folder.mkdir()
    (folder / "quickly.py").write_text(TOY.format(speed=1))
    (folder / "other.py").write_text(TOY.format(speed=2))
    return folder


@pytest.fixture
def program() -> typer.Typer:
    """`bench` mounted as the program mounts it; `--json` stands in front."""
    root = typer.Typer()

    @root.callback()
    def _globals(ctx: typer.Context, as_json: bool = typer.Option(False, "--json")) -> None:
        ctx.obj = Session(as_json)

    root.add_typer(bench.app, name="bench")
    return root


def call(program: typer.Typer, *words: object):
    return CliRunner().invoke(program, [str(word) for word in words])


def test_list_names_them(program: typer.Typer, toys: Path) -> None:
    told = call(program, "--json", "bench", "--list", "--dir", toys)
    assert [row["name"] for row in json.loads(told.stdout)] == ["other", "quickly"]
    assert call(program, "bench", "--list", "--dir", toys).stdout.count("Toy") == 2


def test_a_run_writes_json_and_a_page(program: typer.Typer, toys: Path, tmp_path: Path) -> None:
    told = call(program, "bench", "quickly", "--dir", toys, "--out", tmp_path / "out", "--repeats", "2")
    assert told.exit_code == 0, told.output
    run = json.loads((tmp_path / "out" / "bench.json").read_text())
    [benchmark] = run["benchmarks"]
    assert benchmark["name"] == "quickly"
    assert benchmark["groups"][0]["cases"][0]["values"] == [10.0, 10.0]
    assert run["machine"]["python"] and run["packages"]["numpy"] and "commit" in run
    assert "Toy" in (tmp_path / "out" / "index.html").read_text()
    assert str(tmp_path / "out" / "index.html") in told.stdout


def test_a_case_that_breaks_ends_with_one_and_the_figures_are_kept(program: typer.Typer, toys: Path) -> None:
    (toys / "broken.py").write_text(BROKEN.format(speed=1))
    told = call(program, "bench", "--dir", toys, "--out", toys / "out", "--repeats", "1")
    assert told.exit_code == 1
    assert "ZeroDivisionError" in told.stdout
    assert len(json.loads((toys / "out" / "bench.json").read_text())["benchmarks"]) == 3


def test_terminated_it_keeps_what_it_measured(program: typer.Typer, toys: Path) -> None:
    cut = TOY.format(speed=1).replace("lambda: 8.0", "lambda: os.kill(os.getpid(), signal.SIGTERM)")
    (toys / "quickly.py").write_text(cut.replace("TITLE", "import os, signal\n\nTITLE"))
    told = call(program, "bench", "quickly", "--dir", toys, "--out", toys / "out")
    assert told.exit_code == 130
    run = json.loads((toys / "out" / "bench.json").read_text())
    assert run["interrupted"] and run["benchmarks"][0]["groups"][0]["cases"][0]["first"] == 10.0
    assert "interrupted" in (toys / "out" / "index.html").read_text()


def test_compare_prints_ratios_and_verdicts(program: typer.Typer, toys: Path, tmp_path: Path) -> None:
    call(program, "bench", "quickly", "--dir", toys, "--out", tmp_path / "old", "--repeats", "1")
    (toys / "quickly.py").write_text(TOY.format(speed=3))
    call(program, "bench", "quickly", "--dir", toys, "--out", tmp_path / "new", "--repeats", "1")
    told = call(program, "--json", "bench", "--compare", tmp_path / "old", tmp_path / "new" / "bench.json")
    rows = json.loads(told.stdout)["rows"]
    assert [(row["case"], row["ratio"], row["verdict"]) for row in rows] == [
        ("ours", 3.0, "better"),
        ("peer", 1.0, "same"),
    ]
    assert "better" in call(program, "bench", "--compare", tmp_path / "old", tmp_path / "new").stdout


def test_a_wrong_name_gets_the_nearest_one(program: typer.Typer, toys: Path) -> None:
    told = call(program, "bench", "quikly", "--dir", toys)
    assert isinstance(told.exception, NotFoundError)
    assert told.exception.remedy == "Did you mean quickly?"


def test_what_is_not_there_or_not_a_run_is_said(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        bench.read_run(tmp_path / "none.json")
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(SettingsError):
        bench.read_run(tmp_path / "other.json")
    with pytest.raises(NotFoundError, match="no folder of benchmarks"):
        bench.find_folder(tmp_path / "none")


def test_the_checkouts_own_folder_is_found_and_the_harness_is_no_benchmark() -> None:
    folder = bench.find_folder(None)
    assert (folder / "harness.py").is_file()
    assert "harness" not in bench.load_benchmarks(folder, [])


def test_importing_it_is_light() -> None:
    heavy = ("ray", "torch", "mlflow", "pandas", "psutil", "jinja2")
    code = f"import sys, permed_compute.cli.bench; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
