"""Job `radiology/ingest`: DICOM series and NIfTI files to volume stores, one part each.

`params` of the job:
    to          ''        folder for the stores; '' keeps them with the job's results
    role        image     what NIfTI files are that no dataset.json describes: image, or label (whole classes)
    modalities  []        DICOM series of these only, e.g. [CT, PT]; [] takes every CT, MR and PT
    pet         suv       PT series in SUVbw, refused where the tags do not allow it; `stored` keeps activity
    tilt        refuse    `correct` resamples a tilted gantry and uneven gaps as dcm2niix does
    max_files   0         the most files that `to` may hold when all is done; 0: the site's quota, or no bound
    max_gib     0         the most GiB, likewise
    site        ''        a profile in cluster/sites whose project quota is the bound

Inputs are DICOM folders, zips and DICOMDIRs, NIfTI files and folders of them, nnU-Net raw and Decathlon data sets. Of
those the job also writes `dataset.json`, a Decathlon list whose images and labels are stores.
"""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from permed_compute.errors import Finding, PermedError, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.paths import write_json
from permed_compute.spec import DataClass, JobSpec
from permed_compute.storage import budget
from permed_compute.storage.volumes import Layout
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import layouts, nifti, pet, read, straighten, volume_store
from permed_compute.workloads.radiology.deidentify import require_clean
from permed_compute.workloads.radiology.read import Inventory, Series, Volume

VERSION = "1"
_GIB = 2**30
_WITHOUT_PERSONS = (DataClass.GREEN, DataClass.YELLOW)
"""Data classes whose stores hold nothing that tells who somebody is."""


@dataclass(frozen=True, slots=True)
class Params:
    """The job's `params`, checked."""

    to: str = ""
    role: str = "image"
    modalities: tuple[str, ...] = ()
    pet: str = "suv"
    tilt: str = "refuse"
    max_files: int = 0
    max_gib: float = 0
    site: str = ""

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Params:
        """Raises `SpecError` naming every parameter that is wrong."""
        problems = [
            Problem(f"params.{name}", "is not a parameter of radiology/ingest.", remedy=f"Write one of {_NAMES}.")
            for name in given
            if name not in _TESTS
        ]
        problems += [
            Problem(f"params.{name}", f"is {given[name]!r}, not {words}.")
            for name, (test, words) in _TESTS.items()
            if name in given and not test(given[name])
        ]
        if problems:
            raise SpecError("params", problems)
        values: dict[str, Any] = {**given, "modalities": tuple(given.get("modalities", ()))}
        return cls(**values)

    @property
    def budget(self) -> budget.Budget:
        """The parameters', else the site's."""
        files, gib = self.max_files, self.max_gib
        if self.site:
            from permed_compute.sites.profile import load

            storage = load(self.site).storage
            room = storage.project if storage is not None else None
            if room is not None:
                files, gib = files or room.files or 0, gib or room.gib or 0
        return budget.Budget(files, int(gib * _GIB))


def _one_of(*allowed: str) -> tuple[Any, str]:
    return (lambda value: value in allowed), " or ".join(allowed)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value >= 0


def _modalities(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(one in read.VOLUME_MODALITIES for one in value)


_TESTS: dict[str, tuple[Any, str]] = {
    "to": (lambda value: isinstance(value, str), "the path of a folder"),
    "role": _one_of("image", "label"),
    "modalities": (_modalities, f"a list of {sorted(read.VOLUME_MODALITIES)}"),
    "pet": _one_of("suv", "stored"),
    "tilt": _one_of("refuse", "correct"),
    "max_files": (lambda value: isinstance(value, int) and _number(value), "a number of files"),
    "max_gib": (_number, "a number of GiB"),
    "site": (lambda value: isinstance(value, str), "a site's name"),
}
_NAMES = ", ".join(_TESTS)


# ------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True, slots=True)
class Found:
    """What lies below one input: series of DICOM, files of NIfTI, and the data set that they form, if any."""

    inventory: Inventory
    files: tuple[layouts.File, ...]
    layout: layouts.Layout | None = None


def find(path: Path, params: Params, digest: read.Digest, threads: int) -> Found:
    """Raises `NotFoundError`, and `WorkloadError` for a data set whose index cannot be read."""
    if layouts.is_dataset(path):
        layout = layouts.read(path)
        files = tuple(file for case in layout.cases for file in case.files)
        return Found(Inventory((), layout.findings), files, layout)
    files = tuple(replace(file, kind="label" if params.role == "label" else "image") for file in layouts.plain(path))
    known = {str(file.path) for file in files}
    sources = [source for source in read.find(path) if source not in known and not Path(source).name.startswith(".")]
    return Found(read.scan(sources, digest, threads), files)


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """One part per series and per NIfTI volume. Raises `WorkloadError` where the stores would exceed the budget."""
    params = Params.of(spec.params)
    if not spec.inputs:
        raise WorkloadError("The job names no input.", remedy="Write DICOM or NIfTI under `inputs:`.")
    parts: dict[str, Part] = {}
    needed: dict[str, tuple[int, int]] = {}
    with ctx.stage("scan"):
        for ref in spec.inputs:
            found = find(Path(ref.path), params, ctx.digest, ctx.threads)
            for finding in [*found.inventory.findings, *_passed_over(found.inventory, params)]:
                ctx.finding(finding)
            for part, size, _ in _parts(found, params, ctx, clean=spec.data_class in _WITHOUT_PERSONS):
                parts[part.name], needed[part.name] = part, size
    size, files = (sum(column) for column in zip((0, 0), *needed.values(), strict=True))
    budget.check(Path(params.to) if params.to else ctx.out, files=files, size=size, budget=params.budget)
    ctx.log(f"{len(parts)} volumes, at most {files} files and {size / _GIB:.2f} GiB")
    return list(parts.values())


def _wanted(series: Series, params: Params) -> bool:
    return series.is_volume and not series.is_localiser and series.modality in (params.modalities or (series.modality,))


def _passed_over(inventory: Inventory, params: Params) -> Iterator[Finding]:
    for series in inventory.series:
        if not _wanted(series, params):
            kind = "localiser" if series.is_localiser else "series"
            sentence = (
                f"A {series.modality or 'nameless'} {kind} of {len(series.slices)} images is no volume; passed over."
            )
            yield Finding("SERIES_PASSED_OVER", sentence, "note", series.digest, {"images": len(series.slices)})


class Here(Protocol):
    """What of a `Context` planning and writing take; `convert` runs without a job."""

    @property
    def threads(self) -> int: ...
    @property
    def out(self) -> Path: ...
    def digest(self, path: Path) -> str: ...
    def pseudonym(self, identifier: str) -> str: ...
    def stage(self, name: str) -> Any: ...


def _parts(
    found: Found, params: Params, ctx: Here, *, clean: bool = False
) -> Iterator[tuple[Part, tuple[int, int], Series | None]]:
    """Each part with the (bytes, files) that its store takes at most, and its series where it is one.

    clean: series that are not de-identified are to be refused.
    """
    how: dict[str, Any] = {"to": params.to}
    for series in found.inventory.series:
        if not _wanted(series, params):
            continue
        extra: dict[str, Any] = {"tilt": params.tilt} | ({"pet": params.pet} if series.modality == "PT" else {})
        extra |= {"clean": True} if clean else {}
        subject = ctx.pseudonym(series.patient) if series.patient else ""
        part = Part(f"series-{series.digest[:16]}", series.inputs, {**how, **extra}, series.sources, subject)
        yield part, _dicom_size(series, params), series
    for file in found.files:
        digest = ctx.digest(file.path)
        kind = {"kind": file.kind, "channel": file.channel, "modality": file.modality}
        part = Part(name_of(file, digest), (digest,), {**how, **kind}, (str(file.path),))
        yield part, _nifti_size(file, digest), None


def name_of(file: layouts.File, digest: str) -> str:
    """Of the part and, with `.zarr`, of the store: by content, kind and channel."""
    channel = "" if file.channel is None else f"-c{file.channel}"
    return f"{'label' if file.kind == 'label' else 'volume'}-{digest[:16]}{channel}"


def _dicom_size(series: Series, params: Params) -> tuple[int, int]:
    first = series.slices[0]
    whole = all(item.slope == int(item.slope) and item.intercept == int(item.intercept) for item in series.slices)
    # A straightened stack grows by its lean, for which its rows once more are enough.
    times = straighten.MOST_TIMES if params.tilt == "correct" else 1
    shape = (first.columns, first.rows * times, len(series.slices) * times)
    return Layout(shape, "int16" if whole and series.modality != "PT" else "float32").estimate()


def _nifti_size(file: layouts.File, digest: str) -> tuple[int, int]:
    try:
        x, y, z = nifti.shape_of(file.path, digest)[:3]
    except (RefusedInput, ValueError):
        return 0, 0  # refused again, by name, where it is loaded
    return Layout((x, y, z), "uint8" if file.kind == "label" else "float32").estimate() if min(x, y, z) > 0 else (0, 0)


# ------------------------------------------------------------------------------------------------ load and run


@dataclass(frozen=True, slots=True)
class Loaded:
    """A part's volume in the units that are stored, with the rescale that its source declares."""

    part: Part
    volume: Volume | None
    """None: the store stands already."""
    rescale: volume_store.Rescale | None = None
    unit: str = ""


def load(part: Part, ctx: Here) -> Loaded:
    """Raises `RefusedInput` about the part's input, and `WorkloadError` where files have changed since the plan."""
    if _finished(part, ctx) is not None:
        return Loaded(part, None)
    with ctx.stage("read"):
        return _nifti(part, ctx) if "kind" in part.params else _dicom(part, ctx)


def _nifti(part: Part, ctx: Here) -> Loaded:
    path = Path(part.sources[0])
    if ctx.digest(path) != part.inputs[0]:
        raise _changed()
    volume, rescale = nifti.read(path, part.inputs[0], channel=part.params["channel"])
    return Loaded(part, nifti.with_modality(volume, part.params["modality"]), rescale)


def _dicom(part: Part, ctx: Here) -> Loaded:
    inventory = read.scan(part.sources, ctx.digest, ctx.threads)
    if len(inventory.series) != 1 or inventory.series[0].inputs != tuple(part.inputs):
        raise _changed()
    return dicom_volume(inventory.series[0], part, ctx.threads)


def dicom_volume(series: Series, part: Part, threads: int) -> Loaded:
    """The series as it is stored: straightened or in SUV where the part's params say so.

    Raises `RefusedInput` NOT_DEIDENTIFIED where they ask for clean images and one is not.
    """
    if part.params.get("clean"):
        for source in series.sources:
            require_clean(read.header(source), series.digest)
    assemble = straighten.assemble if part.params.get("tilt") == "correct" else read.assemble
    volume = assemble(series, threads)
    if part.params.get("pet") == "suv":
        volume, rescale = pet.as_suv(volume)
        return Loaded(part, volume, rescale, pet.UNIT)
    declared = {(item.slope, item.intercept) for item in volume.slices}
    unit = {"CT": "HU", "PT": str((volume.header or {}).get("Units", ""))}.get(series.modality, "")
    return Loaded(part, volume, declared.pop() if len(declared) == 1 else None, unit)


def _changed() -> WorkloadError:
    return WorkloadError(
        "The files of this part are not those that were planned.", remedy="Submit the job again: it plans anew."
    )


def _digest_of(part: Part) -> str:
    """What the store of a part calls its source: as `Series.digest` and `nifti.read` do."""
    return part.inputs[0] if "kind" in part.params else hashlib.sha256("\n".join(part.inputs).encode()).hexdigest()


def _how(part: Part) -> dict[str, Any]:
    return {name: value for name, value in part.params.items() if name != "to"}


def _finished(part: Part, ctx: Here) -> dict[str, Any] | None:
    return volume_store.finished(_place(part, ctx), _digest_of(part), _how(part))


def _place(part: Part, ctx: Here) -> Path:
    folder = Path(part.params["to"]) if part.params["to"] else ctx.out
    return folder / f"{part.name}{volume_store.SUFFIX}"


def run(data: Loaded, model: None, ctx: Here) -> PartResult:
    """Write the store, or keep the one that stands."""
    part, volume = data.part, data.volume
    path = _place(part, ctx)
    with ctx.stage("write"):
        told = _finished(part, ctx)
        if told is None and volume is not None:
            told = volume_store.write(
                path, volume, inputs=part.inputs, how=_how(part), kind=part.params.get("kind", "image"),
                rescale=data.rescale, unit=data.unit, subject=part.subject, threads=ctx.threads,
            )  # fmt: skip
    if told is None:
        raise WorkloadError("The store was removed while the job ran.", remedy="Submit the job again.")
    about = told["about"]
    values = {
        "store": path.name, "kind": about["kind"], "modality": about["modality"], "unit": about["unit"],
        "shape": about["shape"], "spacing_mm": [round(v, 6) for v in about["spacing_mm"]],
        "orientation": about["orientation"], "bytes": told["bytes"], "files": told["files"],
        "findings": [finding["code"] for finding in about["findings"]],
    }  # fmt: skip
    return PartResult(values=values, findings=[Finding(**finding) for finding in about["findings"]])


# ------------------------------------------------------------------------------------------------ without a job


def is_radiology(path: Path) -> bool:
    """Whether a path holds volumes: a data set, NIfTI, or DICOM that is no slide. Looks at a few files only."""
    if layouts.is_dataset(path) or (path.is_file() and nifti.is_nifti(path)):
        return True
    if path.is_dir() and (path / "zarr.json").is_file():
        return False
    sources = read.find(path)
    classes = [kind for source in sources[:_LOOKED_AT] if (kind := read.sop_class(source))]
    if classes:
        return classes[0] != _WHOLE_SLIDE
    return any(nifti.is_nifti(Path(source)) for source in sources)


_LOOKED_AT = 20
_WHOLE_SLIDE = "1.2.840.10008.5.1.4.1.1.77.1.6"


@dataclass(frozen=True, slots=True)
class Converted:
    """One volume: its part's name, what its store takes at most, and what was written or why it was not."""

    name: str
    files_most: int
    bytes_most: int
    values: Mapping[str, Any] | None = None
    error: PermedError | None = None


def convert(
    paths: Sequence[Path], params: Params, here: Here, *, dry_run: bool = False
) -> Iterator[Converted | Finding]:
    """What the job does, here and now: findings of files that belong to no volume first, then each volume.

    Raises `WorkloadError` where the stores would exceed the budget, `NotFoundError`.
    """
    planned: dict[str, tuple[Part, tuple[int, int], Series | None]] = {}
    layouts_found = []
    for path in paths:
        found = find(path, params, here.digest, here.threads)
        yield from [*found.inventory.findings, *_passed_over(found.inventory, params)]
        planned.update({row[0].name: row for row in _parts(found, params, here)})
        layouts_found += [found.layout] if found.layout else []
    size, files = (sum(row[1][n] for row in planned.values()) for n in (0, 1))
    budget.check(Path(params.to), files=files, size=size, budget=params.budget)
    stores = {}
    for part, (most, count), series in planned.values():
        done = Converted(part.name, count, most)
        if not dry_run:
            try:
                done = replace(done, values=run(_read(part, series, here), None, here).values)
                stores[part.name] = f"{part.name}{volume_store.SUFFIX}"
            except (RefusedInput, WorkloadError) as error:
                done = replace(done, error=error)
        yield done
    if not dry_run:
        _write_lists(layouts_found, stores, here.digest, Path(params.to))


def _read(part: Part, series: Series | None, here: Here) -> Loaded:
    if series is None or _finished(part, here) is not None:
        return load(part, here)
    return dicom_volume(series, part, here.threads)


def _write_lists(
    found: Sequence[layouts.Layout], stores: Mapping[str, str], digest: read.Digest, *folders: Path
) -> None:  # fmt: skip
    for number, layout in enumerate(found):
        name = layouts.INDEX if len(found) == 1 else f"dataset-{number}.json"
        for folder in folders:
            write_json(folder / name, datalist(layout, stores, digest))


# ------------------------------------------------------------------------------------------------ reduce


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """A table of stores; `dataset.json` where an input is a data set."""
    params = Params.of(ctx.spec.params)
    done = sorted(results, key=lambda item: item.part.name)
    columns = ("store", "kind", "modality", "unit", "shape", "spacing_mm", "orientation", "bytes", "files", "findings")
    with (ctx.out / "volumes.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(columns)
        for item in done:
            cells = [item.values[name] for name in columns]
            table.writerow([" ".join(map(str, cell)) if isinstance(cell, list) else cell for cell in cells])
    stores = {
        item.part.name: item.values["store"] if params.to else f"parts/{item.part.name}/{item.values['store']}"
        for item in done
    }
    found = [layouts.read(path) for ref in ctx.spec.inputs if layouts.is_dataset(path := Path(ref.path))]
    _write_lists(found, stores, ctx.digest, ctx.out, *([Path(params.to)] if params.to else []))
    total = {name: sum(int(item.values[name]) for item in done) for name in ("bytes", "files")}
    return Result(
        values={"parts": {item.part.name: dict(item.values) for item in done}, **total},
        metrics={"volumes": float(len(done)), **{name: float(value) for name, value in total.items()}},
    )


def datalist(layout: layouts.Layout, stores: Mapping[str, str], digest: read.Digest) -> dict[str, Any]:
    """The data set as a Decathlon list of stores; cases of which a volume was refused are left out.

    stores: from a part's name to where its store lies, relative to the list.
    """
    rows: dict[str, list[dict[str, Any]]] = {"training": [], "test": []}
    for case in layout.cases:
        places = [stores.get(name_of(file, digest(file.path))) for file in case.files]
        if None in places:
            continue
        images = places[: len(case.images)]
        row: dict[str, Any] = {"image": images[0] if len(images) == 1 else images}
        if case.label:
            row["label"] = places[-1]
        rows[case.split].append(row)
    return {
        "modality": dict(layout.modalities), "labels": dict(layout.labels), "numTraining": len(rows["training"]),
        "numTest": len(rows["test"]), **rows,
    }  # fmt: skip


WORKLOAD = Map(plan=plan, load=load, run=run, reduce=reduce, version=VERSION)
