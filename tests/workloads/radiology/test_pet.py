"""SUV by body weight: the factor by hand for each way that scanners tell their times, and refusal where they do not."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from permed_compute.errors import RefusedInput
from permed_compute.workloads.radiology import pet, volume_store
from permed_compute.workloads.radiology.volume_store import VolumeStore

from .made import load, write

PET = "1.2.840.10008.5.1.4.1.1.128"
DOSE, HALF_LIFE, WEIGHT = 350e6, 6586.2, 71.5
AFTER_AN_HOUR = WEIGHT * 1000 / (DOSE * 2 ** (-3600 / HALF_LIFE))


def tracer(**change):
    ds = Dataset()
    ds.RadionuclideTotalDose, ds.RadionuclideHalfLife = str(DOSE), str(HALF_LIFE)
    ds.RadiopharmaceuticalStartTime = "093000"
    for name, value in change.items():
        setattr(ds, name, value)
    return ds


def edit(change=None, injected=None):
    def one(k, ds):
        ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = PET
        ds.Modality, ds.Units, ds.DecayCorrection = "PT", "BQML", "START"
        ds.CorrectedImage = ["NORM", "ATTN", "SCAT", "DECY"]
        ds.PatientWeight = str(WEIGHT)
        ds.SeriesDate = ds.AcquisitionDate = "20240105"
        ds.SeriesTime, ds.AcquisitionTime = "103000.000", f"1030{k:02d}"
        ds.RescaleSlope, ds.RescaleIntercept = "2.5", "0"
        ds.RadiopharmaceuticalInformationSequence = Sequence([injected or tracer()])
        for name, value in (change or {}).items():
            setattr(ds, name, value(k) if callable(value) else value)
            if value is None:
                delattr(ds, name)
        return ds

    return one


def suv(folder, **how):
    write(folder, edit=edit(**how))
    return pet.as_suv(load(folder))


def factor(volume):
    return volume.findings[-1].numbers["factor"]


def test_the_dose_is_decayed_to_the_scans_start(tmp_path):
    volume, rescale = suv(tmp_path / "a")
    assert factor(volume) == pytest.approx(AFTER_AN_HOUR, rel=1e-9)
    activity = load(tmp_path / "a").array
    np.testing.assert_allclose(volume.array, activity * AFTER_AN_HOUR, rtol=1e-6)
    assert rescale == pytest.approx((2.5 * AFTER_AN_HOUR, 0.0)) and volume.findings[-1].code == "PET_SUV"
    told = volume_store.write(tmp_path / "a.zarr", volume, inputs=[], rescale=rescale, unit=pet.UNIT)
    store = VolumeStore(tmp_path / "a.zarr")
    assert store.dtype == np.int16 and told["about"]["unit"] == "SUVbw"
    assert np.array_equal(store.volume().array, volume.array)


def test_slopes_that_differ_between_slices_stay_float32(tmp_path):
    volume, rescale = suv(tmp_path / "a", change={"RescaleSlope": lambda k: str(1 + 0.25 * k)})
    assert rescale is None and volume.array.dtype == np.float32
    np.testing.assert_allclose(volume.array, load(tmp_path / "a").array * AFTER_AN_HOUR, rtol=1e-6)


def test_dose_at_administration_is_not_decayed(tmp_path):
    volume, _ = suv(tmp_path / "a", change={"DecayCorrection": "ADMIN"})
    assert factor(volume) == pytest.approx(WEIGHT * 1000 / DOSE)


def test_the_date_time_of_the_injection_counts_first_and_midnight_is_crossed(tmp_path):
    whole = tracer(RadiopharmaceuticalStartDateTime="20240105090000.0", RadiopharmaceuticalStartTime="010203")
    assert suv(tmp_path / "a", injected=whole)[0].findings[-1].numbers["delay_s"] == 5400
    early = {"SeriesTime": "001500", "AcquisitionTime": "001500"}
    late = tracer(RadiopharmaceuticalStartTime="233000")
    assert suv(tmp_path / "b", change=early, injected=late)[0].findings[-1].numbers["delay_s"] == 2700


def test_a_series_time_after_acquisition_gives_way_to_the_frames(tmp_path):
    """Post-processed series: start = acquisition - reference time + time of the mean count rate (QIBA)."""
    change = {"SeriesTime": "155500", "FrameReferenceTime": "90000", "ActualFrameDuration": "180000",
              "AcquisitionTime": "103000"}  # fmt: skip
    volume, _ = suv(tmp_path / "a", change=change)
    constant = math.log(2) / HALF_LIFE
    decay = constant * 180
    mean = math.log(decay / (1 - math.exp(-decay))) / constant
    assert volume.findings[-1].numbers["delay_s"] == pytest.approx(3600 - 90 + mean, abs=1e-5)


def test_ges_own_scan_time_counts_before_the_frames(tmp_path):
    def own(k, ds):
        ds = edit(change={"SeriesTime": "155500"})(k, ds)
        block = ds.private_block(0x0009, "GEMS_PETD_01", create=True)
        block.add_new(0x0D, "DT", "20240105104000.00")
        return ds

    write(tmp_path / "a", edit=own)
    assert pet.as_suv(load(tmp_path / "a"))[0].findings[-1].numbers["delay_s"] == 4200


def test_philips_counts_and_suv_already_there(tmp_path):
    def philips(k, ds):
        ds = edit(change={"Units": "CNTS"})(k, ds)
        ds.private_block(0x7053, "Philips PET Private Group", create=True).add_new(0x00, "DS", "0.000625")
        return ds

    write(tmp_path / "a", edit=philips)
    assert factor(pet.as_suv(load(tmp_path / "a"))[0]) == pytest.approx(0.000625)
    assert factor(suv(tmp_path / "b", change={"Units": "GML"})[0]) == 1


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("PET_UNITS", {"change": {"Units": "PROPCPS"}}),
        ("PET_UNITS", {"change": {"Units": "CNTS"}}),
        ("PET_UNITS", {"change": {"Units": None}}),
        ("PET_NOT_CORRECTED", {"change": {"CorrectedImage": ["NORM", "ATTN"]}}),
        ("PET_NOT_CORRECTED", {"change": {"CorrectedImage": ["DECY"]}}),
        ("PET_NO_WEIGHT", {"change": {"PatientWeight": None}}),
        ("PET_NO_WEIGHT", {"change": {"PatientWeight": "0"}}),
        ("PET_NO_DOSE", {"injected": tracer(RadionuclideTotalDose="0")}),
        ("PET_NO_DOSE", {"injected": tracer(RadionuclideHalfLife=None)}),
        ("PET_NO_DOSE", {"change": {"RadiopharmaceuticalInformationSequence": None}}),
        ("PET_DECAY", {"change": {"DecayCorrection": "NONE"}}),
        ("PET_TIMES", {"injected": tracer(RadiopharmaceuticalStartTime="")}),
        ("PET_TIMES", {"injected": tracer(RadiopharmaceuticalStartDateTime="20230105093000")}),
        ("PET_TIMES", {"injected": tracer(RadiopharmaceuticalStartDateTime="20240105110000")}),
        ("PET_TIMES", {"change": {"SeriesTime": "155500"}}),
    ],
)
def test_what_the_tags_do_not_allow_is_refused(tmp_path, code, how):
    with pytest.raises(RefusedInput) as caught:
        suv(tmp_path / "a", **how)
    assert caught.value.finding.code == code and caught.value.finding.about
