"""A Unix-socket gateway: local processes call the one that holds the queue, which knows them by the kernel's word.

One JSON object a line: `{"call": name, "args": {…}}` is answered by `{"ok": value}` or `{"error": {code, message,
remedy, …}}`. The gateway knows nothing of jobs: `handler(caller, call, args)` answers. The socket has mode 0600 in a
private folder, and the caller's identity comes by SO_PEERCRED, never from what the caller says.
"""

from __future__ import annotations

import contextlib
import json
import logging
import pwd
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Self

from permed_compute import errors
from permed_compute.errors import Finding, NotFoundError, PermedError, PermissionDeniedError, Problem, QueueError

log = logging.getLogger(__name__)

MAX_LINE = 64 * 2**20
"""Bytes of one request or answer, newline included."""
_MAX_PATH = 107  # bytes of a Unix socket's path (sockaddr_un)

_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode


@dataclass(frozen=True, slots=True)
class Caller:
    """Who is at the other end of a connection, as the kernel says."""

    uid: int
    user: str
    pid: int


_LAST_ANSWERS_S = 5.0

Handler = Callable[[Caller, str, Mapping[str, Any]], Any]
"""(caller, name of the call, its arguments) → JSON-able answer. Raises `PermedError` for what the caller shall see."""


class Gateway:
    """Serves until `close`: a thread per connection. Listens from construction on.

    Raises `QueueError` where another server listens on this socket already, or its path is too long.
    """

    def __init__(self, path: Path, handler: Handler) -> None:
        self.path = path
        self._handler = handler
        self._open: dict[socket.socket, threading.Thread] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._listener = _listen(path)
        self._thread = threading.Thread(target=self._accept, name="permed-gateway", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the socket, answer whoever has reached us, then hang up: no caller is left without knowing.

        Callers still being served after `_LAST_ANSWERS_S` are hung up on.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self.path.unlink(missing_ok=True)
        self._listener.setblocking(False)  # takes what has connected, then ends the accepting thread
        with contextlib.suppress(OSError):
            self._wake()
        self._thread.join(_LAST_ANSWERS_S)
        with self._lock:
            open_now = dict(self._open)
        for connection in open_now:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RD)  # what was sent before is still read and answered
        end = time.monotonic() + _LAST_ANSWERS_S
        for thread in open_now.values():
            thread.join(max(0.0, end - time.monotonic()))
        for connection in open_now:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _wake(self) -> None:
        """End an `accept` that began before the listener stopped blocking."""
        self._listener.shutdown(socket.SHUT_RD)

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                log.exception("The gateway could not accept a connection.")
                continue
            connection.setblocking(True)
            thread = threading.Thread(target=self._serve, args=(connection,), name="permed-call", daemon=True)
            with self._lock:
                self._open[connection] = thread
            thread.start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection, connection.makefile("rb") as lines:
                caller = _caller(connection)
                while line := lines.readline(MAX_LINE + 1):
                    if len(line) > MAX_LINE:  # where the next request begins is unknown now: answer and hang up
                        connection.sendall(_line({"error": _too_long().as_dict()}))
                        return
                    connection.sendall(self._answer(caller, line))
        except OSError:
            log.debug("A caller hung up.")
        finally:
            with self._lock:
                self._open.pop(connection, None)

    def _answer(self, caller: Caller, line: bytes) -> bytes:
        try:
            call, args = _request(line)
            return _line({"ok": self._handler(caller, call, args)})
        except PermedError as error:
            return _line({"error": error.as_dict()})
        except Exception:
            # The details are for the operator's log: a message may carry what this caller must not see.
            log.exception("A call failed inside the controller.")
            internal = PermedError("The controller failed inside.", remedy="Its log says more.").as_dict()
            return _line({"error": internal | {"code": "internal"}})


class GatewayClient:
    """One connection to a gateway. Threads may share it; their calls then go one after the other."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._lines: BinaryIO = connection.makefile("rb")
        self._lock = threading.Lock()

    def call(self, name: str, /, **args: Any) -> Any:
        """The handler's answer, or its error raised again as its own class."""
        request = _line({"call": name, "args": args})
        if len(request) > MAX_LINE:
            raise _too_long()
        try:
            with self._lock:
                self._connection.sendall(request)
                line = self._lines.readline()
        except (OSError, ValueError):
            line = b""
        if not line.endswith(b"\n"):
            self.close()  # an answer that comes late must not be taken for the next call's
            raise QueueError(
                f"The controller hung up during {name!r}; whether the call took effect is unknown.",
                remedy="Look with `permed jobs` before you repeat it.",
            )
        answer = json.loads(line)
        if "error" in answer:
            raise error_from_row(answer["error"])
        return answer["ok"]

    def close(self) -> None:
        self._lines.close()
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(path: Path, timeout: float | None = None) -> GatewayClient:
    """A client of the gateway at `path`; `timeout` is seconds per call. Raises `NotFoundError` where nobody listens."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(timeout)
    try:
        connection.connect(_address(path))
    except (FileNotFoundError, ConnectionRefusedError):
        connection.close()
        raise NotFoundError(
            "No controller of this home is running.", remedy="Start one: permed controller, or use permed run."
        ) from None
    except PermissionError:
        connection.close()
        raise PermissionDeniedError("The controller of this home belongs to another user.") from None
    except BaseException:
        connection.close()
        raise
    return GatewayClient(connection)


def error_from_row(row: Mapping[str, Any]) -> PermedError:
    """The error that `as_dict` wrote, as its own class; of an unknown code as `PermedError` that carries the code."""
    kind = _KINDS.get(str(row.get("code")), PermedError)
    error = kind.__new__(kind)
    Exception.__init__(error, row["message"])
    error.message, error.remedy = str(row["message"]), str(row.get("remedy", ""))
    if kind is PermedError:
        error.code = str(row.get("code", PermedError.code))
    for name, read in _MORE.items():
        if name in row:
            setattr(error, name, read(row[name]))
    return error


def _kinds(base: type[PermedError]) -> dict[str, type[PermedError]]:
    found = {base.code: base}
    for kind in base.__subclasses__():
        found |= _kinds(kind)
    return found


_KINDS = _kinds(errors.PermedError)
_MORE: dict[str, Callable[[Any], Any]] = {
    "problems": lambda rows: tuple(Problem(**row) for row in rows),
    "source": str,
    "rule": str,
    "seq": int,
    "finding": lambda row: Finding(**row),
}
"""What some errors carry beside their message."""


def _listen(path: Path) -> socket.socket:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        listener.bind(_address(path))
        path.chmod(0o600)  # before listen: nobody connects in between
        listener.listen(256)
    except OSError as error:
        listener.close()
        raise QueueError(f"The gateway cannot listen on {path} ({error.strerror}).") from None
    except PermedError:
        listener.close()
        raise
    return listener


def _remove_stale(path: Path) -> None:
    """Remove the socket of a server that died; refuse where one lives."""
    try:
        connect(path, timeout=1.0).close()
    except NotFoundError:
        path.unlink(missing_ok=True)
        return
    raise QueueError(f"A controller listens on {path} already.", remedy="One home has one controller.")


def _address(path: Path) -> str:
    address = str(path)
    if len(address.encode()) > _MAX_PATH:
        raise QueueError(
            f"The socket's path {address} is longer than {_MAX_PATH} bytes.", remedy="Set TMPDIR to a shorter folder."
        )
    return address


def _caller(connection: socket.socket) -> Caller:
    """The kernel's answer (SO_PEERCRED, unix(7)): pid, uid and gid when the caller connected."""
    size = struct.calcsize("3i")
    pid, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        user = str(uid)
    return Caller(uid, user, pid)


def _request(line: bytes) -> tuple[str, Mapping[str, Any]]:
    try:
        request = json.loads(line)
        call, args = request["call"], request.get("args", {})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        call, args = None, None
    if not isinstance(call, str) or not isinstance(args, dict):
        raise QueueError("This is not a call.", remedy='Write one line of JSON: {"call": name, "args": {…}}.')
    return call, args


def _line(value: Any) -> bytes:
    return _encode(value).encode("ascii") + b"\n"


def _too_long() -> QueueError:
    return QueueError(
        f"A call is at most {MAX_LINE // 2**20} MiB long.",
        remedy="Submit large arrays as one spec, or in several calls.",
    )
