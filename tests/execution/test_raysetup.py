"""Our quick way to start a Ray worker sets the same variables, hands what it does not know to Ray's own script, and
starts none for an attempt that has been given up; and our quick way to start Ray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from permed_compute.execution import raysetup, raystart

SAY = "import json, os, sys; print(json.dumps([os.environ.get('A'), sys.argv[1:], __file__]))"


@pytest.fixture
def worker(tmp_path: Path) -> Path:
    for name in ("default_worker.py", "setup_worker.py"):
        (tmp_path / name).write_text(SAY)
    return tmp_path / "default_worker.py"


def command(worker: Path, context: dict[str, object], language: str) -> list[str]:
    words = [f"--serialized-runtime-env-context={json.dumps(context)}", f"--language={language}"]
    return [sys.executable, raysetup.__file__, str(worker), "--node-id=7", *words]


def start(worker: Path, context: dict[str, object], language: str = "PYTHON") -> tuple[str | None, list[str], str]:
    done = subprocess.run(command(worker, context, language), capture_output=True, text=True, check=True)
    variable, arguments, file = json.loads(done.stdout)
    return variable, arguments, Path(file).name


def test_variables_are_set_and_the_worker_gets_its_arguments(worker: Path) -> None:
    context = {"env_vars": {"A": "1"}, "py_executable": sys.executable, "command_prefix": [], "java_jars": []}
    assert start(worker, context) == ("1", ["--node-id=7"], "default_worker.py")


@pytest.mark.parametrize(
    ("context", "language"),
    [
        ({"env_vars": {"A": "${HOME}/x"}}, "PYTHON"),
        ({"env_vars": {}, "command_prefix": ["nice"]}, "PYTHON"),
        ({"env_vars": {}, "py_executable": "/another/python"}, "PYTHON"),
        ({"env_vars": {"A": "1"}}, "JAVA"),
    ],
)
def test_the_rest_is_left_to_ray(worker: Path, context: dict[str, object], language: str) -> None:
    variable, arguments, script = start(worker, context, language)
    assert script == "setup_worker.py"
    assert variable is None
    assert f"--language={language}" in arguments
    assert str(worker) in arguments


@pytest.mark.parametrize("more", [{}, {"py_executable": "/another/python"}])
def test_for_an_attempt_that_was_given_up_nothing_is_started(
    worker: Path, tmp_path: Path, more: dict[str, str]
) -> None:
    fence = tmp_path / "a folder" / "fence"
    fence.parent.mkdir()
    context = {"env_vars": {raysetup.FENCE: f"3 {fence}"}, **more}
    assert start(worker, context)[2]  # no fence yet
    for number in ("3", "2"):
        fence.write_text(number)
        assert start(worker, context)[2]
    fence.write_text("4")
    done = subprocess.run(command(worker, context, "PYTHON"), capture_output=True, text=True, check=True)
    assert done.stdout == ""


def test_ray_is_started_without_the_rest_of_its_command_line() -> None:
    start = [sys.executable, "-P", "-X", "importtime", raystart.__file__, "start", "--help"]
    done = subprocess.run(start, capture_output=True, text=True, check=True)
    assert "--head" in done.stdout
    assert "ray.scripts.scripts\n" in done.stderr and "ray.serve\n" not in done.stderr
