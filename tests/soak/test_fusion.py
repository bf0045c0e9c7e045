"""Fusion on real matched omics (CLL) and on a simulated cohort with images: what the issue promised, at full size.

pytest -m soak tests/soak/test_fusion.py -s       prints the tables
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("anndata")

from permed_compute.learning import survival
from permed_compute.paths import write_json
from permed_compute.testing.context import Outcome
from permed_compute.workloads.fusion import learn, train
from permed_compute.workloads.fusion.people import Cohort
from tests.workloads.fusion import made
from tests.workloads.fusion.test_train import agree_with_scikit_survival, answers_of

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3000)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """A step takes a millisecond: threads would wait for each other longer than they work."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shown(report: dict[str, Any]) -> None:
    for row in (report["fusion"], *report["alone"]):
        figures = "  ".join(
            f"{name} {told['value']:.3f} ({told['low']:.3f} – {told['high']:.3f})"
            for name, told in row["figures"].items()
        )
        apart = row.get("fusion_minus")
        difference = (
            f"  fusion − it {apart['value']:+.3f} ({apart['low']:+.3f} – {apart['high']:+.3f})" if apart else ""
        )
        print(f"{row['name']:<12} n={row['people']:<4} {figures}{difference}")
    for row in report["importance"]:
        print(f"importance {row['name']:<12} {row['mean']:+.3f} ({row['least']:+.3f} – {row['most']:+.3f})")


# ------------------------------------------------------------------------------------------------ CLL


@pytest.fixture(scope="module")
def cll(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, dict[str, Path], dict[str, Any]]:
    """Time to treatment of 174 patients with chronic lymphocytic leukaemia (Dietrich et al. 2018), 5 × 4."""
    path = shared_data / "omics" / "cll.h5mu"
    files = {"clinical": path, "omics": path}
    params = {"time": "TTT", "event": "treatedAfter", "clinical": ["age"], "categories": ["Gender"]}
    done = made.run("fusion/train-survival", tmp_path_factory.mktemp("cll"), files, **params)
    shown(done.result.values)
    return done, files, params


def test_fusion_is_not_worse_than_the_best_modality_alone(cll) -> None:
    report = cll[0].result.values
    assert report["people"] == 174 and report["events"] == 96 and (report["folds"], report["repeats"]) == (5, 4)
    [best] = [row for row in report["alone"] if row["name"] == report["best_alone"]]
    assert best["fusion_minus"]["low"] >= -0.03
    for row in (report["fusion"], *report["alone"]):
        assert all(told["low"] < told["value"] < told["high"] for told in row["figures"].values())


def test_scikit_survival_agrees_on_every_metric_of_cll(cll, tmp_path: Path) -> None:
    metrics = pytest.importorskip("sksurv.metrics")
    done, files, params = cll
    job = made.spec("fusion/train-survival", files, params)
    cohort = train.cohort_of(job, made.context(tmp_path, job), train.SURVIVAL)
    agree_with_scikit_survival(metrics, done.result.values, cohort, answers_of(done, cohort, 4))


def test_people_with_one_modality_are_predicted(cll, shared_data: Path, tmp_path: Path) -> None:
    import anndata
    import h5py
    from anndata.io import read_elem

    with h5py.File(shared_data / "omics" / "cll.h5mu") as file:
        for name in file["mod"]:
            x, obs, var = (read_elem(file["mod"][name][part]) for part in ("X", "obs", "var"))
            single = tmp_path / f"{name}.h5ad"
            anndata.AnnData(x[:9], obs=obs.iloc[:9], var=var).write_h5ad(single)
            inputs = {"bundle": cll[0].context.out / "bundle", name: single}
            told = made.run("fusion/predict", tmp_path / name, inputs).result.values
            assert told["people"] == 9 and told["have"][name] == 9 and sum(told["have"].values()) == 9


def test_cll_with_the_same_seed_is_the_same_bytes(cll, tmp_path: Path) -> None:
    done, files, params = cll
    again = made.run("fusion/train-survival", tmp_path, files, **params)
    for path in sorted(path for path in done.context.out.rglob("*") if path.is_file()):
        assert (again.context.out / path.relative_to(done.context.out)).read_bytes() == path.read_bytes(), path.name


# ------------------------------------------------------------------------------------------------ simulated


PARAMS = {
    **made.COLUMNS,
    "learning_rate": 0.01,
    "repeats": 2,
    "resamples": 500,
    "permutations": 2,
    "simulated": [*made.SIMULATED],
}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return made.simulated(tmp_path_factory.mktemp("simulated"), 400, seed=1)


@pytest.fixture(scope="module")
def fused(cohort: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    report = dict(made.run("fusion/train-survival", tmp_path_factory.mktemp("fused"), cohort, **PARAMS).result.values)
    shown(report)
    return report


def test_the_fusion_beats_each_modality_alone_where_the_signal_is_split(fused: dict[str, Any]) -> None:
    assert {row["name"] for row in fused["alone"]} == {*made.SIMULATED}
    for row in fused["alone"]:
        assert row["fusion_minus"]["low"] > 0, row["name"]
    lost = {row["name"]: row["mean"] for row in fused["importance"]}
    assert min(lost[name] for name in ("expression", "radiomics", "slides")) > 0.01 > abs(lost["score"])


def test_a_useless_modality_does_not_hurt_beyond_its_interval(fused, cohort: dict[str, Path], tmp_path: Path) -> None:
    without = {name: path for name, path in cohort.items() if name != "score"}
    params = {**PARAMS, "simulated": [name for name in made.SIMULATED if name != "score"]}
    told = made.run("fusion/train-survival", tmp_path, without, **params).result.values["fusion"]["figures"][
        "harrell_c"
    ]
    own = fused["fusion"]["figures"]["harrell_c"]
    print(
        f"with the useless one {own['value']:.3f}, without {told['value']:.3f} ({told['low']:.3f} – {told['high']:.3f})"
    )
    assert own["value"] >= told["low"]


def test_a_missing_modality_degrades_gracefully(fused: dict[str, Any]) -> None:
    """Taken away when it answers: worse than with it, and still at least what the best of the others can alone."""
    alone = {row["name"]: row["figures"]["harrell_c"]["value"] for row in fused["alone"]}
    for row in fused["without"]:
        found = row["figures"]["harrell_c"]
        print(f"without {row['name']:<12} {found['value']:.3f} ({found['low']:.3f} – {found['high']:.3f})")
        assert found["value"] <= fused["fusion"]["figures"]["harrell_c"]["value"] + 0.01
        assert found["high"] >= max(value for name, value in alone.items() if name != row["name"])


PERMUTATIONS = 24


def permuted(cohort: Cohort, seed: int, ctx: Any) -> Any:
    """Harrell's C with its interval, of held-out people whose outcomes were dealt anew before anything was learnt."""
    order = np.random.default_rng(seed).permutation(len(cohort.people))
    mixed = dataclasses.replace(cohort, outcomes=cohort.outcomes.of(order))
    risk = np.zeros(len(order))
    for fold in range(5):
        train_rows, held = mixed.sides(seed, fold, 5)
        made_by = learn.learn(mixed, train_rows, list(mixed.modalities), learn.How(), 10 * seed + fold, ctx)
        values = {name: rows[held] for name, rows in mixed.values.items()}
        risk[held] = made_by.answer(values, mixed.mask[held], np.zeros(0)).score
    return survival.scores(mixed.outcomes, mixed.outcomes, risk, resamples=500)[survival.HARRELL]


def test_a_permuted_outcome_gives_one_half(cohort: dict[str, Path], tmp_path: Path) -> None:
    """An interval over people knows nothing of how a training would have ended with other labels: the mean over
    permutations is judged by how far these lie apart."""
    job = made.spec("fusion/train-survival", cohort, PARAMS)
    ctx = made.context(tmp_path, job)
    people = train.cohort_of(job, ctx, train.SURVIVAL)
    found = [permuted(people, seed, ctx) for seed in range(PERMUTATIONS)]
    print([f"{one.value:.3f} ({one.low:.3f} – {one.high:.3f})" for one in found])
    values = np.array([one.value for one in found])
    half_width = 1.96 * values.std(ddof=1) / np.sqrt(PERMUTATIONS)
    print(f"mean of {PERMUTATIONS}: {values.mean():.4f} ± {half_width:.4f}")
    assert abs(values.mean() - 0.5) <= half_width
    assert sum(one.low <= 0.5 <= one.high for one in found) >= 5 / 6 * PERMUTATIONS


def test_the_report_is_plain_json(fused: dict[str, Any], tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", fused)
    assert json.loads((tmp_path / "x.json").read_text())["simulated"] == sorted(made.SIMULATED)
