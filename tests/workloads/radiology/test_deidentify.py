"""De-identification: a planted set of identifiers leaves none, the same key gives the same answers, doubt refuses."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.datadict import dictionary_VR
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from permed_compute.errors import NotFoundError, PermissionDeniedError, RefusedInput, WorkloadError
from permed_compute.workloads.radiology import deidentify, read
from permed_compute.workloads.radiology.deidentify import Deidentifier, require_clean

from .made import plane, sha256, write

KEY, OTHER = b"k" * 32, b"o" * 32
NAME, NUMBER, BORN = "Zephyrine", "07077712345", "19610307"
UID = "1.3.6.1.4.1.99999.4711"
PLANTED = (NAME, "Quillfeather", NUMBER, "ACC0815X", BORN, "19980501", UID, "Station66")


def planted(vr: str) -> object:
    """A value of that VR which gives the patient away, or None where the VR can hold none."""
    texts = {
        "PN": f"Quillfeather^{NAME}", "LO": f"{NAME} {NUMBER}", "SH": "ACC0815X", "ST": f"{NAME} says", "LT": NAME,
        "UT": f"of {NAME}", "UC": NAME, "CS": "STATION66", "AE": "Station66", "AS": "065Y", "DA": "19980501",
        "DT": "19980501120000", "TM": "120000", "UI": f"{UID}.7", "UR": f"http://x/{NAME}", "DS": "1", "IS": "1",
        "OB": NAME.encode() + b" ", "UN": NAME.encode() + b" ",
    }  # fmt: skip
    return texts.get(vr)


def full_of_identifiers() -> Dataset:
    """An MR slice with a planted value in every attribute of table E.1-1, in private ones, and three sequences down."""
    ds = plane(0)
    ds.PatientName, ds.PatientID, ds.PatientBirthDate = f"Quillfeather^{NAME}", NUMBER, BORN
    ds.AccessionNumber, ds.StudyDate, ds.StudyTime = "ACC0815X", "19980501", "101500"
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SOPInstanceUID = f"{UID}.1", f"{UID}.2", f"{UID}.3"
    ds.file_meta.MediaStorageSOPInstanceUID = f"{UID}.3"
    ds.file_meta.SourceApplicationEntityTitle = "Station66"
    ds.file_meta.PrivateInformationCreatorUID = f"{UID}.9"
    ds.file_meta.PrivateInformation = NAME.encode() + b" "
    ds.preamble = NAME.encode().ljust(128, b"\0")
    exact, _ = deidentify._table()
    for number in exact:
        tag = Tag(number)
        if tag.is_private or tag in ds or tag.group < 8:
            continue
        try:
            value = planted(dictionary_VR(tag))
        except KeyError:
            continue
        if value is not None:
            ds.add_new(tag, dictionary_VR(tag), value)
    ds.Manufacturer = f"Maker for {NAME}"  # kept by the profile
    ds.SequenceName = f"*{NUMBER}"
    ds.ConvolutionKernel = "STANDARD"
    ds.add_new(0x00091001, "LO", NAME)
    ds.private_block(0x0029, "ACME", create=True).add_new(0x01, "PN", f"Quillfeather^{NAME}")
    ds.add_new(0x00180003, "LO", f"{NAME} in an attribute that no dictionary knows")
    ds.add_new(0x60000010, "US", 8)
    ds.add_new(0x60000022, "LO", NAME)
    ds.add_new(0x60003000, "OB", NAME.encode() + b" ")
    deepest = Dataset()
    deepest.PatientName, deepest.ReferencedSOPInstanceUID = f"Quillfeather^{NAME}", f"{UID}.3"
    deepest.ReferencedSOPClassUID = ds.SOPClassUID
    deepest.AcquisitionDateTime = "19980501120000.5+0100"
    deepest.add_new(0x00111010, "LO", NAME)
    middle, outer = Dataset(), Dataset()
    middle.SourceImageSequence = [deepest]
    middle.TextValue = f"seen by {NAME}"
    outer.ReferencedImageSequence = [middle]
    ds.ReferencedImageSequence = [outer]
    return ds


def saved(ds: Dataset) -> bytes:
    file = io.BytesIO()
    ds.save_as(file, enforce_file_format=True)
    return file.getvalue()


@pytest.mark.filterwarnings("ignore")
def test_the_planted_set_leaves_none():
    before = full_of_identifiers()
    assert len(before) > 300
    raw = saved(before)
    assert all(word.encode() in raw for word in PLANTED)
    done = Deidentifier(KEY).apply(dcmread(io.BytesIO(raw)))
    left = saved(done.dataset)
    assert [word for word in PLANTED if word.encode().lower() in left.lower()] == []
    assert not any(element.tag.is_private for element in done.dataset.iterall())
    assert [finding.code for finding in done.findings] == ["IDENTIFIER_IN_KEPT_TEXT"]
    assert NAME not in str(done.findings) and done.findings[0].numbers["attributes"] == 3
    assert done.dataset.ConvolutionKernel == "STANDARD"
    assert np.array_equal(done.dataset.pixel_array, plane(0).pixel_array)
    require_clean(dcmread(io.BytesIO(left)))


def test_the_method_is_written_as_codes():
    ds = Deidentifier(KEY, keep_characteristics=True).apply(plane(0)).dataset
    assert ds.PatientIdentityRemoved == "YES" and "PS3.15" in ds.DeidentificationMethod
    codes = [(i.CodeValue, i.CodingSchemeDesignator) for i in ds.DeidentificationMethodCodeSequence]
    assert codes == [("113100", "DCM"), ("113107", "DCM"), ("113108", "DCM")]
    assert ds.LongitudinalTemporalInformationModified == "MODIFIED"


def study(key: bytes) -> list[Dataset]:
    by = Deidentifier(key)
    slices = [plane(k) for k in range(3)]
    for k, ds in enumerate(slices):
        ds.StudyDate, ds.AcquisitionDate = "20200101", f"202002{k + 1:02d}"
        ds.ReferencedImageSequence = [Dataset()]
        ds.ReferencedImageSequence[0].ReferencedSOPInstanceUID = slices[0].SOPInstanceUID
    return [by.apply(ds).dataset for ds in slices]


def test_references_still_meet_and_intervals_are_kept():
    first, second, third = study(KEY)
    assert first.StudyInstanceUID == third.StudyInstanceUID != plane(0).StudyInstanceUID
    assert len({ds.SOPInstanceUID for ds in (first, second, third)}) == 3
    assert third.ReferencedImageSequence[0].ReferencedSOPInstanceUID == first.SOPInstanceUID
    assert (
        first.SOPClassUID == plane(0).SOPClassUID and first.file_meta.MediaStorageSOPInstanceUID == first.SOPInstanceUID
    )
    days = [deidentify.date.fromisoformat(ds.AcquisitionDate) for ds in (first, second, third)]
    assert (days[2] - days[0]).days == 2
    study_day = deidentify.date.fromisoformat(first.StudyDate)
    assert (days[0] - study_day).days == 31 and study_day < deidentify.date(2020, 1, 1)


def test_the_mapping_is_stable_under_one_key_and_unrelated_under_another():
    def names(datasets):
        return [(d.PatientID, d.StudyInstanceUID, d.SeriesInstanceUID, d.SOPInstanceUID, d.StudyDate) for d in datasets]

    one, again, other = names(study(KEY)), names(study(KEY)), names(study(OTHER))
    assert one == again
    assert not set(sum(one, ())) & set(sum(other, ()))
    by, unlike = Deidentifier(KEY), Deidentifier(OTHER)
    shifts = [(by.shift_days(f"p{n}"), unlike.shift_days(f"p{n}")) for n in range(2000)]
    assert all(-deidentify.LONGEST_SHIFT_DAYS <= days < 0 for pair in shifts for days in pair)
    assert abs(np.corrcoef(np.array(shifts).T)[0, 1]) < 0.1
    assert len({by.uid(f"1.2.3.{n}") for n in range(2000)} | {unlike.uid(f"1.2.3.{n}") for n in range(2000)}) == 4000


def test_patients_are_told_apart_by_issuer_and_one_patient_keeps_one_shift():
    by = Deidentifier(KEY)
    here, there = plane(0), plane(0)
    here.IssuerOfPatientID, there.IssuerOfPatientID = "Oslo", "Bergen"
    assert by.apply(here).subject != by.apply(there).subject
    assert by.shift_days("x") == by.shift_days("x") != by.shift_days("y")


def with_(**values: object) -> Dataset:
    ds = plane(0)
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


def secondary_capture(**values: object) -> Dataset:
    ds = with_(SOPClassUID="1.2.840.10008.5.1.4.1.1.7", **values)
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
    return ds


@pytest.mark.parametrize(
    ("ds", "code"),
    [
        (with_(BurnedInAnnotation="YES"), "BURNED_IN_ANNOTATION"),
        (with_(RecognizableVisualFeatures="YES"), "RECOGNISABLE_FEATURES"),
        (with_(ImageType=["DERIVED", "SECONDARY", "SCREEN SAVE"]), "BURNED_IN_UNKNOWN"),
        (secondary_capture(), "BURNED_IN_UNKNOWN"),
        (secondary_capture(BurnedInAnnotation="MAYBE"), "BURNED_IN_UNKNOWN"),
        (with_(SOPClassUID="1.2.840.10008.5.1.4.1.1.88.67"), "NOT_AN_IMAGE"),
        (with_(SOPClassUID="1.2.840.10008.5.1.4.1.1.104.1"), "NOT_AN_IMAGE"),
        (with_(PatientID="", StudyInstanceUID=""), "NO_SUBJECT"),
    ],
)
def test_what_may_show_a_person_is_refused(ds, code):
    with pytest.raises(RefusedInput) as caught:
        Deidentifier(KEY).apply(ds, "5e5e")
    assert caught.value.finding.code == code and caught.value.finding.about == "5e5e"


def test_vouching_helps_where_the_file_is_silent_and_never_where_it_says_yes():
    by = Deidentifier(KEY, vouched=True)
    by.apply(secondary_capture())
    Deidentifier(KEY).apply(secondary_capture(BurnedInAnnotation="NO"))
    with pytest.raises(RefusedInput, match="BURNED_IN_ANNOTATION"):
        by.apply(with_(BurnedInAnnotation="YES"))


def test_dates_that_are_none_are_emptied_and_characteristics_stay_only_when_asked():
    odd = {"StudyDate": "1.1.90", "PatientAge": "093Y", "PatientWeight": "71.5", "PatientSex": "F"}
    plain = Deidentifier(KEY).apply(with_(**odd)).dataset
    kept = Deidentifier(KEY, keep_characteristics=True).apply(with_(**odd)).dataset
    assert plain.StudyDate == "" and "PatientWeight" not in plain and "PatientAge" not in plain and not plain.PatientSex
    assert (float(kept.PatientWeight), kept.PatientSex, kept.PatientAge) == (71.5, "F", "090Y")
    assert kept.PatientBirthDate in ("", None)
    require_clean(kept)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda ds: setattr(ds, "PatientIdentityRemoved", "NO"),
        lambda ds: delattr(ds, "DeidentificationMethodCodeSequence"),
        lambda ds: setattr(ds, "PatientBirthDate", "19610307"),
        lambda ds: setattr(ds, "OtherPatientIDs", "1"),
        lambda ds: ds.private_block(0x0029, "ACME", create=True).add_new(1, "LO", "x"),
    ],
)
def test_what_is_not_clean_is_not_taken_for_clean(spoil):
    ds = Deidentifier(KEY).apply(plane(0)).dataset
    require_clean(ds)
    spoil(ds)
    with pytest.raises(RefusedInput, match="NOT_DEIDENTIFIED"):
        require_clean(ds)


def test_a_folder_of_good_and_bad_files(tmp_path):
    write(tmp_path / "in", count=3)
    with_(BurnedInAnnotation="YES").save_as(tmp_path / "in" / "a-marked", enforce_file_format=True)
    (tmp_path / "in" / "b-garbage").write_bytes(b"not dicom")
    (tmp_path / "in" / "c-truncated").write_bytes((tmp_path / "in" / "IM000").read_bytes()[:200])
    by = Deidentifier(KEY)
    rows = list(deidentify.deidentify(read.find(tmp_path / "in"), tmp_path / "out", by, sha256, threads=2))
    assert sum(bool(row.file) for row in rows) == 3 == len(list((tmp_path / "out").rglob("*.dcm")))
    assert sorted(f.code for row in rows for f in row.findings) == ["BURNED_IN_ANNOTATION", "NOT_AN_IMAGE", "NOT_DICOM"]
    assert all(row.digest for row in rows) and "marked" not in repr(rows)
    again = list(deidentify.deidentify(read.find(tmp_path / "in"), tmp_path / "out", by, sha256))
    assert [row.file for row in again] == [row.file for row in rows] and sum(row.already for row in again) == 3
    (series,) = read.scan(read.find(tmp_path / "out"), sha256).series
    assert np.array_equal(read.assemble(series).array, _volume_of(tmp_path / "in"))


def _volume_of(folder: Path) -> np.ndarray:
    (series,) = read.scan([str(path) for path in sorted(folder.glob("IM*"))], sha256).series
    return read.assemble(series).array


def test_keys_are_private_files(tmp_path):
    deidentify.new_key(tmp_path / "k" / "site.key")
    key = deidentify.read_key(tmp_path / "k" / "site.key")
    assert len(key) == 32 and oct((tmp_path / "k" / "site.key").stat().st_mode)[-3:] == "600"
    with pytest.raises(PermissionDeniedError, match="not overwritten"):
        deidentify.new_key(tmp_path / "k" / "site.key")
    (tmp_path / "k" / "site.key").chmod(0o640)
    with pytest.raises(PermissionDeniedError, match="Others"):
        deidentify.read_key(tmp_path / "k" / "site.key")
    with pytest.raises(NotFoundError):
        deidentify.read_key(tmp_path / "none")
    (tmp_path / "short").write_text("abcd")
    (tmp_path / "short").chmod(0o600)
    with pytest.raises(WorkloadError, match="hexadecimal"):
        deidentify.read_key(tmp_path / "short")
    with pytest.raises(WorkloadError, match="bytes"):
        Deidentifier(b"short")


@pytest.mark.shared
def test_real_series_stay_readable_volumes(shared_data, tmp_path):
    by = Deidentifier(KEY, vouched=True)
    source = shared_data / "radiology" / "ct-3slice"
    rows = list(deidentify.deidentify(read.find(source), tmp_path / "out", by, sha256, threads=2))
    assert all(row.file for row in rows)
    before, after = (read.scan(read.find(folder), sha256).series[0] for folder in (source, tmp_path / "out"))
    one, two = read.assemble(before), read.assemble(after)
    assert np.array_equal(one.array, two.array) and np.array_equal(one.affine_lps, two.affine_lps)
    for path in (tmp_path / "out").rglob("*.dcm"):
        require_clean(dcmread(path, stop_before_pixels=True))
