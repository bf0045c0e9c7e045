"""Job `radiology/segment`: any MONAI bundle over DICOM, volume stores and NIfTI; of each volume labels, a SEG, a table.

Stores and NIfTI have no DICOM images that a SEG could refer to: their labels are NIfTI only.

`inputs` and most `params` are those of `studies`; beside them:
    segments           []             of label 1, 2 …: {label: Spleen, code: [78961009, SCT, Spleen]}; [] writes no SEG
    weights            [models/model.pt]    several are an ensemble: the mean of their logits
    flips              []             test-time augmentation: axes of each flip, e.g. [[0], [1], [0, 1]]
    variant            eager          jit, compile, bf16, or auto: the fastest within `tolerance`, measured once per
                                      model and type of machine (`precision.py`); part of every key
    tolerance          0.0001         share of labels that may differ from eager float32's
    keep_memory        512MiB         of logits; above it they lie in the worker's scratch folder

With `auto` the first round is one part, the measurement; the ledger keeps it, so that it is made once.
"""

from __future__ import annotations

import csv
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from permed_compute.errors import Finding, WorkloadError
from permed_compute.spec import JobSpec, parse_memory
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result
from permed_compute.workloads.radiology import bundle, precision, runners, studies
from permed_compute.workloads.radiology.studies import BUNDLE, Study

SEG, NIFTI, OVERLAY = "segmentation.dcm", "labels.nii.gz", "overlay.png"
VERSION = "2"
_CALIBRATE = "calibrate"


# ------------------------------------------------------------------------------------------------ params


def _is_segment(row: Any) -> bool:
    good = isinstance(row, Mapping) and {*row} == {"label", "code"} and isinstance(row["code"], list | tuple)
    return bool(good and len(row["code"]) == 3 and isinstance(row["label"], str) and row["label"])


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_flip(row: Any) -> bool:
    return isinstance(row, list | tuple) and set(row) <= {0, 1, 2} and len(set(row)) == len(row)


_CHOICES = (*precision.VARIANTS, "auto")
_PARAMS: studies.Params = {
    **studies.PARAMS,
    "segments": ([], studies.listed(_is_segment), "a list of {label, code: [value, scheme, meaning]}"),
    "weights": ([bundle.WEIGHTS], lambda v: studies.listed(_is_text)(v) and bool(v), "a list of files"),
    "flips": ([], studies.listed(_is_flip), "a list of lists of axes 0, 1, 2"),
    "variant": (precision.EAGER, lambda v: v in _CHOICES, f"one of {', '.join(_CHOICES)}"),
    "tolerance": (precision.TOLERANCE, lambda v: isinstance(v, int | float) and 0 <= v < 1, "a share below 1"),
    "keep_memory": ("512MiB", studies.is_memory, "an amount of memory, e.g. 512MiB"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    return studies.checked(given, _PARAMS, "radiology/segment")


def checked_bundle(spec: JobSpec, ctx: Context) -> bundle.Checked:
    params = params_of(spec.params)
    return bundle.check(ctx.input(BUNDLE), params["weights"], params["bundle_digest"], ctx.digest)


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """With `auto` first the measurement; then a part per image series, store and NIfTI file of the inputs."""
    params, images = params_of(spec.params), studies.images(spec)
    checked = checked_bundle(spec, ctx)
    common = {
        "weights": list(params["weights"]), "flips": [list(flip) for flip in params["flips"]],
        "tolerance": params["tolerance"],
    }  # fmt: skip
    if params["variant"] == "auto" and not state:
        device = {"machine": precision.machine(ctx.device, ctx.threads), "flavors": list(spec.resources.flavors)}
        return [Part(name=_CALIBRATE, inputs=(checked.digest,), params={"step": _CALIBRATE, **common, **device})]
    chosen = state.get("variant") or {"variant": params["variant"], "machine": ""}
    told = {
        "step": "segment", **common, "variant": chosen["variant"], "machine": chosen["machine"],
        "segments": [dict(row) for row in params["segments"]],
    }  # fmt: skip
    return studies.parts(images, told, params, ctx)


# ------------------------------------------------------------------------------------------------ run


def load(part: Part, ctx: Context) -> Any:
    return part if part.params["step"] == _CALIBRATE else studies.load(part, ctx)


@dataclass(frozen=True, slots=True)
class Answered:
    """A study and its labels, on their way into files."""

    study: Study
    done: bundle.Segmented
    sealed: bool


def prepare(data: Any, model: bundle.Runner, ctx: Context) -> Any:
    """The bundle's own preprocessing, while another study is in the network."""
    if isinstance(data, Study):
        with ctx.stage("prepare"):
            data.prepared = model.prepare(data.image)
    return data


def run(data: Any, model: bundle.Runner, ctx: Context) -> Any:
    """Labels on the source's voxels: a part's `Answered`, or the result of the measurement."""
    if not isinstance(data, Study):
        with ctx.stage("calibrate"):
            return PartResult(dict(model.calibrate(data.params["tolerance"])))
    params, volume = data.part.params, data.volume
    variant = bundle.Variant(params["variant"], params["machine"], params["tolerance"])
    try:
        with ctx.stage("infer"):
            done = model.segment(data.prepared, volume.array.shape, volume.affine_ras, variant)
    except BaseException:
        data.release()
        raise
    finally:
        data.prepared = data.image  # its memory goes before the labels are written
    return Answered(data, done, model.is_sealed)


def finish(done: Any, ctx: Context) -> PartResult:
    """Labels as NIfTI, as SEG where the segments are named, and as a picture, while the next study is computed."""
    if isinstance(done, PartResult):
        return done
    try:
        return _written(done, ctx)
    finally:
        done.study.release()


def _written(answered: Answered, ctx: Context) -> PartResult:
    from permed_compute.workloads.radiology import outputs

    done, volume, params = answered.done, answered.study.volume, answered.study.part.params
    most = int(done.labels.max(initial=0))
    if most > 255:
        raise WorkloadError(f"The bundle gave label {most}; results hold 255.", remedy="Split the bundle's classes.")
    segments = tuple(outputs.Segment(row["label"], tuple(row["code"])) for row in params["segments"])
    with ctx.stage("write"):
        outputs.write_nifti(done.labels, volume, ctx.out / NIFTI)
        outputs.write_overlay(done.labels > 0, volume, ctx.out / OVERLAY)
        if segments and volume.slices:
            outputs.write_seg(done.labels, volume, ctx.out / SEG, _algorithm(segments, params, ctx), ctx.spec.purpose)
    counts = np.bincount(done.labels.reshape(-1))
    values = {
        "volumes_ml": {str(k): round(int(n) * volume.voxel_ml, 3) for k, n in enumerate(counts) if k and n},
        "shape": [int(length) for length in volume.array.shape],
        "spacing_mm": [round(length, 6) for length in volume.spacing],
        "series": volume.series, "modality": volume.modality, "device": ctx.device, "variant": params["variant"],
        "sealed": answered.sealed, "streamed": done.streamed, "windows": list(done.windows),
        "network_s": round(done.network_s, 4), "findings": [finding.code for finding in volume.findings],
    }  # fmt: skip
    findings = [*volume.findings]
    if segments and not volume.slices:
        sentence = "A SEG refers to DICOM images; this volume is none, and its labels are NIfTI only."
        findings.append(Finding("NO_SEG", sentence, "note", volume.series))
    if done.shrunk:
        sentence = "Memory did not suffice for the bundle's windows; labels are those of smaller ones."
        numbers = {"windows": list(done.windows)}
        findings.append(Finding("WINDOWS_SHRUNK", sentence, "note", volume.series, numbers))
    return PartResult(values, findings)


def _algorithm(segments: tuple[Any, ...], params: Mapping[str, Any], ctx: Context) -> Any:
    from permed_compute.workloads.radiology import outputs

    checked = checked_bundle(ctx.spec, ctx)
    name, version = bundle.title(checked)
    text = f"variant={params['variant']} flips={params['flips']} weights={len(params['weights'])}"
    label = segments[0].label if len(segments) == 1 else name
    return outputs.Algorithm(name, version, checked.digest, text, label[:16], segments)


# ------------------------------------------------------------------------------------------------ reduce and model


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result | Next:
    """After the measurement, the choice; after the series, a table of volumes and the pictures."""
    params = params_of(ctx.spec.params)
    if params["variant"] == "auto" and not state:
        if not results:
            raise WorkloadError(
                "The variants could not be measured.", remedy="Write `variant: eager`; see `permed logs`."
            )
        chosen = dict(results[0].values)
        ctx.log(f"variant {chosen['variant']}: {chosen['seconds']}")
        return Next({"variant": chosen})
    done = sorted(results, key=lambda item: item.part.name)
    with (ctx.out / "volumes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(("part", "label", "name", "volume_ml"))
        names = {str(k): row["label"] for k, row in enumerate(params["segments"], 1)}
        for item in done:
            rows = item.values["volumes_ml"].items()
            table.writerows((item.part.name, label, names.get(label, ""), volume) for label, volume in rows)
    figures = []
    for item in done:
        picture = f"{item.part.name}-{OVERLAY}"
        shutil.copyfile(item.folder / OVERLAY, ctx.out / picture)
        figures.append((picture, f"Outline of all labels ({item.part.name})"))
    values = {
        "bundle_digest": checked_bundle(ctx.spec, ctx).digest, "variant": dict(state.get("variant") or {}),
        "parts": {item.part.name: dict(item.values) for item in done},
    }  # fmt: skip
    metrics = {"series": float(len(done)), "network_s": sum(float(item.values["network_s"]) for item in done)}
    return Result(values=values, metrics=metrics, figures=figures)


def load_model(spec: JobSpec, ctx: Context) -> bundle.Runner:
    """The bundle, loaded once per worker: here where its digest is allowed, else in a sealed process."""
    params = params_of(spec.params)
    flips = tuple(tuple(flip) for flip in params["flips"])
    options = bundle.Options(tuple(params["weights"]), flips, parse_memory(params["keep_memory"]) << 20)
    return runners.loaded(checked_bundle(spec, ctx), options, ctx)


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return checked_bundle(spec, ctx).digest


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, prepare=prepare, run=run, finish=finish, reduce=reduce,
    model_digest=model_digest, version=VERSION,
)  # fmt: skip
