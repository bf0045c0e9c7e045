"""A `workloads.port.Context` for one process, and a loop over a map workload: workload tests need no executor.

ctx = LocalContext(tmp_path, spec)
outcome = run_map(WORKLOAD, spec, tmp_path)
"""

from __future__ import annotations

import hashlib
import hmac
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.errors import Finding, PermedError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.storage import checkpoints
from permed_compute.storage.checkpoints import Keep
from permed_compute.workloads.port import DonePart, Map, Next, Part, Result


class LocalContext:
    """Everything stays below `root`: `out/`, `scratch/`, `checkpoint-000001/`. What was logged is kept in lists, dicts.

    metrics: (name, value, step); stages: seconds by name, summed; digests: how often each file was asked for.
    `stop` makes `should_stop()` answer True.
    """

    rank = 0
    world = 1

    def __init__(
        self, root: Path, spec: JobSpec, *, device: str = "cpu", threads: int = 2, seed: int | None = None
    ) -> None:
        self.spec = spec
        self.device = device
        self.threads = threads
        self.seed = spec.seed if seed is None else seed
        self.root = root
        self.out = root / "out"
        self.scratch = root / "scratch"
        for folder in (self.out, self.scratch):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.logs: list[str] = []
        self.findings: list[Finding] = []
        self.metrics: list[tuple[str, float, int | None]] = []
        self.stages: dict[str, float] = {}
        self.far = (0, 0)
        self.missed: Mapping[str, str] = {}
        self.stop = False

    def digest(self, path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def pseudonym(self, identifier: str) -> str:
        return hmac.new(b"local-context", identifier.encode(), "sha256").hexdigest()[:32]

    def input(self, name: str = "input") -> Path:
        for ref in self.spec.inputs:
            if ref.name == name:
                return Path(ref.path)
        raise WorkloadError(f"The job has no input named {name!r}.", remedy="Name it under `inputs:`.")

    def log_metric(self, name: str, value: float, step: int | None = None) -> None:
        self.metrics.append((name, value, step))

    def progress(self, done: int, total: int) -> None:
        self.far = (done, total)

    def log_artifact(self, path: Path, name: str = "") -> None:
        target = self.out / (name or path.name)
        if path != target:
            shutil.copyfile(path, target)

    def log(self, sentence: str) -> None:
        self.logs.append(sentence)

    def finding(self, finding: Finding) -> None:
        self.findings.append(finding)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begun

    def checkpoint(self, save: Callable[[Path], None], *, keep: Keep | None = None, beside: bool = False) -> None:
        known = checkpoints.names(self.root)
        number = 1 + (checkpoints.number_of(known[0]) if known else 0)
        checkpoints.save(checkpoints.Part(self.root, number, 1, 0, 1), save, fence=lambda: None, keep=keep)

    def restore(self) -> Path | None:
        return checkpoints.newest(self.root)

    def agree(self, mine: bool) -> bool:
        return mine

    def should_stop(self) -> bool:
        return self.stop

    def dask_get(self, *args: Any, **kwargs: Any) -> Any:
        from dask.threaded import get

        return get(*args, **kwargs)


class StopAfter(LocalContext):
    """Asked to stop when it is asked for the `left`-th time: a training preempted at a step of the test's choice."""

    left = 0

    def should_stop(self) -> bool:
        self.left -= 1
        return self.left == 0


@dataclass(frozen=True)
class Outcome:
    """How `run_map` ended: the job's result, its parts, and the error of each that failed, by part name."""

    result: Result
    done: Sequence[DonePart]
    failures: Mapping[str, PermedError]
    context: LocalContext = field(repr=False)
    """Of plan, model and reduce; its `out` holds the job's files."""


def run_map(workload: Map, spec: JobSpec, root: Path, *, threads: int = 2, device: str = "cpu") -> Outcome:
    """Plan, compute and reduce in this process, round after round. `PermedError`s fail their part, others rise."""
    job = LocalContext(root / "job", spec, threads=threads, device=device)
    model = workload.model(spec, job)
    state: Mapping[str, Any] = {}
    while True:
        done: list[DonePart] = []
        failures: dict[str, PermedError] = {}
        for part in workload.plan(spec, state, job):
            ctx = LocalContext(root / part.name, spec, threads=threads, device=device)
            try:
                done.append(_compute(workload, part, model, ctx))
            except PermedError as error:
                failures[part.name] = error
        job.missed = {name: str(error) for name, error in failures.items()}
        ended = workload.reduce(done, state, job)
        if not isinstance(ended, Next):
            return Outcome(ended, done, failures, job)
        state = ended.state


def _compute(workload: Map, part: Part, model: Any, ctx: LocalContext) -> DonePart:
    data = workload.prepare(workload.load(part, ctx), model, ctx)
    result = workload.finish(workload.run(data, model, ctx), ctx)
    return DonePart(part, result.values, ctx.out, result.findings)
