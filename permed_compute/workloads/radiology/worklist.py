"""Job `radiology/worklist`: studies from an archive, computed, and the results back in the studies they belong to.

`inputs`: `worklist`, a CSV of accession numbers or study UIDs (`orders.py`); `archives`, the site's (`archives.py`).

`params` of the job:
    archive            (needed)     where the studies are, a name in the archives file
    returns            []           where results are sent, names in that file; [] keeps them with the job
    send_by            ''           stow or c-store; '' takes stow where the archive has it
    outputs            [seg, sr]    of seg, sr, montage, nifti
    coding             BINARY       of the SEG; LABELMAP where every viewer knows it
    modalities, threshold, accept_incomplete      as of radiology/brain-extraction
With a third input, `bundle` (the folder of a MONAI bundle), instead of the last line: modalities, accept_incomplete,
segments, weights, flips, variant … as of radiology/segment.

One part per row. A study is rejected for what it is (not found, found twice, no series that can be computed on), and
fails for what happened (an archive that hangs); either way with its reason, under a pseudonym, and the others go on.

A part's key is what the archive lists of the study, and every UID is derived from it: an item that was killed after it
had sent half of its results sends the same instances again, and an archive keeps each instance once.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from permed_compute.errors import Finding, PermedError, Problem, RefusedInput, SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.workloads.port import Context, DonePart, Map, Part, PartResult, Result
from permed_compute.workloads.radiology import infer, networks, read
from permed_compute.workloads.radiology.archives import Entry, read_archives
from permed_compute.workloads.radiology.geometry import refuse
from permed_compute.workloads.radiology.networks import Network
from permed_compute.workloads.radiology.orders import Order, read_orders
from permed_compute.workloads.radiology.pacs import Archive, ArchiveError, Instance, Study
from permed_compute.workloads.radiology.read import Series, Volume

if TYPE_CHECKING:
    from permed_compute.workloads.radiology.measure import Measurements
    from permed_compute.workloads.radiology.outputs import Algorithm

VERSION = "1"
OUTPUTS = ("seg", "sr", "montage", "nifti")
_NAMES = {"seg": "segmentation.dcm", "sr": "measurements.dcm", "montage": "montage.dcm", "nifti": "mask.nii.gz"}
_DICOM = ("seg", "sr", "montage")
THUMBNAIL = "thumbnail.jpg"
_THUMBNAIL_WIDTH = 640
_ASKED_AT_ONCE = 4
_SILENT_MOST = 3
"""After so many time-outs in a row the rest of the list is not asked for: each costs a whole time-out."""
_MOST_FIGURES = 24


@dataclass(frozen=True, slots=True)
class Params:
    """The job's `params`, checked."""

    archive: str
    returns: tuple[str, ...] = ()
    send_by: str = ""
    outputs: tuple[str, ...] = ("seg", "sr")
    coding: str = "BINARY"
    network: Mapping[str, Any] = field(default_factory=dict)

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.network["modalities"])

    @classmethod
    def of(cls, spec: JobSpec) -> Params:
        """Raises `SpecError` naming every parameter that is wrong."""
        given = spec.params
        mine = {"archive", "returns", "send_by", "outputs", "coding"}
        problems: list[Problem] = []
        network: dict[str, Any] = {}
        rest = {name: value for name, value in given.items() if name not in mine}
        try:
            network = networks.params_of(rest, bundled=networks.is_bundled(spec))
        except SpecError as error:
            problems += error.problems
        archive, returns = given.get("archive", ""), given.get("returns", [])
        if not isinstance(archive, str) or not archive:
            problems.append(Problem("params.archive", "is not the name of an archive in the archives file."))
        if not isinstance(returns, (list, tuple)) or not all(isinstance(name, str) for name in returns):
            problems.append(Problem("params.returns", "is not a list of names in the archives file.", remedy="[pacs]"))
        outputs = given.get("outputs", ["seg", "sr"])
        if not isinstance(outputs, (list, tuple)) or not outputs or not set(outputs) <= set(OUTPUTS):
            problems.append(Problem("params.outputs", f"is not a list of {', '.join(OUTPUTS)}."))
        elif "sr" in outputs and "seg" not in outputs:
            problems.append(Problem("params.outputs", "has sr without seg; a report points at segments."))
        for name, allowed in (("send_by", ("", "stow", "c-store")), ("coding", ("BINARY", "LABELMAP"))):
            if given.get(name, allowed[0]) not in allowed:
                problems.append(Problem(f"params.{name}", f"is not one of {', '.join(map(repr, allowed))}."))
        if problems:
            raise SpecError("params", problems)
        return cls(
            archive, tuple(returns), given.get("send_by", ""), tuple(outputs), given.get("coding", "BINARY"), network
        )


def item_name(pseudonym: Callable[[str], str], order: Order) -> str:
    """The pseudonym under which an item goes through the job: of what the row says, or of its place."""
    named = pseudonym(order.identity if not order.problem else f"row\x1f{order.number}\x1f{order.identity}")
    return f"item-{named.removeprefix('p-')[:16]}"


# ------------------------------------------------------------------------------------------------ plan


@dataclass(frozen=True, slots=True)
class Listing:
    """What the archive says of one row: a study with its instances, or why there is none.

    rejected: code and sentence, certain for as long as the archive says the same. unanswered: what went wrong.
    """

    study: Study | None = None
    instances: tuple[Instance, ...] = ()
    rejected: tuple[str, str] | None = None
    unanswered: PermedError | None = None


def plan(spec: JobSpec, state: Mapping[str, Any], ctx: Context) -> Iterable[Part]:
    """One part per row. Raises before anything is asked where a destination does not take the job's results."""
    params = Params.of(spec)
    entries = _entries(ctx, params)
    for name in params.returns:
        entries[name].accept(spec.purpose)
        entries[name].way(params.send_by)
    path = ctx.input("worklist")
    orders = read_orders(path)
    with ctx.stage("find"):
        listings = _ask_all(Archive(entries[params.archive]), orders, params)
    ctx.log(f"{len(orders)} rows, {sum(bool(listing.study) for listing in listings)} studies found")
    return [_part(order, listing, path, params, ctx) for order, listing in zip(orders, listings, strict=True)]


def _entries(ctx: Context, params: Params) -> dict[str, Entry]:
    entries = read_archives(ctx.input("archives"))
    unknown = [name for name in (params.archive, *params.returns) if name not in entries]
    if unknown:
        raise SpecError("params", [
            Problem("params", f"{unknown[0]!r} is not in the archives file.", remedy=f"There are {', '.join(entries)}.")
        ])  # fmt: skip
    return entries


def _ask_all(archive: Archive, orders: Sequence[Order], params: Params) -> list[Listing]:
    """In the order of the rows; a few at a time, none any more once the archive has been silent."""
    silent = 0

    def ask(order: Order) -> Listing:
        nonlocal silent
        if order.problem:
            return Listing(rejected=("WORKLIST_ROW", f"The row {order.problem}."))
        if silent >= _SILENT_MOST:
            return Listing(unanswered=ArchiveError(f"Archive {archive.entry.name} was silent {silent} times in a row."))
        listing = _ask(archive, order, params)
        silent = silent + 1 if isinstance(listing.unanswered, ArchiveError) else 0
        return listing

    with ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        return list(pool.map(ask, orders))


def _ask(archive: Archive, order: Order, params: Params) -> Listing:
    try:
        studies = archive.find(study=order.study, accession=order.accession)
        if len(studies) != 1:
            code, what = (
                ("STUDY_NOT_FOUND", "no study") if not studies else ("STUDY_AMBIGUOUS", f"{len(studies)} studies")
            )
            return Listing(rejected=(code, f"Archive {archive.entry.name} has {what} of that number."))
        found = archive.instances(studies[0].uid)
    except PermedError as error:
        return Listing(unanswered=error)
    wanted = tuple(item for item in found if item.modality in params.modalities)
    if not wanted:
        modalities = ", ".join(sorted({item.modality for item in found if item.modality})) or "nothing"
        return Listing(studies[0], rejected=("NO_SUITABLE_SERIES", f"The study holds {modalities}; the job asks for"
                                             f" {', '.join(params.modalities)}."))  # fmt: skip
    return Listing(studies[0], wanted)


def listing_digest(study: str, instances: Iterable[Instance]) -> str:
    """SHA-256 of what a study holds: an instance never changes under its UID (PS3.3 C.12.1), so the UIDs will do."""
    rows = sorted(f"{item.series} {item.sop}" for item in instances)
    return hashlib.sha256("\n".join([study, *rows]).encode()).hexdigest()


def _part(order: Order, listing: Listing, path: Path, params: Params, ctx: Context) -> Part:
    what: dict[str, Any] = json.loads(json.dumps(asdict(params)))
    inputs: tuple[str, ...] = ()
    name = item_name(ctx.pseudonym, order)
    if listing.unanswered is not None:
        what["unanswered"] = listing.unanswered.message
    elif listing.rejected is not None:
        what["rejected"] = [*listing.rejected, name]
    else:
        assert listing.study is not None, "a listing that is neither rejected nor unanswered has its study"
        inputs = (listing_digest(listing.study.uid, listing.instances),)
    patient = listing.study.patient if listing.study else ""
    return Part(
        name, inputs, what, (f"{path}#{order.number}",), ctx.pseudonym(patient) if patient else "",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------ load


@dataclass(frozen=True, slots=True)
class Item:
    """A study's volumes in memory, and the folder where its images lie until `run` has ended."""

    part: Part
    volumes: tuple[Volume, ...]
    findings: tuple[Finding, ...]
    folder: Path


def load(part: Part, ctx: Context) -> Item:
    """Fetch and check the study. Raises `RefusedInput` for a rejected one, `ArchiveError` where the archive fails."""
    if "unanswered" in part.params:
        raise WorkloadError(str(part.params["unanswered"]), remedy="Run the job again: what is done is not done again.")
    if "rejected" in part.params:
        code, sentence, _ = part.params["rejected"]
        refuse(code, sentence, part.name, "Correct the worklist, or the job's `modalities`.")
    params = Params.of(ctx.spec)
    archive = Archive(_entries(ctx, params)[params.archive])
    order = _order_of(part, ctx)
    folder = ctx.scratch / part.name
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with ctx.stage("fetch"):
            study = _fetch(archive, order, part, params, folder)
        with ctx.stage("read"):
            volumes, findings = _volumes(folder, study, order, part, params, ctx)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return Item(part, tuple(volumes), tuple(findings), folder)


def _order_of(part: Part, ctx: Context) -> Order:
    path, _, number = part.sources[0].rpartition("#")
    order = next((order for order in read_orders(Path(path)) if order.number == int(number)), None)
    if order is None or item_name(ctx.pseudonym, order) != part.name:
        raise WorkloadError("The worklist has changed since the job was planned.", remedy="Submit the job again.")
    return order


def _fetch(archive: Archive, order: Order, part: Part, params: Params, folder: Path) -> Study:
    listing = _ask(archive, order, params)
    if listing.unanswered is not None:
        raise listing.unanswered
    if listing.study is None or listing_digest(listing.study.uid, listing.instances) != part.inputs[0]:
        raise WorkloadError(
            "The study has changed in the archive since the job was planned.", remedy="Run it again once it is whole."
        )
    count = archive.fetch(listing.study.uid, sorted({item.series for item in listing.instances}), folder)
    if count != len(listing.instances):
        raise ArchiveError(f"Archive {archive.entry.name} sent {count} of {len(listing.instances)} images.")
    return listing.study


def _volumes(
    folder: Path, study: Study, order: Order, part: Part, params: Params, ctx: Context
) -> tuple[list[Volume], list[Finding]]:
    inventory = read.scan(read.find(folder), ctx.digest, ctx.threads)
    wanted = [
        series for series in inventory.series
        if series.modality in params.modalities and series.is_volume and not series.is_localiser
    ]  # fmt: skip
    if len({series.patient for series in wanted}) > 1:
        refuse(
            "MIXED_PATIENTS", "The study holds images of several patients.", part.name, "Have the archive corrected."
        )
    volumes, findings, refusals = [], list(inventory.findings), []
    for series in wanted:
        try:
            volumes.append(_volume(series, study, order, part, params, ctx))
        except RefusedInput as error:
            refusals.append(error)
    if not volumes:
        if refusals:
            raise refusals[0]
        refuse("NO_SUITABLE_SERIES", "The study holds no series that is a volume.", part.name, "See the findings.")
    return volumes, findings + [replace(error.finding, severity="note") for error in refusals]


def _volume(series: Series, study: Study, order: Order, part: Part, params: Params, ctx: Context) -> Volume:
    volume = read.assemble(series, ctx.threads)
    about = str(volume.header.get("AccessionNumber") or "")
    if (order.accession and about != order.accession) or series.study != study.uid:
        refuse(
            "IDENTITY_DIFFERS", "The images are not of the study that the archive listed them under.", part.name,
            "Have the archive corrected.",
        )  # fmt: skip
    infer.refuse_unsuitable(
        series, volume, params.modalities, params.network["accept_incomplete"], "Correct the job's `modalities`."
    )
    # Archives rewrite file headers, so bytes differ where nothing does; the instances' UIDs are what is the same.
    rows = [Instance(series.uid, item.sop_instance) for item in series.slices]
    return replace(volume, series=listing_digest(study.uid, rows))


# ------------------------------------------------------------------------------------------------ run


def run(item: Item, model: Network, ctx: Context) -> PartResult:
    """Segment every volume, write what was asked for, and send it back."""
    params = Params.of(ctx.spec)
    try:
        done = [_compute(volume, model, params, ctx) for volume in item.volumes]
        with ctx.stage("send"):
            sent = _send([path for one in done for path in one.dicom], params, ctx)
    finally:
        shutil.rmtree(item.folder, ignore_errors=True)
    findings = [*item.findings, *(finding for one in done for finding in one.findings)]
    values = {
        "series": {one.name: dict(one.values) for one in done},
        "returned": sent,
        "files": [path.name for one in done for path in one.files],
        "thumbnails": [one.thumbnail for one in done],
        "findings": sorted({finding.code for finding in findings}),
    }
    return PartResult(values=values, findings=findings)


@dataclass(frozen=True, slots=True)
class _Computed:
    name: str
    values: Mapping[str, Any]
    files: tuple[Path, ...]
    dicom: tuple[Path, ...]
    thumbnail: str
    findings: tuple[Finding, ...]


def _compute(volume: Volume, model: Network, params: Params, ctx: Context) -> _Computed:
    from permed_compute.workloads.radiology.measure import measure

    name = f"series-{volume.series[:16]}"
    algorithm = model.algorithm
    with ctx.stage("infer"):
        mask = model.labels(volume)
    with ctx.stage("measure"):
        suv, notes = _suv(volume)
        measured = [measure(mask == number, volume, suv) for number in range(1, len(algorithm.segments) + 1)]
    with ctx.stage("write"):
        written = _write(mask, volume, measured, algorithm, params, name, ctx)
    return _Computed(
        name,
        {segment.label: figures.as_dict() for segment, figures in zip(algorithm.segments, measured, strict=True)},
        tuple(written.values()),
        tuple(path for kind, path in written.items() if kind in _DICOM),
        f"{name}-{THUMBNAIL}",
        (*volume.findings, *notes),
    )


def _suv(volume: Volume) -> tuple[Any, tuple[Finding, ...]]:
    """(SUVs, what was noticed) of a PET volume; (None, ()) of others, and where the tags do not allow it."""
    if volume.modality != "PT":
        return None, ()
    from permed_compute.workloads.radiology.pet import as_suv

    try:
        converted, _ = as_suv(volume)
    except RefusedInput as error:
        return None, (replace(error.finding, severity="note"),)
    return converted.array, converted.findings[len(volume.findings) :]


def _write(
    mask: Any, volume: Volume, measured: Sequence[Measurements], algorithm: Algorithm, params: Params, name: str,
    ctx: Context,
) -> dict[str, Path]:  # fmt: skip
    from pydicom import dcmread

    from permed_compute.workloads.radiology import montage, outputs, report

    purpose = ctx.spec.purpose
    paths = {kind: ctx.out / f"{name}-{_NAMES[kind]}" for kind in params.outputs}
    if "seg" in paths:
        outputs.write_seg(mask, volume, paths["seg"], algorithm, purpose, params.coding)  # type: ignore[arg-type]
    if "sr" in paths and any(figures.voxels for figures in measured):
        report.write_report(measured, dcmread(paths["seg"]), volume, paths["sr"], algorithm, purpose)
    picture = montage.montage(mask, volume)
    montage.write_thumbnail(picture, ctx.out / f"{name}-{THUMBNAIL}", _THUMBNAIL_WIDTH)
    if "montage" in paths:
        montage.write_montage(picture, volume, paths["montage"], algorithm, purpose)
    if "nifti" in paths:
        outputs.write_nifti(mask, volume, paths["nifti"])
    return {kind: path for kind, path in paths.items() if path.exists()}


def _send(files: Sequence[Path], params: Params, ctx: Context) -> dict[str, dict[str, Any]]:
    """To every archive of `returns`: how many were sent, and how many were there already."""
    sent = {}
    entries = _entries(ctx, params) if params.returns else {}
    for name in params.returns:
        by = entries[name].way(params.send_by)
        sent[name] = {"by": by} | asdict(Archive(entries[name]).send(files, ctx.spec.purpose, by))
    return sent


# ------------------------------------------------------------------------------------------------ reduce and model


def reduce(results: Sequence[DonePart], state: Mapping[str, Any], ctx: Context) -> Result:
    """The pictures of the job's page, and totals. The answer per row is `answer.py`'s: it knows the failed ones too."""
    done = sorted(results, key=lambda item: item.part.name)
    figures: list[tuple[str, str]] = []
    for item in done:
        for thumbnail in item.values["thumbnails"]:
            if len(figures) < _MOST_FIGURES:
                picture = f"{item.part.name}-{thumbnail}"
                shutil.copyfile(item.folder / thumbnail, ctx.out / picture)
                figures.append((picture, item.part.name))
    returned = [place for item in done for place in item.values["returned"].values()]
    metrics = {
        "studies": float(len(done)),
        "series": float(sum(len(item.values["series"]) for item in done)),
        "instances_sent": float(sum(place["sent"] for place in returned)),
        "instances_already_there": float(sum(place["already"] for place in returned)),
    }
    return Result(
        values={"parts": {item.part.name: dict(item.values) for item in done}}, metrics=metrics, figures=figures
    )


def load_model(spec: JobSpec, ctx: Context) -> Network:
    return networks.load(spec, ctx, Params.of(spec).network)


def model_digest(spec: JobSpec, ctx: Context) -> str:
    return networks.digest(spec, ctx, Params.of(spec).network)


WORKLOAD = Map(
    plan=plan, model=load_model, load=load, run=run, reduce=reduce, model_digest=model_digest, version=VERSION
)
