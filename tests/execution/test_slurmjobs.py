"""What Slurm's commands say, as rows; and what it means when they say nothing. No Slurm is needed: the commands are
scripts that answer with what real ones printed (22.05)."""

from __future__ import annotations

import os
import stat
from datetime import datetime
from pathlib import Path

import pytest

from permed_compute.errors import EngineError
from permed_compute.execution.delegated import EngineAwayError
from permed_compute.execution.slurmjobs import Slurm, in_words


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Commands:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return Commands(folder)


class Commands:
    """Programs in front of the PATH."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def say(self, name: str, out: str = "", err: str = "", code: int = 0) -> None:
        file = self.folder / name
        file.write_text(
            f"#!/bin/sh\necho {name} \"$@\" >> {self.folder}/asked\ncat <<'E'\n{out}\nE\n"
            f"cat >&2 <<'E'\n{err}\nE\nexit {code}\n"
        )
        file.chmod(file.stat().st_mode | stat.S_IXUSR)

    def asked(self) -> list[str]:
        file = self.folder / "asked"
        return file.read_text().splitlines() if file.exists() else []


def test_jobs_are_read_with_their_reason_and_expected_start(commands: Commands) -> None:
    commands.say("squeue", "12|PENDING|(Priority)|2026-11-22T05:30:00|normal|permed-a-0001\n"
                           "9|COMPLETED|None|2026-11-22T05:00:00|normal|a name with | in it")  # fmt: skip
    waiting, done = Slurm().jobs()
    assert (waiting.number, waiting.state, waiting.name, waiting.partition) == (
        "12", "PENDING", "permed-a-0001", "normal")  # fmt: skip
    assert waiting.starts == datetime(2026, 11, 22, 5, 30).astimezone().timestamp() * 1000
    assert waiting.live and not done.live and done.name == "a name with | in it"


def test_one_question_answers_many(commands: Commands) -> None:
    commands.say("squeue")
    slurm = Slurm()
    assert [slurm.jobs(), slurm.jobs()] == [(), ()]
    assert len(commands.asked()) == 1
    slurm.forget()
    slurm.jobs()
    assert len(commands.asked()) == 2


@pytest.mark.parametrize(
    "words",
    [
        "slurm_load_jobs error: Unable to contact slurm controller (connect failure)",
        "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation",
        "squeue: error: Slurm backup controller in standby mode",
    ],
)
def test_a_controller_that_does_not_answer_has_refused_nothing(commands: Commands, words: str) -> None:
    commands.say("squeue", err=words, code=1)
    slurm = Slurm()
    with pytest.raises(EngineAwayError):
        slurm.jobs()
    with pytest.raises(EngineAwayError):  # and for a moment nobody else waits for it
        slurm.cancel("1")
    assert len(commands.asked()) == 1


def test_a_refusal_is_told_in_slurms_words(commands: Commands, tmp_path: Path) -> None:
    commands.say("sbatch", err="sbatch: error: Batch job submission failed: Invalid account", code=1)
    with pytest.raises(EngineError, match="Invalid account") as caught:
        Slurm().submit(tmp_path / "job.sh")
    assert not isinstance(caught.value, EngineAwayError)


def test_a_machine_without_slurm_is_told_to_go_to_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineAwayError, match="squeue is not on this machine"):
        Slurm().jobs()


def test_a_users_formats_change_nothing(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    (commands.folder / "squeue").write_text('#!/bin/sh\nprintf "1|RUNNING|None|N/A|main|%s\\n" "$SQUEUE_FORMAT"\n')
    (commands.folder / "squeue").chmod(0o700)
    monkeypatch.setenv("SQUEUE_FORMAT", "%i")
    assert Slurm().jobs()[0].name == ""


def test_the_number_is_the_last_words_first(commands: Commands, tmp_path: Path) -> None:
    commands.say("sbatch", "Some site's greeting\n4711;saga")
    assert Slurm().submit(tmp_path / "job.sh") == "4711"


def test_accounting_that_is_off_says_nothing(commands: Commands) -> None:
    commands.say("sacct", err="Slurm accounting storage is disabled", code=1)
    assert Slurm().recorded("1") == ""
    commands.say("sacct", "CANCELLED by 1000")
    assert Slurm().recorded("1") == "CANCELLED"


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("(Priority)", "higher priority"),
        ("AssocGrpBillingMinutes", "billing hours"),
        ("AssocGrpCpuLimit", "limits"),
        ("ReqNodeNotAvail, UnavailableNodes:c1-1", "down, drained or reserved"),
        ("BurstBufferStageIn", "copied to the cluster"),
        ("DependencyNeverSatisfied", "has failed"),
        ("SomethingNew", "Slurm says SomethingNew"),
    ],
)
def test_slurms_reasons_are_sentences(reason: str, why: str) -> None:
    said, change = in_words(reason)
    assert why in said and change
