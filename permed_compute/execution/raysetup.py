"""Starts a Ray worker with its environment variables: what Ray's own `setup_worker.py` does, without importing ray.

Every worker of ours has marks in its environment, so every one goes through here; importing ray only to set variables
cost each of them 0.4 s and more. Run by path, by the raylet (`raylocal.trim`): standard library only.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

_CONTEXT = "--serialized-runtime-env-context="
_LANGUAGE = "--language="


def main(arguments: list[str]) -> None:
    """Become the worker. What is more than variables for Python goes to Ray's own script, unchanged."""
    context = json.loads(next((a.removeprefix(_CONTEXT) for a in arguments if a.startswith(_CONTEXT)), "{}"))
    language = next((a.removeprefix(_LANGUAGE) for a in arguments if a.startswith(_LANGUAGE)), "")
    variables = context.pop("env_vars", None) or {}
    python = context.pop("py_executable", sys.executable)
    plain = language == "PYTHON" and python == sys.executable and not any(context.values())
    worker = [a for a in arguments if not a.startswith((_CONTEXT, _LANGUAGE))]
    if plain and not any("$" in value for value in variables.values()):
        os.environ.update(variables)
        os.execv(python, [python, *worker])  # noqa: S606 - the raylet's own command line, without a shell
    script = Path(next(a for a in worker if a.endswith(".py"))).with_name("setup_worker.py")
    os.execv(sys.executable, [sys.executable, str(script), *arguments])  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
