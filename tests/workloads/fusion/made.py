"""Small cohorts and jobs for the fusion tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permed_compute.spec import JobSpec
from permed_compute.testing.context import LocalContext, Outcome, run_map
from permed_compute.workloads import registry
from permed_compute.workloads.fusion import simulate
from permed_compute.workloads.radiology import characterise

COLUMNS = {"time": "YEARS", "event": "EVENT", "family": "FAMILY"}
SMALL: dict[str, Any] = {
    **COLUMNS, "clinical": ["AGE"], "epochs": 30, "learning_rate": 0.01, "folds": 3, "repeats": 2, "permutations": 2,
    "resamples": 200,
}  # fmt: skip
SIMULATED = ("expression", "radiomics", "score", "slides")


def spec(
    workload: str, inputs: Mapping[str, Path | str] | Sequence[tuple[str, Path | str]], params: Any = None
) -> JobSpec:
    pairs = inputs.items() if isinstance(inputs, Mapping) else inputs
    named = [{"name": name, "path": str(path)} for name, path in pairs]
    return JobSpec(name="t", workload=workload, inputs=named, params=params or {}, seed=3)


def context(root: Path, job: JobSpec) -> LocalContext:
    return LocalContext(root, job, threads=1)


def run(workload: str, root: Path, inputs: Any, **params: Any) -> Outcome:
    job = spec(workload, inputs, params)
    done = run_map(registry.find(job).workload, job, root, threads=1)
    assert not done.failures, done.failures
    return done


def simulated(root: Path, count: int, seed: int = 0) -> dict[str, Path]:
    """The cohort's files by input name; its scans through `radiology/radiomics`."""
    folder = simulate.write(root / "data", count, seed=seed)
    job = spec("radiology/radiomics", {"cases": folder / "cases.json"}, {"bin_width": 25.0, "lowest": 0.0})
    done = run_map(characterise.WORKLOAD, job, root / "radiomics", threads=1)
    assert not done.failures
    return {
        "clinical": folder / "clinical.tsv", "radiomics": done.context.out / "radiomics-lesion.tsv",
        "slides": folder / "slides.tsv", "expression": folder / "expression.tsv", "score": folder / "score.sscore",
    }  # fmt: skip


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> Path:
    path.write_text("\n".join("\t".join(map(str, row)) for row in (header, *rows)) + "\n")
    return path
