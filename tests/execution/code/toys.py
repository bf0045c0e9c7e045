"""Toy workloads of both shapes for `ExecutorConformance`; every executor runs the same ones through `spec.code`."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from permed_compute import Map, Part, PartResult, Result
from permed_compute.errors import Finding, RefusedInput, StoppedError
from permed_compute.workloads.port import Context, DonePart, Next


def plan(spec: Any, state: Mapping[str, Any], ctx: Context) -> list[Part]:
    return [Part(f"n-{n}", inputs=(str(n),), params={"n": n}) for n in range(spec.params["count"])]


def _may_go(ctx: Context) -> bool:
    return (Path(ctx.spec.params["tally"]) / "go").exists()


def _among_the_first(count: int, ctx: Context) -> bool:
    for place in range(count):
        with contextlib.suppress(FileExistsError):
            (Path(ctx.spec.params["tally"]) / f"first-{ctx.spec.name}-{place}").touch(exist_ok=False)
            return True
    return False


def run(part: Part, model: Any, ctx: Context) -> PartResult:
    """Square a number; `params` say which numbers are bad, refused, poisoned, slow, flaky or hungry, and how many go
    on (`gated`) before the others wait for the test's word (`Toys.go`)."""
    n, params = part.params["n"], ctx.spec.params
    if "tally" in params:
        (Path(params["tally"]) / f"{n}-{os.getpid()}-{time.time_ns()}").touch()
    if n in params.get("bad", ()):
        raise ValueError("as the test asked")
    if n in params.get("refused", ()):
        raise RefusedInput(Finding("ODD", f"{n} is refused", "refused", numbers={"n": n}))
    if n in params.get("quits", ()):
        sys.exit("as a script would")
    if n in params.get("poison", ()):
        os._exit(7)
    if n in params.get("flaky", ()) and len(list(Path(params["tally"]).glob(f"{n}-*"))) == 1:
        raise OSError("only the first time")
    if n in params.get("hungry", ()):
        held = bytearray(params["mib"] * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        time.sleep(30)
    if params.get("say"):
        print(f"the number is {n}", flush=True)
    time.sleep(params.get("seconds", 0))
    if "gated" in params and not _among_the_first(params["gated"], ctx):
        while not _may_go(ctx) and not ctx.should_stop():
            time.sleep(0.02)
    with ctx.stage("square"):
        (ctx.out / "square.txt").write_text(str(n * n))
    ctx.log_metric("square", n * n, step=n)
    return PartResult(values={"square": n * n, "seed": ctx.seed, "pid": os.getpid()})


def total(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    squares = [done.values["square"] for done in results]
    (ctx.out / "total.txt").write_text(str(sum(squares)))
    return Result(values={"total": sum(squares)}, metrics={"total": float(sum(squares))})


squares = Map(plan=plan, run=run, reduce=total)


def _until_asked(part: Part, model: Any, ctx: Context) -> PartResult:
    """Goes on until the test's word; gives up where it is to stop, which is right, or for no reason, which is wrong."""
    (Path(ctx.spec.params["tally"]) / f"{part.params['n']}-{time.time_ns()}").touch()
    while not _may_go(ctx):
        if ctx.should_stop() or ctx.spec.params.get("unasked"):
            raise StoppedError("Half-way.")
        time.sleep(0.02)
    return PartResult(values={"square": part.params["n"] ** 2})


patient = Map(plan=plan, run=_until_asked, reduce=total)


def _named(part: Part, model: str, ctx: Context) -> tuple[int, str]:
    return part.params["n"], model


def _alone(data: tuple[int, str], model: str, ctx: Context) -> tuple[int, str]:
    tally = Path(ctx.spec.params["tally"])
    (tally / "running").touch(exist_ok=False)  # fails where another part runs
    (tally / f"begun-{data[0]}").touch()
    time.sleep(0.05)
    (tally / "running").unlink()
    return data


def _when_another_runs(done: tuple[int, str], ctx: Context) -> PartResult:
    others = lambda: [*Path(ctx.spec.params["tally"]).glob("begun-*")]  # noqa: E731
    deadline = time.monotonic() + 30
    while len(others()) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    return PartResult({"square": done[0] ** 2, "model": done[1], "others": len(others())})


stages = Map(
    plan=plan, model=lambda spec, ctx: "the model", prepare=_named, run=_alone, finish=_when_another_runs, reduce=total
)


def _add_up(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    so_far = state.get("sum", 0) + sum(done.values["n"] for done in results)
    rounds = state.get("rounds", 0) + 1
    if rounds < ctx.spec.params["rounds"]:
        return Next({"sum": so_far, "rounds": rounds})
    return Result(values={"sum": so_far, "rounds": rounds})


def _of_round(spec: Any, state: Mapping[str, Any], ctx: Context) -> list[Part]:
    number = state.get("rounds", 0)
    return [Part(f"r-{number}-{n}", inputs=(str(number), str(n)), params={"n": n}) for n in range(2)]


rounds = Map(plan=_of_round, run=lambda part, model, ctx: PartResult(dict(part.params)), reduce=_add_up)


# ------------------------------------------------------------------------------------------- greed


def _burn(seconds: float) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        sum(range(1000))


def _greedy(part: Part, model: Any, ctx: Context) -> PartResult:
    """Start 8 busy processes, and report their affinities and what they burnt together."""
    burners = [multiprocessing.get_context("fork").Process(target=_burn, args=(4.0,)) for _ in range(8)]
    began, before = time.monotonic(), os.times()
    for burner in burners:
        burner.start()
    time.sleep(1.5)
    cores = sorted({core for burner in burners for core in os.sched_getaffinity(burner.pid or 0)})
    for burner in burners:
        burner.join()
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return PartResult(values={"cores": cores, "cpu_s": cpu, "wall_s": time.monotonic() - began})


greedy = Map(run=_greedy)

_ORPHAN = "import os, time; os.setsid(); [os._exit(0) for _ in range(1) if os.fork()]; time.sleep(600)"


def _detached(part: Part, model: Any, ctx: Context) -> PartResult:
    """Leave two processes behind, one with our environment, one without any; end at the test's word."""
    for environment in (None, {}):
        subprocess.run([sys.executable, "-c", _ORPHAN, "permed-orphan", str(ctx.scratch)], env=environment, check=True)
    while not _may_go(ctx):
        time.sleep(0.02)
    return PartResult()


detached = Map(run=_detached)


def _elsewhere(part: Part, model: Any, ctx: Context) -> PartResult:
    """Schedule work outside the job's group, and report to which core it comes to be held, and what it was told."""
    import ray

    @ray.remote(num_cpus=0, scheduling_strategy="DEFAULT")
    def outside(mib: int) -> dict[str, Any]:
        held = bytearray(mib * 2**20)
        held[::4096] = b"x" * len(held[::4096])
        deadline = time.monotonic() + 30
        while (mib or len(os.sched_getaffinity(0)) > 1) and time.monotonic() < deadline:
            time.sleep(0.1)
        return {"cores": sorted(os.sched_getaffinity(0)), "mark": os.environ.get("PERMED_ATTEMPT", "")}

    return PartResult(values=ray.get(outside.remote(ctx.spec.params.get("mib", 0))))


elsewhere = Map(run=_elsewhere)


def _glutton(spec: Any, state: Mapping[str, Any], ctx: Context) -> list[Part]:
    """A plan that holds more memory than the job asked for."""
    held = bytearray(spec.params["mib"] * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    time.sleep(30)
    return [Part("never")]


glutton = Map(plan=_glutton, run=lambda part, model, ctx: PartResult())


def _load_bulk(part: Part, ctx: Context) -> bytearray:
    """A part's data: `mib` MiB, every page written."""
    held = bytearray(ctx.spec.params["mib"] * 2**20)
    held[::4096] = b"x" * len(held[::4096])
    return held


def _weigh(held: bytearray, model: Any, ctx: Context) -> PartResult:
    time.sleep(0.02)
    return PartResult(values={"square": len(held) // 2**20})


bulky = Map(plan=plan, load=_load_bulk, run=_weigh, reduce=total)


def _graph(part: Part, model: Any, ctx: Context) -> PartResult:
    """Add up squares in a dask graph, and report in how many processes they were made."""
    import dask

    squares = [dask.delayed(lambda n: (n * n, os.getpid()))(n) for n in range(8)]
    made = dask.compute(*squares, scheduler=ctx.dask_get)
    return PartResult(values={"total": sum(square for square, _ in made), "pids": sorted({pid for _, pid in made})})


graph = Map(run=_graph)


# ------------------------------------------------------------------------------------------- gang


def train(spec: Any, ctx: Context) -> Result | None:
    """Fit a line by SGD with averaged gradients; the loss of every step is the result. Checkpoints as asked; after
    as many steps as `hold` says it waits until it is to stop."""
    import torch
    import torch.distributed as dist

    torch.manual_seed(ctx.seed)
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses: list[float] = []
    found = ctx.restore()
    if found is not None:
        saved = torch.load(found / f"rank-{ctx.rank}" / "state.pt", weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        losses = saved["losses"]

    def save(folder: Path) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses}
        torch.save(state, folder / "state.pt")

    for step in range(len(losses), spec.params["steps"]):
        random.seed(f"{ctx.seed}-{step}-{ctx.rank}")
        x = torch.tensor([[random.random() for _ in range(4)] for _ in range(8)])
        loss = ((model(x) - x.sum(1, keepdim=True)) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():
            if ctx.world > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= ctx.world
        optimizer.step()
        losses.append(float(loss.detach()))
        time.sleep(spec.params.get("seconds", 0))
        if len(losses) % spec.params.get("every", 10**9) == 0:
            ctx.checkpoint(save)
        while len(losses) == spec.params.get("hold") and not ctx.should_stop():
            time.sleep(0.02)
        if ctx.should_stop():
            ctx.checkpoint(save)
            return None
    if ctx.rank == 0:
        ctx.log_metric("loss", losses[-1], step=len(losses))
    digest = float(sum(parameter.double().sum() for parameter in model.parameters()))
    return Result(values={"losses": losses, "weights": digest, "world": ctx.world})


def lonely(spec: Any, ctx: Context) -> Result | None:
    """Rank 1 dies in the middle."""
    if ctx.rank == 1:
        os._exit(9)
    time.sleep(30)
    return Result()


def _numbers(part: Part, model: Any, ctx: Context) -> PartResult:
    import numpy as np

    return PartResult({"half": np.float32(0.5), "squares": np.arange(3) ** 2})


def _in_rounds(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    import numpy as np

    if not state:
        return Next({"count": np.int64(len(results))})
    values = {"half": np.float32(0.5), "before": state["count"], "squares": results[0].values["squares"]}
    return Result(values, {"loss": np.float32(0.25)})


numbers = Map(plan=plan, run=_numbers, reduce=_in_rounds)


def trained(spec: Any, ctx: Context) -> Result | None:
    import numpy as np

    return Result({"half": np.float32(0.5)}, {"loss": np.float32(0.25)})


def quitter(spec: Any, ctx: Context) -> Result | None:
    """Ends its process as a script would."""
    sys.exit("no config")
