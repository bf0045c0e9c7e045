"""Twenty studies, three of them broken, through `permed run` on Ray with the real network: what a night's batch is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydicom import dcmread

from permed_compute.cli.exits import Exit
from permed_compute.workloads.radiology import sample

JOB = """
name: twenty
workload: radiology/brain-extraction
inputs: [{folder}]
resources: {{workers: 1, cpus: 2, memory: 4GiB}}
"""


@pytest.mark.soak
@pytest.mark.ray
@pytest.mark.timeout(1800)
def test_seventeen_results_three_named_failures_and_nothing_computed_twice(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    sample.write_sample(folder, studies=20, edge=96)
    hole, tilt, cut = (sorted((folder / f"study-{number:03d}").iterdir()) for number in (3, 8, 15))
    hole[5].unlink()
    cut[6].write_bytes(cut[6].read_bytes()[:-100])
    for k, file in enumerate(tilt):
        ds = dcmread(file)
        ds.ImagePositionPatient[1] += 0.5 * k
        ds.save_as(file)
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(folder=folder), encoding="utf-8")
    environment = os.environ | {
        "PERMED_HOME": str(tmp_path / "home"), "PERMED_ANCHOR": str(tmp_path / "anchor"), "PERMED_EXECUTOR": "ray",
        "PERMED_TRACKING_URI": "none",
    }  # fmt: skip

    def run() -> tuple[int, dict[str, Any]]:
        command = [sys.executable, "-m", "permed_compute.cli", "run", "--json", str(job)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        [ended] = json.loads(done.stdout)["jobs"]
        return done.returncode, json.loads((Path(ended["results"]) / "result.json").read_text())

    def computed(result: dict[str, Any]) -> int:
        return sum(not part.get("reused") for part in result["parts"])

    code, result = run()
    reasons = sorted(part["reason"].partition(":")[0] for part in result["parts"] if part["state"] != "DONE")
    assert (code, result["outcome"], computed(result)) == (Exit.PARTIAL, "PARTIAL", 20)
    assert sum(part["state"] == "DONE" for part in result["parts"]) == 17
    assert reasons == ["GANTRY_TILT", "MISSING_SLICES", "PIXELS_UNREADABLE"]

    code, again = run()
    assert (code, again["outcome"], computed(again)) == (Exit.PARTIAL, "PARTIAL", 0)
    assert again["metrics"] == result["metrics"]

    for file in (folder / "study-005").iterdir():
        ds = dcmread(file)
        ds.PixelData = (ds.pixel_array // 2).tobytes()
        ds.save_as(file)
    code, changed = run()
    assert (code, changed["outcome"], computed(changed)) == (Exit.PARTIAL, "PARTIAL", 1)
    assert changed["metrics"]["series"] == 17
