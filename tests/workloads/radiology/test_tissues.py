"""A training on one real T1 is a fit, and says so everywhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("nilearn", reason="nilearn is not installed (extra: demo)")

from permed_compute.errors import WorkloadError  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import LocalContext  # noqa: E402
from permed_compute.workloads.radiology import nifti, tissues, train  # noqa: E402

NETWORK = {"_target_": "UNet", "channels": [8, 16], "strides": [2], "norm": "instance"}
PARAMS = {"patch": 16, "batch": 4, "per_volume": 8, "epochs": 3, "learning_rate": 0.01, "pictures": 0,
          "network": NETWORK}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tissues.write(tmp_path_factory.mktemp("tissues"), step=5)


def run(root: Path, dataset: Path, **params: float):
    spec = JobSpec(
        name="t", workload="radiology/train-segmentation", inputs=[{"name": "dataset", "path": str(dataset)}],
        params={**PARAMS, **params}, seed=1,
    )  # fmt: skip
    ctx = LocalContext(root, spec)
    return train.WORKLOAD.train(spec, ctx), ctx


def test_grey_is_around_white(dataset: Path) -> None:
    label = nifti.read(dataset.parent / "tissues.nii.gz", "")[0].array
    image = nifti.read(dataset.parent / "t1.nii.gz", "")[0].array
    assert 0.05 < (label == 2).mean() < (label == 1).mean() < 0.3
    assert image[label == 2].mean() > image[label == 1].mean() > image[label == 0].mean()


def test_a_fit_on_the_real_t1_is_reported_as_a_fit(dataset: Path, tmp_path: Path) -> None:
    done, ctx = run(tmp_path, dataset, validation=0, test=0)
    assert done.values["kind"] == "fit" and done.values["report"]["patients"] == 1
    assert done.metrics and all(name.startswith("fit_") for name in done.metrics)
    row = done.values["report"]["models"]["segmentation"]["structures"]["1"]["dice"]
    assert row["low"] is None and row["high"] is None, "one subject has no interval"
    card, page = ((ctx.out / name).read_text() for name in ("bundle/docs/README.md", "evaluation.html"))
    assert "A fit, not an evaluation" in card and "A fit, not an evaluation" in page
    assert (
        "no two groups" in card
        and "held out | 0 | 0" in card
        and "Nothing was held out" in card
        and "any choice has seen" not in card
    )
    assert json.loads((ctx.out / "split.json").read_text())["test"] == []
    assert not (ctx.out / "evidence.json").exists(), "nothing that the gate could take for an evaluation"
    losses = [row["loss"] for row in done.values["history"]]
    assert losses[-1] < losses[0]


def test_one_subject_cannot_be_held_out_from_itself(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="nothing for validation and test"):
        run(tmp_path, dataset)
