"""Measurements as a DICOM structured report: TID 1500, one group per segment, pointing at the segment it measures.

UNVERIFIED and PRELIMINARY always: a machine wrote it, and no person has signed. The same measurements of the same
volume give the same bytes, as with the SEG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from permed_compute.spec import Purpose
from permed_compute.workloads.dicomresult import (
    MANUFACTURER,
    copy_patient_and_study,
    derived_uid,
    series_number,
    settle,
)
from permed_compute.workloads.radiology.measure import Measurements
from permed_compute.workloads.radiology.outputs import Algorithm, Concept, identification, sources
from permed_compute.workloads.radiology.read import Volume

_PROCEDURES: dict[str, Concept] = {
    "CT": ("25045-6", "LN", "CT Unspecified Body Region"),
    "MR": ("25056-3", "LN", "MRI Unspecified Body Region"),
    "PT": ("44136-0", "LN", "PET Unspecified Body Region"),
}
_ANY: Concept = ("18748-4", "LN", "Diagnostic imaging study")

_VOLUME: Concept = ("118565006", "SCT", "Volume")
_DIAMETER: Concept = ("L0JK", "IBSI", "Maximum 3D Diameter of a Mesh")
_SUV: Concept = ("126401", "DCM", "SUVbw")
_MAXIMUM: Concept = ("56851009", "SCT", "Maximum")
_MEAN: Concept = ("373098007", "SCT", "Mean")
_PEAK: Concept = ("126031", "DCM", "Peak Value Within ROI")
_ML: Concept = ("ml", "UCUM", "milliliter")
_MM: Concept = ("mm", "UCUM", "millimeter")
_G_PER_ML: Concept = ("g/ml{SUVbw}", "UCUM", "Standardized Uptake Value body weight")


def write_report(
    measured: Sequence[Measurements], seg: Any, volume: Volume, path: Path, algorithm: Algorithm, purpose: Purpose
) -> None:
    """`measured[n]` of segment n + 1 of `seg` (the SEG's data set) as Comprehensive 3D SR, a new series in its study.

    Segments without a voxel are left out: there is nothing to measure. Raises `ValueError` where all are empty.
    """
    from highdicom.sr import Comprehensive3DSR, MeasurementReport, ObservationContext

    key = algorithm.key(volume, purpose)
    groups = [
        _group(number, figures, seg, algorithm, key) for number, figures in enumerate(measured, 1) if figures.voxels
    ]
    if not groups:
        raise ValueError("no segment holds a voxel")
    content = MeasurementReport(
        observation_context=ObservationContext(observer_device_context=_observer(algorithm)),
        procedure_reported=_code(_PROCEDURES.get(volume.modality, _ANY)),
        imaging_measurements=groups,
        title=_code(("126000", "DCM", "Imaging Measurement Report")),
    )
    report = Comprehensive3DSR(
        evidence=[*sources(volume), seg],
        content=content[0],
        series_instance_uid=derived_uid("sr-series", *key),
        series_number=series_number(volume.header, 2),
        sop_instance_uid=derived_uid("sr-instance", *key),
        instance_number=1,
        manufacturer=MANUFACTURER,
        is_complete=True,
        is_final=False,
        is_verified=False,
    )
    report.ManufacturerModelName = algorithm.name if purpose is Purpose.CARE else f"{algorithm.name} (research)"
    report.SoftwareVersions = algorithm.version
    report.DeviceSerialNumber = algorithm.digest[:16]
    report.SeriesDescription = algorithm.described("measurements", purpose)
    copy_patient_and_study(report, volume.header)
    settle(report, volume.header)
    report.save_as(path, enforce_file_format=True)


def _code(concept: Concept) -> Any:
    from pydicom.sr.coding import Code

    return Code(*concept)


def _observer(algorithm: Algorithm) -> Any:
    from highdicom.sr import DeviceObserverIdentifyingAttributes, ObserverContext

    return ObserverContext(
        observer_type=_code(("121007", "DCM", "Device")),
        observer_identifying_attributes=DeviceObserverIdentifyingAttributes(
            uid=derived_uid("device", algorithm.name, algorithm.version, algorithm.digest),
            name=algorithm.name,
            manufacturer_name=MANUFACTURER,
            model_name=algorithm.version,
        ),
    )


def _group(number: int, figures: Measurements, seg: Any, algorithm: Algorithm, key: tuple[str, ...]) -> Any:
    from highdicom.sr import (
        AlgorithmIdentification,
        ReferencedSegment,
        SourceSeriesForSegmentation,
        TrackingIdentifier,
        VolumetricROIMeasurementsAndQualitativeEvaluations,
    )

    segment = algorithm.segments[number - 1]
    return VolumetricROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=TrackingIdentifier(
            uid=derived_uid("tracking", *key, str(number)), identifier=f"{segment.label} {number}"
        ),
        referenced_segment=ReferencedSegment(
            sop_class_uid=seg.SOPClassUID,
            sop_instance_uid=seg.SOPInstanceUID,
            segment_number=number,
            source_series=SourceSeriesForSegmentation(seg.ReferencedSeriesSequence[0].SeriesInstanceUID),
        ),
        finding_category=_code(segment.category),
        finding_type=_code(segment.kind),
        algorithm_id=AlgorithmIdentification(
            name=algorithm.name,
            version=algorithm.version,
            parameters=[identification(algorithm)[0].AlgorithmParameters],
        ),
        measurements=_measurements(figures),
    )


def _measurements(figures: Measurements) -> list[Any]:
    from highdicom.sr import Measurement

    rows: list[tuple[Concept, float | None, Concept, Concept | None]] = [
        (_VOLUME, figures.volume_ml, _ML, None),
        (_DIAMETER, figures.diameter_mm, _MM, None),
        (_SUV, figures.suv_max, _G_PER_ML, _MAXIMUM),
        (_SUV, figures.suv_mean, _G_PER_ML, _MEAN),
        (_SUV, figures.suv_peak, _G_PER_ML, _PEAK),
    ]
    return [
        Measurement(
            name=_code(name),
            value=round(value, 4),
            unit=_code(unit),
            derivation=_code(how) if how is not None else None,
        )
        for name, value, unit, how in rows
        if value is not None
    ]
