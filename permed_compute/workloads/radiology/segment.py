"""Job `radiology/segment`: any MONAI bundle over DICOM, volume stores and NIfTI; of each volume labels, a SEG, a table.

`inputs`: the images, and `bundle`, the folder of a MONAI bundle as it was published. Stores and NIfTI have no DICOM
images that a SEG could refer to: their labels are NIfTI only.

`params` of the job:
    bundle_digest      ''             refuse another bundle than this; the job's result names the digest
    modalities         [CT]           series of other modalities are passed over with a finding; NIfTI is of the first
    pet                suv            PT series reach the network in SUVbw, refused where the tags do not allow it;
                                      `stored` keeps activity
    accept_incomplete  false          compute also where the numbering suggests that slices are missing at an end
    segments           []             of label 1, 2 …: {label: Spleen, code: [78961009, SCT, Spleen]}; [] writes no SEG
    weights            [models/model.pt]    several are an ensemble: the mean of their logits
    flips              []             test-time augmentation: axes of each flip, e.g. [[0], [1], [0, 1]]
    variant            eager          jit, compile, bf16, or auto: the fastest within `tolerance`, measured once per
                                      model and type of machine (`precision.py`); part of every key
    tolerance          0.0001         share of labels that may differ from eager float32's
    keep_memory        512MiB         of logits; above it they lie in the worker's scratch folder
    ahead_memory       2GiB           of decoded studies in one worker; the next one waits for it, one always may

With `auto` the first round is one part, the measurement; the ledger keeps it, so that it is made once.
"""

from __future__ import annotations

import csv
import gc
import hashlib
import shutil
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.spec import JobSpec, parse_memory
from permed_compute.workloads.port import Context, DonePart, Map, Next, Part, PartResult, Result
from permed_compute.workloads.radiology import (
    bundle,
    geometry,
    infer,
    nifti,
    pet,
    precision,
    read,
    volume_files,
    volume_store,
)
from permed_compute.workloads.radiology.read import Series, Volume

SEG, NIFTI, OVERLAY = "segmentation.dcm", "labels.nii.gz", "overlay.png"
VERSION = "2"
BUNDLE = "bundle"
_CALIBRATE = "calibrate"
_ADVICE = "Write the modality that the bundle was made for under `params: {modalities: …}`."
_BYTES_PER_VOXEL = 8
"""While a study is decoded: its planes, and the volume made of them."""


# ------------------------------------------------------------------------------------------------ params


def _memory(value: Any) -> bool:
    try:
        return parse_memory(value) >= 0
    except ValueError:
        return False


def _is_segment(row: Any) -> bool:
    good = isinstance(row, Mapping) and {*row} == {"label", "code"} and isinstance(row["code"], list | tuple)
    return bool(good and len(row["code"]) == 3 and isinstance(row["label"], str) and row["label"])


def _is_flip(row: Any) -> bool:
    return isinstance(row, list | tuple) and set(row) <= {0, 1, 2} and len(set(row)) == len(row)


def _listed(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and all(test(row) for row in value)


_CHOICES = (*precision.VARIANTS, "auto")
_PARAMS: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "bundle_digest": ("", lambda v: isinstance(v, str) and len(v) in (0, 64), "a SHA-256"),
    "pet": ("suv", lambda v: v in ("suv", "stored"), "suv or stored"),
    "modalities": (["CT"], lambda v: _listed(read.VOLUME_MODALITIES.__contains__)(v) and bool(v), "modalities"),
    "accept_incomplete": (False, lambda v: isinstance(v, bool), "true or false"),
    "segments": ([], _listed(_is_segment), "a list of {label, code: [value, scheme, meaning]}"),
    "weights": ([bundle.WEIGHTS], lambda v: _listed(lambda n: isinstance(n, str))(v) and bool(v), "a list of files"),
    "flips": ([], _listed(_is_flip), "a list of lists of axes 0, 1, 2"),
    "variant": (precision.EAGER, lambda v: v in _CHOICES, f"one of {', '.join(_CHOICES)}"),
    "tolerance": (precision.TOLERANCE, lambda v: isinstance(v, int | float) and 0 <= v < 1, "a share below 1"),
    "keep_memory": ("512MiB", _memory, "an amount of memory, e.g. 512MiB"),
    "ahead_memory": ("2GiB", _memory, "an amount of memory, e.g. 2GiB"),
}


def params_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """The job's params with defaults. Raises `SpecError` naming every one that is wrong."""
    problems = [
        Problem(f"params.{name}", "is not a parameter of radiology/segment.", remedy=f"Write one of {list(_PARAMS)}.")
        for name in given
        if name not in _PARAMS
    ]
    values = {name: given.get(name, default) for name, (default, _, _) in _PARAMS.items()}
    problems += [
        Problem(f"params.{name}", f"is {values[name]!r}, not {words}.")
        for name, (_, test, words) in _PARAMS.items()
        if not test(values[name])
    ]
    if problems:
        raise SpecError("params", problems)
    return values


def checked_bundle(spec: JobSpec, ctx: Context) -> bundle.Checked:
    params = params_of(spec.params)
    return bundle.check(ctx.input(BUNDLE), params["weights"], params["bundle_digest"], ctx.digest)


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """With `auto` first the measurement; then a part per image series, store and NIfTI file of the inputs."""
    params = params_of(spec.params)
    images = [ref for ref in spec.inputs if ref.name != BUNDLE]
    if not images:
        remedy = "Write a folder of DICOM, stores or NIfTI under `inputs:`, beside `bundle`."
        raise WorkloadError("The job names no images.", remedy=remedy)
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
        "modalities": list(params["modalities"]), "pet": params["pet"],
        "accept_incomplete": params["accept_incomplete"],
        "segments": [dict(row) for row in params["segments"]],
    }  # fmt: skip
    of_series = [
        Part(
            f"series-{series.digest[:16]}", series.inputs, told, series.sources,
            ctx.pseudonym(series.patient) if series.patient else "",
        )
        for series in infer.wanted(images, params["modalities"], ctx, skip=volume_files.is_within)
    ]  # fmt: skip
    files = sorted({file for ref in images for file in volume_files.find(Path(ref.path))})
    of_files = {part.name: part for file in files if (part := _of_file(file, told, ctx)) is not None}
    return [*of_series, *of_files.values()]


def _of_file(path: Path, told: Mapping[str, Any], ctx: Context) -> Part | None:
    """None for what has no image to segment, a store of labels or one that cannot be read: a finding says so."""
    subject = ""
    try:
        if path.is_dir():
            about = volume_store.VolumeStore(path).about
            if about["kind"] != "image":
                sentence = "A store holds labels, no image; passed over."
                ctx.finding(Finding("LABELS_PASSED_OVER", sentence, "note", volume_files.content_digest(path, ctx)))
                return None
            subject = about["subject"]
        digest = volume_files.content_digest(path, ctx)
    except RefusedInput as error:
        ctx.finding(error.finding)
        return None
    except (OSError, ValueError, LookupError, TypeError) as error:  # the other volumes go on
        named = hashlib.sha256(str(path).encode()).hexdigest()
        sentence = f"A store or NIfTI file cannot be opened ({type(error).__name__})."
        ctx.finding(Finding("VOLUME_UNREADABLE", sentence, "refused", named))
        return None
    return Part(f"volume-{digest[:16]}", (digest,), told, (str(path),), subject)


# ------------------------------------------------------------------------------------------------ load


class Budget:
    """Bytes of decoded studies that one process holds at a time; one study always may."""

    def __init__(self) -> None:
        self._held, self._changed = 0, threading.Condition()

    def admit(self, size: int, most: int, stop: Callable[[], bool]) -> None:
        """Wait until `size` more bytes are at most `most`, or nothing is held. Raises `WorkloadError` once stopped."""
        with self._changed:
            while self._held and self._held + size > most:
                if not self._changed.wait(1.0):
                    gc.collect()  # a study that failed may hang in its own traceback
                    if stop():
                        raise WorkloadError("The attempt was stopped while a study waited for memory.")
            self._held += size

    def release(self, size: int) -> None:
        with self._changed:
            self._held -= size
            self._changed.notify_all()


BUDGET = Budget()


@dataclass(eq=False)
class Study:
    """A decoded series on its way to the network. Its bytes are the budget's until it is let go."""

    part: Part
    volume: Volume
    size: int
    image: Path
    """The volume as NIfTI in the worker's scratch folder: what bundles' own loading transforms read."""
    release: Callable[[], Any] = field(init=False)
    prepared: Path | bundle.Prepared = field(init=False)

    def __post_init__(self) -> None:
        self.release = weakref.finalize(self, _let_go, self.size, self.image)
        self.prepared = self.image


def _let_go(size: int, image: Path) -> None:
    image.unlink(missing_ok=True)
    BUDGET.release(size)


def load(part: Part, ctx: Context) -> Any:
    """The part's volume, checked and decoded once there is memory for it, while another one runs."""
    if part.params["step"] == _CALIBRATE:
        return part
    path = Path(part.sources[0])
    series = None if volume_files.is_one(path) else infer.planned(part, ctx)
    size = volume_files.nbytes(path, part.inputs[0]) if series is None else _size(series)
    with ctx.stage("wait for memory"):
        BUDGET.admit(size, parse_memory(params_of(ctx.spec.params)["ahead_memory"]) << 20, ctx.should_stop)
    image = ctx.scratch / f"{part.name}.nii"
    try:
        with ctx.stage("read"):
            volume = _read_file(path, part, ctx) if series is None else _read_series(series, part, ctx)
        with ctx.stage("prepare"):
            write_image(volume, image)
    except BaseException:
        _let_go(size, image)
        raise
    return Study(part, volume, size, image)


def _read_series(series: Series, part: Part, ctx: Context) -> Volume:
    volume = read.assemble(series, ctx.threads)
    infer.refuse_unsuitable(series, volume, part.params["modalities"], part.params["accept_incomplete"], _ADVICE)
    return pet.as_suv(volume)[0] if volume.modality == "PT" and part.params["pet"] == "suv" else volume


def _read_file(path: Path, part: Part, ctx: Context) -> Volume:
    (digest,) = part.inputs
    if volume_files.content_digest(path, ctx) != digest:
        raise WorkloadError(
            "The file of this part is not the one that was planned.", remedy="Submit the job again: it plans anew."
        )
    volume = volume_files.read(path, ctx)
    if not path.is_dir():
        return nifti.with_modality(volume, part.params["modalities"][0])
    if volume.modality and volume.modality not in part.params["modalities"]:
        sentence = f"The store is {volume.modality}; the job asks for {', '.join(part.params['modalities'])}."
        geometry.refuse("MODALITY_UNSUITABLE", sentence, digest, _ADVICE)
    unit = volume_store.VolumeStore(path).about["unit"]
    if volume.modality == "PT" and part.params["pet"] == "suv" and unit != pet.UNIT:
        advice = "Convert it again with `pet: suv`, or write `params: {pet: stored}` for this job."
        geometry.refuse("PET_UNITS", f"The store is in {unit or 'no unit'}, not in {pet.UNIT}.", digest, advice)
    return volume


def _size(series: Series) -> int:
    return sum(item.rows * item.columns for item in series.slices) * _BYTES_PER_VOXEL


def write_image(volume: Volume, path: Path) -> None:
    """Pixels and affine only, uncompressed: nothing that names a person."""
    import nibabel

    image: Any = nibabel.Nifti1Image(np.asfortranarray(volume.array), volume.affine_ras)  # type: ignore[no-untyped-call]
    image.to_filename(path)


# ------------------------------------------------------------------------------------------------ run


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
    with ctx.stage("load model"):
        return bundle.open_bundle(
            checked_bundle(spec, ctx), options, device=ctx.device, threads=ctx.threads, scratch=ctx.scratch
        )


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return checked_bundle(spec, ctx).digest


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, prepare=prepare, run=run, finish=finish, reduce=reduce,
    model_digest=model_digest, version=VERSION,
)  # fmt: skip
