"""Brain extraction over any mixture of DICOM: one part per image series, each a DICOM SEG, a NIfTI mask and a picture.

`params` of the job:
    threshold           0.5     probability above which a voxel is brain
    modalities          [MR]    series of other modalities are passed over with a finding
    accept_incomplete   false   compute also where the numbering suggests that slices are missing at an end
Where no series is of a wanted modality, each image series becomes a part all the same and is refused with its numbers:
an answer, instead of a job that did nothing.
"""

from __future__ import annotations

import csv
import shutil
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from permed_compute.errors import Finding, Problem, SpecError, WorkloadError
from permed_compute.spec import DataRef, JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import geometry, read
from permed_compute.workloads.radiology.read import Series, Volume

if TYPE_CHECKING:
    import numpy as np

SEG, NIFTI, OVERLAY = "segmentation.dcm", "mask.nii.gz", "overlay.png"
VERSION = "1"


class Segmenter(Protocol):
    """What `run` needs of a model: `model.BrainModel`, or a test's stand-in."""

    name: str
    version: str
    digest: str
    device: str

    def segment(self, volume: Volume, threshold: float) -> np.ndarray:
        """Bool mask, same shape and axes as `volume.array`. Raises `RefusedInput`."""
        ...


@dataclass(frozen=True, slots=True)
class Params:
    """The job's `params`, checked."""

    threshold: float = 0.5
    modalities: tuple[str, ...] = ("MR",)
    accept_incomplete: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        """Raises `SpecError` naming every parameter that is wrong."""
        problems = [
            Problem(
                f"params.{key}", "is not a parameter of radiology/brain-extraction.", remedy=f"Write one of {_NAMES}."
            )
            for key in given
            if key not in _NAMES
        ]
        threshold = given.get("threshold", 0.5)
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < 1:
            problems.append(Problem("params.threshold", f"is {threshold!r}, not a number between 0 and 1."))
        modalities = given.get("modalities", ["MR"])
        known = sorted(read.VOLUME_MODALITIES)
        if not isinstance(modalities, (list, tuple)) or not modalities or not set(modalities) <= set(known):
            problems.append(Problem("params.modalities", f"is {modalities!r}, not a list of {known}."))
        incomplete = given.get("accept_incomplete", False)
        if not isinstance(incomplete, bool):
            problems.append(Problem("params.accept_incomplete", f"is {incomplete!r}, not true or false."))
        if problems:
            raise SpecError("params", problems)
        return cls(float(threshold), tuple(modalities), incomplete)


_NAMES = ("threshold", "modalities", "accept_incomplete")


# ------------------------------------------------------------------------------------------------ plan


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """One part per image series below the job's inputs; what is not computed is a finding of the job."""
    params = Params.of(spec.params)
    if not spec.inputs:
        raise WorkloadError("The job names no input.", remedy="Write the DICOM folder, zip or file under `inputs:`.")
    chosen = wanted(spec.inputs, params.modalities, ctx)
    return [
        Part(
            name=f"series-{series.digest[:16]}",
            inputs=series.inputs,
            params={"threshold": params.threshold, "modalities": list(params.modalities),
                    "accept_incomplete": params.accept_incomplete},
            sources=series.sources,
            subject=ctx.pseudonym(series.patient) if series.patient else "",
        )
        for series in chosen
    ]  # fmt: skip


def wanted(
    refs: Iterable[DataRef],
    modalities: Sequence[str],
    ctx: Context,
    skip: Callable[[str, Path], bool] = lambda source, below: False,
) -> list[Series]:
    """The image series below `refs` of these modalities; all image series where there is none of them.

    skip: which files below an input are no business of DICOM's.
    """
    places = [Path(ref.path) for ref in refs]
    with ctx.stage("scan"):
        sources = sorted({source for place in places for source in read.find(place) if not skip(source, place)})
        inventory = read.scan(sources, ctx.digest, ctx.threads)
    for finding in inventory.findings:
        ctx.finding(finding)
    images = [series for series in inventory.series if series.is_volume and not series.is_localiser]
    chosen = [series for series in images if series.modality in modalities] or images
    for series in inventory.series:
        if series not in chosen:
            ctx.finding(_passed_over(series))
    ctx.log(f"{len(sources)} files, {len(inventory.series)} series, {len(chosen)} to compute")
    return chosen


def _passed_over(series: Series) -> Finding:
    kind = "localiser" if series.is_localiser else "series"
    sentence = (
        f"A {series.modality or 'nameless'} {kind} of {len(series.slices)} images was not asked for; passed over."
    )
    return Finding("SERIES_PASSED_OVER", sentence, "note", series.digest, {"images": len(series.slices)})


# ------------------------------------------------------------------------------------------------ load and run


def load(part: Part, ctx: Context) -> Volume:
    """The part's series as a checked volume. Raises `RefusedInput`, and `WorkloadError` where files have changed."""
    params = Params.of(part.params)
    series = planned(part, ctx)
    with ctx.stage("read"):
        volume = read.assemble(series, ctx.threads)
    refuse_unsuitable(series, volume, params.modalities, params.accept_incomplete, "The network knows T1 heads only.")
    return volume


def refuse_unsuitable(
    series: Series, volume: Volume, modalities: Sequence[str], accept_incomplete: bool, advice: str
) -> None:
    """Raise `RefusedInput` for another modality, a series that no result can point to, and one that is not whole."""
    if series.modality not in modalities:
        geometry.refuse(
            "MODALITY_UNSUITABLE", f"The series is {series.modality}; the job asks for {', '.join(modalities)}.",
            series.digest, advice, slices=len(series.slices),
        )  # fmt: skip
    if not series.study or not series.uid:
        geometry.refuse(
            "NO_STUDY_OR_SERIES_UID", "The series has no study or series UID, so no result can point to it.",
            series.digest, "De-identify with new UIDs instead of empty ones.", slices=len(series.slices),
        )  # fmt: skip
    incomplete = [finding for finding in volume.findings if finding.code == "INCOMPLETE_SUSPECTED"]
    if incomplete and not accept_incomplete:
        geometry.refuse(
            incomplete[0].code, f"{incomplete[0].sentence} Part of an organ has no volume to report.", series.digest,
            "Fetch the whole series, or write `params: {accept_incomplete: true}` where it is known to be whole.",
            **incomplete[0].numbers,
        )  # fmt: skip


def planned(part: Part, ctx: Context) -> Series:
    """The part's series, as it was planned. Raises `WorkloadError` where its files have changed."""
    with ctx.stage("read"):
        inventory = read.scan(part.sources, ctx.digest, ctx.threads)
    if len(inventory.series) != 1 or inventory.series[0].inputs != tuple(part.inputs):
        raise WorkloadError(
            "The files of this part are not those that were planned.", remedy="Submit the job again: it plans anew."
        )
    return inventory.series[0]


def run(volume: Volume, model: Segmenter, ctx: Context) -> PartResult:
    """Segment the volume and write SEG, NIfTI and picture to `ctx.out`."""
    from permed_compute.workloads.radiology import outputs

    params = Params.of(ctx.spec.params)
    with ctx.stage("infer"):
        mask = model.segment(volume, params.threshold)
    algorithm = outputs.Algorithm(model.name, model.version, model.digest, f"threshold={params.threshold:g}")
    with ctx.stage("write"):
        outputs.write_seg(mask, volume, ctx.out / SEG, algorithm, ctx.spec.purpose)
        outputs.write_nifti(mask, volume, ctx.out / NIFTI)
        outputs.write_overlay(mask, volume, ctx.out / OVERLAY)
    voxels = int(mask.sum())
    values = {
        "volume_ml": round(voxels * volume.voxel_ml, 3),
        "voxels": voxels,
        "shape": [int(length) for length in volume.array.shape],
        "spacing_mm": [round(length, 6) for length in volume.spacing],
        "series": volume.series,
        "modality": volume.modality,
        "device": model.device,
        "files": {"seg": SEG, "nifti": NIFTI, "overlay": OVERLAY},
        "findings": [finding.code for finding in volume.findings],
    }
    return PartResult(values=values, findings=volume.findings)


# ------------------------------------------------------------------------------------------------ reduce and model


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """A table of volumes, the pictures with captions, and the mean."""
    done = sorted(results, key=lambda item: item.part.name)
    columns = ("part", "volume_ml", "voxels", "findings")
    with (ctx.out / "volumes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for item in done:
            values = item.values
            table.writerow([item.part.name, values["volume_ml"], values["voxels"], " ".join(values["findings"])])
    figures = []
    for item in done:
        picture = f"{item.part.name}-{OVERLAY}"
        shutil.copyfile(item.folder / OVERLAY, ctx.out / picture)
        figures.append((picture, f"Brain outline, {item.values['volume_ml']:.0f} ml ({item.part.name})"))
    volumes = [float(item.values["volume_ml"]) for item in done]
    metrics = {"series": float(len(volumes))}
    if volumes:
        metrics |= {
            "volume_ml_mean": statistics.fmean(volumes), "volume_ml_min": min(volumes), "volume_ml_max": max(volumes),
        }  # fmt: skip
    return Result(
        values={"parts": {item.part.name: dict(item.values) for item in done}}, metrics=metrics, figures=figures
    )


def load_model(spec: JobSpec, ctx: Context) -> Segmenter:
    """The bundle's networks on the context's device."""
    from permed_compute.workloads.radiology.model import BrainModel, bundle

    with ctx.stage("load model"):
        return BrainModel(bundle(), device=ctx.device, threads=ctx.threads)


@lru_cache(maxsize=1)
def _bundle_digest() -> str:
    from permed_compute.workloads.radiology.model import bundle

    return bundle().digest()


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return _bundle_digest()


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, run=run, reduce=reduce, model_digest=model_digest, version=VERSION
)
