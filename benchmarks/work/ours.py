"""The work as our jobs name it: `ours:BURNING` and `ours:stamped`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burn import burn, stamp

from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result


def _plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> list[Part]:
    """`params.parts` parts of `params.steps` steps; another `params.run` makes them other parts."""
    each = {"steps": spec.params["steps"], "run": spec.params["run"]}
    return [Part(f"part-{number:05d}", params={**each, "number": number}) for number in range(spec.params["parts"])]


def _run(part: Part, model: None, ctx: Context) -> PartResult:
    return PartResult({"value": burn(part.params["steps"], part.params["number"])})


def _sum(done: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    return Result({"sum": sum(part.values["value"] for part in done)})


BURNING = Map(run=_run, plan=_plan, reduce=_sum)


def stamped(part: Part, ctx: Context) -> None:
    """One part that writes to `params.stamp` when it started."""
    stamp(part.params["stamp"])


def meet(spec: JobSpec, ctx: Context) -> Result:
    """A gang that ends once every rank has met the others, and says when (seconds since 1970)."""
    import time

    ctx.agree(True)
    return Result({"met": time.time()})
