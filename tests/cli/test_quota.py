"""`permed quota`, `top`, `drain` … and `replay-decisions`, as a user types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from permed_compute.cli.app import run

USER = __import__("getpass").getuser()
POLICY = {
    "capacity": {"cpu": 8},
    "accounts": {
        "mine": {"quota": {"cpu": {"nominal": 8}}, "members": [{"user": USER}]},
        "theirs": {"members": [{"user": "somebody-else"}]},
    },
}
CODE = """
from permed_compute import Map, Part, PartResult
toy = Map(plan=lambda spec, state, ctx: [Part("p", inputs=("x",))], run=lambda part, model, ctx: PartResult())
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in {
        "HOME": tmp_path / "home", "EXECUTOR": "inprocess", "TRACKING_URI": "none", "ANCHOR": tmp_path / "anchor",
        "CPUS": "2", "MEMORY": "4096",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PERMED_{name}", str(value))
    (tmp_path / "toys.py").write_text(CODE)
    (tmp_path / "quota.yaml").write_text(yaml.safe_dump(POLICY))
    return tmp_path


def job(folder: Path, account: str) -> str:
    file = folder / f"{account}.yaml"
    file.write_text(yaml.safe_dump({"name": "toy", "workload": "toys:toy", "code": str(folder), "account": account}))
    return str(file)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> object:
    capsys.readouterr()
    assert run(["--json", *words]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_a_policy_from_file_to_decisions_that_can_be_taken_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quota = str(here / "quota.yaml")
    version = answer(capsys, "quota", "check", quota)["policy"]
    assert answer(capsys, "quota", "apply", quota)["policy"] == version
    assert run(["submit", job(here, "theirs")]) == 5 and "not a member" in capsys.readouterr().err
    assert run(["run", job(here, "mine")]) == 0
    events = answer(capsys, "quota", "show")
    assert events["policy"] == version and events["accounts"][0]["flavors"]["cpu"]["quota"] == 8000
    assert answer(capsys, "replay-decisions") == {"decisions": 1, "moves": 1, "different": []}


def test_frozen_and_drained_and_why(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "freeze", "mine")
    [made] = answer(capsys, "submit", job(here, "mine"))
    said = answer(capsys, "why", made["id"])
    assert said["code"] == "frozen" and "permed thaw mine" in said["change"]
    answer(capsys, "thaw", "mine")
    answer(capsys, "drain", "*")
    assert answer(capsys, "why", made["id"])["code"] == "drained"
    assert answer(capsys, "top")["accounts"][0]["waiting"] == {"drained": 1}
    answer(capsys, "undrain", "*")
    moments = ("--from", "2020-01-01T00:00+01:00", "--until", "2060-01-01T00:00+01:00")
    name = answer(capsys, "status")["nodes"][0]["node"]
    answer(capsys, "reserve", "kernel", name, *moments)
    assert answer(capsys, "why", made["id"])["code"] == "window"
    answer(capsys, "unreserve", "kernel")
    assert answer(capsys, "why", made["id"])["code"] == "admissible"


def test_a_bad_file_is_refused_with_its_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = here / "bad.yaml"
    bad.write_text("capacity: {cpu: 8}\naccounts:\n  a: {quota: {cpu: {nominal: 9}}}\n")
    assert run(["quota", "check", str(bad)]) == 2
    assert "line 3" in capsys.readouterr().err
    assert answer(capsys, "quota", "diff", str(here / "quota.yaml"), str(here / "quota.yaml")) == []
