"""A mask or label map as DICOM SEG, NIfTI and one picture, all in the geometry of the source series.

The same source, model and parameters give the same bytes: UIDs are derived from them, times are the source's (the
content's moment is that of the images it shows; when it was computed stands in the manifest), gzip carries no clock.
"""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.spec import Purpose
from permed_compute.workloads.dicomresult import (
    EMPTY_WHERE_MISSING,
    MANUFACTURER,
    copy_patient_and_study,
    decimals,
    derived_uid,
    series_number,
    settle,
    settle_dimensions,
)
from permed_compute.workloads.radiology.read import Volume

_CHROMA = float(np.hypot(45, 40))

Coding = Literal["BINARY", "LABELMAP"]
"""How a SEG holds its pixels. BINARY is what every viewer reads; LABELMAP (2024) is small with many segments."""
Concept = tuple[str, str, str]
"""(code value, coding scheme, meaning), e.g. SNOMED CT."""


@dataclass(frozen=True, slots=True)
class Segment:
    """One structure: what it is called and, in codes, what it is."""

    label: str
    kind: Concept
    category: Concept = ("91723000", "SCT", "Anatomical structure")


BRAIN = Segment("Brain", ("12738006", "SCT", "Brain"))


@dataclass(frozen=True, slots=True)
class Algorithm:
    """What made the mask. `digest` is the model's, `parameters` text that a reader can repeat it from.

    label: of the result as a whole. segments: label n of a label map is segment n, from 1.
    """

    name: str
    version: str
    digest: str
    parameters: str
    label: str = "Brain"
    segments: tuple[Segment, ...] = (BRAIN,)

    def key(self, volume: Volume, purpose: Purpose) -> tuple[str, str, str, str]:
        """What the UIDs of every result of this algorithm on that volume are derived from."""
        return volume.series, self.digest, self.parameters, purpose.value

    def described(self, what: str, purpose: Purpose) -> str:
        """A series description: what it is, and that it is research where it is not for care."""
        return (f"{self.label} {what}" if purpose is Purpose.CARE else f"RESEARCH {self.label} {what}")[:64]


# ------------------------------------------------------------------------------------------------ NIfTI


def write_nifti(mask: np.ndarray, volume: Volume, path: Path) -> None:
    """`mask` (shape of `volume.array`) as uint8 NIfTI-1, gzipped; sform and qform are the source's affine in RAS.

    NIfTI-1 keeps the affine in float32: it equals the source's to that precision (below 1e-5 mm at 200 mm).
    """
    import nibabel

    image: Any = nibabel.Nifti1Image(np.asfortranarray(mask, dtype=np.uint8), volume.affine_ras)  # type: ignore[no-untyped-call]
    image.set_sform(volume.affine_ras, code=1)
    image.set_qform(volume.affine_ras, code=1)
    image.header.set_xyzt_units("mm")
    with path.open("wb") as file, gzip.GzipFile("", "wb", compresslevel=6, fileobj=file, mtime=0) as packed:
        packed.write(image.to_bytes())


# ------------------------------------------------------------------------------------------------ DICOM SEG


def write_seg(
    mask: np.ndarray, volume: Volume, path: Path, algorithm: Algorithm, purpose: Purpose, coding: Coding = "BINARY"
) -> None:
    """`mask` (shape of `volume.array`, bool or labels 0 … number of segments) as DICOM SEG (PS3.3 A.51), a new series.

    A single segment has one frame per source slice, empty ones too, so that the frames alone give the whole geometry
    back; of several, the empty frames are left out. Anything that is not for care says so in its labels and in
    ContentQualification. Raises `WorkloadError` where the mask holds a label without a segment.
    """
    from highdicom import PlaneOrientationSequence, PlanePositionSequence
    from highdicom.seg import Segmentation

    count = len(algorithm.segments)
    if int(mask.max(initial=0)) > count:
        raise WorkloadError(f"The mask holds label {int(mask.max())}; {count} segment(s) are described.")
    key = algorithm.key(volume, purpose) + (() if coding == "BINARY" else (coding,))
    care = purpose is Purpose.CARE
    label = re.sub(r"[^A-Z0-9_ ]", "_", algorithm.label.upper())
    pixels = mask.transpose(2, 1, 0).astype(np.uint8 if count < 256 else np.uint16)
    seg = Segmentation(
        source_images=sources(volume),
        pixel_array=np.ascontiguousarray(pixels),
        segmentation_type=coding,
        segment_descriptions=[_segment(number, item, algorithm) for number, item in enumerate(algorithm.segments, 1)],
        series_instance_uid=derived_uid("seg-series", *key),
        series_number=series_number(volume.header, 1),
        sop_instance_uid=derived_uid("seg-instance", *key),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=algorithm.name if care else f"{algorithm.name} (research)",
        software_versions=algorithm.version,
        device_serial_number=algorithm.digest[:16],
        content_label=(label if care else f"RESEARCH_{label}")[:16],
        content_description=f"{algorithm.label} by {algorithm.name} {algorithm.version}"[:64],
        content_creator_name="permed_compute^",
        series_description=algorithm.described("mask", purpose),
        pixel_measures=_measures(volume),
        plane_orientation=PlaneOrientationSequence("PATIENT", _given(volume.slices[0].orientation)),
        plane_positions=[PlanePositionSequence("PATIENT", _given(item.position)) for item in volume.slices],
        omit_empty_frames=coding == "BINARY" and count > 1 and bool(mask.any()),
    )
    if not care:
        seg.ContentQualification = "RESEARCH"
    copy_patient_and_study(seg, volume.header)
    settle(seg, volume.header)
    settle_dimensions(seg, derived_uid("seg-dimensions", *key))
    seg.save_as(path, enforce_file_format=True)


def identification(algorithm: Algorithm) -> Any:
    """The algorithm as SEG and SR name it (PS3.3 10.15)."""
    from highdicom import AlgorithmIdentificationSequence
    from pydicom.sr.codedict import codes

    sequence = AlgorithmIdentificationSequence(
        name=algorithm.name,
        version=algorithm.version,
        family=codes.cid7162.ArtificialIntelligence,
        source=f"sha256:{algorithm.digest[:48]}",
    )
    sequence[0].AlgorithmParameters = algorithm.parameters
    return sequence


def _segment(number: int, segment: Segment, algorithm: Algorithm) -> Any:
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.coding import Code

    # Golden angle round the colour wheel: neighbours differ, a number keeps its colour, 1 is warm red.
    angle = np.arctan2(40, 45) + np.radians(137.508) * (number - 1)
    return SegmentDescription(
        segment_number=number,
        segment_label=segment.label,
        segmented_property_category=Code(*segment.category),
        segmented_property_type=Code(*segment.kind),
        algorithm_type="AUTOMATIC",
        algorithm_identification=identification(algorithm),
        display_color=CIELabColor(65.0, _CHROMA * float(np.cos(angle)), _CHROMA * float(np.sin(angle))),
    )


def _measures(volume: Volume) -> Any:
    from highdicom import PixelMeasuresSequence

    first = volume.slices[0]
    gap = volume.spacing[2]
    return PixelMeasuresSequence(
        pixel_spacing=_given(first.spacing), slice_thickness=first.thickness or gap, spacing_between_slices=gap
    )


def _given(values: tuple[float, ...] | None) -> tuple[float, ...]:
    assert values is not None, "an assembled volume has its geometry"
    return values


def sources(volume: Volume) -> list[Any]:
    """The source images as the library must know them: references and geometry, decimal texts written anew.

    One data set per slice; one for all where the source is a multi-frame image. Without the patient: the library's
    warnings quote names, and warnings end in logs.
    """
    if volume.slices[0].frame is None:
        return [_reference(volume, k) for k in range(len(volume.slices))]
    ds = _reference(volume, 0)
    for keyword in ("NumberOfFrames", "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        ds.add(volume.header[keyword])
    return [ds]


def _reference(volume: Volume, k: int) -> Any:
    from pydicom import Dataset

    item = volume.slices[k]
    ds = Dataset()
    for keyword in EMPTY_WHERE_MISSING:
        setattr(ds, keyword, "")
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID, ds.SOPInstanceUID = item.sop_class, item.sop_instance
    ds.StudyInstanceUID = str(volume.header.get("StudyInstanceUID") or "")
    ds.SeriesInstanceUID = str(volume.header.get("SeriesInstanceUID") or "")
    ds.FrameOfReferenceUID = item.frame_of_reference or derived_uid("frame-of-reference", volume.series)
    ds.Modality, ds.Rows, ds.Columns = volume.modality, item.rows, item.columns
    if item.frame is None:
        ds.ImagePositionPatient = decimals(_given(item.position))
        ds.ImageOrientationPatient = decimals(_given(item.orientation))
        ds.PixelSpacing = decimals(_given(item.spacing))
        (ds.SliceThickness,) = decimals([item.thickness or volume.spacing[2]])
    return ds


# ------------------------------------------------------------------------------------------------ picture


def write_overlay(mask: np.ndarray, volume: Volume, path: Path) -> None:
    """Three orthogonal cuts through the mask's middle with its outline, in true proportions, as PNG. No text at all.

    Seen as radiologists do: the patient's left is on the right, front and head are up.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grey, brain, spacing = volume.to_ras(volume.array), volume.to_ras(mask), volume.spacing_ras
    middle = [round(float(points.mean())) for points in np.nonzero(brain)] if brain.any() else []
    middle = middle or [length // 2 for length in grey.shape]
    low, high = np.percentile(grey[:: max(1, grey.shape[0] // 64)], (1, 99.5))
    figure = Figure(figsize=(12, 4.2), dpi=100, facecolor="black")
    FigureCanvasAgg(figure)
    # RAS: x to the right, y to the front, z to the head. Axial and coronal show x reversed (left on the right).
    for place, (axis, across, up) in enumerate(((2, 0, 1), (1, 0, 2), (0, 1, 2))):
        axes = figure.add_axes((place / 3 + 0.005, 0.01, 1 / 3 - 0.01, 0.98))
        cut = np.take(grey, middle[axis], axis=axis).T
        outline = np.take(brain, middle[axis], axis=axis).T
        extent = (0.0, grey.shape[across] * spacing[across], 0.0, grey.shape[up] * spacing[up])
        axes.imshow(
            cut, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), origin="lower", extent=extent, aspect="equal"
        )
        if outline.any() and not outline.all():
            axes.contour(outline, levels=[0.5], colors=["#ff5a36"], linewidths=1.2, extent=extent, origin="lower")
        if across == 0:
            axes.invert_xaxis()
        axes.set_axis_off()
    figure.savefig(path, format="png", facecolor="black", metadata={"Software": None})
