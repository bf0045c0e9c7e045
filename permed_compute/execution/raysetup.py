"""Starts a Ray worker with its environment variables: what Ray's own `setup_worker.py` does, without importing ray.

Every worker of ours has marks in its environment, so every one goes through here; importing ray only to set variables
cost each of them 0.4 s and more. And it is the gate: a raylet that was about to start a worker starts it though nobody
waits for it any more, and would keep it. Who comes for an attempt that has been given up ends here. Whoever ends an
attempt raises its fence first, and finds those that stand at the gate by their command line (`processes`).
Run by path, by the raylet (`raylocal.trim`): standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

FENCE = "PERMED_FENCE"
"""`<the attempt's number> <its job's fence file>`, in the worker's variables."""
CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="


def main(arguments: list[str]) -> None:
    """Become the worker, or nothing. What is more than variables for Python goes to Ray's own script, unchanged."""
    context = context_of(arguments)
    language = next((a.removeprefix(_LANGUAGE) for a in arguments if a.startswith(_LANGUAGE)), "")
    variables = context.pop("env_vars", None) or {}
    if given_up(variables.get(FENCE, "")):
        return
    python = context.pop("py_executable", sys.executable)
    plain = language == "PYTHON" and python == sys.executable and not any(context.values())
    worker = [a for a in arguments if not a.startswith((CONTEXT, _LANGUAGE))]
    if plain and not any("$" in value for value in variables.values()):
        os.environ.update(variables)
        os.execv(python, [python, *worker])  # noqa: S606 - the raylet's own command line, without a shell
    script = Path(next(a for a in worker if a.endswith(".py"))).with_name("setup_worker.py")
    os.execv(sys.executable, [sys.executable, str(script), *arguments])  # noqa: S606


def context_of(arguments: list[str]) -> dict[str, Any]:
    """The worker's environment as the raylet says it; {} where this is the command line of something else."""
    words = next((a.removeprefix(CONTEXT) for a in arguments if a.startswith(CONTEXT)), "{}")
    context: dict[str, Any] = json.loads(words)
    return context


def given_up(fence: str) -> bool:
    """Whether the attempt that this says (`FENCE`) has been given up: only a newer one may start."""
    number, _, file = fence.partition(" ")
    try:
        return bool(file) and int(Path(file).read_text()) > int(number)
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    main(sys.argv[1:])
