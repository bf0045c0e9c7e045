"""Answers for new people from whatever is there."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from permed_compute.errors import RefusedInput, SpecError
from permed_compute.testing.context import Outcome, run_map
from permed_compute.workloads.fusion import predict, publish

from . import made


def predicted(trained: Outcome, root: Path, **inputs: Path) -> tuple[Outcome, dict[str, dict[str, str]]]:
    done = made.run("fusion/predict", root, {"bundle": trained.context.out / "bundle", **inputs})
    with (done.context.out / "predictions.tsv").open() as file:
        return done, {row["IID"]: row for row in csv.DictReader(file, delimiter="\t")}


def some(path: Path, target: Path, count: int) -> Path:
    target.write_text("\n".join(path.read_text().splitlines()[: count + 1]) + "\n")
    return target


def test_everybody_of_the_training_is_answered_for_from_all_that_is_known(
    trained: Outcome, files: dict[str, Path], tmp_path: Path
) -> None:
    done, rows = predicted(trained, tmp_path, **files)
    bundle = publish.read(trained.context.out / "bundle")
    assert len(rows) == 90 and done.result.values["without answer"] == 0 and len(bundle.members) == 2
    times = [float(name.partition("_")[2]) for name in next(iter(rows.values())) if name.startswith("survival_")]
    assert times == pytest.approx(bundle.times, rel=1e-3)
    for row in rows.values():
        curve = [float(value) for name, value in row.items() if name.startswith("survival_")]
        assert (np.diff(curve) <= 1e-9).all() and 0 <= curve[-1] <= curve[0] <= 1
        assert sum(float(value) for name, value in row.items() if name.startswith("weight_")) == pytest.approx(
            1, abs=1e-4
        )
    risk = {name: float(row["risk"]) for name, row in rows.items()}
    order = sorted(risk, key=lambda name: risk[name])
    assert [rows[name]["group"] for name in (order[0], order[-1])] == ["low", "high"]
    assert done.result.values["simulated"] == list(made.SIMULATED)


@pytest.mark.parametrize("only", ["expression", "radiomics", "slides", "score", "clinical"])
def test_one_modality_is_enough(only: str, trained: Outcome, files: dict[str, Path], tmp_path: Path) -> None:
    _, rows = predicted(trained, tmp_path, **{only: files[only]})
    assert len(rows) > 50
    for row in rows.values():
        weights = {name[7:]: float(value) for name, value in row.items() if name.startswith("weight_")}
        assert weights.pop(only) == 1 and not any(weights.values()) and np.isfinite(float(row["risk"]))


def test_an_answer_rests_on_the_persons_own_rows_alone(
    trained: Outcome, files: dict[str, Path], tmp_path: Path
) -> None:
    _, all_of_them = predicted(trained, tmp_path / "a", expression=files["expression"])
    _, few = predicted(trained, tmp_path / "b", expression=some(files["expression"], tmp_path / "few.tsv", 3))
    assert len(few) == 3
    for name, row in few.items():
        for column in set(row) - {"IID", "group"}:  # a product of another size rounds otherwise
            assert float(row[column]) == pytest.approx(float(all_of_them[name][column]), abs=1e-4)


def test_whoever_nothing_is_known_of_and_the_withdrawn_have_no_answer(
    trained: Outcome, files: dict[str, Path], tmp_path: Path
) -> None:
    path, gone = some(files["score"], tmp_path / "score.sscore", 2), tmp_path / "withdrawn.txt"
    path.write_text(path.read_text() + "new\t1\t1\tNA\n")
    gone.write_text(path.read_text().split("\n")[1].split("\t")[0] + "\n")
    done, rows = predicted(trained, tmp_path, score=path, withdrawn=gone)
    [part] = done.done
    assert len(rows) == 1 and [finding.code for finding in part.findings] == ["NOTHING_KNOWN"]
    who = made.context(tmp_path, made.spec("fusion/predict", {})).pseudonym("new")
    assert who[:12] in part.findings[0].sentence and who not in rows


def test_other_columns_and_other_modalities_are_told(trained: Outcome, files: dict[str, Path], tmp_path: Path) -> None:
    lines = [line.split("\t") for line in files["expression"].read_text().splitlines()]
    lacking = made.table(tmp_path / "x.tsv", lines[0][:-2], [line[:-2] for line in lines[1:4]])
    done, rows = predicted(trained, tmp_path / "a", expression=lacking, protein=files["score"])
    told = {finding.code: finding for finding in done.done[0].findings}
    assert len(rows) == 3 and told["COLUMNS_ABSENT"].numbers == {"columns": 2} and "MODALITY_UNKNOWN" in told
    other = made.table(tmp_path / "y.tsv", ("IID", "gene_00"), [("new", 1.0)])
    job = made.spec("fusion/predict", {"bundle": trained.context.out / "bundle", "expression": other})
    with pytest.raises(RefusedInput, match="OTHER_COLUMNS"):
        run_map(predict.WORKLOAD, job, tmp_path / "b")
    job = made.spec("fusion/predict", {"bundle": trained.context.out / "bundle", "protein": files["score"]})
    with pytest.raises(SpecError, match="no modality of the bundle"):
        run_map(predict.WORKLOAD, job, tmp_path / "c")


def test_the_models_digest_is_the_bundles(trained: Outcome, tmp_path: Path) -> None:
    job = made.spec("fusion/predict", {"bundle": trained.context.out / "bundle"})
    found = predict.model_digest(job, made.context(tmp_path, job))
    assert found == trained.result.values["bundle"] == publish.digest(trained.context.out / "bundle")
