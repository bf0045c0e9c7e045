"""The two shapes of work, and no third. Plain functions over plain data; nothing here knows what runs them.

    map:   plan(spec, state, ctx) -> parts
           model(spec, ctx) -> model           loaded once per worker and kept
           load(part, ctx) -> data             CPU side, prefetched while the previous part runs
           prepare(data, model, ctx) -> data   likewise, where it takes the model to say how
           run(data, model, ctx) -> done       one part at a time
           finish(done, ctx) -> PartResult     CPU side: writes, while the next part runs
           reduce(results, state, ctx) -> Result | Next(state)
    gang:  train(spec, ctx) -> Result          once per rank

A domain's workload is a module-level `Map` or `Gang`. A researcher's own is `module:function`, where the function's
parameters say the shape: `train(spec, ctx)` is a gang, `run(part, ctx)` is a map over the inputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from permed_compute.errors import Finding, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.storage.checkpoints import Keep


@dataclass(frozen=True, slots=True)
class Part:
    """One piece of a map job: seconds to minutes of work, small enough to lose.

    name: stable within the job, unique, without identifiers (e.g. `series-3f9a…`); it names result files.
    inputs: content digests of what is read, in order; together with `params` they make the part's key.
    params: JSON; what the part computes beyond its inputs.
    sources: where the inputs lie now (paths), not part of the key: the same bytes elsewhere are the same part.
    subject: pseudonym of the person (`ctx.pseudonym`), for erasure; '' where the part has none.
    """

    name: str
    inputs: tuple[str, ...] = ()
    params: Mapping[str, Any] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    subject: str = ""


@dataclass(frozen=True, slots=True)
class PartResult:
    """What `run` returns. Files it wrote stand in `ctx.out`; `values` is JSON and goes to `reduce` and the ledger."""

    values: Mapping[str, Any] = field(default_factory=dict)
    findings: Sequence[Finding] = ()


def as_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON keeps them: numbers and arrays of NumPy and torch become Python's. Raises `WorkloadError`."""
    plain: dict[str, Any] = json.loads(json.dumps(dict(values), default=_plain))
    return plain


def _plain(value: Any) -> Any:
    if callable(to_list := getattr(value, "tolist", None)):
        return to_list()
    raise WorkloadError(
        f"A {type(value).__name__} was returned among the values, which are numbers, words, lists and dicts.",
        remedy="Convert it, or write it to a file in ctx.out.",
    )


@dataclass(frozen=True, slots=True)
class DonePart:
    """A finished part as `reduce` sees it: `folder` holds the files that `run` wrote, read-only."""

    part: Part
    values: Mapping[str, Any]
    folder: Path
    findings: Sequence[Finding] = ()
    reused: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """How a job's computation ended. `values` is JSON (metrics, volumes …); files stand in `ctx.out`.

    figures: pictures for the job's page, (file name in `ctx.out`, caption). metrics: scalars for tracking.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    figures: Sequence[tuple[str, str]] = ()
    findings: Sequence[Finding] = ()


@dataclass(frozen=True, slots=True)
class Next:
    """Another round of a map job, with this (JSON) state: PCA, HVG → PCA, null model → GWAS."""

    state: Mapping[str, Any]


class Context(Protocol):
    """What a workload may use of the machine. The worker gives it; workloads never ask where they run."""

    spec: JobSpec
    device: str
    """A torch device: `cpu`, `cuda:0`."""
    rank: int
    world: int
    seed: int
    """Of the job for plan, reduce and gang; of (job, part) for load and run."""
    threads: int
    """CPU threads that this worker may use."""
    scratch: Path
    """Private to this attempt and worker; gone afterwards."""
    out: Path
    """Where files of this part (load, run) or of the job (reduce, train) are written; published by rename."""
    missed: Mapping[str, str]
    """In reduce: the reason of every part of this round that has no result, by the part's name."""

    def digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes, cached by (device, inode, size, mtime)."""
        ...

    def pseudonym(self, identifier: str) -> str:
        """Keyed hash of a person's identifier: the same within this home, meaningless outside."""
        ...

    def input(self, name: str = "input") -> Path:
        """Where the input of that name lies. Raises `WorkloadError`."""
        ...

    def log_metric(self, name: str, value: float, step: int | None = None) -> None: ...

    def progress(self, done: int, total: int) -> None:
        """Gang: how far the training is, in steps. `permed top` says from it how fast it goes and when it ends."""
        ...

    def log_artifact(self, path: Path, name: str = "") -> None:
        """Copy a file into the results (`ctx.out`) and send it to tracking."""
        ...

    def log(self, sentence: str) -> None:
        """A line for `permed logs`; no identifiers."""
        ...

    def finding(self, finding: Finding) -> None:
        """Record a finding of the job (not of one part)."""
        ...

    def stage(self, name: str) -> Any:
        """Context manager that times a stage (`with ctx.stage('read'): …`); wall seconds, by name, in the manifest."""
        ...

    def checkpoint(self, save: Callable[[Path], None], *, keep: Keep | None = None, beside: bool = False) -> None:
        """Gang: `save(folder)` writes this rank's state; published when all ranks have, newest wins. All ranks call it
        equally often. `beside`: in a thread; `save` must then hold a copy of the state. What it raises, the next
        checkpoint or the end of `train` raises."""
        ...

    def restore(self) -> Path | None:
        """Gang: folder of the newest whole checkpoint (`rank-0/`, `rank-1/` …), or None. All ranks call it together."""
        ...

    def agree(self, mine: bool) -> bool:
        """Gang: True where any rank says so. All ranks call it together."""
        ...

    def should_stop(self) -> bool:
        """True once the attempt has been asked to checkpoint and stop. Cheap: at most one file look-up per 0.2 s.

        A part that gives up half-way raises `StoppedError`, and is computed again; what it returns is its result.
        """
        ...

    def dask_get(self, *args: Any, **kwargs: Any) -> Any:
        """The dask scheduler of this executor: `dask.compute(x, scheduler=ctx.dask_get)`."""
        ...


def _no_model(spec: JobSpec, ctx: Context) -> None:
    return None


def _the_part(part: Part, ctx: Context) -> Part:
    return part


def _as_loaded(data: Any, model: Any, ctx: Context) -> Any:
    return data


def _as_run(done: Any, ctx: Context) -> PartResult:
    result: PartResult = done
    return result


def one_part_per_input(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> list[Part]:
    """The default plan: a part per input file, or per array-free job one part where it has no input."""
    parts = []
    for ref in spec.inputs:
        path = Path(ref.path)
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            digest = ctx.digest(file)
            parts.append(Part(name=f"file-{digest[:16]}", inputs=(digest,), sources=(str(file),), params=spec.params))
    unique = {part.name: part for part in parts}
    return list(unique.values()) if spec.inputs else [Part(name="job", params=spec.params)]


def collect(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """The default reduce: every part's values by name."""
    return Result(values={"parts": {done.part.name: dict(done.values) for done in results}})


def _model_digest_none(spec: JobSpec, ctx: Context) -> str:
    return ""


@dataclass(frozen=True)
class Map:
    """A map workload. Only `run` is required; without `finish` it returns the `PartResult`."""

    run: Callable[[Any, Any, Context], Any]
    plan: Callable[[JobSpec, Mapping[str, Any], Context], Iterable[Part]] = one_part_per_input
    model: Callable[[JobSpec, Context], Any] = _no_model
    load: Callable[[Part, Context], Any] = _the_part
    prepare: Callable[[Any, Any, Context], Any] = _as_loaded
    """May run beside another part's `run` with the same model: it reads the model, and changes nothing of it."""
    finish: Callable[[Any, Context], PartResult] = _as_run
    reduce: Callable[[Sequence[DonePart], Mapping[str, Any], Context], Result | Next] = collect
    model_digest: Callable[[JobSpec, Context], str] = _model_digest_none
    """Content digest of the model's weights and code: part of every key, recorded in the manifest."""
    version: str = "1"
    """Raise it when the output changes for the same input: part of every key."""


@dataclass(frozen=True)
class Gang:
    """A gang workload: `train` runs once per rank, all ranks together or none."""

    train: Callable[[JobSpec, Context], Result | None]
    """None: it was asked to stop (`ctx.should_stop`) and has written its checkpoint."""
    version: str = "1"


Workload = Map | Gang
