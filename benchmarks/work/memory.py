"""What a measured program held at most."""

from __future__ import annotations

from pathlib import Path


def most_mib() -> float:
    """Of this program, MiB; `ru_maxrss` also counts what its parent held when it forked."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024
