"""Ports on loopback for real servers that tests start."""

from __future__ import annotations

import secrets
import socket


def free_port() -> int:
    """Below the ports that the system gives to who calls out, else a server that starts later finds its own taken."""
    while True:
        port = 20_000 + secrets.randbelow(12_000)
        with socket.socket() as made:
            try:
                made.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
