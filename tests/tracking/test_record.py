"""What tracking is told of a job: its model where a training left one, and nothing of others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from permed_compute.paths import JobPaths
from permed_compute.queue.port import Job
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.tracking.record import record_of


@pytest.fixture
def paths(tmp_path: Path) -> JobPaths:
    made = JobPaths(tmp_path / "01job")
    (made.results / "bundle" / "configs").mkdir(parents=True)
    (made.results / "bundle" / "docs").mkdir()
    (made.results / "bundle" / "configs" / "metadata.json").write_text('{"name": "lesions", "task": "segmentation"}')
    (made.results / "bundle" / "docs" / "README.md").write_text("# lesions")
    (made.results / "manifest.json").write_text(json.dumps({"job": {"attempt": 1}}))
    (made.results / "result.json").write_text(json.dumps({"values": {"bundle_digest": "ab" * 32, "kind": "held-out"}}))
    return made


def job() -> Job:
    spec = JobSpec(name="t", workload="radiology/train-segmentation", account="helse/ous", legal_entity="ous")
    return Job("01job", spec, JobState.RUNNING, 1, 1, "kari", 1, "", 1, 1, 1)


def test_a_bundle_is_a_model_of_its_account(paths: JobPaths) -> None:
    [model] = record_of(job(), JobState.SUCCEEDED, paths, 5).models
    assert model["name"] == "helse.ous.lesions" and model["card"] == "# lesions" and model["folder"] == "bundle"
    assert model["digest"] == model["tags"]["permed.digest"] == "ab" * 32
    assert model["tags"]["permed.figures"] == "held-out" and model["tags"]["permed.legal_entity"] == "ous"


def test_without_success_a_digest_or_a_bundle_there_is_no_model(paths: JobPaths) -> None:
    assert record_of(job(), JobState.FAILED, paths, 5).models == ()
    (paths.results / "result.json").write_text(json.dumps({"values": {}}))
    assert record_of(job(), JobState.SUCCEEDED, paths, 5).models == ()
