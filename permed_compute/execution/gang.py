"""How the ranks of a gang meet, and how one of them hears that its machine wants it gone.

Ranks are members of one attempt in the attempt's own reservation; between them stands `torch.distributed`: gloo for
what lies in main memory, nccl beside it where the ranks have GPUs. They find each other through a file in the attempt's
folder, which only this user can read: nothing listens for that. Gloo's own sockets take the loopback interface where
all ranks share a node, and else the one that carries the node's address; what speaks to them without knowing the
connection's number is dropped.
"""

from __future__ import annotations

import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import psutil

from permed_compute.errors import EngineError

_PATIENCE = timedelta(minutes=30)
"""A collective's. A dead peer is noticed at once, by its connection; only a stuck one takes so long."""

LOOPBACK = "127.0.0.1"


def join(rendezvous: Path, rank: int, world: int, *, gpu: bool, address: str) -> Callable[[bool], bool]:
    """Meet the other ranks; returns what they agree by (true where any says so). `address`: of this rank's node."""
    interface = interface_of(address)
    os.environ["GLOO_SOCKET_IFNAME"] = os.environ["NCCL_SOCKET_IFNAME"] = interface
    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if gpu else "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world,
        timeout=_PATIENCE,
    )  # fmt: skip

    def agree(mine: bool) -> bool:
        flag = torch.tensor([int(mine)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())

    return agree


def leave() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()


def is_of_a_peer(error: BaseException) -> bool:
    """Whether this is a collective's word for another rank that is gone, and no fault of this one."""
    text = f"{type(error).__module__}.{type(error).__name__}: {error}"
    return isinstance(error, RuntimeError) and any(word in text for word in ("gloo", "DistBackendError", "NCCL"))


def interface_of(address: str) -> str:
    """The network interface that carries this address. Raises `EngineError`."""
    if ipaddress.ip_address(address).is_loopback:
        return "lo"
    for name, found in psutil.net_if_addrs().items():
        if any(each.family == socket.AF_INET and each.address == address for each in found):
            return name
    raise EngineError(
        f"No network interface of this node has the address {address}.",
        remedy="`ray start --node-ip-address` names one.",
    )


# --------------------------------------------------------------------------------------------- SIGTERM


class Termination:
    """SIGTERM as an event. Heard in a thread, through the wake-up descriptor, so that it does not matter what the main
    thread is doing: in a Ray worker it sits in C++.

    Where nobody has said `heeded`, the signal does what it would have done: it ends the process.
    """

    def __init__(self) -> None:
        self._asked = threading.Event()
        self._heeded = 0

    def listen(self) -> None:
        """From now on. Only the main thread may call it."""
        ours, signals = socket.socketpair()
        signals.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(signals.fileno(), warn_on_full_buffer=False)
        self._ends = (ours, signals)
        os.register_at_fork(after_in_child=self._forget)
        threading.Thread(target=self._hear, args=(ours,), name="permed-sigterm", daemon=True).start()

    def asked(self) -> bool:
        return self._asked.is_set()

    def __enter__(self) -> Termination:
        self._heeded += 1
        return self

    def __exit__(self, *_: object) -> None:
        self._heeded -= 1

    def _hear(self, ours: socket.socket) -> None:
        while number := ours.recv(1):
            if number[0] == signal.SIGTERM:
                self._asked.set()
                if not self._heeded:
                    os._exit(128 + signal.SIGTERM)

    @staticmethod
    def _forget() -> None:
        """A child (a loader's worker) ends by SIGTERM as any process does."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


TERMINATION = Termination()
"""Of this process."""
