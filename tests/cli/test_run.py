"""Run and resume: from a file to results, through Ctrl-C, and beside a controller."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from permed_compute.cli.exits import Exit
from permed_compute.cli.progress import Display
from permed_compute.paths import HomePaths
from permed_compute.states import JobState


def test_run_computes_and_says_where_the_results_are(permed, job_file: Path, home: HomePaths) -> None:
    answer = permed("run", job_file)
    assert answer.code == Exit.OK
    assert "SUCCEEDED" in answer.out
    [job] = permed("jobs", "--all", "--json").json
    results = home.job(job["id"]).results
    assert str(results / "index.html") in answer.out
    files = {row["kind"]: row["path"] for row in permed("results", job["id"], "--json").json["files"]}
    assert files["manifest"] == str(results / "manifest.json")
    assert (results / "result.json").is_file()


def test_json_has_the_answer_alone_on_stdout(permed, job_file: Path) -> None:
    answer = permed("run", job_file, "--json")
    assert answer.json["exit"] == 0
    assert answer.json["jobs"][0]["detail"]["counts"] == {"DONE": 5}
    assert answer.err == ""


def test_what_is_done_is_not_done_again(permed, job_file: Path) -> None:
    permed("run", job_file)
    assert permed("run", job_file, "--json").json["jobs"][0]["detail"]["counts"] == {"REUSED": 5}


def test_partial_is_3_and_failed_is_1(permed, job_file: Path) -> None:
    assert permed("run", job_file, "--set", "params.fail=xxx").code == Exit.PARTIAL
    answer = permed("run", job_file, "--set", "params.fail=xxx", "--input", job_file.parent / "files" / "2.txt")
    assert answer.code == Exit.FAILED
    assert "permed logs" in answer.out


def test_logs_show_what_the_code_said(permed, job_file: Path) -> None:
    [job] = permed("run", job_file, "--json").json["jobs"]
    assert "counted 5 characters" in permed("logs", job["id"]).out
    assert len(permed("logs", job["id"], "--json").json["lines"]) == 5
    assert "counted 1 characters" in permed("logs", "-f", job["id"]).out


def test_ctrl_c_holds_and_resume_finishes(
    permed, job_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look, until = Display.look, tmp_path / "until"

    def press(self: Display, jobs: list) -> None:
        look(self, jobs)
        if any(follower.ended for follower in self.followers.values()):
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "look", press)
    answer = permed("run", job_file, "--set", f"params.until={until}")
    assert answer.code == Exit.INTERRUPTED
    [job] = permed("jobs", "--json").json
    assert job["state"] == "HELD"
    assert f"permed resume {job['id']}" in answer.out
    monkeypatch.setattr(Display, "look", look)
    until.touch()
    finished = permed("resume", job["id"], "--json")
    assert finished.code == Exit.OK
    counts = finished.json["jobs"][0]["detail"]["counts"]
    assert counts["REUSED"] >= 1
    assert counts["REUSED"] + counts["DONE"] == 5


def test_ctrl_c_while_waiting_holds_too(permed, job_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def press(self: Display, jobs: list) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Display, "look", press)
    assert permed("run", job_file).code == Exit.INTERRUPTED
    assert permed("jobs", "--json").json[0]["state"] == "HELD"


def test_ctrl_c_after_the_last_part_says_how_the_job_ended(
    permed, job_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = Display.look

    def press(self: Display, jobs: list) -> None:
        look(self, jobs)
        if any(job.state is JobState.SUCCEEDED for job in jobs):
            raise KeyboardInterrupt

    monkeypatch.setattr(Display, "look", press)
    answer = permed("run", job_file)
    assert answer.code == Exit.OK
    assert "5 done" in answer.out


def test_detach_only_queues(permed, job_file: Path) -> None:
    assert permed("run", job_file, "--detach", "--json").json[0]["state"] == "QUEUED"
    [job] = permed("jobs", "--json").json
    permed("cancel", job["id"])
    assert permed("resume", job["id"], "--detach", "--json").json[0]["state"] == "QUEUED"


def test_resume_of_a_success_is_refused(permed, job_file: Path) -> None:
    [job] = permed("run", job_file, "--json").json["jobs"]
    assert permed("resume", job["id"]).code == Exit.REFUSED


def test_while_it_waits_it_says_why(permed, job_file: Path) -> None:
    """A job that cannot start is explained, and held by the interrupt."""
    done = subprocess.Popen(
        [sys.executable, "-m", "permed_compute.cli", "run", job_file, "--set", "resources.cpus=64"],
        stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert done.stderr is not None
    line = done.stderr.readline()
    assert "no node here has that" in line
    done.send_signal(signal.SIGINT)
    out, _ = done.communicate(timeout=150)
    assert done.returncode == Exit.INTERRUPTED
    assert "permed resume" in out


@pytest.fixture
def controller(home: HomePaths):
    """A `permed controller` of this home in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "permed_compute.cli", "controller"], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    assert "serving" in process.stderr.readline()
    yield process
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=150)
    assert process.returncode == Exit.OK


def test_run_beside_a_controller_waits_for_it(permed, job_file: Path, controller) -> None:
    assert permed("status", "--json").json["controller"] == "running"
    answer = permed("run", job_file, "--json")
    assert answer.code == Exit.OK
    [job] = answer.json["jobs"]
    actors = {event["actor"] for event in permed("status", job["id"], "--json").json["history"]}
    assert any(actor.endswith(f"-{controller.pid}") for actor in actors)
    assert permed("audit", "verify").code == Exit.OK
    assert permed("controller").code == Exit.UNAVAILABLE


def test_a_run_whose_controller_is_killed_leads_itself(job_file: Path, home: HomePaths) -> None:
    command = [sys.executable, "-m", "permed_compute.cli"]
    leader = subprocess.Popen([*command, "controller"], stderr=subprocess.PIPE, text=True)
    assert leader.stderr is not None
    assert "serving" in leader.stderr.readline()
    run = [*command, "run", str(job_file), "--set", "params.tenths=5", "--set", "retries=2"]
    follower = subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    end = time.monotonic() + 60
    while not list(home.jobs.glob("*/attempts/*/records-driver.jsonl")):
        assert time.monotonic() < end
        time.sleep(0.05)
    leader.kill()
    leader.communicate()
    out, _ = follower.communicate(timeout=120)
    assert follower.returncode == Exit.OK, out
    assert "SUCCEEDED" in out


def test_two_runs_in_one_home_share_it(job_file: Path, home: HomePaths) -> None:
    """The first leads; when it is done, the second takes the lead and its job goes on."""
    run = [sys.executable, "-m", "permed_compute.cli", "run", str(job_file), "--set", "retries=2"]
    short = subprocess.Popen([*run, "--set", "params.tenths=2"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    end = time.monotonic() + 60
    while not home.socket.exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    long = subprocess.Popen([*run, "--set", "params.tenths=6"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    for process in (short, long):
        out, _ = process.communicate(timeout=120)
        assert process.returncode == Exit.OK, out


def test_controller_stops_when_idle_if_asked(permed, job_file: Path, home: HomePaths) -> None:
    permed("submit", job_file)
    assert permed("controller", "--once-idle").code == Exit.OK
    assert permed("jobs", "--all", "--json").json[0]["state"] == "SUCCEEDED"
    assert home.log.exists()
