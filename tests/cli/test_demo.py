"""`permed demo` for real: DICOM in, five outputs, nothing left running; on Ray and with MLflow."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from permed_compute.cli.demo import find_head
from permed_compute.cli.exits import Exit
from permed_compute.errors import NotFoundError
from permed_compute.paths import HomePaths

pytestmark = [pytest.mark.ray, pytest.mark.slow]
PERMED = [sys.executable, "-m", "permed_compute.cli"]
WAIT = """
import time
from pathlib import Path


def run(part, ctx):
    study = Path(part.sources[0]).parent
    (study / "begun").touch()
    while not (study / "go").exists():
        if ctx.should_stop():
            raise InterruptedError("asked to stop")
        time.sleep(0.1)
    return {"went": 1}
"""


@pytest.fixture
def on_ray(home: HomePaths, tmp_path: Path) -> dict[str, str]:
    """The environment of a user who has set nothing but the home."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PERMED_")} | {
        "PERMED_HOME": str(home.root), "PERMED_ANCHOR": str(tmp_path / "anchor"),
    }  # fmt: skip


def of_this_home(home: HomePaths) -> list[str]:
    """Command lines of processes that belong to this home."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            environment = (process / "environ").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(home.runtime) in words or f"={home.runtime}" in environment:
            found.append(words)
    return found


def test_the_demo_leaves_five_outputs_and_no_process(home: HomePaths, on_ray: dict[str, str]) -> None:
    try:
        find_head(home)
    except NotFoundError as error:
        pytest.skip(error.message)
    done = subprocess.run([*PERMED, "demo", "--json"], env=on_ray, capture_output=True, text=True, timeout=280)
    assert done.returncode == Exit.OK, done.stderr
    answer = json.loads(done.stdout)
    assert answer["missing"] == []
    assert set(answer["outputs"]) == {"DICOM SEG", "NIfTI mask", "MLflow run", "manifest", "HTML page"}
    for name in ("DICOM SEG", "NIfTI mask", "manifest", "HTML page"):
        assert Path(answer["outputs"][name]).stat().st_size > 0
    manifest = json.loads(Path(answer["outputs"]["manifest"]).read_text())
    assert manifest["engine"]["engine"] == "ray"
    assert manifest["why"]
    assert of_this_home(home) == []


def test_ctrl_c_leaves_nothing_running_and_a_job_to_resume(
    home: HomePaths, on_ray: dict[str, str], tmp_path: Path
) -> None:
    """The parts wait for a file, so that the job is never through before the Ctrl-C, however slow the machine. It is
    taken up in this process: that a Ray takes up what another left is proven beside the executor."""
    study = tmp_path / "study"
    (study / "code").mkdir(parents=True)
    (study / "code" / "waiting.py").write_text(WAIT)
    (study / "a.txt").write_text("a")
    (study / "b.txt").write_text("b")
    job = study / "job.yaml"
    job.write_text("name: wait\nworkload: waiting:run\ncode: code\ninputs: [a.txt, b.txt]\n")
    process = subprocess.Popen(
        [*PERMED, "run", str(job)], env=on_ray, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 120
    while not (study / "begun").exists():
        assert time.monotonic() < end
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == Exit.INTERRUPTED, err
    assert of_this_home(home) == []
    held = out.partition("permed resume ")[2].split("`")[0]
    assert held, out + err
    (study / "go").touch()
    here = on_ray | {"PERMED_EXECUTOR": "inprocess"}
    done = subprocess.run([*PERMED, "resume", held, "--json"], env=here, capture_output=True, text=True, timeout=280)
    assert done.returncode == Exit.OK, done.stderr
    assert json.loads(done.stdout)["jobs"][0]["detail"]["counts"]["DONE"] == 2
    assert of_this_home(home) == []
