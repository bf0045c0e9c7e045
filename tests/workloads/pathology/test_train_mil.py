"""From features to a bundle: what is planted is learned and what is not is not, the same bytes, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.errors import RefusedInput, SpecError, WorkloadError  # noqa: E402
from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import LocalContext, StopAfter  # noqa: E402
from permed_compute.workloads.pathology import mil_bundle, train  # noqa: E402
from permed_compute.workloads.port import Result  # noqa: E402

from . import bags  # noqa: E402

SMALL: dict[str, Any] = {
    "hidden": 16, "attention": 8, "epochs": 20, "patience": 0, "batch": 8, "learning_rate": 0.005, "tiles": 30,
    "test": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> bags.Made:
    return bags.cohort(tmp_path_factory.mktemp("made"))


def run(
    root: Path, made: bags.Made, left: int = 0, table: Path | None = None, **params: Any
) -> tuple[Result | None, StopAfter]:
    inputs = [
        {"name": "cohort", "path": str(table or made.table)}, {"name": "features", "path": str(made.features)},
    ]  # fmt: skip
    spec = JobSpec(name="t", workload="pathology/train-mil", inputs=inputs, params={**SMALL, **params}, seed=3)
    ctx = StopAfter(root, spec, threads=1)
    ctx.left = left
    return train.WORKLOAD.train(spec, ctx), ctx


def figure(result: Result | None, measure: str) -> dict[str, Any]:
    assert result is not None
    return next(row for row in result.values["figures"] if row["measure"] == measure and not row["trait"])


# ------------------------------------------------------------------------------------------------ it learns


@pytest.mark.parametrize("model", ["abmil", "clam-sb"])
def test_a_planted_class_is_learned_and_told_of_patients_that_were_held_out(made, tmp_path: Path, model: str) -> None:
    done, ctx = run(tmp_path, made, model=model)
    assert figure(done, "auroc of tumour")["mean"] >= 0.95
    sides = json.loads((ctx.out / "split.json").read_text())
    assert done.values["kind"] == "held-out" and figure(done, "auroc of tumour")["patients"] == len(sides["test"])
    assert [step for name, _, step in ctx.metrics if name == "validation_loss"] == list(range(1, 21))
    card = (ctx.out / "bundle" / mil_bundle.CARD).read_text()
    assert "neither training nor any choice has seen" in card and "not validated for care" in card
    assert "| auroc of tumour | everybody |" in card and "| auroc of tumour | site A |" in card
    page = (ctx.out / "report.html").read_text()
    assert "Found, over false alarms" in page and "validation loss" in page
    described = mil_bundle.read(ctx.out / "bundle")
    assert described.head.classes == ("normal", "tumour") and described.kind.encoder == "made"


@pytest.mark.parametrize("head", ["cox", "discrete"])
def test_a_planted_risk_is_learned(made, tmp_path: Path, head: str) -> None:
    done, ctx = run(tmp_path, made, head=head, epochs=60, learning_rate=0.01)
    for measure in ("harrell_c", "uno_c"):
        told = figure(done, measure)
        assert told["mean"] >= 0.75 and told["low"] < told["mean"] < told["high"], (measure, told)
    assert 0 < figure(done, "ibs")["mean"] < 0.25
    assert "Survival by risk group" in (ctx.out / "report.html").read_text()


def test_nothing_is_learned_of_outcomes_that_were_dealt_out_anew(tmp_path: Path) -> None:
    permuted = bags.cohort(tmp_path / "made", permuted=True)
    told = figure(run(tmp_path / "run", permuted)[0], "auroc of tumour")
    assert told["low"] <= 0.5 <= told["high"], told


def test_without_held_out_patients_a_fit_is_called_a_fit(made, tmp_path: Path) -> None:
    done, ctx = run(tmp_path, made, epochs=1, validation=0, test=0)
    assert done.values["kind"] == "fit" and "a fit, no evidence" in (ctx.out / "bundle" / mil_bundle.CARD).read_text()


# ------------------------------------------------------------------------------------------------ the same bytes


@pytest.mark.parametrize("head", ["classification", "cox"])
def test_preempted_in_the_middle_it_ends_with_the_same_bundle(made, tmp_path: Path, head: str) -> None:
    params = {"epochs": 4, "head": head, "batch": 8, "validation": 0.3}
    done, ctx = run(tmp_path / "whole", made, **params)
    assert run(tmp_path / "cut", made, left=5, **params)[0] is None
    again, resumed = run(tmp_path / "cut", made, **params)
    assert again.values["resumed_at"] == 5 and done.values["resumed_at"] == 0
    for name in ("weights", "bundle_digest", "history", "best_epoch", "figures"):
        assert again.values[name] == done.values[name], name
    for name in (mil_bundle.WEIGHTS, mil_bundle.CARD, mil_bundle.CONFIG):
        assert (resumed.out / "bundle" / name).read_bytes() == (ctx.out / "bundle" / name).read_bytes()


def test_repeats_share_the_split_and_nothing_else_and_folds_the_test_side(made, tmp_path: Path) -> None:
    ends = [run(tmp_path / str(k), made, epochs=1, repeat=k) for k in (0, 1)]
    splits = [json.loads((ctx.out / "split.json").read_text()) for _, ctx in ends]
    assert splits[0] == splits[1] and ends[0][0].values["weights"] != ends[1][0].values["weights"]
    folds = []
    for fold in range(2):
        _, ctx = run(tmp_path / f"fold{fold}", made, epochs=1, folds=2, fold=fold)
        folds.append(json.loads((ctx.out / "split.json").read_text()))
    assert folds[0]["test"] == folds[1]["test"] and not set(folds[0]["validation"]) & set(folds[1]["validation"])


# ------------------------------------------------------------------------------------------------ what is refused


def changed(made: bags.Made, path: Path, change: Any) -> Path:
    rows = bags.read_table(made.table)
    for k, row in enumerate(rows):
        change(k, row)
    return bags.write_table(path, rows)


def always(column: str, value: object) -> Any:
    return lambda k, row: row.update({column: value})


def only(number: int, column: str, value: object) -> Any:
    return lambda k, row: row.update({column: value}) if k == number else None


REFUSED = {
    "NO_FEATURES": ({}, only(3, "slide", "slide-00000000000000ff")),
    "ONE_CLASS": ({}, always("label", "tumour")),
    "LABEL_MISSING": ({}, only(2, "label", "")),
    "TIME_NEGATIVE": ({"head": "cox"}, only(2, "time", "-4")),
    "NO_EVENT": ({"head": "cox"}, always("event", "0")),
    "OUTCOME_UNREADABLE": ({"head": "discrete"}, only(2, "event", "dead")),
    "OUTCOME_CONFLICTS": ({}, only(1, "label", "other")),  # the first patient's second slide
    "PATIENT_IN_TWO_SPLITS": ({}, lambda k, row: row.update(split="test" if k == 1 else "train")),
    "SLIDE_OF_TWO_PATIENTS": ({}, lambda k, row: row.update(patient=f"p{k}", slide=bags.slide_name("0 0 0"))),
    "SLIDE_MISSING": ({}, only(4, "slide", "gone.svs")),
    "COHORT_UNREADABLE": ({}, always("diagnosis", "x")),
}  # fmt: skip


@pytest.mark.parametrize("code", list(REFUSED))
def test_cohorts_that_cannot_be_learned_from_are_refused(made, tmp_path: Path, code: str) -> None:
    params, change = REFUSED[code]
    with pytest.raises(RefusedInput) as caught:
        run(tmp_path, made, table=changed(made, tmp_path / "cohort.csv", change), **params)
    assert caught.value.finding.code == code and caught.value.remedy
    assert "p1" not in str(caught.value) and "gone" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "how"), [("ENCODER_DIFFERS", {"digest": "f" * 64}), ("MPP_DIFFERS", {"mpp": 0.25})]
)  # fmt: skip
def test_features_of_another_kind_are_refused(tmp_path: Path, code: str, how: dict[str, Any]) -> None:
    made = bags.cohort(tmp_path, 8)
    name = sorted(made.planted)[-1]
    bags.write_features(tmp_path / "other", name, np.zeros((9, 12)), **how)
    (made.features / f"{name}.zarr").rename(tmp_path / "aside")
    (tmp_path / "other" / f"{name}.zarr").rename(made.features / f"{name}.zarr")
    with pytest.raises(RefusedInput) as caught:
        run(tmp_path, made)
    assert caught.value.finding.code == code


def test_params_are_checked_and_a_cox_batch_is_not_shared(made, tmp_path: Path) -> None:
    with pytest.raises(SpecError) as raised:
        train.params_of({"head": "regression", "model": "mean", "hidden": 12, "what": 1})
    assert len(raised.value.problems) == 4
    with pytest.raises(SpecError, match="fold"):
        train.params_of({"folds": 3, "fold": 3})
    spec = JobSpec(name="t", workload="pathology/train-mil", params={"head": "cox"})
    ctx = LocalContext(tmp_path, spec)
    ctx.world = 2
    with pytest.raises(WorkloadError, match="risk sets"):
        train.WORKLOAD.train(spec, ctx)


def test_the_shipped_job_is_valid_and_says_the_defaults() -> None:
    from importlib import resources

    from permed_compute import spec as specs

    job = specs.load(Path(str(resources.files("permed_compute.jobs"))) / "pathology/train-mil/job.yaml")
    assert job.workload == "pathology/train-mil" and train.params_of(job.params) == train.params_of({})
