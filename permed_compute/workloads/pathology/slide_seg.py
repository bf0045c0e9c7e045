"""A label image as DICOM SEG (PS3.3 A.51), tiled, in the frame of reference of the DICOM slide that it was made from.

One binary segment per class, frames of 512 × 512 where it has pixels (TILED_SPARSE), at the model's resolution. Objects
that touch are one segment here: a viewer of SEG shows areas, not numbers. The frames are in memory while the file is
made, so that a slide with more than `MOST_PIXELS` in them gets none, and a finding says so.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import Finding
from permed_compute.spec import Purpose
from permed_compute.workloads.dicomresult import (
    EMPTY_WHERE_MISSING,
    MANUFACTURER,
    copy_patient_and_study,
    derived_uid,
    series_number,
    settle,
    settle_dimensions,
)
from permed_compute.workloads.pathology import labels
from permed_compute.workloads.pathology.merge import Frame
from permed_compute.workloads.pathology.segmenters import Recipe

MOST_PIXELS = 256 << 20
_NOMINAL_MM = 0.001
"""Thickness of a plane where the slide says 0, which the standard does not allow: about a depth of focus."""
_CODES = {"Nucleus": ("84640000", "SCT", "Nucleus")}
_CATEGORY = ("91723000", "SCT", "Anatomical structure")


def write(
    file: Path, frame: Frame, made: Recipe, out: Path, name: str, purpose: Purpose, version: str, source: str
) -> list[Finding]:
    """`out/name` from the label image in `out`; findings where something is left out or was not given.

    file: the slide's instance of level 0. source: the slide's digest, for findings. Empty images give no file.
    """
    import pydicom
    from highdicom import PixelMeasuresSequence, PlaneOrientationSequence
    from highdicom.seg import Segmentation

    found = list(labels.places(out, frame.name))
    if not found:
        return []
    if len(found) * labels.CHUNK**2 > MOST_PIXELS:
        sentence = "The slide has too much segmented area for one DICOM SEG; it has none."
        return [Finding("SEG_LEFT_OUT", sentence, "note", source, {"frames": len(found), "mpp": frame.mpp})]
    header = pydicom.dcmread(file, stop_before_pixels=True)
    findings = _with_origin(header, source)
    pixels = np.stack([labels.chunk(out, frame.name, place) for place in found])
    pixels = pixels.astype(np.uint8) if made.gives == "classes" else (pixels > 0).astype(np.uint8)
    care = purpose is Purpose.CARE
    title = made.name if care else f"{made.name} (research)"
    key = (str(header.SOPInstanceUID), made.digest, version, str(frame.least_um2), purpose.value)
    spacing = frame.mpp / 1000
    seg = Segmentation(
        source_images=[_without_patient(header)],
        pixel_array=pixels,
        segmentation_type="BINARY",
        segment_descriptions=[_segment(item, made, version) for item in frame.classes],
        series_instance_uid=derived_uid("slide-seg-series", *key),
        series_number=series_number(header, 1),
        sop_instance_uid=derived_uid("slide-seg-instance", *key),
        instance_number=1,
        manufacturer=MANUFACTURER,
        manufacturer_model_name=title[:64],
        software_versions=version,
        device_serial_number=made.digest[:16],
        content_label="SEGMENTATION" if care else "RESEARCH_SEG",
        content_description=f"{made.name} at {frame.mpp:g} um per pixel"[:64],
        content_creator_name="permed_compute^",
        series_description=("Slide mask" if care else "RESEARCH slide mask"),
        pixel_measures=PixelMeasuresSequence((spacing, spacing), _thickness(header)),
        plane_orientation=PlaneOrientationSequence("SLIDE", [float(v) for v in header.ImageOrientationSlide]),
        plane_positions=list(_positions(header, found, spacing)),
        dimension_organization_type="TILED_SPARSE",
        omit_empty_frames=True,
    )
    # Frames at the right and lower edge reach beyond the slide; what is meant ends with it.
    seg.TotalPixelMatrixColumns, seg.TotalPixelMatrixRows = frame.size
    if not care:
        seg.ContentQualification = "RESEARCH"
    copy_patient_and_study(seg, header)
    settle(seg, header)
    settle_dimensions(seg, derived_uid("slide-seg-dimensions", *key))
    _complete(seg)
    seg.save_as(out / name, enforce_file_format=True)
    return findings


def _complete(seg: Any) -> None:
    """What the standard asks for and the library takes over as the source has it, which may be not at all."""
    seg.PatientOrientation = None
    if "ContainerIdentifier" in seg and "IssuerOfTheContainerIdentifierSequence" not in seg:
        seg.IssuerOfTheContainerIdentifierSequence = []


def _with_origin(header: Any, source: str) -> list[Finding]:
    """Gives a slide that does not say where its matrix begins the origin (0, 0), and says so."""
    origin = header.get("TotalPixelMatrixOriginSequence")
    if origin and "XOffsetInSlideCoordinateSystem" in origin[0] and "YOffsetInSlideCoordinateSystem" in origin[0]:
        return []
    from pydicom import Dataset

    item = Dataset()
    item.XOffsetInSlideCoordinateSystem, item.YOffsetInSlideCoordinateSystem = "0", "0"
    header.TotalPixelMatrixOriginSequence = [item]
    sentence = "The slide does not say where its pixels begin on the glass; the mask begins at 0, 0 as well."
    return [Finding("NO_ORIGIN", sentence, "corrected", source)]


def _without_patient(header: Any) -> Any:
    """The source for the library, whose warnings quote names, and warnings end in logs."""
    from copy import deepcopy

    copy = deepcopy(header)
    for keyword in EMPTY_WHERE_MISSING:
        setattr(copy, keyword, "")
    return copy


def _thickness(header: Any) -> float:
    shared = header.get("SharedFunctionalGroupsSequence")
    measures = shared[0].get("PixelMeasuresSequence") if shared else None
    return float((measures[0].get("SliceThickness") if measures else 0) or _NOMINAL_MM)


def _positions(header: Any, found: list[tuple[int, int]], spacing: float) -> Iterator[Any]:
    """Of each frame: its corner on the glass in mm and in the matrix, from 1."""
    from highdicom import PlanePositionSequence

    origin, way = header.TotalPixelMatrixOriginSequence[0], [float(v) for v in header.ImageOrientationSlide]
    x0, y0 = float(origin.XOffsetInSlideCoordinateSystem), float(origin.YOffsetInSlideCoordinateSystem)
    z0 = float(origin.get("ZOffsetInSlideCoordinateSystem") or 0)
    for y, x in found:
        # Orientation: the direction of rows (along x), then of columns.
        corner = [base + (way[k] * x + way[k + 3] * y) * spacing for k, base in enumerate((x0, y0, z0))]
        yield PlanePositionSequence("SLIDE", corner, (x + 1, y + 1))


def _segment(item: labels.Named, made: Recipe, version: str) -> Any:
    from highdicom import AlgorithmIdentificationSequence
    from highdicom.color import CIELabColor
    from highdicom.seg import SegmentDescription
    from pydicom.sr.codedict import codes
    from pydicom.sr.coding import Code
    from skimage.color import rgb2lab

    colour: Any = rgb2lab(np.array(item.colour, np.float64).reshape(1, 1, 3) / 255)
    return SegmentDescription(
        segment_number=item.value,
        segment_label=item.name[:64],
        segmented_property_category=Code(*_CATEGORY),
        # Without a code of a public scheme the class is named in our own (99…: PS3.3 8.2).
        segmented_property_type=Code(*_CODES.get(item.name, (f"CLASS{item.value}", "99PERMED", item.name[:64]))),
        algorithm_type="AUTOMATIC",
        algorithm_identification=AlgorithmIdentificationSequence(
            name=made.name[:64],
            version=version,
            family=codes.cid7162.ArtificialIntelligence,
            source=f"sha256:{made.digest[:48]}",
        ),
        display_color=CIELabColor(*(float(v) for v in colour[0, 0])),
    )
