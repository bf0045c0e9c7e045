"""Nothing of ours calls out: the kernel watches every process of a job, on a wire that leads nowhere."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from permed_compute.offline import NO_HUB, NO_TELEMETRY, silenced
from permed_compute.paths import HomePaths
from permed_compute.testing import network

needs_wire = pytest.mark.skipif(bool(network.possible(wire=True)), reason=network.possible(wire=True) or "-")
needs_loopback = pytest.mark.skipif(bool(network.possible()), reason=network.possible() or "-")

_CALLS = """
import socket
for family, to in ((socket.AF_INET, "203.0.113.7"), (socket.AF_INET6, "2001:db8:1::7")):
    with socket.socket(family, socket.SOCK_STREAM) as caller:
        caller.settimeout(0.2)
        try:
            caller.connect((to, 443))
        except OSError:
            pass
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asks:
    asks.sendto(b"?", ("198.51.100.1", 53))
"""

_JOB = """
import os
def run(part, ctx):
    import mlflow  # a researcher's own code may
    assert os.environ["HF_HUB_OFFLINE"] == "1" and os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    with open(part.sources[0]) as file:
        return {"lines": len(file.readlines())}
"""


@needs_wire
def test_the_wire_sees_whoever_calls(tmp_path: Path) -> None:
    """Else the next test could not fail."""
    network.isolated([sys.executable, "-c", _CALLS], watch=tmp_path / "seen.json")
    seen = {(attempt.protocol, attempt.to, attempt.port) for attempt in network.attempts(tmp_path / "seen.json")}
    assert seen == {("tcp", "203.0.113.7", 443), ("tcp", "2001:db8:1::7", 443), ("udp", "198.51.100.1", 53)}


@needs_loopback
def test_with_loopback_only_there_is_no_way_out() -> None:
    done = network.isolated([sys.executable, "-c", _CALLS.replace("pass", "print('no way')")])
    assert done.stdout.split("\n")[:2] == ["no way", "no way"] and done.returncode == 1


@needs_loopback
def test_with_loopback_only_programs_find_it() -> None:
    """Slurm asks so, and starts nothing where the answer is that this machine has no address."""
    asks = "import socket; print(socket.getaddrinfo('127.0.0.1', 1, socket.AF_INET, flags=socket.AI_ADDRCONFIG)[0][4])"
    assert network.isolated([sys.executable, "-c", asks]).stdout == "('127.0.0.1', 1)\n"


@needs_wire
@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize("executor", ["inprocess", "ray"])
def test_a_whole_run_calls_nobody(executor: str, tmp_path: Path) -> None:
    """Submit, run on the engine, track in MLflow, look at results, doctor: all with nobody to call."""
    home = HomePaths(tmp_path / "home")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "lines.py").write_text(_JOB)
    (tmp_path / "data").mkdir()
    for name in ("a", "b"):
        (tmp_path / "data" / f"{name}.txt").write_text("x\ny\n")
    (tmp_path / "job.yaml").write_text(
        "name: lines\nworkload: lines:run\ncode: code\ninputs: [data]\ntime_limit: 10m\nresources: {memory: 512MiB}\n"
    )
    permed = [sys.executable, "-m", "permed_compute.cli"]
    script = " && ".join(
        " ".join([*permed, *words]) for words in (["run", "job.yaml", "--json"], ["doctor", "--json", "> /dev/null"])
    )
    environment = {name: value for name, value in os.environ.items() if name not in (*NO_TELEMETRY, *NO_HUB)} | {
        "PERMED_HOME": str(home.root), "PERMED_EXECUTOR": executor, "PERMED_ANCHOR": str(tmp_path / "anchor"),
        "PERMED_CPUS": "2",
    }  # fmt: skip
    try:
        done = network.isolated(["bash", "-c", script], watch=tmp_path / "seen.json", cwd=tmp_path, env=environment)
    finally:
        shutil.rmtree(home.runtime, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["jobs"][0]["state"] == "SUCCEEDED"
    assert list((home.root / "mlflow").glob("*.db")), "MLflow was not used"
    assert network.attempts(tmp_path / "seen.json") == []


def test_telemetry_cannot_be_switched_on_and_a_hub_can() -> None:
    """A data space with a hub of its own may name it; nobody's telemetry goes anywhere."""
    made = silenced({"RAY_USAGE_STATS_ENABLED": "1", "HF_HUB_OFFLINE": "0", "HOME": "/h"})
    assert made["RAY_USAGE_STATS_ENABLED"] == "0" and made["HF_HUB_OFFLINE"] == "0" and made["HOME"] == "/h"
