"""Thirty slides of which some are bad, through the command line; and a kill in the middle of a slide."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.cli.exits import Exit
from permed_compute.execution.processes import SESSION_MARK, Process, ProcessTable, kill_all
from permed_compute.paths import HomePaths

from .made import pixels, slow_encoder, thirty, write

PERMED = [sys.executable, "-m", "permed_compute.cli"]


@pytest.fixture(params=["inprocess", pytest.param("ray", marks=[pytest.mark.soak, pytest.mark.ray])])
def environment(request: pytest.FixtureRequest, home: HomePaths, tmp_path: Path) -> Iterator[dict[str, str]]:
    yield os.environ | {
        "PERMED_HOME": str(home.root), "PERMED_EXECUTOR": request.param, "PERMED_TRACKING_URI": "none",
        "PERMED_ANCHOR": str(tmp_path / "anchor"), "PERMED_CPUS": "2",
    }  # fmt: skip
    end_ray(home)


def end_ray(home: HomePaths) -> None:
    """kill -9 for all of the home's Ray: driver, workers and Ray itself."""

    def left() -> list[Process]:
        table = ProcessTable().look()
        marked = table.marked(SESSION_MARK).items()
        return [table.processes[pid] for pid, mark in marked if mark == str(home.runtime)]

    assert kill_all(left, timeout_s=20.0)


def job(folder: Path, slides: Path, **params: object) -> Path:
    file = folder / "job.json"
    params = {"encoder": "noop", "size": 64, "block": 32, **params}
    file.write_text(json.dumps({
        "version": 1, "name": "t", "workload": "pathology/encode", "inputs": [{"path": str(slides)}], "params": params,
        "account": "local", "resources": {"workers": 1, "cpus": 1, "memory": "2GiB"},
    }))  # fmt: skip
    return file


def permed(environment, *words):
    return subprocess.run([*PERMED, *map(str, words)], env=environment, capture_output=True, text=True, timeout=170)


def newest(home: HomePaths) -> dict:
    (file,) = sorted(home.jobs.glob("*/results/result.json"), key=lambda f: f.stat().st_mtime)[-1:]
    return json.loads(file.read_text())


def test_thirty_slides_of_which_six_are_bad(home, environment, tmp_path):
    slides = tmp_path / "slides"
    bad = thirty(slides)
    file = job(tmp_path, slides, target_mpp=2.0)
    done = permed(environment, "run", file)
    assert done.returncode == Exit.PARTIAL, done.stderr
    first = newest(home)
    refused = [part for part in first["parts"] if part["state"] == "REFUSED"]
    assert {part["reason"].partition(":")[0] for part in refused} == set(bad) and len(refused) == 6
    assert all(part["name"].startswith("slide-") and "zero" not in part["reason"] for part in refused)
    assert first["values"]["slides"] == 24
    # Once more with one slide added: only that one is computed.
    write(slides / "new.tiff", pixels(520, 480, seed=99, blobs=1), mpp=2.0)
    assert permed(environment, "run", file).returncode == Exit.PARTIAL
    second = newest(home)
    blocks = [part for part in second["parts"] if part["name"].count("-") == 2]
    new = [part for part in blocks if part["state"] == "DONE"]
    assert second["values"]["slides"] == 25 and len({part["name"][:22] for part in new}) == 1
    assert all(part["state"] == "REUSED" for part in blocks if part not in new)
    page = next(home.jobs.glob("*/results/index.html")).read_text()
    assert "NO_TISSUE" in page and "tissue" in page.lower() and "<img" in page


@pytest.mark.soak
@pytest.mark.timeout(600)
def test_a_kill_in_the_middle_of_a_slide_loses_no_finished_block(home, environment, tmp_path):
    write(tmp_path / "s.tiff", pixels(1600, 1200))
    file = job(
        tmp_path, tmp_path / "s.tiff", encoder={"torchscript": str(slow_encoder(tmp_path / "slow.pt"))}, block=12
    )
    running = subprocess.Popen([*PERMED, "run", str(file)], env=environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, start_new_session=True)  # fmt: skip
    try:
        until = time.monotonic() + 60
        while len(finished(home)) < 4 and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
        end_ray(home)
    kept = finished(home)
    # The features of at most two blocks are gone: one was being published, one encoded (one worker).
    assert len(list(home.ledger.glob("*/.new/*"))) <= 2
    assert kept, "nothing was finished before the kill"
    job_id = next(home.jobs.iterdir()).name
    assert not (home.job(job_id).results / "result.json").exists(), "it ended before the kill"
    before = {folder: (folder / "part.json").stat().st_mtime_ns for folder in kept}
    done = permed(environment, "resume", job_id)
    assert done.returncode == Exit.OK, done.stderr
    assert before == {folder: (folder / "part.json").stat().st_mtime_ns for folder in kept}
    blocks = [part for part in newest(home)["parts"] if part["name"].count("-") == 2]
    assert sum(part["state"] == "REUSED" for part in blocks) >= len(kept)
    assert newest(home)["values"]["slides"] == 1


def finished(home: HomePaths) -> list[Path]:
    """Folders of finished blocks of features."""
    return [file.parent for file in home.ledger.glob("*/[0-9a-f][0-9a-f]/*/features.f16")]
