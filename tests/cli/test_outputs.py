"""What a job left: kinds of files, the demo's five outputs, and how records are folded."""

from __future__ import annotations

from pathlib import Path

import pytest

from permed_compute.cli.demo import find_head, five_outputs
from permed_compute.cli.exits import Exit
from permed_compute.cli.follow import Follower
from permed_compute.cli.outputs import outputs
from permed_compute.cli.run import Done
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths
from permed_compute.queue.memory import MemoryQueue
from permed_compute.spec import JobSpec
from permed_compute.tracking.files import Drained


def dicom(path: Path, sop_class: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\2\0\2\0UI\x1e\0" + sop_class.encode() + b"\0" * 300)


@pytest.fixture
def results(home: HomePaths) -> Path:
    folder = home.job("job").results
    part = folder / "parts" / "series-1"
    dicom(part / "brain.dcm", "1.2.840.10008.5.1.4.1.1.66.4")
    dicom(part / "source.dcm", "1.2.840.10008.5.1.4.1.1.4")
    (part / "mask.nii.gz").write_bytes(b"x")
    for name in ("index.html", "manifest.json", "result.json"):
        (folder / name).write_text("{}")
    return folder


def test_files_are_told_apart_without_loading_dicom(results: Path) -> None:
    kinds = {output.path.name: output.kind for output in outputs(results)}
    assert kinds == {
        "index.html": "page", "manifest.json": "manifest", "result.json": "result", "brain.dcm": "dicom-seg",
        "source.dcm": "dicom", "mask.nii.gz": "nifti",
    }  # fmt: skip


def test_the_demo_wants_all_five(results: Path, home: HomePaths) -> None:
    sent = Done([], Exit.OK, Drained(1, 0, "", ("store run 7",)))
    found = five_outputs(home, "job", sent, "")
    assert found["MLflow run"] == "store run 7"
    assert all(found.values())
    (results / "parts" / "series-1" / "brain.dcm").unlink()
    assert five_outputs(home, "job", Done([], Exit.OK, Drained(0, 1, "down")), "") == found | {
        "DICOM SEG": "", "MLflow run": "",
    }  # fmt: skip


def test_the_demo_takes_the_real_head_where_it_is(home: HomePaths, tmp_path: Path, monkeypatch) -> None:
    real = tmp_path / "shared" / "data" / "radiology" / "t1-head-mr"
    real.mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    monkeypatch.chdir(tmp_path / "checkout")
    head = find_head(home)
    assert head.folder == real
    assert "real T1 head" in head.source


def test_records_fold_into_parts_and_a_stage(home: HomePaths) -> None:
    queue = MemoryQueue()
    [job] = queue.submit([JobSpec(name="j", workload="m:f")], owner="me")
    paths = home.job(job.id)
    follower = Follower(paths)
    follower.look(job)
    assert follower.total == 0
    from dataclasses import replace

    from permed_compute.states import JobState

    job = replace(job, attempt=1, state=JobState.RUNNING)
    records = Records(paths.attempt(1).records())
    records.write("started")
    follower.look(job)
    assert follower.sentence(job) == "planning"
    records.write("part", name="a", state="REUSED", seconds=0.0)
    records.write("plan", parts=3, known=1)
    records.write("part", name="b", state="FAILED", seconds=1.0)
    records.write("lost", slot=0)
    follower.look(job)
    assert (follower.ended, follower.total) == (2, 3)
    assert follower.sentence(job) == "computing, 1 reused, 1 failed, 1 worker lost"
    records.write("part", name="c", state="DONE", seconds=1.0)
    follower.look(job)
    assert follower.sentence(job).startswith("reducing")
    records.close()
    records = Records(paths.attempt(2).records())
    records.write("started")
    records.write("gang", ranks=2)
    follower.look(replace(job, attempt=2))
    assert follower.total == 0 and follower.sentence(job) == "training"
    records.write("stage", name="train", seconds=1.0)
    follower.look(replace(job, attempt=2))
    assert follower.sentence(job) == "writing results"
    records.close()
