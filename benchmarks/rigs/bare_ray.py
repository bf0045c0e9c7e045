"""A bare Ray as its documentation starts it, but on loopback only, with a token, and stopped by its processes alone."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import LeftOutError
from benchmarks.rigs.home import end_ray_of
from permed_compute.execution.processes import SESSION_MARK

WORK = Path(__file__).resolve().parents[1] / "work"
_START_S = 120


@dataclass(frozen=True, slots=True)
class BareRay:
    """`address` for ray.init, `jobs` for the Jobs API ("" without a dashboard), `environment` for both."""

    address: str
    jobs: str
    environment: Mapping[str, str]


@contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """For a Ray of our own: TMPDIR (short), token and marks. Whatever was started with it is ended afterwards."""
    if importlib.util.find_spec("ray") is None:
        raise LeftOutError("ray is not installed (extra: bench)")
    folder = Path(tempfile.mkdtemp(prefix="bare-ray-"))
    (folder / "token").write_text(secrets.token_hex(32), encoding="ascii")
    (folder / "token").chmod(0o600)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = inherited | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # or Ray listens on every interface
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(folder),
        "SPT_NOENV": "1",  # process titles would be written over the mark
        SESSION_MARK: str(folder),
    }
    try:
        yield environment
    finally:
        end_ray_of(folder)
        shutil.rmtree(folder, ignore_errors=True)


def start_ray(environment: Mapping[str, str], cpus: int, *, dashboard: bool) -> BareRay:
    """`ray start --head`; it ends with its environment. `ray job submit` needs the dashboard."""
    session = Path(environment["RAY_TMPDIR"]) / "session"
    port = _free_port()
    command = [
        sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--node-ip-address=127.0.0.1", "--port=0",
        "--dashboard-agent-listen-port=0", f"--num-cpus={cpus}", "--num-gpus=0", f"--temp-dir={session}",
        "--disable-usage-stats", f"--include-dashboard={str(dashboard).lower()}", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={port}",
    ]  # fmt: skip
    run(command, environment)
    address = (session / "ray_current_cluster").read_text(encoding="ascii").strip()
    jobs = f"http://127.0.0.1:{port}" if dashboard else ""
    return BareRay(address, jobs, {**environment, "RAY_ADDRESS": jobs or address})


def run(command: list[str], environment: Mapping[str, str], timeout_s: float = _START_S) -> str:
    """What it prints. Raises `RuntimeError` with its last words where it fails."""
    done = subprocess.run(
        command, env=dict(environment), capture_output=True, text=True, timeout=timeout_s, check=False,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[1:4])} … ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    return done.stdout


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
