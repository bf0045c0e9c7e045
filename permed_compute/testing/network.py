"""A command in a network of its own: loopback only, or with a wire that leads nowhere and on which we listen.

    python -m permed_compute.testing.network -- make test           # loopback only: whoever calls out is told so
    python -m permed_compute.testing.network --watch FILE -- CMD    # whatever leaves is dropped, and its address noted

With the wire everything that any process sends (C++ of Ray's, a resolver's question) is seen by the kernel, not by what
Python knows of it. Needs Linux, `unshare`, and for the wire `ip`; no root, where user namespaces are allowed.
"""

from __future__ import annotations

import argparse
import fcntl
import ipaddress
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_MODULE = "permed_compute.testing.network"
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _SIOCSIFADDR, _IFF_UP = 0x8913, 0x8914, 0x8916, 0x1
_ALL_PROTOCOLS = 0x0003
_IPV4, _IPV6 = 0x0800, 0x86DD
_PROTOCOLS = {1: "icmp", 6: "tcp", 17: "udp"}
# Addresses for documentation (RFC 5737, RFC 3849): nobody has them.
_WIRE = (
    "link add permed0 type veth peer name permed1",
    "link set permed0 up", "link set permed1 up",
    "addr add 192.0.2.1/24 dev permed0", "neigh add 192.0.2.2 lladdr 02:00:00:00:00:02 dev permed0",
    "route add default via 192.0.2.2",
    "addr add 2001:db8::1/64 dev permed0 nodad", "neigh add 2001:db8::2 lladdr 02:00:00:00:00:02 dev permed0",
    "-6 route add default via 2001:db8::2",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Attempt:
    """Something that was sent away. port: 0 where the protocol has none."""

    protocol: str
    to: str
    port: int


def possible(*, wire: bool = False) -> str:
    """'' where it can be done here, else why not."""
    if shutil.which("unshare") is None or (wire and shutil.which("ip") is None):
        return f"{'ip' if shutil.which('unshare') else 'unshare'} is not on this machine"
    try:
        done = isolated([sys.executable, "-c", "pass"], timeout_s=60)
    except subprocess.TimeoutExpired:
        return "a network of its own does not start here"
    return "" if done.returncode == 0 else "this machine allows no network namespaces"


def isolated(
    command: Sequence[str], *, watch: Path | None = None, cwd: Path | None = None,
    env: Mapping[str, str] | None = None, timeout_s: float = 600.0,
) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """`command` without a way out; with `watch`, on a wire, and what it sent stands there as JSON (see `attempts`)."""
    words = [sys.executable, "-m", _MODULE, *(["--watch", str(watch)] if watch is not None else []), "--", *command]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout_s, check=False)


def attempts(watch: Path) -> list[Attempt]:
    """What was sent, each address once."""
    return [Attempt(**row) for row in json.loads(watch.read_text(encoding="utf-8"))]


# --------------------------------------------------------------------------------------------- outside, then inside


def main(argv: Sequence[str] | None = None) -> int:
    """Exit with the command's own code."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {_MODULE}", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--watch", type=Path, help="note here, as JSON, what is sent away")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(argv)
    if not given.inside:
        return _outside(given.watch, given.command)
    _loopback_up()
    if given.watch is None:
        return subprocess.run(given.command, check=False).returncode
    return _on_a_wire(given.watch, given.command)


def _outside(watch: Path | None, command: Sequence[str]) -> int:
    # Root keeps its users (tests become `postgres`); others become root of a namespace, alone.
    how = ["--net"] if os.geteuid() == 0 else ["--net", "--map-root-user"]
    words = ["unshare", *how, "--", sys.executable, "-m", _MODULE, "--inside"]
    words += ["--watch", str(watch.absolute())] if watch is not None else []
    return subprocess.run([*words, "--", *command], check=False).returncode


def _loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh", b"lo", 0)
        flags = struct.unpack("16sh", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh", b"lo", flags | _IFF_UP))
        # Where 127.0.0.1 is the only address, glibc tells who asks by AI_ADDRCONFIG, as Slurm does, that there is none.
        second = struct.pack("16sH2x4s8x", b"lo:2", socket.AF_INET, socket.inet_aton("127.0.0.2"))
        fcntl.ioctl(any_socket, _SIOCSIFADDR, second)


def _on_a_wire(watch: Path, command: Sequence[str]) -> int:
    for words in _WIRE:
        subprocess.run(["ip", *words.split()], check=True)
    found: dict[Attempt, None] = {}
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ALL_PROTOCOLS)) as wire:
        wire.bind(("permed1", 0))
        wire.settimeout(0.2)
        ended = threading.Event()
        listener = threading.Thread(target=_listen, args=(wire, ended.is_set, found))
        listener.start()
        try:
            code = subprocess.run(command, check=False).returncode
        finally:
            ended.set()
            listener.join()
    watch.write_text(json.dumps([asdict(attempt) for attempt in found]), encoding="utf-8")
    return code


def _listen(wire: socket.socket, ended: Callable[[], bool], found: dict[Attempt, None]) -> None:
    """Until nothing more comes after the end."""
    while True:
        try:
            attempt = read(wire.recv(256))
        except TimeoutError:
            if ended():
                return
            continue
        if attempt is not None:
            found.setdefault(attempt)


def read(frame: bytes) -> Attempt | None:
    """Who an Ethernet frame is for; None where it is no call: neighbours' and groups' own talk."""
    kind, packet = struct.unpack("!H", frame[12:14])[0], frame[14:]
    if kind == _IPV4:
        to: ipaddress.IPv4Address | ipaddress.IPv6Address = ipaddress.IPv4Address(packet[16:20])
        number, rest = packet[9], packet[(packet[0] & 0x0F) * 4 :]
    elif kind == _IPV6:
        to, number, rest = ipaddress.IPv6Address(packet[24:40]), packet[6], packet[40:]
    else:
        return None
    if number not in _PROTOCOLS and to.is_multicast:
        return None
    port = struct.unpack("!H", rest[2:4])[0] if number in (6, 17) else 0
    return Attempt(_PROTOCOLS.get(number, str(number)), str(to), port)


if __name__ == "__main__":
    sys.exit(main())
