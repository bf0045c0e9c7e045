"""The program itself: help, global options, errors in words and codes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from typer.main import get_command

from permed_compute.cli.app import app, global_options_first
from permed_compute.cli.exits import MEANING, Exit, of_error, of_states
from permed_compute.errors import PermedError, SpecError
from permed_compute.states import JobState


def test_help_names_every_exit_code(permed) -> None:
    said = " ".join(permed("--help").out.split())
    for code, text in MEANING.items():
        assert f"{code.value} {text}" in said


def _leaves(command, path):
    """Names of all commands that do something, `audit verify` and not `audit`."""
    below = getattr(command, "commands", {})
    return [" ".join(path)] if not below else [leaf for name in below for leaf in _leaves(below[name], (*path, name))]


def test_every_command_teaches_by_an_example(permed) -> None:
    commands = set(get_command(app).commands)
    assert commands >= {
        "run", "submit", "jobs", "status", "why", "logs", "cancel", "hold", "release", "resume", "results", "catalog",
        "validate", "doctor", "demo", "controller", "backup", "restore", "gc", "audit",
    }  # fmt: skip
    for command in _leaves(get_command(app), ()):
        if command == "bench":  # it lists what stands instead
            continue
        said = " ".join(permed(*command.split(), "--help").out.split())
        assert re.search(rf"Example: permed (--home \S+ )?{command}", said), command


def test_global_options_may_stand_anywhere() -> None:
    moved = global_options_first(["jobs", "--home", "/x", "--all", "--json", "--executor=inprocess"])
    assert moved == ["--home", "/x", "--json", "--executor=inprocess", "jobs", "--all"]
    assert global_options_first(["run", "--", "--json"]) == ["run", "--", "--json"]


def test_version(permed) -> None:
    from permed_compute import __version__

    assert permed("--version").out.strip() == __version__


@pytest.mark.parametrize(
    "words",
    [["no-such-command"], ["run"], ["jobs", "--limit", "0"], ["submit", "radiology/brain-extraction", "--set", "y"]],
)
def test_wrong_usage_is_2_and_says_where_help_is(permed, words: list[str]) -> None:
    answer = permed(*words)
    assert answer.code == Exit.USAGE
    assert "--help" in answer.err
    assert "Traceback" not in answer.err


def test_errors_say_what_and_what_to_do_and_show_no_traceback(permed) -> None:
    answer = permed("why", "00000000")
    assert answer.code == Exit.NOT_FOUND
    assert "There is no job '00000000'" in answer.err
    assert "permed jobs" in answer.err
    assert "Traceback" not in answer.err
    assert answer.out == ""


def test_errors_as_json_stand_on_stderr(permed) -> None:
    answer = permed("why", "00000000", "--json")
    assert json.loads(answer.err)["code"] == "not-found"
    assert answer.out == ""


def test_debug_shows_the_traceback(permed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMED_DEBUG", "1")
    with pytest.raises(PermedError):
        permed("why", "00000000")


def test_a_wrong_setting_is_wrong_usage(permed) -> None:
    answer = permed("jobs", "--executor", "magic")
    assert answer.code == Exit.USAGE
    assert "ray or inprocess" in answer.err


def test_every_error_kind_has_a_code() -> None:
    assert of_error(SpecError("job.yaml", [])) is Exit.USAGE
    assert of_error(PermedError("anything")) is Exit.FAILED


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["SUCCEEDED", "SUCCEEDED"], Exit.OK),
        (["SUCCEEDED", "PARTIAL"], Exit.PARTIAL),
        (["PARTIAL", "FAILED"], Exit.FAILED),
        (["CANCELLED"], Exit.FAILED),
        (["HELD", "SUCCEEDED"], Exit.INTERRUPTED),
    ],
)
def test_the_code_of_several_jobs_is_the_worst(states: list[str], code: Exit) -> None:
    assert of_states([JobState(state) for state in states]) is code


def test_the_shell_completes_commands() -> None:
    """Typer's own protocol: the words so far come by the environment."""
    environment = {**os.environ, "_PERMED_COMPLETE": "complete_bash", "COMP_WORDS": "permed va", "COMP_CWORD": "1"}
    words = [sys.executable, "-c", "import sys; from permed_compute.cli import main; sys.exit(main())"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=150)
    assert done.stdout.split() == ["validate"]
