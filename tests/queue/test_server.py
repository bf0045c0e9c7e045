"""The gateway: who calls, what comes back, and that a bad caller harms nobody."""

from __future__ import annotations

import json
import logging
import os
import pwd
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from permed_compute import errors
from permed_compute.errors import AuditError, Finding, NotFoundError, PermedError, Problem, QueueError, StaleError
from permed_compute.paths import HomePaths
from permed_compute.queue import server
from permed_compute.queue.server import Caller, Gateway, connect, error_from_row


def answer(caller: Caller, call: str, args: Mapping[str, Any]) -> Any:
    if call == "whoami":
        return [caller.uid, caller.user, caller.pid]
    if call == "stale":
        raise StaleError("moved", remedy="look again")
    if call == "bug":
        raise RuntimeError("secret inside")
    if call == "unserialisable":
        return object()
    return {"call": call, "args": dict(args)}


@pytest.fixture
def path(home: HomePaths) -> Path:
    return home.socket


@pytest.fixture
def gateway(path: Path) -> Iterator[Gateway]:
    with Gateway(path, answer) as gateway:
        yield gateway


def raw(path: Path, data: bytes) -> list[dict[str, Any]]:
    """What the gateway answers to these bytes until it, or we, hang up."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return [json.loads(line) for line in connection.makefile("rb")]


def test_a_call_and_its_answer(gateway: Gateway, path: Path) -> None:
    with connect(path) as client:
        assert client.call("echo", text="blåbær\n\u2028", number=1.5, none=None) == {
            "call": "echo",
            "args": {"text": "blåbær\n\u2028", "number": 1.5, "none": None},
        }
        assert client.call("again", name="an argument may be called name") is not None


def test_the_kernel_says_who_calls(gateway: Gateway, path: Path) -> None:
    with connect(path) as client:
        assert client.call("whoami", uid=0, user="root") == [
            os.getuid(), pwd.getpwuid(os.getuid()).pw_name, os.getpid(),
        ]  # fmt: skip
    code = (
        "import sys, os, pathlib; from permed_compute.queue.server import connect;"
        "sys.exit(connect(pathlib.Path(sys.argv[1])).call('whoami')[2] != os.getpid())"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 0


def test_only_this_user_may_connect(gateway: Gateway, path: Path) -> None:
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_an_error_comes_back_as_its_class(gateway: Gateway, path: Path) -> None:
    with connect(path) as client:
        with pytest.raises(StaleError, match="moved look again") as caught:
            client.call("stale")
        assert caught.value.remedy == "look again"
        assert client.call("echo")["call"] == "echo"


@pytest.mark.parametrize(
    "error",
    [
        errors.SpecError("job.yaml", [Problem("name", "is missing", 3, "Write one.")]),
        AuditError("edited", seq=17),
        errors.RefusedInput(Finding("GANTRY_TILT", "tilted", "refused", "abc", {"degrees": 12.5})),
        errors.LeaseLostError("lost"),
    ],
)
def test_errors_keep_what_they_carry(error: PermedError) -> None:
    again = error_from_row(json.loads(json.dumps(error.as_dict())))
    assert type(again) is type(error)
    assert again.as_dict() == error.as_dict()


def test_an_unknown_error_is_still_ours() -> None:
    error = error_from_row({"code": "from-the-future", "message": "m", "remedy": "r"})
    assert type(error) is PermedError
    assert error.code == "from-the-future"


@pytest.mark.parametrize("call", ["bug", "unserialisable"])
def test_a_failure_inside_is_logged_and_not_told(
    gateway: Gateway, path: Path, call: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR), connect(path) as client:
        with pytest.raises(PermedError) as caught:
            client.call(call)
        assert caught.value.code == "internal"
        assert "secret" not in str(caught.value.as_dict())
        assert client.call("echo")["call"] == "echo"
    assert caplog.records[0].exc_info is not None
    if call == "bug":
        assert "secret inside" in caplog.text


@pytest.mark.parametrize(
    "line", [b"nonsense", b"[]", b"3", b"{}", b'{"call": 3}', b'{"call": "x", "args": []}', b"\xff", b""]
)
def test_what_is_no_call_is_said_to_be_none(gateway: Gateway, path: Path, line: bytes) -> None:
    first, second = raw(path, line + b'\n{"call": "whoami"}\n')
    assert first["error"]["code"] == "queue"
    assert second["ok"][0] == os.getuid()


def test_deep_nesting_harms_nobody(gateway: Gateway, path: Path) -> None:
    [row] = raw(path, b'{"call": ' + b"[" * 200_000 + b"\n")
    assert row["error"]["code"] == "queue"


def test_a_line_too_long_is_refused(gateway: Gateway, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert server.MAX_LINE == 64 * 2**20
    monkeypatch.setattr(server, "MAX_LINE", 1000)
    with connect(path) as client:
        with pytest.raises(QueueError, match="long"):
            client.call("echo", text="x" * 1000)
        assert client.call("echo", text="x" * 100)["args"]["text"] == "x" * 100
    [row] = raw(path, b'{"call": "echo", "args": {"text": "' + b"x" * 970 + b'"}}\n')
    assert row["error"]["code"] == "queue"


def test_nobody_listens(path: Path) -> None:
    with pytest.raises(NotFoundError, match="permed controller"):
        connect(path)


def test_a_dead_servers_socket_is_replaced_and_a_living_ones_is_not(path: Path) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(str(path))
    dead.close()
    with pytest.raises(NotFoundError):
        connect(path)
    with Gateway(path, answer):
        with pytest.raises(QueueError, match="already"):
            Gateway(path, answer)
        with connect(path) as client:
            assert client.call("whoami")[0] == os.getuid()
    assert not path.exists()


def test_a_path_that_no_socket_can_have(tmp_path: Path) -> None:
    with pytest.raises(QueueError, match="longer"):
        Gateway(tmp_path / ("x" * 200), answer)
    with pytest.raises(QueueError, match="longer"):
        connect(tmp_path / ("x" * 200))


def test_a_call_under_way_is_answered_before_the_server_goes(path: Path) -> None:
    entered, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> str:
        entered.set()
        leave.wait(30)
        return "done"

    gateway = Gateway(path, wait)
    with connect(path) as client, ThreadPoolExecutor(2) as pool:
        call = pool.submit(client.call, "wait")
        assert entered.wait(30)
        closing = pool.submit(gateway.close)
        leave.set()
        assert call.result(30) == "done"
        closing.result(30)
        with pytest.raises(QueueError):
            client.call("echo")


def test_a_call_that_takes_too_long_is_hung_up_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permed_compute.queue.server._LAST_ANSWERS_S", 0.2)
    entered, leave = threading.Event(), threading.Event()

    def wait(*_: Any) -> None:
        entered.set()
        leave.wait(30)

    gateway = Gateway(path, wait)
    with connect(path) as client, ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.call, "wait")
        assert entered.wait(30)
        gateway.close()
        with pytest.raises(QueueError, match="unknown"):
            call.result(30)
        leave.set()


def test_a_late_answer_is_not_the_next_calls(path: Path) -> None:
    release = threading.Event()

    def slow(caller: Caller, call: str, args: Mapping[str, Any]) -> str:
        if call == "slow":
            release.wait(30)
        return call

    with Gateway(path, slow), connect(path, timeout=0.2) as client:
        with pytest.raises(QueueError, match="unknown"):
            client.call("slow")
        release.set()
        with pytest.raises(QueueError):
            client.call("fast")


def test_64_clients(gateway: Gateway, path: Path) -> None:
    def talk(number: int) -> list[Any]:
        with connect(path) as client:
            return [client.call("echo", me=number, i=i)["args"] for i in range(20)]

    with ThreadPoolExecutor(64) as pool:
        for number, answers in enumerate(pool.map(talk, range(64))):
            assert answers == [{"me": number, "i": i} for i in range(20)]


def test_threads_may_share_a_client(gateway: Gateway, path: Path) -> None:
    with connect(path) as client, ThreadPoolExecutor(16) as pool:
        ask: Callable[[int], Any] = lambda number: client.call("echo", n=number)["args"]["n"]  # noqa: E731
        assert list(pool.map(ask, range(200))) == list(range(200))
