"""Jobs `fusion/train-survival` and `fusion/train-classification`: one model over all that is known of each person.

`inputs`: see `people`. A map: a part for each fold of each repetition (that is the cross-validation), and one for each
member of the model, which is trained on everybody. A part that is lost is trained again alone; all of it is found again
where nothing has changed.

`params` of the job:
    time, event        survival: columns of the clinical table: follow-up, and 1 where the event was seen
    label              classification: a column with two classes; the last in the alphabet is the positive one
    family             ''      column of a family's identifier: relatives are never on two sides
    clinical           []      columns of numbers that are a modality `clinical`
    categories, codes  []      columns of words; of codes as COLUMN=SYSTEM (HP, ORPHA, SNOMEDCT, ICD10)
    modalities         []      of those that are there; [] = all
    simulated          []      of these: the page and the card say so
    repeated           refuse  several rows of one person in a modality: refuse, or mean
    head               cox     or discrete, hazards in `bins` bins of time
    folds, repeats     5, 4    of the cross-validation; the model has a member for each repetition
    permutations       5       of each modality, for its importance
    resamples          1000    draws of people for intervals
and those of `learn.How`. Nothing is chosen by the held-out people: epochs are fixed, the rate falls to nothing.

Results: `bundle/`, `fusion.html`, `report.json`, `people.json` (who was in it, by pseudonym, and in which fold).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Problem, SpecError, WorkloadError
from permed_compute.learning.randomness import derive
from permed_compute.paths import write_json
from permed_compute.spec import JobSpec
from permed_compute.workloads.fusion import judge, learn, page, people, publish
from permed_compute.workloads.fusion.judge import FUSION, Answers
from permed_compute.workloads.fusion.learn import BINARY, COX, DISCRETE, How, Member
from permed_compute.workloads.fusion.people import Asked, Cohort, Columns
from permed_compute.workloads.omics.codes import SYSTEMS
from permed_compute.workloads.omics.params import Checked
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "1"
SURVIVAL, CLASSIFICATION = "survival", "classification"
ANSWERS, MEMBER, REPORT = "answers.npz", "member.pt", "report.json"


@dataclass(frozen=True, slots=True)
class Params(How):
    name: str = "fusion"
    time: str = ""
    event: str = ""
    label: str = ""
    family: str = ""
    clinical: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    codes: tuple[str, ...] = ()
    modalities: tuple[str, ...] = ()
    simulated: tuple[str, ...] = ()
    repeated: str = "refuse"
    folds: int = 5
    repeats: int = 4
    permutations: int = 5
    resamples: int = 1000

    @classmethod
    def of(cls, given: Mapping[str, Any], kind: str) -> Params:
        """Raises `SpecError` with everything that is wrong."""
        checked = Checked(f"fusion/train-{kind}", given, cls)
        wanted = ("time", "event") if kind == SURVIVAL else ("label",)
        for name in wanted:
            if not given.get(name):
                checked.problem(name, "is missing.", "Name the column of the clinical table.")
        checked.one_of("head", COX, DISCRETE)
        checked.one_of("repeated", "refuse", "mean")
        for name, low, high in (
            ("folds", 2, 100), ("repeats", 1, 100), ("permutations", 0, 1000), ("resamples", 0, 100_000),
            ("bins", 2, 100), ("components", 1, 4096), ("width", 1, 4096), ("epochs", 1, 100_000), ("batch", 2, 1e9),
            ("dropout", 0, 0.9), ("modality_dropout", 0, 0.9), ("learning_rate", 1e-9, 10), ("weight_decay", 0, 100),
        ):  # fmt: skip
            checked.between(name, low, high)
        for each in given.get("codes") or ():
            if str(each).partition("=")[2] not in SYSTEMS:
                checked.problem("codes", f"holds {each!r}.", f"Write COLUMN=SYSTEM, of {', '.join(SYSTEMS)}.")
        return checked.done()

    def how(self, kind: str) -> How:
        own = {field.name: getattr(self, field.name) for field in fields(How)}
        return How(**own | {"head": self.head if kind == SURVIVAL else BINARY})

    @property
    def columns(self) -> Columns:
        return Columns(self.clinical, self.categories, self.codes)


def cohort_of(spec: JobSpec, ctx: Context, kind: str) -> Cohort:
    """Who is in the job. Raises what `people.cohort` raises."""
    params = Params.of(spec.params, kind)
    asked = Asked(params.time, params.event, "", params.family) if kind == SURVIVAL else Asked(
        label=params.label, family=params.family
    )  # fmt: skip
    with ctx.stage("read"):
        found = people.cohort(spec, ctx, asked, params.columns, only=params.modalities, repeated=params.repeated)
    unknown = sorted(set(params.simulated) - set(found.modalities))
    if unknown:
        raise SpecError("params", [Problem("params.simulated", f"names {unknown[0]!r}, which is no modality.")])
    return found


# ------------------------------------------------------------------------------------------------ plan


def plan(kind: str, spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part for every fold of every repetition, and for every member. What is read is the key, not where it lies."""
    params, cohort = Params.of(spec.params, kind), cohort_of(spec, ctx, kind)
    given = {**asdict(params.how(kind)), "permutations": params.permutations, "folds": params.folds, "seed": spec.seed}
    cohort.sides(derive(spec.seed, "split", 0), 0, params.folds)  # too few people: said now
    parts = [
        Part(f"repetition-{k:02}-fold-{fold:02}", (cohort.digest,), {**given, "repetition": k, "fold": fold})
        for k in range(params.repeats)
        for fold in range(params.folds)
    ]
    return [
        *parts,
        *(Part(f"member-{k:02}", (cohort.digest,), {**given, "repetition": k}) for k in range(params.repeats)),
    ]


def model(kind: str, spec: JobSpec, ctx: Context) -> Cohort:
    """What every part reads, once per worker."""
    return cohort_of(spec, ctx, kind)


# ------------------------------------------------------------------------------------------------ a part


def run(part: Part, cohort: Cohort, ctx: Context) -> PartResult:
    """The answers of a fold's people, or a member."""
    import torch

    how = How(**{field.name: part.params[field.name] for field in fields(How)})
    seed, k = int(part.params["seed"]), int(part.params["repetition"])
    if "fold" not in part.params:
        with ctx.stage("train"):
            made = learn.learn(
                cohort, np.arange(len(cohort.people)), list(cohort.modalities), how, derive(seed, "member", k), ctx
            )
        torch.save(made.state(), ctx.out / MEMBER)
        return PartResult({"people": len(cohort.people)})
    fold, folds = int(part.params["fold"]), int(part.params["folds"])
    train, held = cohort.sides(derive(seed, "split", k), fold, folds)
    own = derive(seed, "fold", k, fold)
    found = fold_answers(cohort, train, held, how, own, int(part.params["permutations"]), ctx)
    answers: Any = found | {"rows": held}
    np.savez(ctx.out / ANSWERS, **answers)
    return PartResult({"trained on": len(train), "held out": len(held)})


def fold_answers(
    cohort: Cohort, train: np.ndarray, held: np.ndarray, how: How, seed: int, permutations: int, ctx: Context
) -> dict[str, np.ndarray]:
    """Of the held-out people: `score VIEW` (people,) and `curve VIEW` (people, times), NaN where there is none."""
    names, times = list(cohort.modalities), judge.times_of(cohort)
    values, mask = {name: cohort.values[name][held] for name in names}, cohort.mask[held]
    found: dict[str, np.ndarray] = {}

    def keep(view: str, member: Member, own: Mapping[str, np.ndarray], there: np.ndarray) -> None:
        some = there.any(axis=1)
        score = np.full(len(held), np.nan)
        curve = np.full((len(held), len(times)), np.nan)
        if some.any():
            told = member.answer({name: rows[some] for name, rows in own.items()}, there[some], times)
            score[some] = told.score
            if told.curve is not None:
                curve[some] = told.curve
        found[f"score {view}"] = score
        if len(times) and not view.startswith("permuted"):
            found[f"curve {view}"] = curve

    with ctx.stage("train"):
        whole = learn.learn(cohort, train, names, how, derive(seed, FUSION), ctx)
    keep(FUSION, whole, values, mask)
    if len(names) == 1:
        return found
    chance = np.random.default_rng(derive(seed, "permutations"))
    for k, name in enumerate(names):
        keep(f"without {name}", whole, values, mask & (np.arange(len(names)) != k))
        has = np.flatnonzero(mask[:, k])
        for turn in range(permutations):
            mixed = values[name].copy()
            mixed[has] = mixed[chance.permutation(has)]
            keep(f"permuted {name} {turn}", whole, {**values, name: mixed}, mask)
        if _teaches(cohort, train[cohort.mask[train, k]]):
            with ctx.stage("train alone"):
                alone = learn.learn(cohort, train, [name], how, derive(seed, "alone", name), ctx)
            keep(f"alone {name}", alone, values, mask[:, [k]])
    return found


def _teaches(cohort: Cohort, rows: np.ndarray) -> bool:
    """Whether these people are enough, and ended differently."""
    if len(rows) < judge.FEW:
        return False
    if cohort.outcomes is not None:
        return bool(cohort.outcomes.event[rows].any())
    return len({cohort.labels[row] for row in rows}) == 2


# ------------------------------------------------------------------------------------------------ all of them


def reduce(kind: str, results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """Figures, page, bundle, and who was in it. Raises `WorkloadError` where a part has no result."""
    params, cohort = Params.of(ctx.spec.params, kind), cohort_of(ctx.spec, ctx, kind)
    done = sorted(results, key=lambda item: item.part.name)
    missing = params.repeats * (params.folds + 1) - len(done)
    if missing:
        raise WorkloadError(f"{missing} trainings have no result.", remedy="`permed resume` trains those again.")
    with ctx.stage("judge"):
        answers, folds = _gathered([item for item in done if "fold" in item.part.params], cohort, params.repeats)
        report = judge.report(cohort, answers, seed=ctx.spec.seed, resamples=params.resamples)
    report |= _said(params, cohort, kind, ctx.spec.seed)
    members = [_member(item.folder) for item in done if "fold" not in item.part.params]
    bundle = publish.write(ctx.out / publish.BUNDLE, publish.Told(kind, params, cohort, report, members))
    earlier = people.in_earlier(ctx.spec, cohort.withdrawn)
    report |= {"earlier": earlier, "bundle": bundle}
    write_json(ctx.out / REPORT, report)
    write_json(ctx.out / people.PEOPLE, {
        "bundle": bundle, "people": list(cohort.people), "families": list(cohort.families), "folds": folds.tolist(),
    })  # fmt: skip
    page.write(report, ctx.out / page.PAGE)
    return Result(report, _metrics(report), findings=people.finding_of(earlier))


def _said(params: Params, cohort: Cohort, kind: str, seed: int) -> dict[str, Any]:
    return {
        "name": params.name, "kind": kind, "head": params.how(kind).head, "simulated": sorted(params.simulated),
        "folds": params.folds, "repeats": params.repeats, "seed": seed, "data": cohort.digest,
        "columns": {name: len(table.columns) for name, table in cohort.modalities.items()},
        "unit_of_time": params.time,
    }  # fmt: skip


def _gathered(done: Sequence[DonePart], cohort: Cohort, repeats: int) -> tuple[Answers, np.ndarray]:
    """All folds' answers together, and (repetitions, people) which fold a person was held out in."""
    scores: dict[str, np.ndarray] = {}
    curves: dict[str, np.ndarray] = {}
    times, many = judge.times_of(cohort), len(cohort.people)
    folds = np.full((repeats, many), -1)
    for item in done:
        k = int(item.part.params["repetition"])
        with np.load(item.folder / ANSWERS) as file:
            rows = file["rows"]
            folds[k, rows] = int(item.part.params["fold"])
            for title in file.files:
                what, _, view = title.partition(" ")
                if what == "score":
                    scores.setdefault(view, np.full((repeats, many), np.nan))[k, rows] = file[title]
                elif what == "curve":
                    curves.setdefault(view, np.full((repeats, many, len(times)), np.nan))[k, rows] = file[title]
    return Answers(scores, curves, times), folds


def _member(folder: Path) -> dict[str, Any]:
    import torch

    state: dict[str, Any] = torch.load(folder / MEMBER, map_location="cpu", weights_only=True)
    return state


def _metrics(report: Mapping[str, Any]) -> dict[str, float]:
    rows = [("fusion", report["fusion"]), *((f"alone_{row['name']}", row) for row in report["alone"])]
    return {
        f"{name}_{figure}": told["value"]
        for name, row in rows if row is not None
        for figure, told in row["figures"].items() if told is not None
    }  # fmt: skip


def workload(kind: str) -> Map:
    return Map(
        plan=partial(plan, kind), model=partial(model, kind), run=run, reduce=partial(reduce, kind), version=VERSION
    )


SURVIVAL_WORKLOAD, CLASSIFICATION_WORKLOAD = workload(SURVIVAL), workload(CLASSIFICATION)
