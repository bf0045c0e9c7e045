"""Ends a local Ray that nobody needs any more: its controller was killed and none came back, or its folder is gone.

Runs beside the session, bears its mark, and is ended with it. A controller says that it is there by a shared lock,
which the system takes back however it dies; attempts say so by being there.
"""

from __future__ import annotations

import fcntl
import os
import sys
import time
from pathlib import Path

from permed_compute.execution import processes
from permed_compute.execution.processes import ATTEMPT_MARK, SESSION_MARK, Process, ProcessTable
from permed_compute.paths import is_locked

LONELY_S = 60.0
"""How long Ray waits for another controller once there is neither controller nor attempt."""
_TICK_S = 2.0


def users_file(runtime: Path) -> Path:
    """Controllers that use the session hold a shared lock on it."""
    return runtime / "ray.users"


def say_here(runtime: Path) -> int:
    """Hold the controllers' lock; returns the descriptor to close when leaving."""
    handle = os.open(users_file(runtime), os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(handle, fcntl.LOCK_SH)
    return handle


def of_session(runtime: Path, table: ProcessTable | None = None) -> list[Process]:
    """Every process that bears the session's mark, jobs' processes included."""
    table = (table or ProcessTable()).look()
    return [table.processes[pid] for pid, mark in table.marked(SESSION_MARK).items() if mark == str(runtime)]


def keep(runtime: Path, record: Path, lonely_s: float = LONELY_S) -> None:
    """Return once the session has been ended."""
    table = ProcessTable()
    lonely_since: float | None = None
    while record.exists():
        now = time.monotonic()
        if is_locked(users_file(runtime)) or _has_attempt(runtime, table):
            lonely_since = None
        else:
            lonely_since = lonely_since or now
            if now - lonely_since >= lonely_s:
                record.unlink(missing_ok=True)
        time.sleep(_TICK_S)
    processes.kill_all(lambda: [each for each in of_session(runtime, table) if each.pid != os.getpid()])


def _has_attempt(runtime: Path, table: ProcessTable) -> bool:
    session = {process.pid for process in of_session(runtime, table)}
    return any(pid in session for pid in table.marked(ATTEMPT_MARK))


if __name__ == "__main__":
    if os.fork():  # nobody's child: it outlives the controller that started the session
        os._exit(0)
    keep(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]))
