"""The training job: nothing of the held-out is learnt from, the same bytes again, figures that others agree with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from permed_compute.errors import SpecError
from permed_compute.learning.randomness import derive
from permed_compute.testing.context import Outcome
from permed_compute.workloads.fusion import judge, train
from permed_compute.workloads.fusion.learn import How
from permed_compute.workloads.fusion.people import Cohort
from permed_compute.workloads.fusion.tables import Table

from . import made

NAMES = ["clinical", *made.SIMULATED]


def cohort_of(files: dict[str, Path], root: Path) -> Cohort:
    job = made.spec("fusion/train-survival", files, made.SMALL)
    return train.cohort_of(job, made.context(root, job), train.SURVIVAL)


def answers_of(trained: Outcome, cohort: Cohort, repeats: int) -> judge.Answers:
    done = [item for item in trained.done if "fold" in item.part.params]
    return train._gathered(done, cohort, repeats)[0]


# ------------------------------------------------------------------------------------------------ no leak


def test_nothing_of_the_held_out_people_changes_what_is_learnt(files: dict[str, Path], tmp_path: Path) -> None:
    """Other values and other outcomes of the held-out: the training ends with the same weights."""
    cohort = cohort_of(files, tmp_path)
    training, held = cohort.sides(1, 0, 3)
    job = made.spec("fusion/train-survival", files, made.SMALL)
    ctx = made.context(tmp_path, job)
    chance = np.random.default_rng(0)
    assert cohort.outcomes is not None
    time, event = cohort.outcomes.time.copy(), cohort.outcomes.event.copy()
    time[held], event[held] = chance.permutation(time[held]), ~event[held]
    gone = {cohort.people[k] for k in held}
    tables = {
        name: Table(
            table.people, table.columns,
            np.where(np.isin(table.people, list(gone))[:, None], table.values + 50, table.values).astype(np.float32),
        )
        for name, table in cohort.modalities.items()
    }  # fmt: skip
    other = Cohort(cohort.people, cohort.families, tables, type(cohort.outcomes)(time, event))
    how = How(epochs=5)
    one, two = (train.learn.learn(each, training, NAMES, how, 4, ctx).state() for each in (cohort, other))
    for name, value in one["net"].items():
        assert torch.equal(value, two["net"][name]), name
    for name, parts in one["projections"].items():
        assert all(torch.equal(value, two["projections"][name][part]) for part, value in parts.items())
    assert one["centre"] == two["centre"] and one["baseline"] == two["baseline"]


def test_everybody_is_answered_for_once_in_each_repetition_and_families_stay_together(trained: Outcome) -> None:
    told = json.loads((trained.context.out / "people.json").read_text())
    folds = np.array(told["folds"])
    assert folds.shape == (2, 90) and set(folds.ravel()) == {0, 1, 2} and len(set(told["families"])) == 72
    for repetition in folds:
        pairs = {(family, fold) for family, fold in zip(told["families"], repetition, strict=True)}
        assert len(pairs) == 72
    assert (folds[0] != folds[1]).any() and "sim-" not in json.dumps(told)


# ------------------------------------------------------------------------------------------------ the figures


def test_the_fusion_has_signal_and_stands_beside_each_modality(trained: Outcome) -> None:
    report = trained.result.values
    assert report["fusion"]["figures"]["harrell_c"]["value"] > 0.65
    assert [row["name"] for row in report["alone"]] == NAMES
    assert [row["name"] for row in report["importance"]] == NAMES
    for row in (report["fusion"], *report["alone"]):
        assert (
            row["figures"]["harrell_c"]["low"]
            < row["figures"]["harrell_c"]["value"]
            < row["figures"]["harrell_c"]["high"]
        )
        assert 0 < row["figures"]["ibs"]["value"] < 0.35
    assert report["fusion"]["people"] == 90 > max(row["people"] for row in report["alone"][1:])
    assert trained.result.metrics["fusion_harrell_c"] == report["fusion"]["figures"]["harrell_c"]["value"]
    groups = report["groups"]["curves"]
    assert sum(row["people"] for row in groups.values()) == 90
    assert groups["low"]["survival"][-1] > groups["high"]["survival"][-1]


def test_scikit_survival_agrees_on_every_figure(trained: Outcome, files: dict[str, Path], tmp_path: Path) -> None:
    metrics = pytest.importorskip("sksurv.metrics")
    cohort = cohort_of(files, tmp_path)
    agree_with_scikit_survival(metrics, trained.result.values, cohort, answers_of(trained, cohort, 2))


def agree_with_scikit_survival(metrics, report, cohort: Cohort, answers: judge.Answers) -> None:
    from sksurv.util import Surv

    own = cohort.outcomes
    everybody = Surv.from_arrays(own.event, own.time)
    views = {"fusion": report["fusion"], **{f"alone {row['name']}": row for row in report["alone"]}}
    for view, row in views.items():
        rows = answers.rows(view)
        risk, told = answers.score(view, rows), row["figures"]
        event, time = own.event[rows], own.time[rows]
        assert told["harrell_c"]["value"] == pytest.approx(metrics.concordance_index_censored(event, time, risk)[0])
        theirs = metrics.concordance_index_ipcw(everybody, everybody[rows], risk, tau=own.time.max())[0]
        assert told["uno_c"]["value"] == pytest.approx(theirs, abs=1e-6)
        kept = (answers.times >= time.min()) & (answers.times < time.max())
        curve = answers.curves[view][:, rows].mean(axis=0)[:, kept]
        ibs = metrics.integrated_brier_score(everybody, everybody[rows], curve, answers.times[kept])
        assert told["ibs"]["value"] == pytest.approx(ibs, abs=1e-6)


def test_the_page_and_the_card_say_what_is_simulated(trained: Outcome) -> None:
    page = (trained.context.out / "fusion.html").read_text()
    card = (trained.context.out / "bundle/docs/README.md").read_text()
    assert "Simulated, not measured in anybody: expression, radiomics, score, slides" in page
    assert "Simulated, not measured in anybody: expression, radiomics, score, slides" in card
    assert "not validated for care" in page and "not validated for care" in card.replace("**", "")
    assert page.count('class="line') == 6 and "sim-0" not in page + card  # three curves and their legend; no names


def test_an_input_that_is_called_simulated_must_be_there(files: dict[str, Path], tmp_path: Path) -> None:
    job = made.spec("fusion/train-survival", files, {**made.SMALL, "simulated": ["scan"]})
    with pytest.raises(SpecError, match=r"params.simulated: .*'scan'"):
        train.cohort_of(job, made.context(tmp_path, job), "survival")


# ------------------------------------------------------------------------------------------------ again


def test_the_same_seed_gives_the_same_bytes(files: dict[str, Path], tmp_path: Path) -> None:
    few = {name: files[name] for name in ("clinical", "expression", "slides")}
    params = {**made.SMALL, "epochs": 4, "repeats": 1, "permutations": 1, "head": "discrete", "bins": 5}
    one, other = (made.run("fusion/train-survival", tmp_path / name, few, **params) for name in "ab")
    files_of = [
        sorted(path.relative_to(done.context.out) for path in done.context.out.rglob("*.*")) for done in (one, other)
    ]
    assert files_of[0] == files_of[1] and len(files_of[0]) == 7
    for name in files_of[0]:
        assert (one.context.out / name).read_bytes() == (other.context.out / name).read_bytes(), name


def test_a_withdrawn_person_is_in_no_part_any_more_and_the_earlier_run_is_named(
    trained: Outcome, files: dict[str, Path], tmp_path: Path
) -> None:
    gone = tmp_path / "withdrawn.txt"
    gone.write_text("sim-00007\n")
    inputs = [
        *((name, files[name]) for name in ("clinical", "expression")),
        ("withdrawn", gone),
        ("earlier", trained.context.out),
    ]
    done = made.run("fusion/train-survival", tmp_path / "next", inputs, **{**made.SMALL, "epochs": 2, "repeats": 1})
    who = made.context(tmp_path, made.spec("fusion/predict", {})).pseudonym("sim-00007")
    assert who not in (done.context.out / "people.json").read_text()
    assert who in (trained.context.out / "people.json").read_text()
    assert done.result.values["people"] == 89 and done.result.values["left_out"]["withdrawn"] == 1
    [earlier] = done.result.values["earlier"]
    assert earlier == {"bundle": trained.result.values["bundle"], "people": [who]}
    assert [finding.code for finding in done.result.findings] == ["WITHDRAWN_IN_EARLIER"]
    assert who in (done.context.out / "fusion.html").read_text()
    keys = [{part.inputs for part in (item.part for item in each.done)} for each in (trained, done)]
    assert not keys[0] & keys[1]  # nothing that the person was in is found again


def test_too_few_people_and_wrong_params_are_told_at_once(files: dict[str, Path]) -> None:
    with pytest.raises(SpecError, match=r"params.time: is missing.*params.folds: is 1.*params.codes: holds 'X'"):
        train.Params.of({"event": "E", "folds": 1, "codes": ["X"]}, "survival")
    with pytest.raises(SpecError, match=r"params.label: is missing"):
        train.Params.of({}, "classification")


# ------------------------------------------------------------------------------------------------ classes


def test_classes_are_told_apart_by_the_same_job(files: dict[str, Path], tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    genes = chance.normal(size=(80, 6))
    label = np.where(genes[:, 0] + genes[:, 1] + 0.5 * chance.normal(size=80) > 0, "yes", "no")
    names = [f"id{k}" for k in range(80)]
    inputs = {
        "clinical": made.table(tmp_path / "c.tsv", ("IID", "RESPONSE"), list(zip(names, label, strict=True))),
        "a": made.table(
            tmp_path / "a.tsv", ("IID", "x", "y"), [(n, *row[:2]) for n, row in zip(names, genes, strict=True)]
        ),
        "b": made.table(tmp_path / "b.tsv", ("IID", "z"), [(n, row[3]) for n, row in zip(names, genes, strict=True)]),
    }
    params = {"label": "RESPONSE", "epochs": 60, "learning_rate": 0.02, "folds": 3, "repeats": 1, "resamples": 100}
    report = made.run("fusion/train-classification", tmp_path / "run", inputs, **params).result.values
    alone = {row["name"]: row["figures"]["auroc"]["value"] for row in report["alone"]}
    assert report["fusion"]["figures"]["auroc"]["value"] > 0.85 and alone["a"] > 0.85 and alone["b"] < 0.7
    assert report["best_alone"] == "a" and "groups" not in report
    assert report["importance"][0]["mean"] > 0.1 > report["importance"][1]["mean"]


def test_a_seed_is_of_its_fold_and_repetition() -> None:
    assert len({derive(0, "fold", k, fold) for k in range(4) for fold in range(5)}) == 20
