"""Studies on their way to a bundle: found below a job's inputs, a part each, decoded within a budget of memory.

`inputs`: the images (DICOM, volume stores, NIfTI, or a mixture), and `bundle`, the folder of a MONAI bundle.

`params` of every job that does so:
    bundle_digest      ''             refuse another bundle than this; the job's result names the digest
    modalities         [CT]           series of other modalities are passed over with a finding; NIfTI is of the first
    pet                suv            PT series reach the network in SUVbw, refused where the tags do not allow it;
                                      `stored` keeps activity
    accept_incomplete  false          compute also where the numbering suggests that slices are missing at an end
    ahead_memory       2GiB           of decoded studies in one worker; the next one waits for it, one always may
"""

from __future__ import annotations

import gc
import hashlib
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding, Problem, RefusedInput, SpecError, StoppedError, WorkloadError
from permed_compute.spec import DataRef, JobSpec, parse_memory
from permed_compute.workloads.port import Context, Part
from permed_compute.workloads.radiology import (
    bundle,
    geometry,
    infer,
    nifti,
    pet,
    read,
    volume_files,
    volume_store,
)
from permed_compute.workloads.radiology.read import Series, Volume

BUNDLE = "bundle"
_ADVICE = "Write the modality that the bundle was made for under `params: {modalities: …}`."
_BYTES_PER_VOXEL = 8
"""While a study is decoded: its planes, and the volume made of them."""

Params = Mapping[str, tuple[Any, Callable[[Any], bool], str]]
"""Of each parameter its default, whether a value will do, and what it should be."""


# ------------------------------------------------------------------------------------------------ params


def is_memory(value: Any) -> bool:
    try:
        return parse_memory(value) >= 0
    except ValueError:
        return False


def listed(test: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """The test of a list whose every item passes this one."""
    return lambda value: isinstance(value, list | tuple) and all(test(row) for row in value)


PARAMS: Params = {
    "bundle_digest": ("", lambda v: isinstance(v, str) and len(v) in (0, 64), "a SHA-256"),
    "pet": ("suv", lambda v: v in ("suv", "stored"), "suv or stored"),
    "modalities": (["CT"], lambda v: listed(read.VOLUME_MODALITIES.__contains__)(v) and bool(v), "modalities"),
    "accept_incomplete": (False, lambda v: isinstance(v, bool), "true or false"),
    "ahead_memory": ("2GiB", is_memory, "an amount of memory, e.g. 2GiB"),
}


def checked(given: Mapping[str, Any], params: Params, workload: str = "") -> dict[str, Any]:
    """`params` as given, with defaults. Raises `SpecError` naming every one that is wrong; with `workload`, also
    those that are none of its."""
    problems = [
        Problem(f"params.{name}", f"is not a parameter of {workload}.", remedy=f"Write one of {list(params)}.")
        for name in given
        if workload and name not in params
    ]
    values = {name: given.get(name, default) for name, (default, _, _) in params.items()}
    problems += [
        Problem(f"params.{name}", f"is {values[name]!r}, not {words}.")
        for name, (_, test, words) in params.items()
        if not test(values[name])
    ]
    if problems:
        raise SpecError("params", problems)
    return values


# ------------------------------------------------------------------------------------------------ plan


def images(spec: JobSpec) -> list[DataRef]:
    """Raises `WorkloadError` where the job names none."""
    found = [ref for ref in spec.inputs if ref.name != BUNDLE]
    if not found:
        remedy = "Write a folder of DICOM, stores or NIfTI under `inputs:`, beside `bundle`."
        raise WorkloadError("The job names no images.", remedy=remedy)
    return found


def parts(refs: Sequence[DataRef], told: Mapping[str, Any], params: Mapping[str, Any], ctx: Context) -> list[Part]:
    """A part per image series, store and NIfTI file, each with `told` and what `load` must know."""
    each = {
        **told, "modalities": list(params["modalities"]), "pet": params["pet"],
        "accept_incomplete": params["accept_incomplete"],
    }  # fmt: skip
    of_series = [
        Part(
            f"series-{series.digest[:16]}", series.inputs, each, series.sources,
            ctx.pseudonym(series.patient) if series.patient else "",
        )
        for series in infer.wanted(refs, params["modalities"], ctx, skip=volume_files.is_within)
    ]  # fmt: skip
    files = sorted({file for ref in refs for file in volume_files.find(Path(ref.path))})
    of_files = {part.name: part for file in files if (part := _of_file(file, each, ctx)) is not None}
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
        """Wait until `size` more bytes are at most `most`, or nothing is held. Raises `StoppedError`."""
        with self._changed:
            while self._held and self._held + size > most:
                if not self._changed.wait(1.0):
                    gc.collect()  # a study that failed may hang in its own traceback
                    if stop():
                        raise StoppedError("The attempt was asked to stop while a study waited for memory.")
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


def load(part: Part, ctx: Context) -> Study:
    """The part's volume, checked and decoded once there is memory for it, while another one runs."""
    path = Path(part.sources[0])
    series = None if volume_files.is_one(path) else infer.planned(part, ctx)
    size = volume_files.nbytes(path, part.inputs[0]) if series is None else _size(series)
    with ctx.stage("wait for memory"):
        BUDGET.admit(size, parse_memory(checked(ctx.spec.params, PARAMS)["ahead_memory"]) << 20, ctx.should_stop)
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
