"""SFTP, one way: HUNT Cloud's kista. paramiko speaks the protocol, the user's own ssh carries it.

Sending asks for sizes, writes and renames; it never reads and never lists. Receiving lists and reads; it never writes.
"""

from __future__ import annotations

import errno
import select
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import IO, TYPE_CHECKING, Any, Self

from permed_compute.errors import NoRoomError, NotFoundError, PermissionDeniedError, TransferError
from permed_compute.transfer import ssh
from permed_compute.transfer.destinations import SftpDestination, permit
from permed_compute.transfer.port import CHUNK, Moved, Volume

if TYPE_CHECKING:
    from paramiko import SFTPClient, SFTPFile

_AHEAD = 128
"""Read requests under way at once, of 32 KiB each: 4 MiB covers 40 ms at 100 MB/s."""
_PATIENCE_S = 10


class Sftp:
    """One SFTP account and folder, used in the direction it was declared for."""

    largest = 0

    def __init__(self, entry: SftpDestination) -> None:
        self._entry = entry
        self._open_until = ExitStack()
        self._process: subprocess.Popen[bytes] | None = None
        self._said: IO[bytes] | None = None
        self._client: SFTPClient | None = None

    def __enter__(self) -> Self:
        try:
            from paramiko import SFTPClient
        except ImportError:
            raise TransferError(
                "SFTP needs paramiko, which is not installed.", remedy="pip install 'permed-compute[transfer]'"
            ) from None
        entry = self._entry
        words = ssh.command(
            entry.host, port=entry.port, user=entry.user, config=entry.config, options=("-s",), words=("sftp",)
        )
        with ExitStack() as stack:
            self._said = stack.enter_context(tempfile.TemporaryFile())
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    words, stdin=theirs.fileno(), stdout=theirs.fileno(), stderr=self._said
                )
            stack.callback(_end, self._process)
            stack.callback(ours.close)
            with self._told():
                self._client = SFTPClient(_Wire(ours))
            self._open_until = stack.pop_all()
        return self

    def __exit__(self, *exc: object) -> None:
        self._open_until.close()

    def put(self, volume: Volume, moved: Moved) -> None:
        permit("This SFTP account", self._entry, "send")
        target = self._path(volume.name)
        part = f"{target}.part"
        with self._told():
            if self._size(target) == volume.size:
                moved(volume.size)
                return
            held = self._size(part) or 0
            held = held if held <= volume.size else 0
            with self._open(part, held) as file:
                try:
                    self._write(file, volume, held, moved)
                except OSError as error:
                    if error.errno is not None:  # the wire's, not the server's answer
                        raise
                    self.forget(volume.name)
                    raise _full() from None
            if self._size(part) != volume.size:
                self.forget(volume.name)
                raise _full()
            self._sftp.posix_rename(part, target)

    def forget(self, name: str) -> None:
        permit("This SFTP account", self._entry, "send")
        with self._told():
            for path in (self._path(name), f"{self._path(name)}.part"):
                if self._size(path) is not None:
                    self._sftp.remove(path)

    def sizes(self) -> Mapping[str, int]:
        permit("This SFTP account", self._entry, "receive")
        with self._told():
            return {row.filename: row.st_size or 0 for row in self._sftp.listdir_attr(self._entry.folder)}

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        permit("This SFTP account", self._entry, "receive")
        with self._told(), self._sftp.open(self._path(name), "rb") as file:
            file.seek(offset)
            file.prefetch(max_concurrent_requests=_AHEAD)
            while piece := file.read(CHUNK):
                yield piece

    @property
    def _sftp(self) -> SFTPClient:
        assert self._client is not None, "the channel is used inside `with`"
        return self._client

    def _path(self, name: str) -> str:
        return f"{self._entry.folder}/{name}"

    def _size(self, path: str) -> int | None:
        try:
            return int(self._sftp.stat(path).st_size or 0)
        except FileNotFoundError:
            return None

    def _open(self, part: str, held: int) -> SFTPFile:
        file = self._sftp.open(part, "r+b" if held else "wb")
        file.chmod(0o600)  # before the first byte: the server's umask would let others read
        file.seek(held)
        return file

    def _write(self, file: SFTPFile, volume: Volume, held: int, moved: Moved) -> None:
        at, pieces = held, volume.read(held)
        file.set_pipelined(True)
        for piece in pieces:
            # The last write waits for its answer and with it for all before: a refused one is never taken for done.
            if at + len(piece) == volume.size:
                file.set_pipelined(False)
            file.write(piece)
            at += len(piece)
            moved(at)
        _sync(self._sftp, file)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """The library's and ssh's words in ours."""
        from paramiko import SSHException

        try:
            yield
        except (EOFError, SSHException):
            raise self._cut() from None
        except OSError as error:
            if error.errno == errno.ENOENT:
                raise NotFoundError(
                    "The account has no such folder or volume.", remedy="Is `folder` right in the destinations file?"
                ) from None
            if error.errno == errno.EACCES:
                raise PermissionDeniedError(
                    "The account may not do this there.", remedy="Is it the right account, and for this direction?"
                ) from None
            if error.errno is None:
                raise TransferError("The SFTP server refused without a reason.", remedy="Ask who runs it.") from None
            raise self._cut() from None

    def _cut(self) -> Exception:
        assert self._process is not None and self._said is not None
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_PATIENCE_S)
        self._said.seek(0)
        return ssh.reason(self._said.read().decode(errors="replace"), self._process.poll())


def _end(process: subprocess.Popen[bytes]) -> None:
    """ssh ends when its input does; one that does not is not waited for."""
    try:
        process.wait(_PATIENCE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _sync(client: SFTPClient, file: Any) -> None:
    """Ask the server to write it to its disk (OpenSSH's extension); one that cannot is not asked twice."""
    with suppress(OSError):
        client._request(200, "fsync@openssh.com", file.handle)


def _full() -> NoRoomError:
    return NoRoomError(
        "The far side took no more bytes: its disk or quota is full (SFTP does not say which).",
        remedy="What was half-written is removed. Have room made there, then run it again.",
    )


class _Wire:
    """ssh's input and output as the channel that paramiko expects."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def send(self, data: bytes) -> int:
        return self._end.send(data)

    def recv(self, count: int) -> bytes:
        return self._end.recv(count)

    def recv_ready(self) -> bool:
        return bool(select.select([self._end], [], [], 0)[0])

    def get_name(self) -> str:
        return "ssh"

    def close(self) -> None: ...
