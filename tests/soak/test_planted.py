"""A hundred and twenty slides of real tissue, encoded by a real network: a pasted morphology is learned and found by
attention, a permuted outcome is not."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from permed_compute.spec import JobSpec  # noqa: E402
from permed_compute.testing.context import LocalContext, run_map  # noqa: E402
from permed_compute.workloads.pathology import encode, geojson, heatmap, predict, train  # noqa: E402
from tests.soak import planted  # noqa: E402
from tests.workloads.pathology import bags  # noqa: E402

pytestmark = [pytest.mark.soak, pytest.mark.shared, pytest.mark.timeout(1800)]
PARAMS: dict[str, Any] = {
    "hidden": 128, "attention": 64, "epochs": 60, "patience": 0, "batch": 8, "learning_rate": 0.001, "test": 0.3,
}  # fmt: skip
GRID = {"min_tissue": 0.0, "target_mpp": 1.0, "size": 112}
"""The tiles that are planted, at half their resolution: a quarter of the work."""
SMALL = "resources={workers: 1, cpus: 2, memory: 3GiB}"
_REGION = "pathology/CMU-1-Small-Region.svs"


@pytest.fixture(scope="module")
def cohort(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> bags.Made:
    return encoded(tmp_path_factory.mktemp("planted"), shared_data / _REGION, 120)


def encoded(folder: Path, region: Path, count: int) -> bags.Made:
    made = planted.write(folder, region, count)
    spec = JobSpec(name="e", workload="pathology/encode", inputs=(str(folder / "scans"),), params=GRID)
    done = run_map(encode.WORKLOAD, spec, folder / "work")
    (done.context.out / "features").rename(made.features)
    return made


def trained(root: Path, made: bags.Made, table: Path | None = None, **params: Any) -> tuple[dict[str, float], Path]:
    """Figures by measure: (low, value, high); the bundle."""
    inputs = [
        {"name": "cohort", "path": str(table or made.table)}, {"name": "features", "path": str(made.features)},
    ]  # fmt: skip
    spec = JobSpec(name="t", workload="pathology/train-mil", inputs=inputs, params={**PARAMS, **params}, seed=3)
    ctx = LocalContext(root, spec, threads=torch.get_num_threads())
    done = train.WORKLOAD.train(spec, ctx)
    assert done is not None and done.values["kind"] == "held-out"
    figures = {
        row["measure"]: (row["low"], row["mean"], row["high"]) for row in done.values["figures"] if not row["trait"]
    }
    print(params, figures)
    return figures, ctx.out / "bundle"


def share_found(root: Path, made: bags.Made, bundle: Path) -> float:
    """Of the 1 % of tiles with the highest attention of each held-out slide that has any planted, those that are."""
    held_out = json.loads((bundle.parent / train.SPLIT).read_text(encoding="utf-8"))["test"]
    inputs = [{"name": name, "path": str(path)} for name, path in (("bundle", bundle), ("features", made.features))]
    ended = run_map(predict.WORKLOAD, JobSpec(name="p", workload="pathology/predict", inputs=inputs), root)
    hits: list[bool] = []
    for item in (item for item in ended.done if item.part.name in held_out):
        for name in item.values["slides"]:
            rows = list(geojson.read(item.folder / f"{name}{heatmap.GEOJSON}"))
            value = np.array([row["properties"]["measurements"][heatmap.RELATIVE] for row in rows])
            corners = np.array([row["geometry"]["coordinates"][0][0] for row in rows]) // planted.TILE
            own = made.planted[name].reshape(planted.ACROSS, -1)[corners[:, 1], corners[:, 0]]
            if own.any():
                hits += own[np.argsort(-value)[: max(1, len(value) // 100)]].tolist()
    print(bundle, "found", np.mean(hits), "of", len(hits))
    return float(np.mean(hits))


@pytest.mark.parametrize("model", ["abmil", "clam-sb", "transmil"])
def test_the_pasted_morphology_is_learned_and_found(cohort: bags.Made, tmp_path: Path, model: str) -> None:
    params = {"attention": 32, "learning_rate": 0.0003} if model == "transmil" else {}
    figures, bundle = trained(tmp_path / "train", cohort, model=model, **params)
    assert figures["auroc of tumour"][1] >= 0.95, figures
    assert share_found(tmp_path / "predict", cohort, bundle) >= 0.9


@pytest.mark.parametrize("head", ["cox", "discrete"])
def test_the_pasted_risk_is_learned(cohort: bags.Made, tmp_path: Path, head: str) -> None:
    figures, _ = trained(tmp_path, cohort, head=head, batch=16)
    assert figures["harrell_c"][1] >= 0.75 and figures["uno_c"][1] >= 0.75, figures


def test_a_permuted_outcome_is_not(cohort: bags.Made, tmp_path: Path) -> None:
    table = planted.permuted(cohort.table, cohort.table.with_name("permuted.csv"))
    low, _, high = trained(tmp_path / "a", cohort, table)[0]["auroc of tumour"]
    assert low <= 0.5 <= high
    low, _, high = trained(tmp_path / "b", cohort, table, head="cox", batch=16)[0]["harrell_c"]
    assert low <= 0.5 <= high


@pytest.mark.ray
def test_the_commands_of_the_page_as_jobs_on_ray(shared_data: Path, tmp_path: Path) -> None:
    """What README and docs/pathology.md say to type, as it stands there, on 24 planted slides and the real one."""
    made = planted.write(tmp_path, shared_data / _REGION, 24)
    shutil.copyfile(shared_data / _REGION, tmp_path / "scans" / "whole.svs")
    rows = bags.read_table(made.table)
    whole = {"slide": "scans/whole.svs", "patient": "whole", "label": "normal", "time": "900", "event": "0"}
    bags.write_table(made.table, [*rows, whole])
    environment = os.environ | {
        "PERMED_HOME": str(tmp_path / "home"), "PERMED_ANCHOR": str(tmp_path / "anchor"), "PERMED_EXECUTOR": "ray",
        "PERMED_TRACKING_URI": "none",
    }  # fmt: skip
    results: dict[str, str] = {}
    for command in commands():
        for name, place in results.items():
            command = command.replace(name, place)
        words = [sys.executable, "-m", "permed_compute.cli", *shlex.split(command)[1:], "--json", "--set", SMALL]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        [ended] = json.loads(done.stdout)["jobs"]
        results[("ENCODED", "TRAINED", "PREDICTED")[len(results)]] = ended["results"]
    out = Path(results["PREDICTED"])
    page = (out / predict.PAGE).read_text(encoding="utf-8")
    assert "Where it looked" in page and "Tiles of highest attention" in page and "auroc of tumour" in page
    assert len(list(out.rglob(f"parts/*/*{heatmap.PNG}"))) == 25 and (out / "evidence.json").is_file()
    name = f"slide-{hashlib.sha256((tmp_path / 'scans' / 'whole.svs').read_bytes()).hexdigest()[:16]}"
    [found] = out.rglob(f"parts/*/{name}{heatmap.GEOJSON}")
    assert sum(1 for _ in geojson.read(found)) > 50


def commands() -> list[str]:
    """Encode, train, predict: the README's, which are the page's."""
    root = Path(__file__).parents[2]
    found = [
        re.findall(
            r"^\$ (permed run pathology/(?:encode|train-mil|predict) .*)$", path.read_text("utf-8"), re.MULTILINE
        )
        for path in (root / "README.md", root / "docs" / "pathology.md")
    ]
    assert found[0] == found[1] and len(found[0]) == 3
    return found[0]
