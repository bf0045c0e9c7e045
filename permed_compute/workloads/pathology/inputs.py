"""Slides of a job: what a part is, how its slide is opened, and how a bad one is quarantined under its digest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from permed_compute.errors import Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.workloads.pathology import source, store
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.port import Context, Part

Check = Callable[[Any], bool]
T = TypeVar("T")


def checked(given: Mapping[str, Any], known: Mapping[str, tuple[Any, Check, str]], workload: str) -> dict[str, Any]:
    """The job's params with defaults. known: name → (default, test, what it must be). Raises `SpecError`."""
    problems = [
        Problem(f"params.{name}", f"is not a parameter of {workload}.", remedy=f"Write one of {', '.join(known)}.")
        for name in given
        if name not in known
    ]
    values = {name: given.get(name, default) for name, (default, _, _) in known.items()}
    for name, (_, test, words) in known.items():
        if not test(values[name]):
            problems.append(Problem(f"params.{name}", f"is {values[name]!r}, not {words}."))
    if problems:
        raise SpecError("params", problems)
    return values


def is_number(value: Any, low: float, high: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


MPP = (None, lambda value: value is None or is_number(value, 1e-3, 1e3), "µm per pixel at level 0, e.g. 0.25")
"""The parameter `mpp` of every job: replaces what the slides say."""


def slides(spec: JobSpec, ctx: Context, params: Mapping[str, Any]) -> list[Part]:
    """One part per slide below the job's inputs; the same bytes twice are one. Raises `WorkloadError` without input."""
    if not spec.inputs:
        raise WorkloadError("The job names no input.", remedy="Write slides or a folder of them under `inputs:`.")
    parts: dict[str, Part] = {}
    with ctx.stage("scan"):
        for ref in spec.inputs:
            for path in store.find_slides(Path(ref.path)):
                digest = store.digest_of(path, ctx.digest)
                name = f"slide-{digest[:16]}"
                parts.setdefault(name, Part(name=name, inputs=(digest,), params=dict(params), sources=(str(path),)))
    ctx.log(f"{len(parts)} slides")
    return list(parts.values())


def open_part(part: Part, ctx: Context, mpp: float | None) -> Any:
    """The part's slide. `RefusedInput` says which by digest; `WorkloadError` where the file has changed."""
    path = Path(part.sources[0])
    with ctx.stage("open"):
        if store.digest_of(path, ctx.digest) != part.inputs[0]:
            raise WorkloadError(
                "The slide of this part is not the one that was planned.", remedy="Submit the job again: it plans anew."
            )
        return named(part, lambda: source.open_slide(path, mpp=mpp))


class Readers:
    """The last few slides' readers of this process: blocks of one slide follow one another."""

    def __init__(self, most: int = 3) -> None:
        self._most, self._lock = most, Lock()
        self._open: OrderedDict[tuple[str, str, int, float | None], Reader] = OrderedDict()

    def get(self, part: Part, ctx: Context) -> Reader:
        key = part.sources[0], part.inputs[0], ctx.threads, part.params["mpp"]
        with self._lock:
            if key not in self._open:
                slide = open_part(part, ctx, part.params["mpp"])
                self._open[key] = Reader(slide, threads=ctx.threads)
                while len(self._open) > self._most:
                    self._open.popitem(last=False)  # closed when the block that may still read it lets go
            self._open.move_to_end(key)
            return self._open[key]


READERS = Readers()


def named(part: Part, work: Callable[[], T]) -> T:
    """`work()`, where a refusal is about this part's slide."""
    try:
        return work()
    except RefusedInput as error:
        raise RefusedInput(replace(error.finding, about=part.inputs[0]), remedy=error.remedy) from None
