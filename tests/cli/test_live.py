"""`permed top` and `permed status -w`: what runs, what it really uses, how fast it goes."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from permed_compute.cli import live
from permed_compute.cli.session import Session
from permed_compute.client import open_client
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths
from permed_compute.settings import resolve
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

NOW = 1_800_000_000_000


def granted(job: str, **more: Any) -> dict[str, Any]:
    return {
        "job": job, "name": "n", "account": "local", "owner": "kari", "state": "RUNNING", "attempt": 1, "since": NOW,
        "workers": 2, "cpus": 2.0, "memory_mib": 2048, "gpus": 0.0, **more,
    }  # fmt: skip


def says(home: HomePaths, job: str, monkeypatch: pytest.MonkeyPatch, at: int = NOW, **use: Any) -> None:
    monkeypatch.setattr("permed_compute.execution.records.wall_clock", lambda: at)
    records = Records(home.job(job).attempt(1).records())
    records.write("use", **{"done": 40, "total": 100, "rate": 0.5, "cpus": 1.5, "memory": 1024, **use})
    records.close()


def test_each_job_is_shown_with_what_it_said_last(home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    says(home, "one", monkeypatch)
    says(home, "silent", monkeypatch, at=NOW - 10 * 60_000)
    rows = live.with_use(home, [granted("one"), granted("silent"), granted("new", attempt=0)], NOW)
    assert [row["use"] is None for row in rows] == [False, True, True]
    assert rows[0]["use"]["ends"] == NOW + 120_000
    [cells] = zip(*(list(column.cells) for column in live.table(rows[:1], NOW).columns), strict=True)
    assert cells[4:10] == ("1.5 of 2", "1.0 GiB of 2.0 GiB", "", "40/100", "30/min", "2m00s")


def test_gpus_are_shown_as_far_as_they_say(home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    says(home, "one", monkeypatch, gpu=93.0, gpu_memory=20480)
    [row] = live.with_use(home, [granted("one", gpus=1.0)], NOW)
    assert live._gpu(row["use"], 1.0) == "1, 93 % busy, 20.0 GiB"
    assert live._gpu({}, 0.5) == "0.5"


@pytest.mark.parametrize(("each_s", "said"), [(0, ""), (12.34, "12.3/s"), (0.25, "15/min"), (0.001, "3.6/h")])
def test_rates_have_something_before_the_point(each_s: float, said: str) -> None:
    assert live.rate(each_s) == said


def test_a_job_is_watched_until_it_has_ended(permed: Any, job_file: Path, home: HomePaths) -> None:
    """By a second look-out beside the controller that runs it, as a user would."""
    with open_client(resolve()) as client:
        [job] = client.submit(job_file)
        watching: list[Any] = []
        thread = threading.Thread(target=lambda: watching.append(permed("status", job.id, "-w", "--json")))
        thread.start()
        time.sleep(0.3)
        client.wait([job.id])
        thread.join(120)
    lines = [json.loads(line) for line in watching[0].out.splitlines()]
    assert watching[0].code == 0
    assert lines[-1]["state"] == JobState.SUCCEEDED
    assert len(lines[-1]["parts"]) == 5


def test_watching_ends_with_ctrl_c(capsys: pytest.CaptureFixture[str]) -> None:
    looks = iter([1, 2])

    def look() -> int:
        try:
            return next(looks)
        except StopIteration:
            raise KeyboardInterrupt from None

    live.watch(Session(as_json=True), look, lambda console, value: None, every_s=0.0)
    assert capsys.readouterr().out == "1\n2\n"


def test_top_says_what_runs_with_what_it_was_granted(
    permed: Any, job_file: Path, home: HomePaths, tmp_path: Path
) -> None:
    until = tmp_path / "until"
    (tmp_path / "until-first").touch()  # the only part waits, too
    with open_client(resolve()) as client:
        [job] = client.submit(
            JobSpec.model_validate(
                {
                    "name": "slow",
                    "workload": "counting:run",
                    "code": str(job_file.parent / "code"),
                    "params": {"until": str(until)},
                }
            )
        )
        assert client.queue is not None
        seen: list[Any] = []

        def look(jobs: list[Any]) -> None:
            if jobs[0].state is JobState.RUNNING and not seen:
                seen.append(client.service.top())
                until.touch()

        client.wait([job.id], look)
    [row] = seen[0].live
    assert (row["job"], row["state"], row["workers"], row["attempt"]) == (job.id, "RUNNING", 1, 1)
    assert seen[0].nodes[0]["cpus_reserved"] == row["cpus"] > 0


def test_looking_at_a_thousand_jobs_opens_a_file_each(home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [granted(f"job-{number}") for number in range(1000)]
    for row in rows[:50]:
        says(home, row["job"], monkeypatch)
    opened: list[Path] = []
    whole = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *words: opened.append(self) or whole(self, *words))
    found = live.with_use(home, rows, NOW)
    assert sum(row["use"] is not None for row in found) == 50
    assert len(opened) == 1000
