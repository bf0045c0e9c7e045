"""A bundle at work: attention on what was planted, heatmaps that others open, a report, evidence for the gate."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.client import Client  # noqa: E402
from permed_compute.errors import ModelRefusedError, StateError  # noqa: E402
from permed_compute.governance import criteria, judge  # noqa: E402
from permed_compute.governance.identify import used_by  # noqa: E402
from permed_compute.learning import evidence  # noqa: E402
from permed_compute.spec import JobSpec, Purpose  # noqa: E402
from permed_compute.testing.context import LocalContext, Outcome, run_map  # noqa: E402
from permed_compute.workloads.pathology import geojson, heatmap, predict, train  # noqa: E402

from . import bags  # noqa: E402
from .test_train_mil import SMALL, only  # noqa: E402

CRITERIA = """
title: Tumour on slides
model: slide-model
intended_use: {name: tumour, statement: Finds tumour in biopsies that a pathologist reads as well.}
least_patients: 20
thresholds: [{measure: auroc of tumour, least: 0.8}]
subgroups: {traits: [site], thresholds: [{measure: auroc of tumour, least: 0.7, of: mean}]}
"""


def trained(root: Path, made: bags.Made, **params: Any) -> Path:
    inputs = [{"name": "cohort", "path": str(made.table)}, {"name": "features", "path": str(made.features)}]
    spec = JobSpec(name="t", workload="pathology/train-mil", inputs=inputs, params={**SMALL, **params}, seed=3)
    ctx = LocalContext(root, spec, threads=1)
    train.WORKLOAD.train(spec, ctx)
    return ctx.out / "bundle"


def spec_of(bundle: Path, features: Path, table: Path | None = None, **params: Any) -> JobSpec:
    inputs = [{"name": "bundle", "path": str(bundle)}, {"name": "features", "path": str(features)}]
    inputs += [{"name": "cohort", "path": str(table)}] if table else []
    return JobSpec(name="t", workload="pathology/predict", inputs=inputs, params=params)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    return trained(root, bags.cohort(root / "made"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> bags.Made:
    """Patients that the bundle has never seen; one of them without features."""
    made = bags.cohort(tmp_path_factory.mktemp("others"), 40, seed=9)
    rows = bags.read_table(made.table)
    only(len(rows) - 1, "slide", "slide-00000000000000ff")(len(rows) - 1, rows[-1])
    bags.write_table(made.table, rows)
    return made


@pytest.fixture(scope="module")
def outcome(bundle: Path, others: bags.Made, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return run_map(predict.WORKLOAD, spec_of(bundle, others.features, others.table), tmp_path_factory.mktemp("run"))


def test_attention_finds_what_was_planted(outcome: Outcome, others: bags.Made) -> None:
    hits = []
    for item in outcome.done:
        for name in item.values["slides"]:
            if others.grade[name]:
                rows = list(geojson.read(item.folder / f"{name}{heatmap.GEOJSON}"))
                value = np.array([row["properties"]["measurements"][heatmap.RELATIVE] for row in rows])
                hits += others.planted[name][np.argsort(-value)[: max(1, len(value) // 100)]].tolist()
    assert len(hits) >= 25 and np.mean(hits) >= 0.9


def test_a_patients_slides_are_answered_together_and_alone(outcome: Outcome) -> None:
    several = [item for item in outcome.done if len(item.values["slides"]) > 1]
    assert several
    for item in several:
        alone = [row["probability"]["tumour"] for row in item.values["slides"].values()]
        assert item.values["probability"]["tumour"] not in alone and len(set(alone)) == len(alone)
    with (outcome.context.out / predict.TABLE).open() as file:
        table = {row["patient"]: row for row in csv.DictReader(file)}
    assert set(table) == {item.part.name for item in outcome.done}
    for item in outcome.done:
        assert float(table[item.part.name]["probability tumour"]) == item.values["probability"]["tumour"]


def test_a_heatmap_opens_elsewhere(outcome: Outcome) -> None:
    import zarr
    from PIL import Image

    models = pytest.importorskip("ome_zarr_models.v05")
    item = outcome.done[0]
    name = next(iter(item.values["slides"]))
    group = zarr.open_group(item.folder / f"{name}{heatmap.ZARR}", mode="r")
    models.Image.from_zarr(group)
    grid = group["0"][:]
    rows = list(geojson.read(item.folder / f"{name}{heatmap.GEOJSON}"))
    assert np.isfinite(grid).sum() == len(rows) and grid.shape[1] == bags.ACROSS
    for row in rows:
        x, y = row["geometry"]["coordinates"][0][0]
        value = row["properties"]["measurements"][heatmap.RELATIVE]
        assert grid[y // 64, x // 64] == pytest.approx(value, abs=1e-3)
        said = row["properties"]
        ring = np.array(row["geometry"]["coordinates"][0][:-1])
        colour = said["classification"]["color"]
        assert row == geojson.feature([ring], "tile", "Attention", colour, said["measurements"])
    [scale] = group.attrs["ome"]["multiscales"][0]["datasets"][0]["coordinateTransformations"]
    assert scale["scale"] == [32.0, 32.0]  # µm: 64 pixels of 0.5
    with Image.open(item.folder / f"{name}{heatmap.PNG}") as picture:
        assert max(picture.size) <= 1024


def test_who_has_no_features_is_named_and_stops_nobody(outcome: Outcome) -> None:
    [error] = outcome.failures.values()
    assert error.finding.code == "NO_FEATURES" and outcome.result.values["failed"] == 1
    page = (outcome.context.out / predict.PAGE).read_text()
    assert "NO_FEATURES" in page and "Where it looked" in page and "auroc of tumour" in page
    assert "http" not in page.partition("<style>")[2]


def test_the_gate_reads_what_was_predicted(outcome: Outcome, bundle: Path, others: bags.Made, tmp_path: Path) -> None:
    told = evidence.read(outcome.context.out)
    made = {hashlib.sha256((item.folder / predict.PREDICTION).read_bytes()).hexdigest() for item in outcome.done}
    assert set(told.predictions["slide-model"]) == made and told.cases == len(outcome.done) and told.unscored == 1
    judged = judge.judge(told, criteria.loads(CRITERIA))
    assert judged.failures == ("1 cases have no result at all",)
    assert {row.verdict for row in judged.rows} == {"met"}
    spec = spec_of(bundle, others.features)
    used = used_by(spec, tmp_path)
    assert used.digest == predict.model_digest(spec, LocalContext(tmp_path, spec))
    weights = bundle / "models" / "model.pt"
    kept = weights.read_bytes()
    try:
        weights.write_bytes(kept + b"x")
        assert used_by(spec, tmp_path / "other").digest != used.digest
    finally:
        weights.write_bytes(kept)


def test_a_slide_model_from_predictions_to_care(
    client: Client, bundle: Path, others: bags.Made, tmp_path: Path
) -> None:  # fmt: skip
    """Jobs as people submit them: the one that predicts is the one that judged; what failed in it is not left out."""
    shutil.copytree(bundle, tmp_path / "bundle")
    whole = bags.write_table(tmp_path / "whole.csv", bags.read_table(others.table)[:-1])

    def care_of(table: Path) -> JobSpec:
        asked = spec_of(tmp_path / "bundle", others.features, table, heatmap=False, geojson=False)
        return asked.model_copy(update={"legal_entity": "ous", "purpose": Purpose.CARE})

    def ran(spec: JobSpec) -> str:
        [job] = client.wait([job.id for job in client.submit(spec)])
        return job.id

    with pytest.raises(ModelRefusedError, match="No validation"):
        client.submit(care_of(whole))
    partial, predicted = (
        ran(care_of(table).model_copy(update={"purpose": Purpose.RESEARCH})) for table in (others.table, whole)
    )
    with pytest.raises(StateError, match="left out of the figures"):
        client.service.model("validate", {"evaluation": partial, "predictions": partial, "criteria": CRITERIA})
    asked = {"evaluation": predicted, "predictions": predicted, "criteria": CRITERIA}
    record = client.service.model("validate", asked)
    assert (
        record["failures"] == []
        and record["patients"] == 39
        and {row["verdict"] for row in record["judged"]} == {"met"}
    )
    with pytest.raises(ModelRefusedError) as caught:
        client.submit(care_of(whole))
    assert caught.value.rule == "model-not-promoted"
    client.service.model("promote", {"record": record["record"], "own_work": "a test"})
    [cared] = client.wait([job.id for job in client.submit(care_of(whole))])
    assert cared.state == "SUCCEEDED", cared.detail
    weights = tmp_path / "bundle" / "models" / "model.pt"
    weights.write_bytes(weights.read_bytes() + b"x")
    with pytest.raises(ModelRefusedError, match="not the one that was validated"):
        client.submit(care_of(whole))


def test_features_of_another_encoder_are_refused_alone(bundle: Path, tmp_path: Path) -> None:
    chance = np.random.default_rng(0)
    bags.write_features(tmp_path, "slide-00000000000000aa", chance.normal(size=(9, 12)))
    bags.write_features(tmp_path, "slide-00000000000000bb", chance.normal(size=(9, 12)), encoder="other")
    ended = run_map(predict.WORKLOAD, spec_of(bundle, tmp_path, geojson=False, heatmap=False), tmp_path / "run")
    assert [error.finding.code for error in ended.failures.values()] == ["ENCODER_DIFFERS"]
    assert ended.result.values["patients"] == 1 and not list((ended.done[0].folder).glob("*.png"))


def test_a_survival_model_tells_risk_group_and_curve(tmp_path: Path) -> None:
    made = bags.cohort(tmp_path / "made", 30)
    place = trained(tmp_path, made, head="cox", epochs=3, batch=8)
    ended = run_map(
        predict.WORKLOAD, spec_of(place, made.features, made.table, geojson=False, heatmap=False), tmp_path / "run"
    )  # fmt: skip
    values = ended.done[0].values
    chances = values["survival"]["chance"]
    assert values["group"] in ("lower risk", "higher risk") and chances == sorted(chances, reverse=True)
    assert {"harrell_c", "uno_c", "ibs"} <= set(ended.result.metrics)
    assert "Survival by risk group" in (ended.context.out / predict.PAGE).read_text()
    assert json.loads((place / "configs" / "model.json").read_text())["baseline"]


def test_pictures_over_the_slide(bundle: Path, slide: Path, tmp_path: Path) -> None:
    """Real pixels: tiles encoded from a slide, and shown again where attention is highest."""
    name = f"slide-{hashlib.sha256(slide.read_bytes()).hexdigest()[:16]}"
    bags.write_features(tmp_path / "features", name, np.random.default_rng(0).normal(size=(40, 12)))
    inputs = [
        {"name": "bundle", "path": str(bundle)}, {"name": "features", "path": str(tmp_path / "features")},
        {"name": "slides", "path": str(slide)},
    ]  # fmt: skip
    spec = JobSpec(name="t", workload="pathology/predict", inputs=inputs, params={"top": 3})
    ended = run_map(predict.WORKLOAD, spec, tmp_path / "run")
    from PIL import Image

    with Image.open(ended.done[0].folder / predict.TOP) as strip:
        assert strip.size == (480, 160)
    assert "Tiles of highest attention" in (ended.context.out / predict.PAGE).read_text()


def test_the_shipped_job_is_valid_and_says_the_defaults() -> None:
    from importlib import resources

    from permed_compute import spec as specs

    job = specs.load(Path(str(resources.files("permed_compute.jobs"))) / "pathology/predict/job.yaml")
    assert job.workload == "pathology/predict" and predict.params_of(job.params) == predict.params_of({})
