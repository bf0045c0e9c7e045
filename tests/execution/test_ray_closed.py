"""Whatever listens while a gang trains refuses callers without the token, with a wrong one, and other users."""

from __future__ import annotations

import http.client
import os
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path

import psutil
import pytest

from permed_compute.execution import processes
from permed_compute.execution.port import Attempt
from permed_compute.execution.ray import RayExecutor
from permed_compute.storage import checkpoints
from permed_compute.testing.execution import Toys, wait_for

pytestmark = pytest.mark.ray
grpc = pytest.importorskip("grpc", reason="grpcio is not installed")

# One call of each server that Ray has, which changes nothing; empty messages are valid protobuf.
CALLS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo", "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.CoreWorkerService/NumPendingTasks", "/ray.rpc.ReporterService/HealthCheck",
)  # fmt: skip
ONLY_REFUSED = ("/ray.rpc.ObjectManagerService/Pull",)  # an empty one that was let in would do harm
NOBODY = 65534


@pytest.fixture
def gang(ray_executor: RayExecutor, ray_toys: Toys) -> Iterator[Attempt]:
    attempt = ray_toys.attempt("train", job="listening", workers=2, steps=100_000, every=2, seconds=0.1)
    ray_executor.launch(attempt)
    wait_for(lambda: checkpoints.names(attempt.paths.job.state), "a checkpoint")
    yield attempt
    assert ray_executor.end(attempt)


def by_grpc(port: int, token: str, calls: tuple[str, ...] = CALLS) -> dict[str, str]:
    """Call → status, of those that the server knows."""
    metadata = [("authorization", f"Bearer {token}")] if token else None
    found = {}
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        for call in calls:
            try:
                channel.unary_unary(call)(b"", metadata=metadata, timeout=30)
                found[call] = "OK"
            except grpc.RpcError as error:
                if error.code().name in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):  # nobody here speaks it
                    break
                if error.code().name != "UNIMPLEMENTED":
                    found[call] = error.code().name
    return found


def by_http(port: int, token: str) -> int:
    """The status of an agent's answer; 0 where none comes. (Its `/api/healthz` alone says `success` to everybody.)"""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("POST", "/get_or_create_runtime_env", body=b"", headers=headers)
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


def by_noise(port: int) -> bytes:
    """What comes back for bytes that mean nothing."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as stranger:
        stranger.settimeout(4.0)
        try:
            stranger.sendall(os.urandom(64))
            return stranger.recv(64)
        except OSError:
            return b""


def listening(executor: RayExecutor) -> dict[int, int]:
    """Port → pid, of every process of the session."""
    assert executor._local is not None
    return {
        each.laddr.port: process.pid
        for process in executor._local.processes()
        for each in psutil.Process(process.pid).net_connections("tcp")
        if each.status == psutil.CONN_LISTEN
    }


def test_every_port_refuses_who_has_no_token_or_a_wrong_one(ray_executor: RayExecutor, gang: Attempt) -> None:
    assert ray_executor._local is not None
    token = ray_executor._local.token.read_text()
    members = {process.pid for slot in processes.of_attempt(gang.name).values() for process in slot}
    kinds: dict[str, int] = {}
    for port, pid in listening(ray_executor).items():
        name = psutil.Process(pid).name()
        if by_noise(port) == b"":  # gloo's: it takes a connection's number for which it waits, and nothing else
            assert pid in members, name
            kinds["ranks"] = kinds.get("ranks", 0) + 1
        elif (known := by_grpc(port, token)) or by_grpc(port, "", ONLY_REFUSED):
            assert not known or "OK" in known.values(), (name, known)
            for wrong in ("", "0" * 64, token[:-1]):
                assert set(by_grpc(port, wrong, CALLS + ONLY_REFUSED).values()) == {"UNAUTHENTICATED"}, name
            kinds["grpc"] = kinds.get("grpc", 0) + 1
        else:
            assert by_http(port, token), name
            assert by_http(port, token) not in (401, 403)
            assert {by_http(port, wrong) for wrong in ("", "0" * 64)} <= {401, 403}, name
            kinds["http"] = kinds.get("http", 0) + 1
    print(kinds)
    assert kinds["grpc"] >= 5 and kinds["ranks"] >= 2  # gcs, raylet, objects, driver, two members; two ranks
    before = checkpoints.names(gang.paths.job.state)
    wait_for(lambda: checkpoints.names(gang.paths.job.state) != before, "the gang to go on in spite of the strangers")


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried only by root")
def test_another_user_reaches_no_socket_and_no_secret(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    assert ray_executor._local is not None
    attempt = ray_toys.attempt("train", job="private")
    (attempt.paths.root / "rendezvous").touch()
    ray_executor.start()
    runtime = ray_executor._local.token.parent
    sockets = [path for path in runtime.rglob("*") if path.is_socket()]
    assert len(sockets) >= 2  # the raylet's and the object store's
    places = [*sockets, ray_executor._local.token, attempt.paths.root / "rendezvous", attempt.paths.launch]
    assert as_nobody(places) == {"PermissionError"}


def as_nobody(places: Iterable[Path]) -> set[str]:
    """What another user gets who connects to these, or reads them."""
    ours, theirs = os.pipe()
    child = os.fork()  # without exec: this Python may lie where that user cannot read
    if child == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        got = set()
        for path in places:
            for way in (lambda: socket.socket(socket.AF_UNIX).connect(str(path)), lambda: path.read_bytes()):  # noqa: B023
                try:
                    way()
                    got.add(f"entered {path.name}")
                except OSError as error:
                    got.add(type(error).__name__)
        os.write(theirs, "\n".join(got).encode())
        os._exit(0)
    os.close(theirs)
    os.waitpid(child, 0)
    with os.fdopen(ours) as answer:
        return set(answer.read().split("\n"))
