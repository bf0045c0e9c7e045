"""`--via ssh:HOST` against a real sshd on loopback; behind it the same environment's permed with a home of its own."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from permed_compute.cli.exits import Exit
from permed_compute.errors import NotFoundError
from permed_compute.paths import HomePaths
from permed_compute.testing import sshd

pytest.importorskip("paramiko", reason="paramiko is not installed")


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The home on the other side; `ssh far` leads there, as the user's own configuration would have it."""
    paths = HomePaths(tmp_path / "far" / "home").create()
    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PERMED_HOME": paths.root,
        "PERMED_EXECUTOR": "inprocess", "PERMED_TRACKING_URI": "none", "PERMED_ANCHOR": tmp_path / "far" / "anchor",
        "PERMED_CPUS": "2",
    }  # fmt: skip
    try:
        with sshd.server(tmp_path / "sshd", environment={k: str(v) for k, v in environment.items()}) as server:
            wrapper = tmp_path / "bin" / "ssh"
            wrapper.parent.mkdir()
            wrapper.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {server.config} "$@"\n')
            wrapper.chmod(0o755)
            monkeypatch.setenv("PATH", f"{wrapper.parent}{os.pathsep}{os.environ['PATH']}")
            yield paths
    except NotFoundError as error:
        pytest.skip(str(error))
    finally:
        shutil.rmtree(paths.runtime, ignore_errors=True)


def test_a_job_goes_there_runs_there_and_its_results_come_back(permed, far, job_file, tmp_path):
    sent = permed("--json", "submit", "--via", "ssh:far", job_file)
    assert sent.code == 0, sent.err
    (row,) = sent.json
    assert json.loads(_there("jobs", "--all", "--json"))[0]["id"] == row["id"] and row["state"] == "QUEUED"
    assert not list(far.incoming.iterdir()), "what was unpacked is not kept twice"
    assert {stat.S_IMODE(p.stat().st_mode) for p in far.received.rglob("*") if p.is_file()} == {0o600}
    _run_there(far)
    assert "SUCCEEDED" in _there("status", row["id"])
    back = permed("--json", "results", "--via", "ssh:far", row["id"], "--to", tmp_path / "results")
    assert back.code == 0, back.err
    assert (tmp_path / "results" / "manifest.json").is_file() and (tmp_path / "results" / "index.html").is_file()
    assert not list(far.outgoing.iterdir())


def _there(*words):
    """What a command that runs there says: as a process, because its output goes to the file descriptors."""
    program = Path(sys.executable).with_name("permed")
    done = subprocess.run([program, "--via", "ssh:far", *words], capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _run_there(far):
    environment = os.environ | {
        "PERMED_HOME": str(far.root), "PERMED_EXECUTOR": "inprocess", "PERMED_TRACKING_URI": "none",
        "PERMED_ANCHOR": str(far.root.parent / "anchor"),
    }  # fmt: skip
    subprocess.run(
        [Path(sys.executable).with_name("permed"), "controller", "--once-idle"], env=environment, check=True,
        timeout=200, capture_output=True,
    )  # fmt: skip


def test_typed_again_after_a_cut_it_is_queued_once(permed, far, job_file, monkeypatch):
    from permed_compute.errors import TransferError
    from permed_compute.transfer.remote import Remote

    ask = Remote.ask

    def cut(self, *words, say=None):
        answer = ask(self, *words, say=say)
        if words[0] == "submit":
            raise TransferError("cut before the answer came")
        return answer

    monkeypatch.setattr(Remote, "ask", cut)
    broken = permed("submit", "--via", "ssh:far", job_file)
    assert broken.code == Exit.UNAVAILABLE and "cut before the answer" in broken.err
    monkeypatch.setattr(Remote, "ask", ask)
    (record,) = far.submissions.glob("*.json")
    record.write_text(json.dumps(json.loads(record.read_text()) | {"jobs": []}))  # as if it died before writing them
    first = permed("--json", "submit", "--via", "ssh:far", job_file).json
    assert len(first) == 1
    assert json.loads(record.read_text())["jobs"] == [first[0]["id"]]
    second = permed("--json", "submit", "--via", "ssh:far", job_file).json  # answered: this is another one
    assert second[0]["id"] != first[0]["id"]


def test_what_the_command_says_about_the_site_goes_along(permed, job_file, monkeypatch):
    from permed_compute.transfer.remote import Remote

    said = []
    monkeypatch.setattr(
        Remote, "carry", lambda self, paths, data_class, progress: [f"/far/{n}" for n in range(len(paths))]
    )
    monkeypatch.setattr(Remote, "ask", lambda self, *words, say=None: said.append((self.options, say)) or [{"id": "1"}])
    words = ("--site", "saga", "--account", "nn9999k", "--partition", "a100")
    assert permed("--json", "submit", "--via", "ssh:far", job_file, *words).code == 0
    ((options, say),) = said
    assert options == ("--site", "saga") and say["site"] == {"site_account": "nn9999k", "site_partition": "a100"}
    spec = json.loads(say["specs"][0])
    assert [ref["path"] for ref in spec["inputs"]] == ["/far/0"] and spec["code"] == "/far/1"


def test_what_goes_wrong_there_is_told_here(permed, far, job_file, tmp_path):
    for words, code, said in (
        (("why", "--via", "ssh:far", "01none"), Exit.NOT_FOUND, ""),
        (("results", "--via", "ssh:far", "01none", "--to", tmp_path / "to"), Exit.NOT_FOUND, "There: "),
        (("submit", "--via", "ssh:far:/no/permed", job_file), Exit.UNAVAILABLE, "--via ssh:HOST:/path/to/permed"),
        (("submit", "--via", "far", job_file), Exit.USAGE, "--via ssh:HOST"),
        (("run", "--via", "ssh:far", job_file), Exit.USAGE, "does not go through --via"),
        (("submit", "--via", "ssh:far", job_file, "--input", tmp_path / "none"), Exit.NOT_FOUND, "not on this machine"),
    ):
        answer = permed(*words)
        assert answer.code == code, (words, answer)
        assert said in answer.err.replace("\n", " "), answer.err
