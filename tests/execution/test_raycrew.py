"""What a crew on Ray says of a worker that it has lost."""

from __future__ import annotations

import os
import select
import socket
import threading
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed")

from permed_compute.execution import raybridge, raycrew
from permed_compute.execution.raycrew import RayCrew
from permed_compute.execution.worker import WorkerLost


def crew(port: int) -> RayCrew:
    made = object.__new__(RayCrew)
    made._attempt = SimpleNamespace(grants=[SimpleNamespace(node="gpu-07"), SimpleNamespace(node="local")])  # type: ignore[assignment]
    made._raylets = {"gpu-07": ("127.0.0.1", port)}
    return made


def test_a_process_that_dies_with_its_nodes_daemon_was_lost_with_the_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raycrew, "_DYING_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as daemon:
        port = daemon.getsockname()[1]
        assert crew(port)._loss(0, RuntimeError("the actor died")).code == "worker-lost"
    lost = crew(port)._loss(0, RuntimeError("the actor died"))
    assert (lost.code, lost.message) == ("node-lost", "The node of worker 0 is gone.")
    assert crew(port)._loss(1, RuntimeError("the actor died")).code == "worker-lost"  # of a node that nobody knows


@pytest.mark.parametrize("taken", [False, True])
def test_a_daemon_that_dies_after_its_workers_still_takes_connections(taken: bool) -> None:
    daemon = socket.create_server(("127.0.0.1", 0))
    told: list[str] = []
    asking = threading.Thread(
        target=lambda: told.append(crew(daemon.getsockname()[1])._loss(0, RuntimeError("the actor died")).code)
    )
    asking.start()
    if taken:
        connection, _ = daemon.accept()
        connection.sendall(b"settings")
        connection.close()
    else:
        assert select.select([daemon], [], [], 10.0)[0]
    daemon.close()
    asking.join()
    assert told == ["node-lost"]


def test_what_never_began_on_a_node_that_is_gone_is_lost_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made = crew(1)
    there, gone = Future[Any](), Future[Any]()
    made._open, made._closed = {gone: 0, there: 1}, threading.Event()
    monkeypatch.setattr(raycrew, "_LOOK_AT_NODES_S", 0.01)
    monkeypatch.setattr(raycrew.ray, "nodes", lambda: [node("a" * 20, "10.0.0.1", **{"permed-node": "local"})])
    watching = threading.Thread(target=made._watch_nodes)
    watching.start()
    error = gone.exception(timeout=30)
    assert isinstance(error, WorkerLost) and error.code == "node-lost"
    made._closed.set()
    watching.join()
    assert not there.done()


def test_what_ray_says_itself_comes_first() -> None:
    assert crew(1)._loss(1, RuntimeError("its node has died")).code == "node-lost"


def node(identity: str, address: str, alive: bool = True, **labels: str) -> dict[str, Any]:
    return {"Alive": alive, "NodeID": identity, "NodeManagerAddress": address, "NodeManagerPort": 7, "Resources": {},
            "Labels": labels}  # fmt: skip


def test_nodes_are_called_by_label_else_by_address_else_by_both_and_the_id() -> None:
    nodes = [
        node("a" * 20, "10.0.0.1", **{"permed-node": "gpu-07"}), node("b" * 20, "10.0.0.2"),
        node("c" * 20, "10.0.0.3"), node("d" * 20, "10.0.0.3"), node("e" * 20, "10.0.0.4", alive=False),
    ]  # fmt: skip
    names = [row["name"] for row in raybridge.living(nodes)]
    assert names == ["gpu-07", "10.0.0.2", "10.0.0.3-cccccc", "10.0.0.3-dddddd"]


def test_a_bridge_that_died_within_a_request_is_closed_all_the_same(tmp_path: Path) -> None:
    """Its pipe still holds what the process did not take; another bridge is made, and the controller goes on."""
    bridge = raybridge.Bridge("127.0.0.1:1", "nobody", {**os.environ}, tmp_path / "log")
    bridge._process.kill()
    bridge._process.wait()
    with pytest.raises(raybridge.BridgeError, match="gone"):
        bridge.ask("names", 1.0)
    bridge.close()
