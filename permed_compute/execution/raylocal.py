"""A Ray of our own on this machine: begun by `ray start`, on loopback, with a token; found again and ended by its pids.

`ray stop` would end every Ray of the user, and `ray.init` would leave an agent behind when its process is killed: we do
neither. Every process of the session bears our mark, and whoever bears it is ended with the session.
This module does not import ray.
"""

from __future__ import annotations

import math
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permed_compute.admission.snapshot import Node
from permed_compute.errors import EngineError
from permed_compute.execution import processes, raykeeper
from permed_compute.execution.processes import SESSION_MARK, Process
from permed_compute.offline import silenced
from permed_compute.paths import read_json, write_json

_START_TIMEOUT_S = 90
_MIB = 2**20
_OBJECT_STORE = 512 * _MIB
"""Backed by /dev/shm as it is used. Parts travel as rows; only Dask-on-Ray puts arrays here."""

_ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    # Without it Ray puts the host's address where we say 127.0.0.1, and listens on every interface (measured, 2.60).
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Its metrics' ports ask nobody for a token (measured, 2.60); the head's is closed by a number that is no port.
    "RAY_enable_metrics_collection": "0",
    "DASHBOARD_METRIC_PORT": "-1",
    # Ray writes its process titles over the environment that /proc shows, where our marks are; this keeps them.
    "SPT_NOENV": "1",
    # Admission chose the devices; Ray only counts them.
    "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1",
    # Our workers have an environment of their own, which workers started beforehand would not have.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_enable_worker_prestart": "0",
    "RAY_gcs_rpc_server_reconnect_timeout_s": "10",
    # A worker that is ended while it starts keeps its place among the starting until then (default: 60 s, 2 places).
    "RAY_worker_maximum_startup_concurrency": "64",
    "RAY_worker_register_timeout_seconds": "30",
    "RAY_START_HOOK": "permed_compute.execution.raylocal.trim",
}


def trim(params: Any, head: bool) -> None:
    """Ray's start hook: no Ray Client server (a process and an open port), and our own quick way to start workers.

    And no dashboard process: what is left of it without a dashboard asks three clouds' metadata services where it runs,
    and tells Ray's makers that telemetry is switched off (seen on a wire, 2.60; tests/test_offline.py).
    """
    params.ray_client_server_port = None
    params.setup_worker_path = str(Path(__file__).with_name("raysetup.py"))
    if not params.include_dashboard:
        sys.modules["ray._private.services"].start_api_server = lambda *_, **__: ("", None)  # type: ignore[attr-defined]


@dataclass(frozen=True, slots=True)
class Session:
    """A local Ray as it was started; `gcs` and `raylet` are (pid, start time), and it lives while both do."""

    address: str
    gcs: tuple[int, int]
    raylet: tuple[int, int]
    cpus: int
    memory: int
    gpus: int

    def lives(self) -> bool:
        return processes.alive(*self.gcs) and processes.alive(*self.raylet)


class LocalRay:
    """The one Ray of a home. `node` is what admission may give out: Ray is made as large, never larger.

    label: of this node, `name=value`. address: this machine's, for a Ray of several; default: loopback alone. join: the
    head's address, for a node of its Ray; then `secret` is its token.
    """

    def __init__(
        self, runtime: Path, node: Node, lonely_s: float = raykeeper.LONELY_S, *, label: str = "", address: str = "",
        join: str = "", secret: str = "",
    ) -> None:  # fmt: skip
        self._runtime, self._lonely_s = runtime, lonely_s
        self._label, self._join, self._secret = label, join, secret
        self._several, self._address = bool(address), address or "127.0.0.1"
        self._size = {
            "cpus": math.ceil(node.cpu_milli / 1000), "memory": node.memory, "gpus": len(node.gpus),
        }  # fmt: skip
        self._record = runtime / "ray.json"
        self._folder = runtime / "session"
        self.token = runtime / "ray.token"

    def find(self) -> Session | None:
        """The living session, whoever started it; None where there is none."""
        row = read_json(self._record)
        if row is None:
            return None
        session = Session(**{**row, "gcs": tuple(row["gcs"]), "raylet": tuple(row["raylet"])})
        return session if session.lives() else None

    def fits(self, session: Session) -> bool:
        """Whether the session has the size that it should have now."""
        return all(getattr(session, name) == value for name, value in self._size.items())

    def start(self) -> Session:
        """A new session, after ending whatever is left of an older one. Raises `EngineError`."""
        if not self.stop():
            raise EngineError("Processes of an earlier Ray of this home cannot be ended.", remedy="`permed doctor`.")
        self._make_private()
        output = self._runtime / "ray-start.log"
        try:
            code = self._run_start(output)
        except BaseException:  # Ctrl-C above all: what has been started so far must not stay
            self.stop()
            raise
        session = self._started() if code == 0 else None
        if session is None:
            self.stop()
            raise EngineError(f"`ray start` failed (exit {code}).", remedy=f"Its words are in {output}.")
        write_json(self._record, asdict(session))
        self._start_keeper()
        return session

    def stop(self) -> bool:
        """End the session and everything that bears its mark. True once nothing of it is left."""
        if not processes.kill_all(self.processes, timeout_s=10.0):
            return False
        self._record.unlink(missing_ok=True)
        self.token.unlink(missing_ok=True)
        shutil.rmtree(self._folder, ignore_errors=True)
        return True

    def processes(self) -> list[Process]:
        """Every process of this home's Ray, jobs' processes included, present now."""
        return raykeeper.of_session(self._runtime)

    def environment(self) -> dict[str, str]:
        """For `ray start` and whoever connects. What only the controller needs to know is left out."""
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PERMED_"))
        }  # fmt: skip
        ours = {"RAY_AUTH_TOKEN_PATH": str(self.token), SESSION_MARK: str(self._runtime)}
        if self._several:
            ours["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "1"  # else no node may join
        return silenced(inherited) | _ENVIRONMENT | ours

    def _start_keeper(self) -> None:
        words = [str(self._runtime), str(self._record), str(self._lonely_s)]
        nowhere = subprocess.DEVNULL
        subprocess.run(
            [sys.executable, "-P", "-m", raykeeper.__name__, *words], env=self.environment(), cwd="/",
            stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True, check=False,
        )  # fmt: skip

    def _run_start(self, output: Path) -> int:
        with output.open("wb") as log:
            try:
                return subprocess.run(
                    self._command(), env=self.environment(), stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    cwd=self._runtime, start_new_session=True, timeout=_START_TIMEOUT_S, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                return -1

    def _command(self) -> list[str]:
        # Port 0 everywhere: Ray takes free ones. No dashboard, autoscaler or log forwarding: nobody here asks them.
        head = ["--head", "--port=0", "--include-dashboard=false", "--no-monitor", f"--temp-dir={self._folder}"]
        return [
            sys.executable, "-P", str(Path(__file__).with_name("raystart.py")), "start",
            *([f"--address={self._join}"] if self._join else head), f"--node-ip-address={self._address}",
            *([f"--labels={self._label}"] if self._label else []), "--dashboard-agent-listen-port=0",
            "--include-log-monitor=false", "--disable-usage-stats",
            f"--num-cpus={self._size['cpus']}", f"--num-gpus={self._size['gpus']}",
            f"--memory={self._size['memory'] * _MIB}", f"--object-store-memory={_OBJECT_STORE}",
        ]  # fmt: skip

    def _make_private(self) -> None:
        self._runtime.mkdir(mode=0o700, exist_ok=True)
        status = self._runtime.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise EngineError(
                f"{self._runtime} is not private to this user.", remedy="Remove it, or set TMPDIR to a private folder."
            )
        handle = os.open(self.token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(self._secret or secrets.token_hex(32))

    def _started(self) -> Session | None:
        try:
            address = self._join or (self._folder / "ray_current_cluster").read_text().strip()
        except OSError:
            return None
        raylet = self._process_of("raylet")
        gcs = raylet if self._join else self._process_of("gcs_server")
        return Session(address, gcs, raylet, **self._size) if gcs and raylet else None

    def _process_of(self, program: str) -> tuple[int, int] | None:
        for process in self.processes():
            try:
                name = Path(f"/proc/{process.pid}/exe").readlink().name
            except OSError:
                continue
            if name == program:
                return process.pid, process.started
        return None


def bridge_environment(local: LocalRay | None, address: str) -> Mapping[str, str]:
    """For the process that speaks Ray for us: the local session's, or the caller's own for a Ray that is given."""
    if local is not None:
        ours = (SESSION_MARK, "RAY_START_HOOK")
        return {name: value for name, value in local.environment().items() if name not in ours}
    loopback = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"} if address.startswith(("127.", "localhost:")) else {}
    return {**os.environ, **loopback}
