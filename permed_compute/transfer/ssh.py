"""The user's own ssh, as a program: their keys, one-time passwords, jump hosts and known hosts, and none of ours."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from permed_compute.errors import PermedError, PermissionDeniedError, TransferError

_ALIVE = ("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=4", "-o", "ConnectTimeout=30")
"""A line that is silent for a minute is cut, so that the transfer ends with a sentence and can be gone on with."""
_CLOSED = ("-a", "-x", "-T", "-o", "ClearAllForwardings=yes", "-o", "PermitLocalCommand=no")
"""No agent, no windows, no tunnels: whoever has the other side gets nothing of this one."""


def command(
    host: str,
    *,
    port: int = 0,
    user: str = "",
    config: str = "",
    options: Sequence[str] = (),
    words: Sequence[str] = (),
) -> list[str]:
    """`ssh … HOST WORDS`, to be started by argument list."""
    program = shutil.which("ssh")
    if program is None:
        raise TransferError("ssh is not on PATH.", remedy="Install OpenSSH's client.")
    given = [*(("-F", config) if config else ()), *(("-p", str(port)) if port else ()), *(("-l", user) if user else ())]
    return [program, *_ALIVE, *_CLOSED, *given, *options, "--", host, *words]


def reason(said: str, code: int | None) -> PermedError:
    """Why ssh ended, in our words: its own quote users and addresses."""
    for sign, error in _REASONS.items():
        if sign in said:
            return error
    return TransferError(
        f"The connection was cut (ssh ended with {code}).",
        remedy="Run it again: it goes on from what is there. `ssh -v` to the same host says more.",
    )


_REASONS: dict[str, PermedError] = {
    "Host key verification failed": PermissionDeniedError(
        "ssh does not know this host's key, or it has changed.",
        remedy="Have the key confirmed by another way, then connect once with ssh yourself.",
    ),
    "Permission denied": PermissionDeniedError(
        "The host did not accept your login.",
        remedy="Does `ssh HOST` work in this terminal? Is the key loaded (ssh-add), the account still open?",
    ),
    "Could not resolve": TransferError(
        "The host's name is not known here.", remedy="Is the VPN on? Is it spelt right?"
    ),
    "Connection refused": TransferError("Nobody answers at that host and port.", remedy="Is the port right, and open?"),
    "timed out": TransferError("The host does not answer.", remedy="Is the VPN on? Run it again: it goes on."),
    "subsystem request failed": TransferError("The host offers no SFTP.", remedy="Ask who runs it, or use another."),
}
