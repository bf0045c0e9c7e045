"""The whole way on real parts: a bundle predicts, its predictions are judged, it is validated, promoted and used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("monai")

from permed_compute.client import Client, open_client
from permed_compute.errors import ModelRefusedError
from permed_compute.paths import HomePaths
from permed_compute.queue.port import Job
from permed_compute.spec import JobSpec, Purpose
from permed_compute.workloads.radiology import bundle, nifti
from permed_compute.workloads.radiology.segment import NIFTI

from .bundles import config, write_bundle
from .made import write

CRITERIA = """
title: Made up
model: ours
least_patients: 4
intended_use: {name: made-up, statement: Labels of nothing in nobody for a test of the whole way.}
thresholds: [{measure: dice of one, least: 0.5}, {measure: missed structures, most: 0}]
subgroups: {traits: [sex], least_patients: 2, thresholds: [{measure: dice of one, least: 0.5, of: mean}]}
"""


def done(client: Client, spec: JobSpec) -> Job:
    [job] = client.submit(spec)
    [ended] = client.wait([job.id])
    assert ended.state == "SUCCEEDED", ended.detail
    return ended


def test_a_bundle_from_predictions_to_care(client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_bundle(tmp_path / "bundle", config(classes=2))
    listed = tmp_path / "bundles.yaml"
    listed.write_text(f"allowed: {{{bundle.check(root).digest}: for a test}}\n")
    monkeypatch.setenv(bundle.ALLOWED, str(listed))
    for name in "abcdef":
        write(tmp_path / "in" / name, series=name, gap=1.5 + ord(name) / 200)
    inputs = [{"name": "input", "path": str(tmp_path / "in")}, {"name": "bundle", "path": str(root)}]
    params = {"modalities": ["MR"]}
    care = JobSpec(
        name="care", workload="radiology/segment", inputs=inputs, params=params, legal_entity="ous", purpose="care"
    )
    with pytest.raises(ModelRefusedError, match="No validation"):
        client.submit(care)
    predicted = done(client, care.model_copy(update={"purpose": Purpose.RESEARCH}))
    rows = []
    for number, path in enumerate(sorted(client.paths(predicted).results.glob(f"parts/*/{NIFTI}"))):
        found, _ = nifti.read(path, "prediction")
        truth = found.array.astype(np.uint8)
        truth[0] = 1
        nifti.write(truth, found.affine_ras, tmp_path / f"t{number}.nii")
        rows.append({
            "label": f"t{number}.nii", "predictions": {"ours": str(path)}, "subject": f"S{number}",
            "sex": "FM"[number % 2],
        })  # fmt: skip
    (tmp_path / "cases.json").write_text(json.dumps({"labels": {"1": "one"}, "cases": rows}))
    cases = [{"name": "cases", "path": str(tmp_path / "cases.json")}]
    judged = done(client, JobSpec(name="e", workload="radiology/evaluate", inputs=cases, legal_entity="ous"))
    asked = {"evaluation": judged.id, "predictions": predicted.id, "criteria": CRITERIA}
    record = client.service.model("validate", asked)
    assert record["failures"] == [] and record["model"] == bundle.check(root).digest and record["patients"] == 6
    client.service.model("promote", {"record": record["record"], "own_work": "a test"})
    done(client, care)
    with pytest.raises(ModelRefusedError, match=r"params\.flips"):
        client.submit(care.model_copy(update={"params": {**params, "flips": [[0]]}}))
    (root / "configs" / "metadata.json").write_text(json.dumps({"name": "Made up", "version": "0.1.1"}))
    with pytest.raises(ModelRefusedError, match="not the one that was validated"):
        client.submit(care)


@pytest.mark.slow
def test_a_training_ends_in_the_registry_with_its_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed (extra: tracking)")
    from mlflow.tracking import MlflowClient

    from permed_compute.workloads.radiology import phantoms

    home = HomePaths(tmp_path / "home")
    for name, value in {"HOME": home.root, "EXECUTOR": "inprocess", "ANCHOR": tmp_path / "anchor", "CPUS": "2"}.items():
        monkeypatch.setenv(f"PERMED_{name}", str(value))
    network = {"_target_": "UNet", "channels": [4, 8], "strides": [2], "norm": "instance"}
    params = {"name": "lesions", "patch": 16, "batch": 2, "per_volume": 1, "epochs": 1, "network": network}
    inputs = [{"name": "dataset", "path": str(phantoms.write(tmp_path / "phantoms", 8, edge=20))}]
    training = JobSpec(
        name="t", workload="radiology/train-segmentation", inputs=inputs, params=params, account="helse/ous",
        legal_entity="ous",
    )  # fmt: skip
    try:
        with open_client() as opened:
            job = done(opened, training)
            sent = opened.flush_tracking()
            assert (sent.sent, sent.left) == (1, 0), sent.error
            results = opened.paths(job).results
    finally:
        shutil.rmtree(home.runtime, ignore_errors=True)
    uri = f"sqlite:///{home.mlflow / 'mlflow.db'}"
    [version] = MlflowClient(tracking_uri=uri, registry_uri=uri).search_model_versions("name = 'helse.ous.lesions'")
    assert version.tags["permed.digest"] == bundle.check(results / "bundle").digest
    assert version.tags["permed.job"] == job.id and version.tags["permed.figures"] == "held-out"
    card = (results / "bundle" / "docs" / "README.md").read_text()
    assert card.startswith(version.description[:1000]) and "Dice" in card
