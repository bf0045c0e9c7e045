"""Job `radiology/sweep`: hyper-parameters of a segmentation training, tried in rounds; Optuna proposes, we compute.

`inputs`: `dataset`, as for `radiology/train-segmentation`.

`params` of the job:
    train        {}      params of `radiology/train-segmentation` that all trials share
    space        needed  {learning_rate: {low: 0.0001, high: 0.01, log: true}, patch: {choices: [32, 48]}}
    rounds       4       the next round is proposed by what all rounds before it gave
    per_round    4       trials at a time

A trial is a part: one worker, without checkpoints, lost and tried again as a whole; what is done is never done again.
All trials have the same split. They are compared by the validation scans' mean Dice; no test scan is segmented, so that
the training that follows can still be judged by them. The same seed and data propose the same trials.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from permed_compute.errors import Finding, NotFoundError, Problem, SpecError, WorkloadError
from permed_compute.learning.alone import alone
from permed_compute.paths import replacing, write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result
from permed_compute.workloads.radiology import splits, supervised, train

if TYPE_CHECKING:
    import optuna

VERSION = "1"
TRIALS, BEST = "trials.tsv", "best.json"
_PARAMS: dict[str, Any] = {"train": {}, "space": {}, "rounds": 4, "per_round": 4}
_SPLIT = frozenset({"validation", "test", "split_by", "hold_out", "fold", "folds"})


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [Problem(f"params.{name}", f"is none of {list(_PARAMS)}.") for name in given if name not in _PARAMS]
    values = {**_PARAMS, **given}
    space = values["space"]
    problems += [
        Problem(f"params.{name}", f"cannot be {values[name]!r}.")
        for name in ("rounds", "per_round")
        if not isinstance(values[name], int) or isinstance(values[name], bool) or values[name] < 1
    ]
    if not isinstance(space, Mapping) or not space:
        problems.append(Problem("params.space", "says nothing to try.", remedy="Write {learning_rate: {low, high}}."))
    else:
        problems += [found for name in space if (found := _wrong(str(name), space[name])) is not None]
    if problems:
        raise SpecError("params", problems)
    train.params_of(values["train"])
    return values


def _wrong(name: str, axis: Any) -> Problem | None:
    where = f"params.space.{name}"
    if name not in train.PARAMS or name in _SPLIT:
        return Problem(where, "is no param of the training that may differ between trials.")
    if not isinstance(axis, Mapping):
        return Problem(where, "is neither {low, high} nor {choices}.")
    if set(axis) == {"choices"} and isinstance(axis["choices"], list) and axis["choices"]:
        return None
    ends: list[Any] = [axis.get("low"), axis.get("high")]
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends)
    if not numbers or set(axis) - {"low", "high", "log"} or not ends[0] < ends[1] or (axis.get("log") and ends[0] <= 0):
        return Problem(where, "is neither {low, high, log} in this order of size nor {choices}.")
    return None


# ------------------------------------------------------------------------------------------------ what is tried


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """The trials of a round. Raises `NotFoundError` where Optuna is not installed."""
    params, told = params_of(spec.params), state.get("trials", [])
    index = ctx.input(supervised.DATASET)
    digests = sorted(digest for scan in splits.scans(index, ctx) for digest in scan.digests)
    proposed = propose(params["space"], told, params["per_round"], spec.seed)
    return [
        Part(
            f"trial-{len(told) + number:03}", (ctx.digest(index), *digests),
            {"train": {**params["train"], **trial}, "trial": trial, "round": len(told)}, (str(index),),
        )
        for number, trial in enumerate(proposed)
    ]  # fmt: skip


def propose(space: Mapping[str, Any], told: Sequence[Mapping[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """The next trials, after those that were told: {trial, score}, score null where it failed."""
    try:
        import optuna
    except ImportError:
        raise NotFoundError("Optuna is not installed.", remedy="pip install 'permed-compute[sweep]'") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.TPESampler(seed=(seed + len(told)) % 2**32, constant_liar=True)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    axes = {name: _distribution(space[name]) for name in sorted(space)}
    for row in told:
        failed = row["score"] is None
        study.add_trial(
            optuna.trial.create_trial(
                params={name: _index(space[name], row["trial"][name]) for name in axes}, distributions=axes,
                value=None if failed else row["score"],
                state=optuna.trial.TrialState.FAIL if failed else optuna.trial.TrialState.COMPLETE,
            )
        )  # fmt: skip
    asked = [study.ask(axes).params for _ in range(count)]
    return [{name: _value(space[name], one[name]) for name in axes} for one in asked]


def _distribution(axis: Mapping[str, Any]) -> optuna.distributions.BaseDistribution:
    import optuna

    if "choices" in axis:  # by number: a choice may be a list or a mapping, which Optuna does not take
        return optuna.distributions.CategoricalDistribution(list(range(len(axis["choices"]))))
    low, high, log = axis["low"], axis["high"], bool(axis.get("log"))
    if isinstance(low, int) and isinstance(high, int):
        return optuna.distributions.IntDistribution(low, high, log=log)
    return optuna.distributions.FloatDistribution(float(low), float(high), log=log)


def _index(axis: Mapping[str, Any], value: Any) -> Any:
    return axis["choices"].index(value) if "choices" in axis else value


def _value(axis: Mapping[str, Any], proposed: Any) -> Any:
    return axis["choices"][proposed] if "choices" in axis else proposed


# ------------------------------------------------------------------------------------------------ one trial


def run(part: Part, model: None, ctx: Context) -> PartResult:
    """The best validation score of a training. One that cannot be made so is a finding and no score."""
    try:
        params = train.params_of({**part.params["train"], "pictures": 0})
        made = train.fitted(params, alone(ctx, ctx.spec.seed))
    except (SpecError, WorkloadError) as error:
        finding = Finding("TRIAL_IMPOSSIBLE", f"It cannot be trained so: {error.message}", "note", part.name)
        return PartResult({"trial": part.params["trial"], "score": None}, [finding])
    if made is None:
        raise WorkloadError("The trial was stopped.", remedy="`permed resume` tries it again.")
    best = made.judge.best
    score = float(best.score) if best.weights and math.isfinite(best.score) else None
    return PartResult({
        "trial": part.params["trial"], "score": score, "epoch": best.epoch + 1, "epochs": len(made.done.history),
    })  # fmt: skip


# ------------------------------------------------------------------------------------------------ all of them


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    """The next round, or the table and the params of the best training."""
    params = params_of(ctx.spec.params)
    done = sorted(results, key=lambda item: item.part.name)
    told = [*state.get("trials", []), *({name: item.values[name] for name in ("trial", "score")} for item in done)]
    tried = state.get("rounds", 0) + 1
    if tried < params["rounds"]:
        return Next({"trials": told, "rounds": tried})
    scored = [row for row in told if row["score"] is not None]
    if not scored:
        raise WorkloadError("No trial has a score.", remedy="See the findings: is there a validation scan?")
    best = max(scored, key=lambda row: row["score"])
    names = sorted(params["space"])
    with replacing(ctx.out / TRIALS) as new, new.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(("trial", "score", *names))
        for number, row in enumerate(told):
            table.writerow((number, row["score"], *(row["trial"][name] for name in names)))
    write_json(ctx.out / BEST, {"params": {**params["train"], **best["trial"]}, "score": best["score"]})
    values = {"trials": told, "best": best}
    return Result(values, {"best_dice": best["score"], "trials": float(len(told))})


WORKLOAD = Map(plan=plan, run=run, reduce=reduce, version=VERSION)
