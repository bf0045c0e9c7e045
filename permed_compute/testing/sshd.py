"""A real OpenSSH server of our own on loopback, with keys of its own, for tests; no root needed."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from permed_compute.errors import EngineError, NotFoundError
from permed_compute.testing.ports import free_port

_WHERE = ("/usr/sbin/sshd", "/usr/local/sbin/sshd", "/usr/bin/sshd")
_PATIENCE_S = 20


@dataclass(frozen=True, slots=True)
class Sshd:
    """A running server: `ssh -F config far` reaches it. `config` is the client's, `key` the client's private key."""

    port: int
    config: Path
    key: Path
    host: str = "far"


@contextmanager
def server(
    folder: Path, *, sftp: str = "internal-sftp", environment: Mapping[str, str] | None = None
) -> Iterator[Sshd]:
    """One in `folder`, for this user. `sftp` is its SFTP subsystem, `environment` what its sessions get.

    Raises `NotFoundError` where the machine has no OpenSSH server.
    """
    program = next((place for place in _WHERE if Path(place).is_file()), None)
    if program is None or shutil.which("ssh") is None:
        raise NotFoundError("There is no OpenSSH server on this machine.", remedy="make real-parts")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)  # where sshd parts with its rights
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True, timeout=30)
    port = free_port()
    given = " ".join(f'{name}="{value}"' for name, value in (environment or {}).items())
    (folder / "sshd_config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\nAuthorizedKeysFile {folder}/client.pub\n"
        "PidFile none\nStrictModes no\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
        f"PermitRootLogin yes\nMaxStartups 100\nSubsystem sftp {sftp}\n" + (f"SetEnv {given}\n" if given else "")
    )
    (folder / "known_hosts").write_text(f"[127.0.0.1]:{port} {(folder / 'host.pub').read_text()}")
    config = folder / "ssh_config"
    config.write_text(
        f"Host far\n  HostName 127.0.0.1\n  Port {port}\n  User {getpass.getuser()}\n  IdentityFile {folder}/client\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  GlobalKnownHostsFile none\n"
        "  StrictHostKeyChecking yes\n  BatchMode yes\n"
    )
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([program, "-D", "-e", "-f", folder / "sshd_config"], stdout=log, stderr=log)
    try:
        _wait(port, process, folder / "log")
        yield Sshd(port, config, folder / "client")
    finally:
        process.terminate()
        process.wait(_PATIENCE_S)


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + _PATIENCE_S
    while time.monotonic() < end and process.poll() is None:
        with socket.socket() as knock:
            if knock.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise EngineError(f"sshd did not start: {log.read_text(errors='replace').strip()[-500:]}")
