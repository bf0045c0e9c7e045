"""The omics jobs on a real Ray, by the shipped job files: the same bytes as in this process."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from permed_compute.admission.snapshot import Grant
from permed_compute.execution.context import raise_fence
from permed_compute.execution.port import Attempt
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths, read_json
from permed_compute.spec import JobSpec
from permed_compute.storage.genotypes import GenotypeStore
from permed_compute.testing.execution import Toys
from tests.workloads.omics.made import genotypes, people, table, write_bed, write_score

pytestmark = pytest.mark.ray
_numbers = itertools.count()


class Runs:
    """Jobs one after the other on the session's Ray, two workers each."""

    def __init__(self, executor: RayExecutor, home: HomePaths) -> None:
        self._executor, self._home = executor, home

    def __call__(self, workload: str, *inputs: tuple[str, Path], **params: Any) -> Path:
        """The job's results."""
        refs = tuple({"name": name, "path": str(path)} if name else str(path) for name, path in inputs)
        spec = JobSpec(
            name="omics", workload=workload, inputs=refs, params=params, account="omics",
            resources={"workers": 2, "cpus": 0.5, "memory": "1GiB"},
        )  # fmt: skip
        job = f"omics-{next(_numbers)}"
        paths = self._home.job(job).attempt(1)
        grants = tuple(Grant("local", 500, 1024, 0, "cpu") for _ in range(2))
        attempt = Attempt(job, 1, spec, grants, "the test asked for it", self._home.root, paths)
        attempt.write()
        raise_fence(paths)
        self._executor.launch(attempt)
        ending = Toys.ending(attempt)
        assert ending["outcome"] == "SUCCEEDED", ending
        assert self._executor.end(attempt)
        return attempt.paths.job.results


def converted(run: Runs, copies: np.ndarray, folder: Path) -> Path:
    store = run("omics/convert", ("", write_bed(folder / "a", copies)), part_variants=1000) / "genotypes.zarr"
    made = GenotypeStore(store)
    assert made.variants == 2500 and made.layout.parts == 3
    return store


def test_genotypes_scores_and_associations(ray_executor: RayExecutor, ray_home: HomePaths, tmp_path: Path) -> None:
    run, copies, rng = Runs(ray_executor, ray_home), genotypes(2500, 150), np.random.default_rng(0)
    store = converted(run, copies, tmp_path)

    rows, weights = table(2500), rng.normal(size=2500)
    lines = [(c, p, a, r, repr(float(w))) for (c, p, _, r, a), w in zip(rows, weights, strict=True)]
    score = write_score(tmp_path / "s.txt", lines)
    scores = run("omics/prs", ("genotypes", store), ("score", score), ambiguous="keep", missing="zero")
    told = np.loadtxt(scores / "S1.sscore", skiprows=1, usecols=4)
    assert told == pytest.approx(np.where(copies == 3, 0, copies).T @ weights, abs=1e-4)

    y = rng.normal(size=150)
    phenotypes = tmp_path / "p.tsv"
    phenotypes.write_text("IID\ty\n" + "".join(f"{n}\t{v}\n" for n, v in zip(people(150), y, strict=True)))
    found = run("omics/gwas", ("genotypes", store), ("phenotypes", phenotypes), phenotype="y")
    with gzip.open(found / "y.glm.linear.gz", "rt") as file:
        assert len(file.readlines()) == 2501


@pytest.mark.soak  # the same machinery as above; what they compute is proven without Ray
def test_quality_and_frequencies(ray_executor: RayExecutor, ray_home: HomePaths, tmp_path: Path) -> None:
    run = Runs(ray_executor, ray_home)
    store = converted(run, genotypes(2500, 150), tmp_path)
    checked = run("omics/qc", ("genotypes", store), components=2)
    assert {"variants.tsv.gz", "samples.tsv", "kinship.kin0", "components.eigenvec"} <= {
        path.name for path in checked.iterdir()
    }

    groups = tmp_path / "g.tsv"
    groups.write_text("IID\tPOPULATION\n" + "".join(f"{name}\tA\n" for name in people(150)))
    register = tmp_path / "register"
    released = run("omics/frequency", ("genotypes", store), ("populations", groups), register=str(register))
    assert (released / "beacon.jsonl.gz").exists()
    facts = read_json(register / "releases" / "0001" / "public" / "release.json")
    assert facts is not None and facts["people"] == {"A": 130}
