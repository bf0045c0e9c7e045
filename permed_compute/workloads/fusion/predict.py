"""Job `fusion/predict`: a bundle's answer for each person, from whatever is there of them.

`inputs`: `bundle`, and any of the modalities that it was trained with, by their names; a MuData has several; `clinical`
where clinical columns are one of them. One is enough. A person who has none of them gets no answer and a finding.

Results: `predictions.tsv`: IID (pseudonym); of survival `risk` (standard deviations above the training people's mean),
`group` (thirds of held-out risk) and `survival_T` for each time of the bundle; of classification `probability`; then
`weight_NAME`, how much each modality counted, 0 where it is not there.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, SpecError
from permed_compute.paths import replacing
from permed_compute.spec import JobSpec
from permed_compute.workloads.fusion import judge, people, publish
from permed_compute.workloads.fusion.people import BUNDLE, Columns
from permed_compute.workloads.fusion.publish import Bundle
from permed_compute.workloads.fusion.tables import Table
from permed_compute.workloads.omics.read import refuse
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result

VERSION = "1"
PREDICTIONS = "predictions.tsv"
_LEAST_COLUMNS = 0.9


def model_digest(spec: JobSpec, ctx: Context) -> str:
    """Of the bundle: what a validation for care is about."""
    return publish.digest(ctx.input(BUNDLE), ctx.digest)


def load_model(spec: JobSpec, ctx: Context) -> Bundle:
    return publish.read(ctx.input(BUNDLE), ctx.device)


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """One part: a network answers for thousands in the time it takes to read them. Its key is what was read."""
    if spec.params:
        raise SpecError(
            "params", [Problem(f"params.{one}", "is no parameter of fusion/predict.") for one in spec.params]
        )
    found, _ = modalities(spec, load_model(spec, ctx), ctx)
    total = hashlib.sha256("\n".join(sorted(people.withdrawn(spec, ctx))).encode())
    for name, table in found.items():
        total.update("\n".join((name, *table.people)).encode() + table.values.tobytes())
    return [Part("people", (total.hexdigest(),))]


def run(part: Part, bundle: Bundle, ctx: Context) -> PartResult:
    """Writes the table. Raises `RefusedInput` as `tables.read`, and OTHER_COLUMNS where a modality is not the one."""
    with ctx.stage("read"):
        found, findings = modalities(ctx.spec, bundle, ctx)
    gone = people.withdrawn(ctx.spec, ctx)
    names = sorted({one for table in found.values() for one in table.people} - gone)
    values = {
        name: found[name].of(names) if name in found else np.full((len(names), len(columns)), np.nan, np.float32)
        for name, columns in bundle.config["modalities"].items()
    }
    mask = np.stack([np.isfinite(rows).any(axis=1) for rows in values.values()], axis=1)
    known = mask.any(axis=1)
    findings += [
        Finding("NOTHING_KNOWN", f"Of person {names[k][:12]} nothing is known; there is no answer.", "note", names[k])
        for k in np.flatnonzero(~known)
    ]
    if not known.any():
        raise refuse("NOTHING_KNOWN", f"Of {len(names)} people nothing is known.", people=len(names))
    with ctx.stage("answer"):
        header, rows = answers(bundle, {name: own[known] for name, own in values.items()}, mask[known])
    who = [names[k] for k in np.flatnonzero(known)]
    with replacing(ctx.out / PREDICTIONS) as new, new.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, delimiter="\t", lineterminator="\n")
        table.writerow(("IID", *header))
        table.writerows((one, *row) for one, row in zip(who, rows, strict=True))
    counts = dict(zip(values, mask[known].sum(axis=0).tolist(), strict=True))
    return PartResult({"people": len(who), "without answer": int((~known).sum()), "have": counts}, findings)


def modalities(spec: JobSpec, bundle: Bundle, ctx: Context) -> tuple[dict[str, Table], list[Finding]]:
    """The job's tables with the bundle's columns. What the bundle does not know is told and left out."""
    told = bundle.config["clinical"]
    columns = Columns(tuple(told["numbers"]), tuple(told["categories"]), tuple(told["codes"]), told["levels"])
    found, _ = people.modalities(spec, ctx, columns=columns, repeated=bundle.config["repeated"])
    known = bundle.config["modalities"]
    findings = [
        Finding("MODALITY_UNKNOWN", f"The bundle knows no modality {name!r}; it was not used.", "note")
        for name in found if name not in known
    ]  # fmt: skip
    own = {name: aligned(name, table, known[name]) for name, table in found.items() if name in known}
    if not own:
        raise SpecError(
            "job", [Problem("inputs", "no modality of the bundle.", remedy=f"It knows {', '.join(known)}.")]
        )
    for name, table in own.items():
        absent = len(set(known[name]) - set(found[name].columns))
        if absent:
            sentence = f"{absent} of {len(table.columns)} columns of {name} are not there; they count as missing."
            findings.append(Finding("COLUMNS_ABSENT", sentence, "note", "", {"columns": absent}))
    return own, findings


def aligned(name: str, table: Table, columns: Sequence[str]) -> Table:
    """The table with these columns in this order, NaN where it lacks one. Raises `RefusedInput` OTHER_COLUMNS."""
    place = {column: k for k, column in enumerate(table.columns)}
    there = [(to, place[column]) for to, column in enumerate(columns) if column in place]
    if len(there) < _LEAST_COLUMNS * len(columns):
        raise refuse(
            "OTHER_COLUMNS", f"{name} has {len(there)} of the {len(columns)} columns that the bundle was trained with.",
            remedy="Make it as it was made for the training.", there=len(there), columns=len(columns),
        )  # fmt: skip
    values = np.full((len(table.people), len(columns)), np.nan, np.float32)
    to, where = np.array(there).T
    values[:, to] = table.values[:, where]
    return Table(table.people, tuple(columns), values)


def answers(
    bundle: Bundle, values: Mapping[str, np.ndarray], mask: np.ndarray
) -> tuple[list[str], list[list[str]]]:  # fmt: skip
    """Header and rows: the mean of the members' answers."""
    told = [member.answer(values, mask, bundle.times) for member in bundle.members]
    score = np.mean([one.score for one in told], axis=0)
    curves = [one.curve for one in told if one.curve is not None]
    weights = np.mean([one.weights for one in told], axis=0)
    header = ["probability"] if not curves else ["risk", "group", *(f"survival_{time:.4g}" for time in bundle.times)]
    header += [f"weight_{name}" for name in values]
    rows = [[_text(value)] for value in score]
    if curves:
        survival = np.mean(curves, axis=0)
        groups = judge.group_of(score, bundle.config["cuts"])
        rows = [[*row, groups[k], *map(_text, survival[k])] for k, row in enumerate(rows)]
    return header, [[*row, *map(_text, weights[k])] for k, row in enumerate(rows)]


def _text(value: float) -> str:
    return f"{value:.6g}"


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """The table as the job's own file."""
    if not results:
        return Result()
    done = results[0]
    ctx.log_artifact(done.folder / PREDICTIONS)
    simulated = load_model(ctx.spec, ctx).config["simulated"]
    return Result({**done.values, "simulated": simulated}, {"people": float(done.values["people"])})


WORKLOAD = Map(plan=plan, model=load_model, run=run, reduce=reduce, model_digest=model_digest, version=VERSION)
