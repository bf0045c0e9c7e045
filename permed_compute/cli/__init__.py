"""The command line: one file per noun. `main` is the `permed` program."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code (`exits.Exit`)."""
    from permed_compute.cli.app import run

    return run(argv)
