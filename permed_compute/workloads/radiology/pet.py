"""PET to standardised uptake values by body weight, decay-corrected (QIBA's vendor-neutral SUV computation, 2012).

    SUVbw = activity (Bq/ml) × weight (g) / dose at the reference time (Bq)

The reference time is the injection's (DecayCorrection ADMIN) or the scan's start (START), to which the dose is decayed.
Where a tag that this needs is missing or impossible the series is refused: a wrong factor looks like a real finding.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import numpy as np

from permed_compute.errors import Finding
from permed_compute.workloads.radiology import geometry, read
from permed_compute.workloads.radiology.read import Volume

UNIT = "SUVbw"
MOST_DELAY_S = 12 * 3600.0
"""Scans do not begin later after the injection; a longer delay is a wrong date."""
WEIGHT_KG = (0.3, 400.0)
_GE_SCAN_TIME = (0x0009, 0x100D)
_GE_CREATOR = (0x0009, 0x0010)
_PHILIPS_FACTOR = (0x7053, 0x1000)


def as_suv(volume: Volume) -> tuple[Volume, tuple[float, float] | None]:
    """The volume in SUVbw (float32), and the rescale that its stored integers have, where all slices share one.

    Raises `RefusedInput` PET_NO_HEADER, PET_NOT_CORRECTED, PET_UNITS, PET_NO_WEIGHT, PET_NO_DOSE, PET_DECAY, PET_TIMES.
    """
    about = volume.series
    if volume.header is None or not volume.slices:
        geometry.refuse("PET_NO_HEADER", "The volume has no DICOM header to compute SUV from.", about)
    # A multi-frame file is one header, however many planes it holds.
    once = {item.source: item for item in volume.slices}
    factor, numbers = factor_of([volume.header, *(read.header_of(item) for item in list(once.values())[1:])], about)
    rescales = {(item.slope, item.intercept) for item in volume.slices}
    whole = None
    if len(rescales) == 1:
        slope, intercept = rescales.pop()
        stored = np.rint((volume.array.astype(np.float64) - intercept) / slope)
        whole = (slope * factor, intercept * factor)
        values = (stored * np.float64(whole[0]) + whole[1]).astype(np.float32)
    else:
        values = (volume.array * np.float64(factor)).astype(np.float32)
    sentence = f"Activity was turned into SUV by body weight (factor {factor:.6g})."
    finding = Finding("PET_SUV", sentence, "corrected", about, numbers)
    return replace(volume, array=values, findings=(*volume.findings, finding)), whole


def factor_of(headers: Sequence[Any], about: str) -> tuple[float, dict[str, Any]]:
    """What stored activity is multiplied by, and the numbers that it came from. headers: one per file of the series."""
    first = headers[0]
    units = str(first.get("Units", "")).upper()
    if units == "GML" and str(first.get("SUVType", "BW") or "BW").upper() == "BW":
        return 1.0, {"units": units, "factor": 1.0}
    if units == "CNTS" and _private(first, _PHILIPS_FACTOR) > 0:
        factor = _private(first, _PHILIPS_FACTOR)
        return factor, {"units": units, "factor": factor}
    if units != "BQML":
        geometry.refuse(
            "PET_UNITS", f"Units is {units or 'not there'}; SUV needs BQML, GML, or CNTS with Philips' own factor.",
            about, "Write `params: {pet: stored}` to keep the values as they are.", units=units,
        )  # fmt: skip
    corrected = {str(step).upper() for step in read.many(first.get("CorrectedImage"))}
    if not {"ATTN"} <= corrected or not corrected & {"DECY", "DECAY"}:
        geometry.refuse(
            "PET_NOT_CORRECTED", "CorrectedImage lacks attenuation (ATTN) or decay (DECY) correction.", about,
            corrected=sorted(corrected),
        )  # fmt: skip
    weight = _number(first, "PatientWeight")
    if not WEIGHT_KG[0] <= weight <= WEIGHT_KG[1]:
        geometry.refuse(
            "PET_NO_WEIGHT", "PatientWeight is missing or impossible.", about, weight_kg=_told(weight),
            remedy="Enter the weight at the scanner's archive and export again.",
        )  # fmt: skip
    decayed, numbers = _dose(headers, about)
    factor = weight * 1000 / decayed
    return factor, {**numbers, "weight_kg": weight, "factor": factor}


def _dose(headers: Sequence[Any], about: str) -> tuple[float, dict[str, Any]]:
    """Bq at the time to which the pixels are decay-corrected."""
    first = headers[0]
    tracer = next(iter(first.get("RadiopharmaceuticalInformationSequence") or ()), None)
    dose, half_life = (_number(tracer, name) for name in ("RadionuclideTotalDose", "RadionuclideHalfLife"))
    if not dose > 0 or not half_life > 0:
        geometry.refuse(
            "PET_NO_DOSE", "RadionuclideTotalDose or RadionuclideHalfLife is missing or not above zero.", about,
            dose_bq=_told(dose), half_life_s=_told(half_life),
        )  # fmt: skip
    told = {"dose_bq": dose, "half_life_s": half_life}
    how = str(first.get("DecayCorrection", "")).upper()
    if how == "ADMIN":
        return dose, told
    if how != "START":
        geometry.refuse("PET_DECAY", f"DecayCorrection is {how or 'not there'}, not START or ADMIN.", about)
    start = _scan_start(headers, half_life, about)
    injected = _injection(first, tracer, start, about)
    delay = (start - injected).total_seconds()
    if not 0 <= delay <= MOST_DELAY_S:
        geometry.refuse(
            "PET_TIMES", f"The scan begins {delay:.0f} s after the injection, which cannot be.", about,
            "Check dates and times; de-identification must shift all by the same.", delay_s=delay,
        )  # fmt: skip
    return dose * 2 ** (-delay / half_life), {**told, "delay_s": delay}


def _scan_start(headers: Sequence[Any], half_life: float, about: str) -> datetime:
    """The series' time where it is not after any acquisition, else what the frames or GE's own tag say."""
    series = _moment(headers[0], "Series")
    acquired = [moment for moment in (_moment(ds, "Acquisition") for ds in headers) if moment is not None]
    if series is not None and acquired and series <= min(acquired):
        return series
    ge = headers[0].get(_GE_SCAN_TIME)
    if ge is not None and "GEMS_PETD_01" in str(getattr(headers[0].get(_GE_CREATOR), "value", "")):
        moment = _parsed(_text(ge.value))
        if moment is not None:
            return moment
    starts = [moment for moment in (_start_of_frame(ds, half_life) for ds in headers) if moment is not None]
    if not starts:
        geometry.refuse(
            "PET_TIMES", "Neither series nor acquisition times tell when the scan began.", about, files=len(headers)
        )
    return min(starts)


def _start_of_frame(ds: Any, half_life: float) -> datetime | None:
    """The scan's start by one frame: acquisition time less FrameReferenceTime plus the time of its mean count rate."""
    acquired, reference, lasts = (
        _moment(ds, "Acquisition"), _number(ds, "FrameReferenceTime"), _number(ds, "ActualFrameDuration"),
    )  # fmt: skip
    if acquired is None or not reference >= 0 or not lasts > 0:
        return None
    constant = math.log(2) / half_life
    decay = constant * lasts / 1000
    return acquired - timedelta(seconds=reference / 1000) + timedelta(
        seconds=math.log(decay / -math.expm1(-decay)) / constant
    )  # fmt: skip


def _injection(first: Any, tracer: Any, start: datetime, about: str) -> datetime:
    moment = _parsed(_text(tracer.get("RadiopharmaceuticalStartDateTime")))
    if moment is not None:
        return moment
    clock = _text(tracer.get("RadiopharmaceuticalStartTime"))
    moment = _parsed(start.strftime("%Y%m%d") + clock) if clock else None
    if moment is None:
        geometry.refuse("PET_TIMES", "The time of the injection is missing.", about)
    return moment if moment <= start else moment - timedelta(days=1)  # before midnight


def _moment(ds: Any, what: str) -> datetime | None:
    whole = _parsed(_text(ds.get(f"{what}DateTime")))
    date, clock = _text(ds.get(f"{what}Date")), _text(ds.get(f"{what}Time"))
    return whole or (_parsed(date + clock) if date and clock else None)


def _parsed(text: str) -> datetime | None:
    """DICOM DT or DA + TM, to the microsecond; a UTC offset is dropped: all of a series have one."""
    digits, _, fraction = text.partition("+")[0].partition("-")[0].strip().partition(".")
    try:
        moment = datetime.strptime(digits[:14].ljust(14, "0"), "%Y%m%d%H%M%S")
    except ValueError:
        return None
    return moment + timedelta(microseconds=int((fraction or "0").ljust(6, "0")[:6])) if len(digits) >= 10 else None


def _text(value: Any) -> str:
    return value.decode("ascii", "replace").strip("\0 ") if isinstance(value, bytes) else str(value or "").strip()


def _number(ds: Any, name: str) -> float:
    try:
        value = None if ds is None else ds.get(name)
        return float(value) if value not in (None, "") else math.nan
    except (TypeError, ValueError):
        return math.nan


def _private(ds: Any, tag: tuple[int, int]) -> float:
    element = ds.get(tag)
    value = getattr(element, "value", None)
    values: Iterable[Any] = read.many(value) if not isinstance(value, bytes) else [_text(value)]
    try:
        return float(next(iter(values)))
    except (StopIteration, TypeError, ValueError):
        return math.nan


def _told(value: float) -> float | None:
    return None if math.isnan(value) else value
