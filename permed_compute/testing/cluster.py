"""A Ray of several nodes on this machine, each in a network namespace of its own: nodes are added, cut off and killed,
and so is the head.

    with RayCluster() as cluster, cluster.inside():
        one, two = cluster.add(2, cpus=1)
        executor = RayExecutor(Settings(home=…, ray_address=cluster.address), home)
        two.kill()

The head offers no CPU to jobs. Ray listens on every interface once a cluster may have several nodes: here those are the
namespaces' own, which nothing else reaches. `inside` moves the calling thread, and what it starts, into the head's.
Needs root and `ip`. Every process bears a mark and is ended with the cluster; `ray stop` would end everybody's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from permed_compute.execution import processes, raylocal
from permed_compute.execution.processes import SESSION_MARK, Process, ProcessTable
from permed_compute.testing.certificates import Authority

_START_S = 120
_PORT = 20_000 + os.getpid() % 10_000
"""The head's, in a network of its own: the same when it is started again, another one in another suite."""
_MIB = 2**20
_SOCKETS = "RAY_CLUSTER_SOCKETS"
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count(os.getpid() % 200)


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """One raylet with its workers. `name` is what admission calls it."""

    name: str
    address: str
    mark: str
    """What its processes bear in `SESSION_MARK`."""

    def processes(self) -> list[Process]:
        table = ProcessTable().look()
        return [table.processes[pid] for pid, value in table.marked(SESSION_MARK).items() if value == self.mark]

    def kill(self) -> None:
        """As a power failure does: everything on it at once, with SIGKILL."""
        assert processes.kill_all(self.processes, timeout_s=20.0)


def name_sockets(params: Any, head: bool) -> None:
    """Ray's start hook: two raylets that start together would choose the same names for their sockets."""
    raylocal.trim(params, head)
    params.raylet_socket_name = f"{os.environ[_SOCKETS]}.raylet"
    params.plasma_store_socket_name = f"{os.environ[_SOCKETS]}.store"


class RayCluster:
    """See the module. `address` is for ray.init, `environment` for whoever connects.

    durable: the head keeps what it knows on disk (Ray's embedded RocksDB), and knows it when it is started again.
    tls: between all of Ray's processes, with a certificate per node; needs `cryptography`.
    """

    def __init__(self, *, object_store_mib: int = 128, durable: bool = False, tls: bool = False) -> None:
        # Short: Unix sockets stand below it.
        self._folder = Path(tempfile.mkdtemp(prefix="rc-"))
        self._networks = _Networks()
        self._store = object_store_mib
        self._count = itertools.count(1)
        self.nodes: list[ClusterNode] = []
        token = self._folder / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PERMED_"))}
        self.environment = inherited | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
            "SPT_NOENV": "1", "RAY_enable_metrics_collection": "0",
            "RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES": "1", "RAY_prestart_worker_first_driver": "0",
            "RAY_enable_worker_prestart": "0", "DASHBOARD_METRIC_PORT": "-1",
            "RAY_START_HOOK": f"{__name__}.{name_sockets.__name__}",
            "RAY_worker_maximum_startup_concurrency": "64", "RAY_worker_register_timeout_seconds": "30",
            # A dead node is known to be dead after seconds, a busy machine's is not taken for one.
            "RAY_health_check_initial_delay_ms": "10000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "5000", "RAY_health_check_failure_threshold": "4",
            # Nodes wait so long for a head that is gone, and then end themselves.
            "RAY_gcs_rpc_server_reconnect_timeout_s": "60" if durable else "10",
        }  # fmt: skip
        self._of_head = {"RAY_gcs_storage": "rocksdb", "RAY_gcs_storage_path": str(self._folder / "gcs")}
        if not durable:
            self._of_head = {}
        self.authority = Authority(self._folder) if tls else None
        self.environment |= self._certificate("head", self._networks.head)
        self.token = token
        self.address = f"{self._networks.head}:{_PORT}"
        self._heads = itertools.count(1)
        self._head = ""

    def __enter__(self) -> RayCluster:
        try:
            self._networks.make()
            self.start_head()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(
        self, count: int, *, cpus: int = 1, memory_mib: int = 4096, labels: Sequence[str] = ()
    ) -> list[ClusterNode]:
        """More nodes, started beside each other."""
        with ThreadPoolExecutor(count) as threads:
            made = list(threads.map(lambda _: self._add(cpus, memory_mib, labels), range(count)))
        self.nodes += made
        return sorted(made, key=lambda node: node.name)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """In the head's network, with the variables that Ray wants: this thread and every process that it starts."""
        before = {name: os.environ.get(name) for name in self.environment}
        with self._networks.entered():
            os.environ.update(self.environment)
            try:
                yield
            finally:
                for name, value in before.items():
                    if value is None:
                        del os.environ[name]

    def start_head(self) -> None:
        """At the cluster's address; after `kill_head` again."""
        # Ray takes the nodes' daemons, which it sees as they are on this machine, for a head that runs there already.
        (self._folder / "s" / "ray_current_cluster").unlink(missing_ok=True)
        self._head = self._start(
            ["--head", f"--port={_PORT}", "--num-cpus=0", "--memory=1", "--include-dashboard=false", "--no-monitor",
             f"--temp-dir={self._folder / 's'}", f"--node-ip-address={self._networks.head}"],
            f"head-{next(self._heads)}", self._networks.name, self._of_head,
        )  # fmt: skip

    def kill_head(self) -> None:
        """With SIGKILL, as a power failure does; nodes and what runs on them are left alone."""
        assert processes.kill_all(lambda: self._all(self._head), timeout_s=20.0)

    def cut(self, node: ClusterNode) -> None:
        """Take the node's network away; its processes go on."""
        self._networks.cut(node.address)

    def close(self) -> None:
        assert processes.kill_all(self._all, timeout_s=20.0)
        self._networks.remove()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, cpus: int, memory_mib: int, labels: Sequence[str]) -> ClusterNode:
        number = next(self._count)
        name = f"node-{number}"
        namespace, address = self._networks.node(number)
        mark = self._start(
            [f"--address={self.address}", f"--num-cpus={cpus}", f"--memory={memory_mib * _MIB}",
             f"--node-ip-address={address}", f"--labels={','.join([f'permed-node={name}', *labels])}"],
            name, namespace, self._certificate(name, address),
        )  # fmt: skip
        return ClusterNode(name, address, mark)

    def _certificate(self, name: str, address: str) -> dict[str, str]:
        return self.authority.ray(name, [address, "127.0.0.1"]) if self.authority is not None else {}

    def _start(self, words: list[str], name: str, namespace: str, more: Mapping[str, str]) -> str:
        mark = f"{self._folder}/{name}"
        command = [
            "ip", "netns", "exec", namespace, sys.executable, "-P", "-m", "ray.scripts.scripts", "start", *words,
            "--num-gpus=0", "--include-log-monitor=false", "--dashboard-agent-listen-port=0", "--disable-usage-stats",
            f"--object-store-memory={self._store * _MIB}",
        ]  # fmt: skip
        done = subprocess.run(
            command, env={**self.environment, **more, SESSION_MARK: mark, _SOCKETS: mark}, cwd=self._folder,
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_START_S, check=False,
            start_new_session=True,
        )  # fmt: skip
        if done.returncode:
            raise RuntimeError(f"ray start of {name}: {done.stdout[-300:]} {done.stderr[-600:]}")
        return mark

    def _all(self, mark: str = "") -> list[Process]:
        """Every process of the cluster, or those that bear that mark."""
        table = ProcessTable().look()
        found = table.marked(SESSION_MARK).items()
        return [table.processes[pid] for pid, value in found if value.startswith(mark or f"{self._folder}/")]


class _Networks:
    """A namespace for the head with a bridge in it, and one per node behind that."""

    def __init__(self) -> None:
        number = next(_numbers) % 250
        self.name, self._net = f"pc{os.getpid()}-{number}", f"10.213.{number}"
        self._made: list[str] = []
        self.head = f"{self._net}.254"

    def make(self) -> None:
        self._new(self.name)
        _ip("-n", self.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self.name, "addr", "add", f"{self.head}/24", "dev", "bridge")
        _ip("-n", self.name, "link", "set", "bridge", "up")

    def node(self, number: int) -> tuple[str, str]:
        """(namespace, address) of a new node."""
        name, address = f"{self.name}-{number}", f"{self._net}.{number}"
        self._new(name)
        _ip("-n", self.name, "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("-n", self.name, "link", "set", f"to{number}", "master", "bridge", "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        return name, address

    def cut(self, address: str) -> None:
        _ip("-n", self.name, "link", "set", f"to{address.rpartition('.')[2]}", "down")

    @contextmanager
    def entered(self) -> Iterator[None]:
        with open("/proc/thread-self/ns/net") as back, open(f"/run/netns/{self.name}") as there:  # noqa: PTH123
            _setns(there.fileno())
            try:
                yield
            finally:
                _setns(back.fileno())

    def remove(self) -> None:
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)

    def _new(self, name: str) -> None:
        _ip("netns", "add", name)
        self._made.append(name)
        _ip("-n", name, "link", "set", "lo", "up")


def _setns(handle: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(handle, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def networks_possible() -> bool:
    """Whether this process may make network namespaces."""
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    name = f"pc-try-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], check=False, capture_output=True, timeout=20).returncode == 0
    if made:
        subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True, timeout=20)
    return made


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)
