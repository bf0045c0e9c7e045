"""A trained bundle over studies: sealed and not, from DICOM, stores and NIfTI; and what it may not answer."""

from __future__ import annotations

import csv
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from permed_compute.errors import NotFoundError, SpecError, WorkloadError  # noqa: E402
from permed_compute.spec import DataRef, JobSpec  # noqa: E402
from permed_compute.testing.context import LocalContext, run_map  # noqa: E402
from permed_compute.workloads.radiology import (  # noqa: E402
    bundle,
    classify,
    predict,
    publish,
    publish_classes,
    runners,
    studies,
    supervised,
    volume_store,
)
from permed_compute.workloads.radiology.publish_classes import Answers  # noqa: E402

from .bundles import config, write_bundle  # noqa: E402
from .made import load, write  # noqa: E402

NETWORK = {
    "_target_": "DenseNet", "init_features": 4, "growth_rate": 4, "block_config": [1, 1], "norm": ["group", {
        "num_groups": 2}],
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of three classes that may be there together, untrained."""
    network = supervised.defined(NETWORK, 1, 3)
    told = publish.Training("t", network, (0.0, 8000.0), (2.0, 2.0, 2.0), "fit", {"classes": {}}, {})
    answers = Answers(["one", "two", "three"], [0, 1, 2], False, 16, True, 0.25, "mean")
    made = publish.Made(publish_classes._inference(told, answers), {"name": "t", "version": "1"}, "")
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("made") / "bundle"
    publish.write(place, supervised.network_of(network), made)
    return place


@pytest.fixture
def allowed(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "bundles.yaml"
    listed.write_text(f"allowed: {{{bundle.check(root).digest}: for a test}}\n")
    monkeypatch.setenv(bundle.ALLOWED, str(listed))


def spec(images: Path, root: Path, **params: object) -> JobSpec:
    inputs = (DataRef(path=str(images)), DataRef(path=str(root), name="bundle"))
    return JobSpec(name="t", workload="radiology/predict", inputs=inputs, params={"modalities": ["MR"], **params})


def forms(folder: Path) -> Path:
    """The same study as DICOM, as a store and as NIfTI, and a file that is neither."""
    write(folder / "dicom")
    volume = load(folder / "dicom")
    volume_store.write(folder / "image.zarr", volume, inputs=["a" * 64], subject="p-1")
    studies.write_image(volume, folder / "image.nii.gz")
    (folder / "broken.nii.gz").write_bytes(b"\x1f\x8b no image")
    return folder


@pytest.mark.usefixtures("allowed")
def test_every_form_of_a_study_is_answered_alike_and_tabled(root: Path, tmp_path: Path) -> None:
    outcome = run_map(predict.WORKLOAD, spec(forms(tmp_path / "in"), root, threshold=0.4), tmp_path / "w")
    assert len(outcome.done) == 3 and len(outcome.failures) == 1, "the broken one is named, the others go on"
    first, *others = [item.values["probabilities"] for item in outcome.done]
    assert set(first) == {"one", "two", "three"} and all(0 < value < 1 for value in first.values())
    assert all(other == pytest.approx(first, abs=1e-5) for other in others)
    assert {"", "p-1"} < {item.part.subject for item in outcome.done}
    rows = list(csv.DictReader((outcome.context.out / predict.TABLE).read_text().splitlines()))
    assert len(rows) == 9
    assert all((row["called"] == "present") == (float(row["probability"]) >= 0.4) for row in rows)
    values = outcome.result.values
    assert values["bundle_digest"] == bundle.check(root).digest
    assert values["called"]["one"] == sum(row["class"] == "one" and row["called"] == "present" for row in rows)
    assert not list((tmp_path / "w").rglob("*.nii")), "nothing decoded is left behind"


@pytest.mark.soak  # half a minute: a sealed process compiles all it imports
def test_what_nobody_vouches_for_answers_from_a_sealed_process(
    root: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    write(tmp_path / "in")
    found = []
    for place in ("sealed", "here"):
        outcome = run_map(predict.WORKLOAD, spec(tmp_path / "in", root), tmp_path / place)
        assert [item.values["sealed"] for item in outcome.done] == [place == "sealed"]
        found.append([item.values["probabilities"] for item in outcome.done])
        request.getfixturevalue("allowed")
    assert found[0] == found[1]


def test_the_sealed_process_says_on_a_line_what_is_said_here(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "in")
    image = tmp_path / "image.nii"
    setup = {"root": str(root), "device": "cpu", "threads": 1}
    lines = [setup | {"options": asdict(bundle.Options(answers=bundle.PROBABILITIES))}, {"image": str(image)}]
    answers, give = os.pipe()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", [json.dumps(line) for line in lines])
    studies.write_image(load(tmp_path / "in"), image)
    assert runners.main([str(give)]) == 0
    with os.fdopen(answers) as said:
        first, second = map(json.loads, said)
    studies.write_image(load(tmp_path / "in"), image)
    options = bundle.Options(answers=bundle.PROBABILITIES)
    here = bundle.Plain(root, options, device="cpu", threads=1, scratch=tmp_path).probabilities(image)
    assert first == {} and second == {"probabilities": here}


def test_other_bundles_other_digests_and_wrong_params_are_refused(root: Path, tmp_path: Path) -> None:
    write(tmp_path / "in")
    labels = write_bundle(tmp_path / "labels", config())
    options = bundle.Options(answers=bundle.PROBABILITIES)
    with pytest.raises(WorkloadError, match="no classes and no probabilities"):
        bundle.Plain(labels, options, device="cpu", threads=1, scratch=tmp_path)

    def plan(job: JobSpec) -> None:
        predict.plan(job, {}, LocalContext(tmp_path / "w", job))

    with pytest.raises(WorkloadError, match="digest"):
        plan(spec(tmp_path / "in", root, bundle_digest="0" * 64))
    with pytest.raises(NotFoundError):
        plan(spec(tmp_path / "in", tmp_path / "in"))
    with pytest.raises(WorkloadError, match="names no images"):
        plan(JobSpec(name="t", workload="radiology/predict", inputs=(DataRef(path=str(root), name="bundle"),)))
    with pytest.raises(SpecError) as raised:
        predict.params_of({"threshold": 2, "flips": [], "modalities": ["XX"]})
    assert len(raised.value.problems) == 3


@pytest.mark.parametrize(
    "answer", [None, {}, [], {"a": 1.1}, {"a": float("nan")}, {"a": "0.5"}, {"\n": 0.5}, {"a" * 65: 0.5}, {1: 0.5}]
)
def test_only_a_probability_for_each_class_leaves_a_bundle(answer: Any) -> None:
    with pytest.raises(WorkloadError, match="not a probability"):
        bundle.probabilities_of(answer)


def test_the_shipped_job_file_names_the_parameters_there_are() -> None:
    import yaml

    told = yaml.safe_load(Path(__file__).parents[3].joinpath("jobs/radiology/predict/job.yaml").read_text())
    assert predict.params_of(told["params"])["threshold"] == classify.params_of({})["threshold"]
