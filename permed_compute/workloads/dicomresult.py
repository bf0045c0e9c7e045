"""What DICOM objects of results have in common: derived UIDs, the source's patient and study, no clock.

The same source, model and parameters give the same bytes: UIDs are derived from them, times are the source's (when a
result was computed stands in the manifest).
"""

from __future__ import annotations

import hashlib
from typing import Any

MANUFACTURER = "permed_compute"

# What a result shares with its source (Patient, Patient Study and General Study modules). Nothing else is copied:
# headers of scanners and converters hold values that DICOM forbids, and private data that no result should carry.
_TEXTS = (
    "PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex", "PatientIdentityRemoved",
    "DeidentificationMethod", "StudyInstanceUID", "StudyDate", "StudyTime", "StudyID", "StudyDescription",
    "AccessionNumber", "ReferringPhysicianName", "PositionReferenceIndicator", "LossyImageCompression",
    "LossyImageCompressionMethod",
)  # fmt: skip
_DECIMALS = ("PatientSize", "PatientWeight", "LossyImageCompressionRatio")
_SEQUENCES = (
    "DeidentificationMethodCodeSequence",
    "IssuerOfAccessionNumberSequence",
    "IssuerOfPatientIDQualifiersSequence",
)
EMPTY_WHERE_MISSING = (
    "PatientName", "PatientID", "PatientBirthDate", "PatientSex", "StudyDate", "StudyTime", "StudyID",
    "AccessionNumber", "ReferringPhysicianName",
)  # fmt: skip


def derived_uid(*parts: str) -> str:
    """A UID below 2.25 (PS3.5 B.2) that the same parts give again: no clock, no chance, nobody's root to register."""
    digest = hashlib.sha256("\x1f".join(parts).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:16], 'big')}"


def copy_patient_and_study(result: Any, header: Any) -> None:
    """As the source's header has them, in UTF-8: files without a character set hold Latin-1 more often than not."""
    from pydicom.valuerep import PersonName

    for keyword in (*_TEXTS, *_SEQUENCES):
        if keyword in header and (keyword != "PositionReferenceIndicator" or "FrameOfReferenceUID" in result):
            result.add(header[keyword])
    for keyword in _DECIMALS:
        values = header.get(keyword)
        if values not in (None, ""):
            many = values if hasattr(values, "__iter__") and not isinstance(values, str) else [values]
            setattr(result, keyword, decimals(many))
    for keyword in ("PatientName", "ReferringPhysicianName"):
        result[keyword].value = PersonName(str(header.get(keyword) or ""))


def decimals(values: Any) -> list[Any]:
    from pydicom.valuerep import DSfloat

    return [DSfloat(float(value), auto_format=True) for value in values]


def series_number(header: Any, kind: int) -> int:
    """The source's series number × 100 + kind (1 SEG, 2 SR, 3 picture), as PACS users know derived series; 9000 + kind
    where it has none that fits."""
    number = header.get("SeriesNumber")
    return int(number) * 100 + kind if str(number or "").isdigit() and int(number) < 10_000_000 else 9000 + kind


def settle(result: Any, header: Any) -> None:
    """Replace what a library takes from the clock: dates and times are those of the images that the result shows."""
    date = str(header.get("SeriesDate") or header.get("StudyDate") or header.get("ContentDate") or "19700101")
    time = str(header.get("SeriesTime") or header.get("StudyTime") or header.get("ContentTime") or "000000")
    result.SeriesDate = result.ContentDate = date
    result.SeriesTime = result.ContentTime = time
    for keyword in ("InstanceCreationDate", "InstanceCreationTime"):
        if keyword in result:
            delattr(result, keyword)
    for item in result.get("ContributingEquipmentSequence", ()):
        item.pop("ContributionDateTime", None)


def settle_dimensions(seg: Any, dimensions: str) -> None:
    for item in (*seg.DimensionIndexSequence, *seg.DimensionOrganizationSequence):
        item.DimensionOrganizationUID = dimensions
