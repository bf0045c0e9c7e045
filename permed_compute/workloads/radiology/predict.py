"""Job `radiology/predict`: what a bundle of `radiology/train-classification` says of each study; a part a study.

`inputs` and most `params` are those of `studies`; beside them:
    threshold    0.5    probability from which a class is called present; the bundle's card says what it was judged at

`predictions.csv` has a row per study and class, `result.json` the same with what was found in the images.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from permed_compute.learning.classification import THRESHOLD
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import bundle, runners, studies
from permed_compute.workloads.radiology.studies import BUNDLE, Study

TABLE = "predictions.csv"
VERSION = "1"
_DIGITS = 6
_PARAMS: studies.Params = {
    **studies.PARAMS,
    "threshold": (THRESHOLD, lambda v: isinstance(v, int | float) and 0 <= v <= 1, "a probability"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    return studies.checked(given, _PARAMS, "radiology/predict")


def checked_bundle(spec: JobSpec, ctx: Context) -> bundle.Checked:
    return bundle.check(ctx.input(BUNDLE), expected=params_of(spec.params)["bundle_digest"], digest_of=ctx.digest)


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """A part per image series, store and NIfTI file of the inputs."""
    params, images = params_of(spec.params), studies.images(spec)
    checked_bundle(spec, ctx)
    return studies.parts(images, {}, params, ctx)


def prepare(study: Study, model: bundle.Runner, ctx: Context) -> Study:
    """The bundle's own preprocessing, while another study is in the network."""
    with ctx.stage("prepare"):
        study.prepared = model.prepare(study.image)
    return study


def run(study: Study, model: bundle.Runner, ctx: Context) -> PartResult:
    """Probabilities by class."""
    volume = study.volume
    try:
        with ctx.stage("infer"):
            found = model.probabilities(study.prepared)
    finally:
        study.prepared = study.image
        study.release()
    values = {
        "probabilities": {name: round(value, _DIGITS) for name, value in found.items()},
        "series": volume.series, "modality": volume.modality, "device": ctx.device, "sealed": model.is_sealed,
        "findings": [finding.code for finding in volume.findings],
    }  # fmt: skip
    return PartResult(values, volume.findings)


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """A table of all studies, and of each class how many are called so."""
    threshold = params_of(ctx.spec.params)["threshold"]
    done = sorted(results, key=lambda item: item.part.name)
    called: dict[str, int] = {}
    with (ctx.out / TABLE).open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("part", "subject", "class", "probability", "called"))
        for item in done:
            for name, value in item.values["probabilities"].items():
                present = value >= threshold
                called[name] = called.get(name, 0) + present
                table.writerow((item.part.name, item.part.subject, name, value, "present" if present else "absent"))
    values = {
        "bundle_digest": checked_bundle(ctx.spec, ctx).digest, "threshold": threshold, "called": called,
        "parts": {item.part.name: dict(item.values) for item in done},
    }  # fmt: skip
    metrics = {"studies": float(len(done)), **{f"called_{name}": float(count) for name, count in called.items()}}
    return Result(values=values, metrics=metrics)


def load_model(spec: JobSpec, ctx: Context) -> bundle.Runner:
    """The bundle, loaded once per worker: here where its digest is allowed, else in a sealed process."""
    return runners.loaded(checked_bundle(spec, ctx), bundle.Options(answers=bundle.PROBABILITIES), ctx)


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return checked_bundle(spec, ctx).digest


WORKLOAD = Map(
    plan=plan, model=load_model, load=studies.load, prepare=prepare, run=run, reduce=reduce,
    model_digest=model_digest, version=VERSION,
)  # fmt: skip
