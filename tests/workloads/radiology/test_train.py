"""From labelled scans to a bundle: no leakage, the same bits again and after a preemption, a bundle that runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.errors import RefusedInput, SpecError, WorkloadError  # noqa: E402
from permed_compute.learning.best import Best  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import StopAfter  # noqa: E402
from permed_compute.workloads.port import Result  # noqa: E402
from permed_compute.workloads.radiology import bundle, nifti, phantoms, splits, supervised, train  # noqa: E402
from permed_compute.workloads.radiology.patches import Case  # noqa: E402
from permed_compute.workloads.radiology.splits import Scan  # noqa: E402

SMALL: dict[str, Any] = {
    "patch": 16, "batch": 4, "per_volume": 1, "epochs": 3, "pictures": 2, "learning_rate": 0.01,
    "network": {"_target_": "UNet", "channels": [4, 8], "strides": [2], "norm": "instance", "dropout": 0.1},
}  # fmt: skip


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantoms.write(tmp_path_factory.mktemp("phantoms"), 12, edge=20)


def run(root: Path, dataset: Path, left: int = 0, seed: int = 5, **params: Any) -> tuple[Result | None, StopAfter]:
    inputs = [{"name": "dataset", "path": str(dataset)}]
    spec = JobSpec(
        name="t", workload="radiology/train-segmentation", inputs=inputs, params={**SMALL, **params}, seed=seed
    )
    ctx = StopAfter(root, spec, threads=1)
    ctx.left = left
    return train.WORKLOAD.train(spec, ctx), ctx


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, StopAfter]:
    result, ctx = run(tmp_path_factory.mktemp("whole"), dataset)
    assert result is not None
    return result, ctx


# ------------------------------------------------------------------------------------------------ the job


def test_preempted_in_the_middle_it_ends_with_the_same_bundle(whole, dataset: Path, tmp_path: Path) -> None:
    done, ctx = whole
    assert run(tmp_path, dataset, left=3)[0] is None  # in the second epoch, after the first has been the best
    again, resumed = run(tmp_path, dataset)
    assert again.values["resumed_at"] == 3 and done.values["resumed_at"] == 0
    for name in ("weights", "bundle_digest", "history", "best_epoch", "report"):
        assert again.values[name] == done.values[name], name
    assert (resumed.out / "bundle/models/model.pt").read_bytes() == (ctx.out / "bundle/models/model.pt").read_bytes()


def test_it_logs_curves_and_pictures_and_judges_by_what_was_held_out(whole) -> None:
    done, ctx = whole
    assert [step for name, _, step in ctx.metrics if name == "dice_organ"] == [1, 2, 3]
    assert (ctx.out / "epoch-0002.png").exists() and not (ctx.out / "epoch-0001.png").exists()
    sides = json.loads((ctx.out / "split.json").read_text())
    assert done.values["kind"] == "held-out" and done.values["report"]["cases"] == len(sides["test"])
    assert {row["case"] for row in done.values["report"]["worst"]} <= {*sides["test"]}
    assert "held-out_organ_dice" in done.metrics
    card = (ctx.out / "bundle/docs/README.md").read_text()
    assert "neither training nor any choice has seen" in card and "not validated for care" in card
    assert "phantom-" not in card + (ctx.out / "split.json").read_text()  # no names of patients


def test_training_ends_where_it_gets_no_better(dataset: Path, tmp_path: Path) -> None:
    done, _ = run(tmp_path, dataset, epochs=9, patience=2, learning_rate=1e-9, pictures=0)
    assert done.values["epochs"] == 3 and done.values["best_epoch"] == 1


def test_the_best_weights_are_kept_through_a_checkpoint() -> None:
    best, again, model = Best(), Best(), torch.nn.Linear(2, 1)
    for epoch, score in enumerate((0.2, 0.9, 0.5)):
        torch.nn.init.constant_(model.weight, epoch)
        best.offer(model, epoch, score)
    again.load_state_dict(best.state_dict())
    assert (again.epoch, again.score) == (1, 0.9) and again.weights["weight"].tolist() == [[1.0, 1.0]]


def test_without_held_out_scans_a_fit_is_called_a_fit(dataset: Path, tmp_path: Path) -> None:
    done, ctx = run(tmp_path, dataset, epochs=1, validation=0, test=0)
    card = (ctx.out / "bundle/docs/README.md").read_text()
    assert done.values["kind"] == "fit" and "A fit, not an evaluation" in card and "Nothing was held out" in card
    assert all(name.startswith("fit_") for name in done.metrics)


def test_a_small_bright_lesion_is_not_clipped() -> None:
    seen = [
        supervised.Seen(np.ones(3), (1, 1, 1), {0: np.arange(1000.0), 1: np.array([]), 2: np.array([1500.0, 1600.0])})
    ] * 2
    low, high = supervised.range_of(seen)
    assert low == pytest.approx(5, abs=1) and high == pytest.approx(1600, abs=1)


def test_deep_supervision_weighs_each_head_half_of_the_one_above() -> None:
    from monai.losses import DiceCELoss

    heads = torch.randn(2, 3, 3, 4, 4, 4)
    batch = {"image": heads, "label": torch.randint(0, 3, (2, 1, 4, 4, 4))}
    told = train.supervised_loss()(lambda image: image, batch)
    one = DiceCELoss(to_onehot_y=True, softmax=True, include_background=False)
    a, b, c = (one(heads[:, k], batch["label"]) for k in range(3))
    assert float(told) == pytest.approx(float((a + b / 2 + c / 4) / 1.75), rel=1e-5)


# ------------------------------------------------------------------------------------------------ the bundle


def test_the_bundle_runs_with_monai_and_here_and_both_agree_with_the_judge(
    whole, dataset: Path, tmp_path: Path
) -> None:
    from monai.bundle import run as monai_run

    done, ctx = whole
    root = tmp_path / "bundle"
    shutil.copytree(ctx.out / "bundle", root)
    image = dataset.parent / "image-000.nii.gz"
    (tmp_path / "data").mkdir()
    shutil.copyfile(image, tmp_path / "data" / "a.nii.gz")
    monai_run(
        config_file=str(root / "configs" / "inference.json"), bundle_root=str(root), dataset_dir=str(tmp_path / "data"),
        output_dir=str(tmp_path / "eval"),
    )  # fmt: skip
    torch.set_grad_enabled(True)
    [file] = (tmp_path / "eval").glob("*.nii.gz")
    theirs = nifti.read(file, "")[0].array

    checked = bundle.check(root, expected=done.values["bundle_digest"])
    volume = nifti.read(image, "")[0]
    nifti.write(volume.array, volume.affine_ras, tmp_path / "image.nii")
    runner = bundle.Plain(checked.root, bundle.Options(), device="cpu", threads=1, scratch=tmp_path)
    ours = runner.segment(tmp_path / "image.nii", volume.array.shape, volume.affine_ras)
    assert ours.streamed and np.array_equal(ours.labels, theirs) and len(np.unique(theirs)) > 1

    params = train.params_of(SMALL)
    judge = train.Judge(train.data_of(params, ctx), params, ctx)
    [scan] = [scan for scan in splits.scans(dataset, ctx) if scan.case.images[0] == image]
    model = supervised.network_of(train.defined(params, judge.data))
    model.load_state_dict(torch.load(root / bundle.WEIGHTS, weights_only=True))
    assert np.array_equal(judge.segmented(model.eval(), scan)[2], ours.labels)


# ------------------------------------------------------------------------------------------------ splits


def scan(number: int, subject: str, site: str = "a", image: str = "") -> Scan:
    digests = (image or f"image {number}", f"label {number}")
    return Scan(Case((Path(f"{number}.nii"),)), subject, digests, {"site": site})


def many() -> list[Scan]:
    """30 patients at three sites, every third scanned twice; one scan stands there under another patient's name."""
    found = [scan(k, f"p{k % 30}", "abc"[k % 30 % 3]) for k in range(40)]
    return [*found, scan(40, "p30", "b", image="image 7")]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("folds", [0, 4])
def test_nobody_is_on_two_sides_and_nothing_is_lost(seed: int, folds: int) -> None:
    parts = [
        splits.split(many(), validation=0.2, test=0.2, seed=seed, fold=fold, folds=folds) for fold in range(folds or 1)
    ]
    for part in parts:
        sides = [part.training, part.validation, part.test]
        people = [{one.subject for one in side} for side in sides]
        images = [{one.digests[0] for one in side} for side in sides]
        for a, b in ((0, 1), (0, 2), (1, 2)):
            assert not people[a] & people[b] and not images[a] & images[b]
        assert sorted(one.name for side in sides for one in side) == sorted(one.name for one in many())
        assert part.test == parts[0].test and 8 <= len(part.test) <= 11
    if folds:
        validated = [one.name for part in parts for one in part.validation]
        assert sorted(validated) == sorted(one.name for one in many() if one not in parts[0].test)


def test_sites_are_held_out_whole_and_can_be_what_is_split_by() -> None:
    held = splits.split(many(), validation=0.2, test=0, seed=0, hold_out=["c"])
    assert {one.traits["site"] for one in held.test} == {"c"}
    assert "c" not in {one.traits["site"] for one in (*held.training, *held.validation)}
    found = [one for one in many() if one.subject != "p30"]
    sites = splits.split(found, validation=0.2, test=0.2, seed=0, by_site=True)
    assert all(
        len({one.traits["site"] for one in side}) == 1 for side in (sites.training, sites.validation, sites.test)
    )
    with pytest.raises(WorkloadError, match="nothing for"):
        splits.split(found[:1], validation=0.2, test=0.2, seed=0)


def test_another_seed_is_another_split_and_a_new_scan_moves_few() -> None:
    def held(found: list[Scan], seed: int) -> set[str]:
        return {one.name for one in splits.split(found, validation=0.2, test=0.3, seed=seed).test}

    assert held(many(), 0) != held(many(), 1)
    assert len(held([*many(), scan(99, "new")], 0) ^ held(many(), 0)) <= 4


# ------------------------------------------------------------------------------------------------ what is refused


def test_params_are_checked_and_a_network_is_never_an_expression() -> None:
    with pytest.raises(SpecError) as raised:
        train.params_of({"patch": 4, "folds": -1, "network": {"_target_": "UNet", "channels": "$print(1)"}, "what": 1})
    assert len(raised.value.problems) == 4
    for bad in ({"_target_": "os.system"}, {"_target_": "UNet", "norm": ["@x"]}, {}):
        with pytest.raises(SpecError):
            train.params_of({"network": bad})
    with pytest.raises(WorkloadError, match="no network"):
        supervised.network_of({"_target_": "Nothing"})


def test_scans_of_another_spacing_are_refused(dataset: Path, tmp_path: Path) -> None:
    shutil.copytree(dataset.parent, tmp_path / "data")
    for name in ("image-003.nii.gz", "label-003.nii.gz"):
        array = nifti.read(tmp_path / "data" / name, "")[0].array
        nifti.write(array, np.diag([2.0, 2.0, 3.0, 1.0]), tmp_path / "data" / name)
    with pytest.raises(RefusedInput, match="50 %"):
        run(tmp_path, tmp_path / "data" / "dataset.json")
