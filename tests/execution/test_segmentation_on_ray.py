"""A segmentation on a real Ray whose worker is killed in the middle: the bytes of one that nobody disturbed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from permed_compute.admission.snapshot import Grant
from permed_compute.execution import processes
from permed_compute.execution.context import raise_fence
from permed_compute.execution.port import Attempt
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths
from permed_compute.spec import JobSpec
from permed_compute.testing.context import run_map
from permed_compute.testing.execution import Toys, wait_for
from permed_compute.workloads import registry
from tests.workloads.pathology.made import write

# A kill that changes no byte is in make test for encoding (test_slides_on_ray); this one takes 27 s more.
pytestmark = [pytest.mark.ray, pytest.mark.soak]

SLOW = """
import time
import numpy as np
from skimage.measure import label

def segment(pixels, mpp):
    time.sleep(0.3)
    return label(pixels.mean(2) < 150)
"""


def spec_of(folder: Path) -> JobSpec:
    model = {"callable": "slow_nuclei:segment", "gives": "instances", "mpp": 2.0, "halo": 32, "classes": ["Dark"]}
    return JobSpec(
        name="segments", workload="pathology/segment", inputs=(str(folder / "slides"),), account="slides", retries=2,
        code=str(folder / "code"), params={"model": model, "tile": 512},
        resources={"workers": 2, "cpus": 0.5, "memory": "2GiB"},
    )  # fmt: skip


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.timeout(240)
def test_a_kill_changes_no_byte(ray_executor: RayExecutor, ray_home: HomePaths, tmp_path: Path) -> None:
    for name in ("slides", "code"):
        (tmp_path / name).mkdir()
    (tmp_path / "code" / "slow_nuclei.py").write_text(SLOW)
    for number in range(6):
        write(tmp_path / "slides" / f"s{number}.tiff", mpp=2.0, seed=number)
    spec = spec_of(tmp_path)
    paths = ray_home.job("segments-1").attempt(1)
    grants = tuple(Grant("local", 500, 2048, 0, "cpu") for _ in range(2))
    attempt = Attempt("segments-1", 1, spec, grants, "the test asked for it", ray_home.root, paths)
    attempt.write()
    raise_fence(paths)

    def tiles() -> list[dict[str, object]]:
        return [row for row in Toys.rows(attempt, "part") if str(row["name"]).count("-") == 3]

    ray_executor.launch(attempt)
    wait_for(lambda: len(tiles()) >= 3, "three tiles")
    processes.kill(processes.of_attempt(attempt.name)["0"])
    ending = Toys.ending(attempt)
    assert ending["outcome"] == "SUCCEEDED", ending
    [lost] = Toys.rows(attempt, "lost")
    assert len(lost["parts"]) <= 2
    calm = run_map(registry.find(spec).workload, spec, tmp_path / "calm")
    merged = [item for item in calm.done if item.part.params["step"] == "merge"]
    assert len(merged) == 6 and not calm.failures
    for item in merged:
        assert digests(attempt.paths.job.results / "parts" / item.part.name) == digests(item.folder)
    assert ray_executor.end(attempt)
