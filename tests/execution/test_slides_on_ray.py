"""Thirty slides on a real Ray, six of them bad, and a worker killed in the middle of one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from permed_compute.admission.snapshot import Grant
from permed_compute.execution import processes
from permed_compute.execution.context import raise_fence
from permed_compute.execution.port import Attempt
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths
from permed_compute.spec import JobSpec
from permed_compute.testing.execution import Toys, wait_for
from permed_compute.workloads.pathology import features
from tests.workloads.pathology.made import slow_encoder, thirty

pytestmark = pytest.mark.ray


def attempt_of(home: HomePaths, folder: Path, encoder: Path) -> Attempt:
    spec = JobSpec(
        name="slides", workload="pathology/encode", inputs=(str(folder),), account="slides", retries=2,
        params={"encoder": {"torchscript": str(encoder)}, "target_mpp": 2.0, "size": 64, "block": 6},
        resources={"workers": 2, "cpus": 0.5, "memory": "2GiB"},
    )  # fmt: skip
    paths = home.job("slides-1").attempt(1)
    grants = tuple(Grant("local", 500, 2048, 0, "cpu") for _ in range(2))
    attempt = Attempt("slides-1", 1, spec, grants, "the test asked for it", home.root, paths)
    attempt.write()
    raise_fence(paths)
    return attempt


@pytest.mark.timeout(240)
def test_thirty_slides_and_a_kill(ray_executor: RayExecutor, ray_home: HomePaths, tmp_path: Path) -> None:
    bad = thirty(tmp_path / "slides")
    attempt = attempt_of(ray_home, tmp_path / "slides", slow_encoder(tmp_path / "slow.pt"))

    def blocks() -> list[dict[str, object]]:
        return [row for row in Toys.rows(attempt, "part") if str(row["name"]).count("-") == 2]

    ray_executor.launch(attempt)
    wait_for(lambda: len(blocks()) >= 6, "six blocks")
    processes.kill(processes.of_attempt(attempt.name)["0"])
    ending = Toys.ending(attempt)
    assert ending["outcome"] == "PARTIAL", ending
    # What the kill cost: at most the block that was being published and the one that was being encoded.
    [lost] = Toys.rows(attempt, "lost")
    assert len(lost["parts"]) <= 2
    result = Toys.result(attempt)
    assert result["values"]["slides"] == 24
    refused = [part["reason"].partition(":")[0] for part in result["parts"] if part["state"] == "REFUSED"]
    assert Counter(refused) == Counter(bad)
    published = Counter(str(row["name"]) for row in blocks())
    assert set(published.values()) == {1} and sum(part["name"].count("-") == 2 for part in result["parts"]) == len(
        published
    )
    for name in result["values"]["features"].values():
        coords, made, _ = features.read(attempt.paths.job.results / name)
        assert len(coords) == len(made) > 0 and np.isfinite(made).all() and made.any(axis=1).all()
    assert ray_executor.end(attempt)
