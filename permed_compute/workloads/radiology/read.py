"""DICOM in: any mixture of files to series, and a series to a `Volume` whose geometry has been checked.

    find(path) -> sources             files below a folder, members of zips, what a DICOMDIR refers to
    scan(sources, digest) -> Inventory   headers only; unreadable files become findings, named by digest
    assemble(series) -> Volume        order by position, refuse what is not one regular volume, decode the pixels

A source is a path, or `archive.zip!/member`. Decimal texts are read raw, because over-long ones (real scanners and
converters write them) are dropped or rounded by stricter readers. `geometry.py` holds the checks and their tolerances.
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np

from permed_compute.errors import Finding, NotFoundError, RefusedInput
from permed_compute.workloads.radiology import geometry
from permed_compute.workloads.radiology.geometry import Slice

Digest = Callable[[Path], str]

VOLUME_MODALITIES = frozenset({"CT", "MR", "PT"})
MEMBER = "!/"
LARGEST_MEMBER = 4 << 30
"""Bytes; a zip member that claims more is not unpacked."""

_MEDIA_DIRECTORY = "1.2.840.10008.1.3.10"
_HEADER = (
    "SOPClassUID", "SOPInstanceUID", "StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "ImageType",
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "ImagePositionPatient",
    "ImageOrientationPatient", "PixelSpacing", "SliceThickness", "SpacingBetweenSlices", "GantryDetectorTilt",
    "InstanceNumber", "ImagesInAcquisition", "FrameOfReferenceUID", "RescaleSlope", "RescaleIntercept",
    "ModalityLUTSequence", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence", "BitsAllocated",
    "BitsStored", "HighBit", "PixelRepresentation",
)  # fmt: skip
_PIXELS = (
    "Rows", "Columns", "NumberOfFrames", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData", "ExtendedOffsetTable",
    "ExtendedOffsetTableLengths",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Series:
    """One series as its headers tell it. `digest` = SHA-256 over the sorted digests of its files."""

    uid: str = field(repr=False)
    study: str = field(repr=False)
    patient: str = field(repr=False)
    modality: str
    digest: str
    slices: tuple[Slice, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Sorted digests of its files; a file that lies there twice counts twice."""
        return tuple(sorted(digest for _, digest in self._files()))

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(source for source, _ in sorted(self._files(), key=lambda pair: (pair[1], pair[0])))

    def _files(self) -> set[tuple[str, str]]:
        return {(item.source, item.digest) for item in self.slices}

    @property
    def is_volume(self) -> bool:
        return self.modality in VOLUME_MODALITIES

    @property
    def is_localiser(self) -> bool:
        return all(item.localiser for item in self.slices)


@dataclass(frozen=True, slots=True)
class Inventory:
    """What was found: series in order of their digests, and findings about files that belong to none."""

    series: tuple[Series, ...]
    findings: tuple[Finding, ...]


@dataclass(frozen=True)
class Volume:
    """A regular volume in the geometry of its source.

    array: (columns, rows, slices) = index (i, j, k), int16 where the values are whole and fit, else float32; modality
    units (HU for CT). affine_lps: 4×4 float64, (i, j, k, 1) → mm in DICOM's LPS. slices[k] is the header of plane k.
    header: a pydicom Dataset of slice 0's file without pixels. corrected: findings about what was mended or noted.
    """

    array: np.ndarray
    affine_lps: np.ndarray
    slices: tuple[Slice, ...]
    header: Any = field(repr=False)
    series: str = ""
    modality: str = ""
    findings: tuple[Finding, ...] = ()

    @property
    def affine_ras(self) -> np.ndarray:
        """4×4 float64, (i, j, k, 1) → mm in NIfTI's RAS."""
        return np.asarray(np.diag([-1.0, -1.0, 1.0, 1.0]) @ self.affine_lps)

    def to_ras(self, array: np.ndarray) -> np.ndarray:
        """A view of an array of this shape with axes flipped and swapped to run right, front, head (nearest axes)."""
        return np.asarray(_orientations().apply_orientation(array, self._axes()))

    def from_ras(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ras`."""
        orientations = _orientations()
        ras = np.array([[0, 1], [1, 1], [2, 1]])
        return np.asarray(orientations.apply_orientation(array, orientations.ornt_transform(ras, self._axes())))

    @property
    def spacing_ras(self) -> tuple[float, float, float]:
        """mm between neighbours along the axes of `to_ras`."""
        x, y, z = (self.spacing[int(axis)] for axis in np.argsort(self._axes()[:, 0]))
        return x, y, z

    def _axes(self) -> Any:
        return _orientations().io_orientation(self.affine_ras)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """mm between neighbours along i, j, k."""
        i, j, k = np.linalg.norm(self.affine_lps[:3, :3], axis=0)
        return float(i), float(j), float(k)

    @property
    def voxel_ml(self) -> float:
        return float(abs(np.linalg.det(self.affine_lps[:3, :3]))) / 1000


def _orientations() -> Any:
    from nibabel import orientations

    return orientations


# ------------------------------------------------------------------------------------------------ sources


def find(path: Path) -> list[str]:
    """Every file that may be DICOM below `path`, sorted: a folder, a zip, a DICOMDIR or one file. Reads 4 bytes each.

    Raises `NotFoundError`.
    """
    if path.is_dir():
        files = sorted(Path(folder, name) for folder, _, names in os.walk(path) for name in names)
    elif path.name.upper() == "DICOMDIR":
        files = _referenced(path)
    elif path.exists():
        files = [path]
    else:
        raise NotFoundError("The input does not exist.", remedy="Check the path in the job's inputs.")
    return [source for file in files for source in _members(file)]


def _members(path: Path) -> list[str]:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if not zipped:
            return [str(path)]
        names = sorted(info.filename for info in _archive(path).infolist() if not info.is_dir())
    except (OSError, zipfile.BadZipFile):
        return [str(path)]  # scan() says what is wrong with it
    return [f"{path}{MEMBER}{name}" for name in names]


def _referenced(path: Path) -> list[Path]:
    """Files that a DICOMDIR names, below its own folder only."""
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        records = dcmread(path).get("DirectoryRecordSequence") or ()
    except (InvalidDicomError, EOFError, OSError):
        return [path]
    folder, real = path.parent, path.resolve().parent
    files = set()
    for record in records:
        name = record.get("ReferencedFileID") or ()
        file = folder.joinpath(*([name] if isinstance(name, str) else name))
        if name and file.resolve().is_relative_to(real):
            files.add(file)
    return sorted(files)


def _archive(path: Path) -> zipfile.ZipFile:
    seen = path.stat()
    return _opened(str(path), seen.st_mtime_ns, seen.st_size)


@lru_cache(maxsize=4)
def _opened(path: str, mtime: int, size: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def open_source(source: str) -> BinaryIO:
    """The bytes of a source, for reading. Raises `OSError`."""
    archive, marker, member = source.partition(MEMBER)
    if not marker or not Path(archive).is_file():
        return Path(source).open("rb")
    try:
        opened = _archive(Path(archive))
        if opened.getinfo(member).file_size > LARGEST_MEMBER:
            raise OSError("the zip member is larger than 4 GiB")
        return io.BytesIO(opened.read(member))
    except (KeyError, RuntimeError, NotImplementedError, zipfile.BadZipFile, EOFError) as error:
        raise OSError(f"the zip member cannot be unpacked ({error.__class__.__name__})") from None


def source_digest(source: str, digest: Digest) -> str:
    """SHA-256 of the source's bytes; `digest` (the context's cached one) does whole files."""
    archive, marker, _ = source.partition(MEMBER)
    if not marker or not Path(archive).is_file():
        return digest(Path(source))
    with open_source(source) as file:
        return hashlib.sha256(file.read()).hexdigest()


# ------------------------------------------------------------------------------------------------ headers


def scan(sources: Iterable[str], digest: Digest, threads: int = 1) -> Inventory:
    """Read the headers of all sources and group them by (study, series). Never raises for a bad file."""
    groups: dict[tuple[str, str, str], list[tuple[str, str, Slice | None]]] = defaultdict(list)
    findings: list[Finding] = []
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for outcome in pool.map(lambda source: _header(source, digest), sources):
            if isinstance(outcome, Finding):
                findings.append(outcome)
            elif outcome is not None:
                (study, series, patient, modality), slices = outcome
                # Clumsy de-identification empties the UIDs: then a folder and a frame of reference are a series.
                apart = ""
                if not series and slices:
                    apart = f"{Path(slices[0].source).parent}|{slices[0].frame_of_reference}"
                members: Sequence[Slice | None] = slices or (None,)
                groups[study, series, apart].extend((patient, modality, item) for item in members)
    whole = []
    for (study, uid, _), rows in groups.items():
        slices = [item for _, _, item in rows if item is not None]
        patient, modality, _ = rows[0]
        if not slices:
            sentence = f"A series of modality {modality or 'unknown'} holds no images ({len(rows)} objects); skipped."
            findings.append(Finding("NOT_AN_IMAGE", sentence, "note", "", {"objects": len(rows)}))
            continue
        digests = sorted({(item.source, item.digest) for item in slices}, key=lambda pair: pair[1])
        name = hashlib.sha256("\n".join(pair[1] for pair in digests).encode()).hexdigest()
        if not uid:
            sentence = (
                "A series has no SeriesInstanceUID; its files were taken together by folder and frame of reference."
            )
            findings.append(Finding("NO_SERIES_UID", sentence, "note", name, {"slices": len(slices)}))
        whole.append(Series(uid, study, patient, modality, name, tuple(slices)))
    findings.sort(key=lambda item: (item.code, item.about))
    return Inventory(tuple(sorted(whole, key=lambda item: item.digest)), tuple(findings))


Identity = tuple[str, str, str, str]


def header(source: str) -> Any:
    """Everything before the pixels. Raises `OSError` where the file cannot be read."""
    with open_source(source) as file:
        ds = read_dataset(file)
    if ds is None:
        raise OSError("not DICOM any more")
    return ds


def _header(source: str, digest: Digest) -> Finding | tuple[Identity, list[Slice]] | None:
    """(study, series, patient, modality) and the planes of one file; a finding where it cannot be read; None for a
    DICOMDIR."""
    try:
        about = source_digest(source, digest)
        with open_source(source) as file:
            if not file.read(1):
                return _unreadable("EMPTY_FILE", "A file of zero bytes was skipped.", about)
            file.seek(0)
            ds = read_dataset(file, _HEADER)
            behind = (file.tell(), file.read(12)) if ds is not None else (0, b"")
    except OSError as error:
        return _unreadable("UNREADABLE_FILE", f"A file could not be read ({error.__class__.__name__}).", "")
    if ds is None:
        return _unreadable("NOT_DICOM", "A file that is not DICOM was skipped.", about)
    try:
        return _planes(ds, source, about, behind)
    except Exception:  # noqa: BLE001 - pydicom converts values as they are asked for, and raises what it likes
        return _unreadable("BROKEN_HEADER", "A DICOM file whose header holds impossible values was skipped.", about)


def _unreadable(code: str, sentence: str, about: str) -> Finding:
    return Finding(code, sentence, "note", about)


def read_dataset(file: BinaryIO, keywords: Sequence[str] | None = None, *, pixels: bool = False) -> Any | None:
    """The file's data set (only `keywords` where given), or None where it is not DICOM or broken off in its header.

    A file without the 128-byte preamble is taken where it names a SOP class; old archives hold such files.
    """
    from pydicom import config, dcmread
    from pydicom.errors import InvalidDicomError

    # pydicom's warnings quote values, birth dates too, and warnings end in logs; what counts is checked here.
    config.settings.reading_validation_mode = config.IGNORE
    tags: Any = list(keywords) if keywords else None
    try:
        return dcmread(file, stop_before_pixels=not pixels, specific_tags=tags)
    except InvalidDicomError:
        pass
    except Exception:  # noqa: BLE001 - pydicom raises nearly anything on bytes that are broken off
        return None
    try:
        file.seek(0)
        ds = dcmread(file, stop_before_pixels=not pixels, specific_tags=tags, force=True)
        return ds if str(ds.get("SOPClassUID", "")).startswith("1.2.840.10008.") else None
    except Exception:  # noqa: BLE001 - forced onto bytes that are not DICOM
        return None


def _planes(
    ds: Any, source: str, about: str, behind: tuple[int, bytes]
) -> Finding | tuple[Identity, list[Slice]] | None:  # fmt: skip
    """behind: where the header ends, and the bytes that follow."""
    meta = getattr(ds, "file_meta", None) or {}
    sop_class = _text(ds, "SOPClassUID") or str(meta.get("MediaStorageSOPClassUID", ""))
    if sop_class == _MEDIA_DIRECTORY:
        return None
    identity = (
        _text(ds, "StudyInstanceUID"), _text(ds, "SeriesInstanceUID"), _text(ds, "PatientID"), _text(ds, "Modality"),
    )  # fmt: skip
    rows, columns = _count(ds, "Rows"), _count(ds, "Columns")
    if not rows or not columns:
        if identity[3] in VOLUME_MODALITIES or not identity[1]:
            return _unreadable("BROKEN_HEADER", "A DICOM file broken off in its header was skipped.", about)
        return identity, []
    instance = _text(ds, "SOPInstanceUID") or str(meta.get("MediaStorageSOPInstanceUID", ""))
    image_type = _text(ds, "ImageType").upper().split("\\")
    numbers = _Numbers()
    frames = int(_text(ds, "NumberOfFrames") or 1)
    plane = Slice(
        source=source, digest=about, frame=None, sop_class=sop_class, sop_instance=instance,
        rows=rows, columns=columns, position=None, orientation=None, spacing=None,
        photometric=_text(ds, "PhotometricInterpretation"), samples=_count(ds, "SamplesPerPixel") or 1,
        modality_lut="ModalityLUTSequence" in ds, frame_of_reference=_text(ds, "FrameOfReferenceUID"),
        patient=identity[2], number=numbers.whole(ds, "InstanceNumber"),
        expected=numbers.whole(ds, "ImagesInAcquisition"), tilt=numbers.one(ds, "GantryDetectorTilt") or 0.0,
        localiser="LOCALIZER" in image_type[2:3],
        native=_native(ds, str(meta.get("TransferSyntaxUID", "")), *behind) if frames == 1 else None,
    )  # fmt: skip
    if frames > 1 or "PerFrameFunctionalGroupsSequence" in ds:
        return identity, list(_frames(ds, plane, frames))
    return identity, [_placed(plane, ds, ds, ds, ds, numbers)]


_PLAIN = {"1.2.840.10008.1.2": (4, 8), "1.2.840.10008.1.2.1": (8, 12)}
"""Implicit and explicit little endian: where PixelData's length stands behind its tag, and where its value does."""


def _native(ds: Any, syntax: str, end: int, bytes_there: bytes) -> tuple[int, int, int, bool] | None:
    """See `Slice.native`; None where a decoder is needed, or anything is unusual."""
    if syntax not in _PLAIN or bytes_there[:4] != b"\xe0\x7f\x10\x00":
        return None
    at, value = _PLAIN[syntax]
    allocated, stored = _count(ds, "BitsAllocated"), _count(ds, "BitsStored")
    length = int.from_bytes(bytes_there[at : at + 4], "little")
    usual = allocated in (8, 16) and 0 < stored <= allocated and _count(ds, "HighBit") == stored - 1
    if not usual or length < _count(ds, "Rows") * _count(ds, "Columns") * allocated // 8 or length == 2**32 - 1:
        return None
    return end + value, allocated, stored, bool(_count(ds, "PixelRepresentation"))


def _raw(ds: Any, keyword: str) -> Any:
    """The element as the file has it: pydicom's conversion of every value would take most of a scan."""
    tag = _tag(keyword)
    return ds.get_item(tag) if tag in ds else None


@cache
def _tag(keyword: str) -> Any:
    from pydicom.datadict import tag_for_keyword
    from pydicom.tag import Tag

    number = tag_for_keyword(keyword)
    assert number is not None
    return Tag(number)


def _text(ds: Any, keyword: str) -> str:
    """Of a text attribute, several values parted by a backslash as in the file; '' where it is missing."""
    raw = _raw(ds, keyword)
    value = getattr(raw, "value", None)
    if isinstance(value, bytes) and value.isascii():
        return value.decode().rstrip("\0 ")
    return "\\".join(str(one) for one in many(ds.get(keyword)))


def _count(ds: Any, keyword: str) -> int:
    """Of a US attribute; 0 where it is missing."""
    raw = _raw(ds, keyword)
    value = getattr(raw, "value", None)
    if isinstance(value, bytes) and len(value) == 2:
        return int.from_bytes(value, "little" if raw.is_little_endian else "big")
    return int(ds.get(keyword) or 0)


def many(value: Any) -> list[Any]:
    if value is None:
        return []
    return [value] if isinstance(value, str) or not hasattr(value, "__iter__") else list(value)


def _placed(plane: Slice, place: Any, direction: Any, measures: Any, rescale: Any, numbers: _Numbers) -> Slice:
    """`plane` with its geometry, each group of attributes from the data set that holds it."""
    slope, intercept = numbers.one(rescale, "RescaleSlope"), numbers.one(rescale, "RescaleIntercept")
    return replace(
        plane,
        position=numbers.several(place, "ImagePositionPatient", 3),
        orientation=numbers.several(direction, "ImageOrientationPatient", 6),
        spacing=numbers.several(measures, "PixelSpacing", 2),
        thickness=numbers.one(measures, "SliceThickness"),
        declared_gap=numbers.one(measures, "SpacingBetweenSlices"),
        slope=1.0 if slope is None else slope,
        intercept=intercept or 0.0,
        overlong=numbers.overlong,
        unreadable=numbers.unreadable,
    )


def _frames(ds: Any, plane: Slice, frames: int) -> Iterator[Slice]:
    """Planes of a multi-frame image from its functional groups (PS3.3 C.7.6.16): per frame, else shared."""
    from pydicom import Dataset

    shared = next(iter(ds.get("SharedFunctionalGroupsSequence") or ()), Dataset())
    own = list(ds.get("PerFrameFunctionalGroupsSequence") or ())
    for index in range(frames):
        mine = own[index] if index < len(own) else Dataset()

        def group(name: str, mine: Any = mine) -> Any:
            return next(iter(mine.get(name) or shared.get(name) or ()), Dataset())

        yield _placed(
            replace(plane, frame=index, number=None, expected=None), group("PlanePositionSequence"),
            group("PlaneOrientationSequence"), group("PixelMeasuresSequence"),
            group("PixelValueTransformationSequence"), _Numbers(),
        )  # fmt: skip


class _Numbers:
    """Decimal attributes read from their text. Remembers whether any was over-long, and the first that is no number."""

    def __init__(self) -> None:
        self.overlong = False
        self.unreadable = ""

    def several(self, ds: Any, keyword: str, count: int) -> tuple[float, ...] | None:
        texts = self._texts(ds, keyword)
        if not texts:
            return None
        try:
            values = tuple(float(text) for text in texts)
        except ValueError:
            values = ()
        if len(values) != count or not np.all(np.isfinite(values)):
            self.unreadable = self.unreadable or keyword
            return None
        return values

    def one(self, ds: Any, keyword: str) -> float | None:
        values = self.several(ds, keyword, 1)
        return values[0] if values else None

    def whole(self, ds: Any, keyword: str) -> int | None:
        texts = self._texts(ds, keyword)
        return int(texts[0]) if texts and texts[0].lstrip("+-").isdigit() else None

    def _texts(self, ds: Any, keyword: str) -> list[str]:
        raw = _raw(ds, keyword)
        if raw is None:
            return []
        if raw.VR in (None, "DS", "IS", "UN") and isinstance(raw.value, bytes):
            texts = raw.value.decode("ascii", "replace").strip("\0 ").split("\\")
            self.overlong = self.overlong or any(len(text.rstrip()) > 16 for text in texts)
            texts = [text.strip() for text in texts]
        else:
            texts = [str(value) for value in many(ds[_tag(keyword)].value)]
        return texts if any(texts) else []


# ------------------------------------------------------------------------------------------------ volumes


def assemble(series: Series, threads: int = 1) -> Volume:
    """The series as one regular volume. Raises `RefusedInput` with the finding and its numbers.

    Images at one position are one image where their pixels are equal, and refused where they differ (several echoes,
    phases or time points are several volumes).
    """
    slices, findings = in_order(series)
    stack = geometry.regular(slices, series.digest)
    array, inverted = decode(stack.slices, series.digest, threads)
    findings += [*stack.findings, *inverted]
    header = header_of(stack.slices[0])
    return Volume(array, stack.affine, stack.slices, header, series.digest, series.modality, tuple(findings))


def check(series: Series) -> None:
    """The geometry alone, without decoding more than duplicates. Raises `RefusedInput`."""
    geometry.regular(in_order(series)[0], series.digest)


def in_order(series: Series) -> tuple[list[Slice], list[Finding]]:
    """The series' planes along their normal, one at each place: all that its volume needs but even, straight steps.

    Raises `RefusedInput`.
    """
    slices, findings = geometry.without_localisers(series.slices, series.digest)
    geometry.check_uniform(slices, series.digest)
    slices, mended = _without_duplicates(geometry.ordered(slices), series.digest)
    geometry.check_instances(slices, series.digest)
    return slices, [*findings, *mended]


def sop_class(source: str) -> str:
    """What kind of object a source is; '' where it is not DICOM."""
    try:
        with open_source(source) as file:
            ds = read_dataset(file, ("SOPClassUID",))
    except OSError:
        return ""
    return "" if ds is None else str(ds.get("SOPClassUID", ""))


def header_of(item: Slice) -> Any:
    """The data set of a plane's file, without pixels."""
    with open_source(item.source) as file:
        return read_dataset(file)


def _without_duplicates(slices: list[Slice], about: str) -> tuple[list[Slice], list[Finding]]:
    groups = geometry.same_place(slices)
    if not groups:
        return slices, []
    dropped: set[int] = set()
    differing: list[int] = []
    broken: list[Finding] = []
    for group in groups:
        values: dict[int, np.ndarray] = {}
        for index in group:
            try:
                values[index] = _values(slices[index], _stored(slices[index]))
            except RefusedInput as error:
                broken.append(replace(error.finding, severity="corrected"))
        # A copy that cannot be decoded is dropped where an intact one lies at its place; else decoding refuses it.
        kept = min(values, default=group[0])
        dropped.update(index for index in group if index != kept)
        if any(not np.array_equal(values[kept], value) for value in values.values()):
            differing.append(kept)
    if differing:
        geometry.refuse(
            "DUPLICATE_POSITIONS",
            f"{len(differing)} position(s) hold several images that differ (of {len(groups)} shared).", about,
            "Split the series into its echoes, phases or time points.",
            positions=len(groups), differing=len(differing), at_index=differing[: geometry.LISTED], slices=len(slices),
        )  # fmt: skip
    kept_slices = [item for index, item in enumerate(slices) if index not in dropped]
    sentence = f"{len(dropped)} image(s) lay at a position taken by an equal one and were dropped."
    numbers = {
        "dropped": len(dropped),
        "positions": len(groups),
        "undecodable": len(broken),
        "slices": len(kept_slices),
    }
    return kept_slices, [Finding("DUPLICATES_DROPPED", sentence, "corrected", about, numbers), *broken]


_decoding = threading.local()


def _stored(item: Slice) -> np.ndarray:
    """Stored pixel values of one plane (rows, columns). Raises `RefusedInput` PIXELS_UNREADABLE about the file."""
    if item.native is not None:
        return _plain(item, *item.native)
    frames = _frames_of(item.source, item.digest)
    return frames if item.frame is None or frames.ndim == 2 else frames[item.frame]


def _plain(item: Slice, offset: int, allocated: int, stored: int, signed: bool) -> np.ndarray:
    """Uncompressed pixels straight from their bytes, as pydicom decodes them."""
    size = item.rows * item.columns * allocated // 8
    with open_source(item.source) as file:
        file.seek(offset)
        data = file.read(size)
    if len(data) < size:
        _undecodable("cut off", item.digest)
    pixels = np.frombuffer(data, np.dtype(f"<{'i' if signed else 'u'}{allocated // 8}")).reshape(item.rows, -1)
    unused = allocated - stored
    if unused:  # old files keep overlays there
        pixels = (pixels << unused) >> unused
    return _upright(pixels, item.photometric, stored, signed)


def _undecodable(why: str, about: str) -> NoReturn:
    geometry.refuse(
        "PIXELS_UNREADABLE", f"The pixels of one file cannot be decoded ({why}): truncated, damaged, or in a coding"
        " that is not supported.", about, "Fetch the file again.",
    )  # fmt: skip


def _upright(pixels: np.ndarray, photometric: str, stored: int, signed: bool) -> np.ndarray:
    """MONOCHROME1, where low is bright, turned round."""
    if photometric != "MONOCHROME1":
        return pixels
    ends = -1 if signed else 2**stored - 1  # lowest + highest stored value
    return ends - pixels.astype(np.int32)


def _frames_of(source: str, digest: str) -> np.ndarray:
    # A multi-frame file is decoded once per thread, not once per frame; single frames just replace each other.
    if getattr(_decoding, "digest", None) != digest:
        _decoding.frames, _decoding.digest = _decoded(source, digest), digest
    return np.asarray(_decoding.frames)


def _decoded(source: str, digest: str) -> np.ndarray:
    from pydicom.uid import ImplicitVRLittleEndian

    try:
        with open_source(source) as file:
            ds = read_dataset(file, _PIXELS, pixels=True)
        if ds is None:
            raise ValueError("the data set is broken off")
        if "TransferSyntaxUID" not in ds.file_meta:
            ds.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
        pixels: np.ndarray = ds.pixel_array
    except Exception as error:  # noqa: BLE001 - decoders raise whatever they like on broken bytes
        _undecodable(error.__class__.__name__, digest)
    signed = bool(int(ds.get("PixelRepresentation", 0)))
    return _upright(pixels, str(ds.PhotometricInterpretation), int(ds.get("BitsStored", 16)), signed)


def _values(item: Slice, stored: np.ndarray) -> np.ndarray:
    """Modality values: stored × slope + intercept; whole numbers stay whole."""
    if item.slope == 1.0 and item.intercept == int(item.intercept):
        return stored if item.intercept == 0 else stored.astype(np.int32) + int(item.intercept)
    return (stored * np.float64(item.slope) + item.intercept).astype(np.float32)


def decode(slices: Sequence[Slice], about: str, threads: int) -> tuple[np.ndarray, list[Finding]]:
    """(columns, rows, slices) in modality values; int16 where every plane is whole and fits, else float32."""
    with ThreadPoolExecutor(max(1, threads)) as pool:
        planes = list(pool.map(lambda item: _values(item, _stored(item)), slices))
    _decoding.__dict__.clear()
    limits = np.iinfo(np.int16)
    whole = all(
        np.issubdtype(plane.dtype, np.integer) and plane.min() >= limits.min and plane.max() <= limits.max
        for plane in planes
    )
    array = np.empty((len(planes), *planes[0].shape), dtype=np.int16 if whole else np.float32)
    for index, plane in enumerate(planes):
        array[index] = plane
    inverted = sum(item.photometric == "MONOCHROME1" for item in slices)
    notes = []
    if inverted:
        sentence = f"{inverted} slices are MONOCHROME1 (low is bright); their stored values were turned round."
        notes.append(Finding("MONOCHROME1_INVERTED", sentence, "corrected", about, {"slices": inverted}))
    return array.transpose(2, 1, 0), notes
