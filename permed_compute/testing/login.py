"""A login node: `permed` commands as processes of their own against one home, and nothing that stays between them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from permed_compute.errors import EngineError
from permed_compute.execution.slurm import ticket_file
from permed_compute.paths import AttemptPaths, HomePaths, read_json


class Login:
    """`environment` is what every command gets beside this process's own, e.g. `SlurmCluster.environment`."""

    def __init__(self, home: HomePaths, environment: Mapping[str, str]) -> None:
        self.home = home
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("PERMED_", "SLURM_"))},
            **environment, "PERMED_HOME": str(home.root), "PERMED_ANCHOR": str(home.root.parent / "anchor"),
            "PERMED_TRACKING_URI": "none",
        }  # fmt: skip

    def start(self, *words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "permed_compute.cli", *words, "--json"], env=self.environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def __call__(self, *words: str, code: int = 0, timeout_s: float = 90.0) -> Any:
        """The command's answer. Raises `EngineError` with what it said where it ends with another code."""
        process = self.start(*words)
        out, err = process.communicate(timeout=timeout_s)
        if process.returncode != code:
            raise EngineError(f"permed {' '.join(words)} ended with {process.returncode}: {err or out}")
        return json.loads(out) if out else json.loads(err)

    def state(self, job_id: str) -> str:
        """The job's state after one more look."""
        return str(self("status", job_id)["state"])

    def until(self, job_id: str, true: Callable[[str], bool], patience_s: float = 120.0) -> str:
        """Look again and again, as a user does, until the job's state is what it should be."""
        deadline = time.monotonic() + patience_s
        while not true(state := self.state(job_id)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{job_id} is {state}: {self('why', job_id)['sentence']}\n{self.words(job_id)}")
            time.sleep(0.5)
        return state

    def attempts(self, job_id: str) -> list[AttemptPaths]:
        folder = self.home.job(job_id).root / "attempts"
        return [AttemptPaths(each) for each in sorted(folder.iterdir())] if folder.is_dir() else []

    def slurm_job(self, job_id: str) -> str:
        """The number of the newest attempt's job in Slurm, '' where none is known."""
        attempts = self.attempts(job_id)
        return str((read_json(ticket_file(attempts[-1])) or {}).get("job", "")) if attempts else ""

    def words(self, job_id: str) -> str:
        """What the attempts' allocations have printed, for a failure's message."""
        files = [paths.root / name for paths in self.attempts(job_id) for name in ("slurm.out", "log.txt")]
        return "\n".join(f"{file}: {file.read_text()[-1500:]}" for file in files if file.exists())

    def result(self, job_id: str) -> Any:
        return json.loads((self.home.job(job_id).results / "result.json").read_text(encoding="utf-8"))


def job_file(folder: Path, code: Path, workload: str = "squares", **spec: Any) -> Path:
    """A job of the toy workloads; `params` and everything else of a job as keywords."""
    file = folder / f"{spec.get('name', workload)}.json"
    base = {
        "name": workload, "workload": f"toys:{workload}", "code": str(code), "time_limit": "10m",
        "resources": {"cpus": 1, "memory": "1GiB"}, "params": {"count": 4},
    }  # fmt: skip
    file.write_text(json.dumps({**base, **spec}))
    return file
