"""From studies with labels to a bundle: the same bits after a preemption, and a bundle that answers as the judge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.errors import RefusedInput, SpecError, WorkloadError  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import LocalContext, StopAfter  # noqa: E402
from permed_compute.workloads.port import Result  # noqa: E402
from permed_compute.workloads.radiology import bundle, classify, nifti, phantoms, supervised  # noqa: E402

NETWORK = {
    "_target_": "DenseNet", "init_features": 4, "growth_rate": 4, "block_config": [1, 1], "dropout_prob": 0.1,
    "norm": ["group", {"num_groups": 2}],
}  # fmt: skip
SMALL: dict[str, Any] = {"size": 20, "batch": 4, "epochs": 3, "learning_rate": 0.01, "network": NETWORK}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write(tmp_path_factory.mktemp("studies"), 20, edge=20, studies=True)


def run(root: Path, dataset: Path, left: int = 0, seed: int = 5, **params: Any) -> tuple[Result | None, StopAfter]:
    inputs = [{"name": "dataset", "path": str(dataset)}]
    spec = JobSpec(
        name="t", workload="radiology/train-classification", inputs=inputs, params={**SMALL, **params}, seed=seed
    )
    ctx = StopAfter(root, spec, threads=1)
    ctx.left = left
    return classify.WORKLOAD.train(spec, ctx), ctx


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, StopAfter]:
    result, ctx = run(tmp_path_factory.mktemp("whole"), dataset)
    assert result is not None
    return result, ctx


def changed(dataset: Path, folder: Path, change: Any) -> Path:
    """The list with its rows changed, beside the same images."""
    shutil.copytree(dataset.parent, folder)
    told = json.loads(dataset.read_text())
    change(told)
    (folder / "dataset.json").write_text(json.dumps(told))
    return folder / "dataset.json"


# ------------------------------------------------------------------------------------------------ the job


def test_preempted_in_the_middle_it_ends_with_the_same_bundle(whole, dataset: Path, tmp_path: Path) -> None:
    done, _ = whole
    assert run(tmp_path, dataset, left=4)[0] is None
    again, _ = run(tmp_path, dataset)
    assert again.values["resumed_at"] == 4 and done.values["resumed_at"] == 0
    for name in ("weights", "bundle_digest", "history", "best_epoch", "report"):
        assert again.values[name] == done.values[name], name


def test_it_is_judged_by_what_was_held_out_and_says_so(whole) -> None:
    done, ctx = whole
    sides = json.loads((ctx.out / "split.json").read_text())
    report = done.values["report"]
    assert done.values["kind"] == "held-out" and report["cases"] == len(sides["test"])
    assert {row["case"] for row in report["worst"]} <= {*sides["test"]}
    assert 0 < report["classes"]["lesion"]["present"] < report["cases"], "both classes are on each side"
    assert "held-out_lesion_auroc" in done.metrics
    assert {"log_loss", "auroc", "loss"} == set(done.values["history"][0])
    losses = [row["log_loss"] for row in done.values["history"]]
    assert done.values["best_epoch"] == 1 + int(np.argmin(losses))
    card = (ctx.out / "bundle/docs/README.md").read_text()
    assert "neither training nor any choice has seen" in card and "AUROC" in card and "not validated for care" in card
    assert "phantom-" not in card + (ctx.out / "split.json").read_text()
    page = (ctx.out / "evaluation.html").read_text()
    assert "neither training nor any choice has seen" in page and "site: north" in page
    assert json.loads((ctx.out / "evaluation.json").read_text()) == report


@pytest.mark.parametrize("view", ["whole", "patches"])
def test_the_bundle_runs_with_monai_and_answers_as_the_judge(
    view: str, whole, dataset: Path, tmp_path: Path
) -> None:  # fmt: skip
    from monai.bundle import run as monai_run

    params = SMALL if view == "whole" else {**SMALL, "view": "patches", "size": 16, "pool": "max", "epochs": 1}
    done, ctx = whole if view == "whole" else run(tmp_path / "run", dataset, **params)
    image = dataset.parent / "image-002.nii.gz"
    (tmp_path / "data").mkdir()
    shutil.copyfile(image, tmp_path / "data" / "a.nii.gz")
    root = ctx.out / "bundle"
    monai_run(
        config_file=str(root / "configs" / "inference.json"), bundle_root=str(root), dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "eval"),
    )  # fmt: skip
    torch.set_grad_enabled(True)
    [told] = json.loads((tmp_path / "eval" / "predictions.json").read_text())
    assert told["image"] == "a.nii.gz" and set(told["probabilities"]) == {"lesion"}

    judge = classify.course(classify.params_of(params), ctx).judge
    [scan] = [scan for scan in judge.data.cohort.found if scan.case.images[0] == image]
    model = supervised.network_of(supervised.defined(params["network"], 1, 2))
    model.load_state_dict(torch.load(root / bundle.WEIGHTS, weights_only=True))
    assert told["probabilities"]["lesion"] == pytest.approx(judge.probabilities(model.eval(), scan)[0], abs=1e-5)
    assert done.values["bundle_digest"] == bundle.check(root).digest

    runner = bundle.Plain(
        root, bundle.Options(answers=bundle.PROBABILITIES), device="cpu", threads=1, scratch=tmp_path
    )  # fmt: skip
    assert runner.probabilities(tmp_path / "data" / "a.nii.gz") == pytest.approx(told["probabilities"], abs=1e-6)


def test_classes_that_can_be_there_together_are_told_apart_one_by_one(dataset: Path, tmp_path: Path) -> None:
    def both(told: dict[str, Any]) -> None:
        told["labels"] = {"0": "lesion", "1": "second"}
        for k, row in enumerate(told["training"]):
            row["label"] = ([0] if row["label"] else []) + (["second"] if k % 3 else [])

    done, ctx = run(tmp_path / "run", changed(dataset, tmp_path / "data", both), epochs=1)
    assert set(done.values["report"]["classes"]) == {"lesion", "second"}
    assert "binary cross entropy" in (ctx.out / "bundle/docs/README.md").read_text()
    judge = classify.course(classify.params_of(SMALL), ctx).judge
    model = supervised.network_of(supervised.defined(NETWORK, 1, 2)).eval()
    assert judge.probabilities(model, judge.data.split.test[0]).sum() != pytest.approx(1)


def test_without_held_out_studies_a_fit_is_called_a_fit(dataset: Path, tmp_path: Path) -> None:
    done, ctx = run(tmp_path, dataset, epochs=1, validation=0, test=0)
    assert done.values["kind"] == "fit" and all(name.startswith("fit_") for name in done.metrics)
    for file in ("bundle/docs/README.md", "evaluation.html"):
        assert "A fit, not an evaluation" in (ctx.out / file).read_text()


def test_studies_of_other_spacings_are_seen_whole(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervised, "varied", lambda keys: [])  # noise goes below 0
    other = tmp_path / "data" / "image-003.nii.gz"
    index = changed(dataset, tmp_path / "data", lambda told: None)
    nifti.write(nifti.read(other, "")[0].array, np.diag([2.0, 2.0, 3.0, 1.0]), other)
    spec = JobSpec(
        name="t", workload="radiology/train-classification", inputs=[{"name": "dataset", "path": str(index)}]
    )
    data = classify.data_of(classify.params_of({**SMALL, "validation": 0, "test": 0}), LocalContext(tmp_path, spec))
    assert data.spacing == (3.0, 3.0, 3.0)  # the largest study, 60 mm, in 20 voxels
    sample = classify.training_samples(data, SMALL | {"view": "whole"})[0]
    assert sample["image"].shape == (1, 20, 20, 20) and float(sample["image"].min()) >= 0
    with pytest.raises(RefusedInput, match="50 %"):
        params = {**SMALL, "view": "patches", "size": 16, "validation": 0, "test": 0}
        classify.data_of(classify.params_of(params), LocalContext(tmp_path, spec))


# ------------------------------------------------------------------------------------------------ what is refused


def test_lists_that_cannot_be_used_are_refused(dataset: Path, tmp_path: Path) -> None:
    def mixed(told: dict[str, Any]) -> None:
        told["training"][0]["label"] = [1]

    def unknown(told: dict[str, Any]) -> None:
        told["training"][0]["label"] = 7

    def one(told: dict[str, Any]) -> None:
        for row in told["training"]:
            row["label"] = 0

    for k, (change, words) in enumerate([(mixed, "can be used"), (unknown, "can be used"), (one, "all or none")]):
        with pytest.raises(WorkloadError, match=words):
            run(tmp_path / f"run{k}", changed(dataset, tmp_path / f"data{k}", change))


def test_params_and_networks_are_checked(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        classify.params_of({"view": "half", "size": 1, "pool": "sum", "patch": 3})
    assert len(raised.value.problems) == 4
    with pytest.raises(WorkloadError, match="no argument for channels"):
        run(tmp_path, dataset, network={"_target_": "Critic"})
