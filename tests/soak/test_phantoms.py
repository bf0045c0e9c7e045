"""Trainings that learn: made-up scans, no patient on two sides, judged on those they have not seen."""

from __future__ import annotations

from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import LocalContext  # noqa: E402
from permed_compute.workloads.radiology import classify, phantoms, train  # noqa: E402

ENOUGH = 0.85
TOLD_APART = 0.9
PARAMS = {"patch": 32, "batch": 4, "per_volume": 4, "epochs": 45, "patience": 0, "learning_rate": 0.002, "pictures": 0}


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_forty_phantoms_teach_organ_and_lesion(tmp_path: Path) -> None:
    dataset = phantoms.write(tmp_path / "phantoms", 40)
    inputs = [{"name": "dataset", "path": str(dataset)}]
    spec = JobSpec(name="phantoms", workload="radiology/train-segmentation", inputs=inputs, params=PARAMS, seed=5)
    ctx = LocalContext(tmp_path / "run", spec, threads=torch.get_num_threads())
    result = train.WORKLOAD.train(spec, ctx)
    assert result is not None
    found = {name: result.metrics[f"held-out_{name}_dice"] for name in phantoms.LABELS.values()}
    print(found)
    assert min(found.values()) >= ENOUGH, found


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_studies_with_lesions_are_told_from_those_without(tmp_path: Path) -> None:
    dataset = phantoms.write(tmp_path / "phantoms", 80, studies=True)
    inputs = [{"name": "dataset", "path": str(dataset)}]
    params = {"size": 32, "epochs": 50, "patience": 0, "learning_rate": 0.003, "intensity": [0, 500]}
    spec = JobSpec(name="studies", workload="radiology/train-classification", inputs=inputs, params=params, seed=5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # steps of milliseconds: threads would wait for each other longer than they work
    try:
        result = classify.WORKLOAD.train(spec, LocalContext(tmp_path / "run", spec, threads=1))
    finally:
        torch.set_num_threads(before)
    assert result is not None and result.values["kind"] == "held-out"
    print(result.metrics)
    assert result.metrics["held-out_lesion_auroc"] >= TOLD_APART, result.metrics
