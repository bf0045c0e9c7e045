"""Series by geometry. Every trap is a series that some reader loads without a word."""

from __future__ import annotations

import random
import shutil
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, RLELossless

from permed_compute.errors import NotFoundError, RefusedInput
from permed_compute.workloads.radiology import read

from .made import codes, load, plane, scan, sha256, write


def refusal(folder: Path) -> RefusedInput:
    with pytest.raises(RefusedInput) as caught:
        load(folder)
    return caught.value


def naive(files: list[Path]) -> tuple[np.ndarray, np.ndarray]:
    """The oracle: pydicom's own values in position order, and the affine of PS3.3 C.7.6.2.1.1, written down plainly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sets = [dcmread(file) for file in files]
        cosines = [float(value) for value in sets[0].ImageOrientationPatient]
        normal = np.cross(cosines[:3], cosines[3:])
        sets.sort(key=lambda ds: np.dot([float(v) for v in ds.ImagePositionPatient], normal))
        array = np.stack([ds.pixel_array.T for ds in sets], axis=-1)
        first = np.array([float(v) for v in sets[0].ImagePositionPatient])
        second = np.array([float(v) for v in sets[1].ImagePositionPatient])
        between_rows, between_columns = (float(value) for value in sets[0].PixelSpacing)
    affine = np.eye(4)
    affine[:3, 0] = np.array(cosines[:3]) * between_columns
    affine[:3, 1] = np.array(cosines[3:]) * between_rows
    affine[:3, 2] = second - first
    affine[:3, 3] = first
    return array, affine


# ------------------------------------------------------------------------------------------ what must load


def test_a_regular_series_is_what_pydicom_says(regular):
    volume = load(regular)
    array, affine = naive(sorted(regular.iterdir()))
    assert volume.array.dtype == np.int16 and np.array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine_lps, affine, atol=1e-6)
    np.testing.assert_allclose(volume.affine_ras, np.diag([-1, -1, 1, 1]) @ affine, atol=1e-6)
    assert volume.spacing == pytest.approx((1.25, 0.75, 2.0))
    assert volume.findings == ()
    assert [item.number for item in volume.slices] == list(range(1, 9))


def test_order_comes_from_positions_alone(tmp_path):
    write(tmp_path / "a")
    numbers = random.Random(3).sample(range(1, 9), 8)

    def shuffle(k, ds):
        ds.InstanceNumber = numbers[k]
        return ds

    write(tmp_path / "b", edit=shuffle)
    straight, shuffled = load(tmp_path / "a"), load(tmp_path / "b")
    assert np.array_equal(straight.array, shuffled.array)
    assert np.array_equal(straight.affine_lps, shuffled.affine_lps)
    assert codes(shuffled.findings) == ["INSTANCE_NUMBER_DISORDER"]


def test_reversed_numbers_are_no_disorder(tmp_path):
    def reverse(k, ds):
        ds.InstanceNumber = 8 - k
        return ds

    write(tmp_path / "a", edit=reverse)
    assert load(tmp_path / "a").findings == ()


def test_over_long_decimals_are_read_in_full(tmp_path):
    def lengthen(k, ds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds.PixelSpacing = ["0.666666686534882", "0.699987828731537"]
            ds.ImagePositionPatient = ["-91.44958643319081234", "-160.060358702440", f"{k * 0.666666686534882:.17f}"]
            ds.ImageOrientationPatient = ["1", "0", "0", "0", "1", "0"]
        return ds

    write(tmp_path / "a", edit=lengthen)
    volume = load(tmp_path / "a")
    assert volume.affine_lps[0, 3] == -91.44958643319081234
    assert volume.spacing[:2] == (0.699987828731537, 0.666666686534882)
    assert codes(volume.findings) == ["OVERLONG_DECIMAL"]


def test_unsigned_big_endian_and_compressed_pixels_are_equal(tmp_path):
    def unsigned(k, ds):
        ds.PixelRepresentation = 0
        return ds

    def big(k, ds):
        ds = unsigned(k, ds)
        ds["PixelData"].VR = "OW"
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        return ds

    def packed(k, ds):
        ds = unsigned(k, ds)
        ds.compress(RLELossless, generate_instance_uid=False)
        return ds

    write(tmp_path / "little", edit=unsigned)
    write(tmp_path / "packed", edit=packed)
    folder = tmp_path / "big"
    folder.mkdir()
    for k in range(8):
        big(k, plane(k)).save_as(folder / str(k), little_endian=False, implicit_vr=False, enforce_file_format=True)
    expected = load(tmp_path / "little").array
    assert np.array_equal(load(folder).array, expected)
    assert np.array_equal(load(tmp_path / "packed").array, expected)


@pytest.mark.parametrize(
    ("allocated", "stored", "signed"), [(16, 12, 0), (16, 12, 1), (16, 16, 1), (8, 8, 0), (8, 6, 1)]
)
def test_plain_pixels_are_pydicoms_also_with_overlays_in_unused_bits(tmp_path, allocated, stored, signed):
    random = np.random.default_rng(allocated + stored)

    def edit(k, ds):
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = allocated, stored, stored - 1, signed
        ds["PixelData"].VR = "OW"
        ds.PixelData = random.integers(0, 2**allocated, (12, 10)).astype(f"u{allocated // 8}").tobytes()
        return ds

    write(tmp_path / "a", edit=edit)
    (series,) = scan(tmp_path / "a").series
    assert all(item.native == (item.native[0], allocated, stored, bool(signed)) for item in series.slices)
    array, _ = naive(sorted((tmp_path / "a").iterdir()))
    assert np.array_equal(read.assemble(series).array, array)


def test_each_slice_is_scaled_by_its_own_slope(tmp_path):
    def scale(k, ds):
        ds.RescaleSlope, ds.RescaleIntercept = str(1 + 0.5 * k), "-10"
        return ds

    write(tmp_path / "a", edit=scale)
    volume = load(tmp_path / "a")
    stored, _ = naive(sorted((tmp_path / "a").iterdir()))
    assert volume.array.dtype == np.float32
    for k in range(8):
        np.testing.assert_allclose(volume.array[..., k], stored[..., k] * (1 + 0.5 * k) - 10, rtol=1e-6)
    assert codes(volume.findings) == ["RESCALE_VARIES"]


def test_hounsfield_units_stay_int16(tmp_path):
    def hounsfield(k, ds):
        ds.RescaleSlope, ds.RescaleIntercept = "1", "-1024"
        return ds

    write(tmp_path / "a", edit=hounsfield)
    volume = load(tmp_path / "a")
    assert volume.array.dtype == np.int16 and volume.array.min() == -1024


def test_monochrome1_is_turned_round_and_said(tmp_path):
    def invert(k, ds):
        ds.PhotometricInterpretation, ds.PixelRepresentation, ds.BitsStored, ds.HighBit = "MONOCHROME1", 0, 13, 12
        return ds

    write(tmp_path / "a", edit=invert)
    volume = load(tmp_path / "a")
    stored, _ = naive(sorted((tmp_path / "a").iterdir()))
    assert np.array_equal(volume.array, 8191 - stored.astype(int))
    assert codes(volume.findings) == ["MONOCHROME1_INVERTED"]


def enhanced(order: list[int], *, geometry: bool = True) -> Dataset:
    """An enhanced MR image whose frames hold planes in the given order."""
    ds = plane(0)
    planes = [plane(k) for k in order]
    ds.SOPClassUID = ds.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.4.1"
    ds.NumberOfFrames = len(order)
    ds.PixelData = b"".join(item.PixelData for item in planes)
    if geometry:
        shared, measures, direction = Dataset(), Dataset(), Dataset()
        measures.PixelSpacing, measures.SliceThickness = ds.PixelSpacing, ds.SliceThickness
        direction.ImageOrientationPatient = ds.ImageOrientationPatient
        shared.PixelMeasuresSequence, shared.PlaneOrientationSequence = Sequence([measures]), Sequence([direction])
        ds.SharedFunctionalGroupsSequence = Sequence([shared])
        frames = []
        for item in planes:
            frame, place = Dataset(), Dataset()
            place.ImagePositionPatient = item.ImagePositionPatient
            frame.PlanePositionSequence = Sequence([place])
            frames.append(frame)
        ds.PerFrameFunctionalGroupsSequence = Sequence(frames)
    del ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.PixelSpacing
    return ds


def test_an_enhanced_multiframe_image_is_the_same_volume(regular, tmp_path):
    folder = tmp_path / "enhanced"
    folder.mkdir()
    enhanced([3, 0, 1, 2, 7, 6, 5, 4]).save_as(folder / "one", enforce_file_format=True)
    volume, classic = load(folder), load(regular)
    assert np.array_equal(volume.array, classic.array)
    np.testing.assert_allclose(volume.affine_lps, classic.affine_lps, atol=1e-6)
    assert [item.frame for item in volume.slices] == [1, 2, 3, 0, 7, 6, 5, 4]


def test_a_zip_a_dicomdir_and_a_folder_give_one_series(regular, tmp_path):
    from pydicom.fileset import FileSet

    with zipfile.ZipFile(tmp_path / "study.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in regular.iterdir():
            archive.write(file, f"deep/er/{file.name}")
    media = FileSet()
    for file in regular.iterdir():
        ds = dcmread(file)
        ds.SeriesNumber, ds.StudyDate, ds.StudyTime, ds.StudyID = 1, "20260101", "120000", "1"
        media.add(ds)
    media.write(tmp_path / "media")
    zipped, folder = scan(tmp_path / "study.zip").series[0], scan(regular).series[0]
    assert zipped.digest == folder.digest and zipped.inputs == folder.inputs
    assert np.array_equal(read.assemble(zipped).array, read.assemble(folder).array)
    (tmp_path / "link").symlink_to(tmp_path / "media")
    for way in (tmp_path / "media" / "DICOMDIR", tmp_path / "link" / "DICOMDIR", tmp_path / "media"):
        inventory = scan(way)
        assert inventory.findings == ()
        assert np.array_equal(read.assemble(inventory.series[0]).array, read.assemble(folder).array)


def test_a_mixture_falls_apart_into_its_series(tmp_path):
    write(tmp_path / "all" / "x", series="a")
    write(tmp_path / "all" / "y", series="b", count=5)
    inventory = scan(tmp_path / "all")
    assert sorted(len(series.slices) for series in inventory.series) == [5, 8]
    assert len({series.digest for series in inventory.series}) == 2


# ------------------------------------------------------------------------------------------ what must be refused


def test_removed_slices_are_counted_and_placed(tmp_path):
    write(tmp_path / "a", count=20, edit=lambda k, ds: None if k in (4, 5, 11) else ds)
    finding = refusal(tmp_path / "a").finding
    assert finding.code == "MISSING_SLICES"
    assert finding.numbers["missing"] == 3
    assert finding.numbers["after_index"] == [3, 8] and finding.numbers["missing_there"] == [2, 1]
    assert finding.numbers["gap_max_mm"] == pytest.approx(6.0)


def test_more_than_half_removed_is_still_missing_slices(tmp_path):
    write(tmp_path / "a", count=30, edit=lambda k, ds: ds if k in (0, 1, 4, 9, 13, 20, 29) else None)
    assert refusal(tmp_path / "a").finding.numbers["missing"] == 23


def test_uneven_gaps_are_refused_with_their_numbers(tmp_path):
    def widen(k, ds):
        if k >= 4:
            ds.ImagePositionPatient = plane(k, gap=2.3).ImagePositionPatient
        return ds

    write(tmp_path / "a", edit=widen)
    finding = refusal(tmp_path / "a").finding
    assert finding.code == "UNEVEN_GAPS"
    assert finding.numbers["gap_min_mm"] == pytest.approx(2.0) and finding.numbers["gap_max_mm"] == pytest.approx(3.2)


def test_a_sheared_stack_is_refused_with_its_angle(tmp_path):
    def shear(k, ds):
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, round(k * 2 * np.tan(np.radians(12)), 6), 2 * k]
        ds.GantryDetectorTilt = "12"
        return ds

    write(tmp_path / "a", edit=shear)
    finding = refusal(tmp_path / "a").finding
    assert finding.code == "GANTRY_TILT"
    assert finding.numbers["tilt_degrees"] == pytest.approx(12, abs=1e-3)


def test_declared_tilt_without_shear_is_only_noted(tmp_path):
    def declare(k, ds):
        ds.GantryDetectorTilt = "12"
        return ds

    write(tmp_path / "a", edit=declare)
    assert codes(load(tmp_path / "a").findings) == ["TILT_DECLARED"]


def test_equal_duplicates_are_dropped_and_said(regular):
    expected = load(regular)
    for k in (0, 3, 7):
        ds = plane(k)
        ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = f"1.2.3.{k}"
        ds.save_as(regular / f"again{k}", enforce_file_format=True)
    volume = load(regular)
    assert np.array_equal(volume.array, expected.array) and np.array_equal(volume.affine_lps, expected.affine_lps)
    (finding,) = volume.findings
    assert (finding.code, finding.severity, finding.numbers["dropped"]) == ("DUPLICATES_DROPPED", "corrected", 3)


def test_different_images_at_one_position_are_refused(regular):
    ds = plane(3)
    ds.SOPInstanceUID = ds.file_meta.MediaStorageSOPInstanceUID = "1.2.3.4"
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(regular / "echo2", enforce_file_format=True)
    finding = refusal(regular).finding
    assert finding.code == "DUPLICATE_POSITIONS"
    assert finding.numbers["differing"] == 1 and finding.numbers["positions"] == 1


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("MIXED_ORIENTATION", {"ImageOrientationPatient": [1, 0, 0, 0, 1, 0]}),
        ("MIXED_FRAME_OF_REFERENCE", {"FrameOfReferenceUID": "1.2.3"}),
        ("MIXED_PATIENTS", {"PatientID": "P2"}),
        ("MIXED_SPACING", {"PixelSpacing": [0.75, 1.3]}),
        ("NO_GEOMETRY", {"ImagePositionPatient": None}),
        ("ATTRIBUTE_UNREADABLE", {"PixelSpacing": ["0.75", "1.25", "9"]}),
        ("NOT_GREYSCALE", {"PhotometricInterpretation": "PALETTE COLOR"}),
        ("RESCALE_INVALID", {"RescaleSlope": "0", "RescaleIntercept": "0"}),
        ("ORIENTATION_INVALID", {"ImageOrientationPatient": [1, 0, 0, 0.5, 0.5, 0]}),
    ],
)
def test_one_odd_slice_refuses_the_series(tmp_path, code, change):
    def spoil(k, ds):
        for name, value in change.items() if k == 2 else ():
            setattr(ds, name, value)
        return ds

    write(tmp_path / "a", edit=spoil)
    error = refusal(tmp_path / "a")
    assert error.finding.code == code and error.finding.severity == "refused"
    assert error.finding.about == scan(tmp_path / "a").series[0].digest
    assert error.finding.numbers


def test_mixed_matrix_single_slice_and_frames_without_places(tmp_path):
    write(tmp_path / "a", edit=lambda k, ds: plane(k, rows=14) if k == 5 else ds)
    assert refusal(tmp_path / "a").finding.numbers["rows"] == [12, 14]
    write(tmp_path / "b", count=1)
    assert refusal(tmp_path / "b").finding.code == "SINGLE_SLICE"
    (tmp_path / "c").mkdir()
    enhanced([0, 1, 2], geometry=False).save_as(tmp_path / "c" / "x", enforce_file_format=True)
    assert refusal(tmp_path / "c").finding.code == "MULTIFRAME_NO_GEOMETRY"


def test_a_localiser_inside_a_series_is_set_aside(tmp_path):
    def scout(k, ds):
        if k == 0:
            ds.ImageType = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
            ds.ImageOrientationPatient = [0, 1, 0, 0, 0, -1]
        return ds

    write(tmp_path / "a", edit=scout)
    volume = load(tmp_path / "a")
    assert volume.array.shape[2] == 7 and "LOCALISER_SET_ASIDE" in codes(volume.findings)


def test_slices_cut_off_at_an_end_are_suspected_where_numbers_tell(tmp_path):
    write(tmp_path / "a", count=20, edit=lambda k, ds: None if k < 6 else ds)
    (finding,) = load(tmp_path / "a").findings
    assert (finding.code, finding.numbers["first_number"]) == ("INCOMPLETE_SUSPECTED", 7)

    def told(k, ds):
        ds.ImagesInAcquisition = 20
        return ds if k < 14 else None

    write(tmp_path / "b", count=20, edit=told)
    assert load(tmp_path / "b").findings[0].numbers["images_in_acquisition"] == 20


# ------------------------------------------------------------------------------------------ bad files beside good ones


def test_bad_files_are_named_by_digest_and_the_rest_goes_on(regular):
    expected = load(regular)
    whole = (regular / "IM003").read_bytes()
    secret = "Nordmann_Kari_01019012345"
    bad = {
        "zero": b"",
        f"{secret}.txt": b"not DICOM at all, but rather long: " * 20,
        "cut-in-the-header.dcm": whole[:400],
        "cut-in-the-pixels.dcm": whole[:-50],
        f"{secret}.zip": b"PK\x03\x04 a broken archive",
    }
    for name, data in bad.items():
        (regular / name).write_bytes(data)
    inventory = scan(regular)
    volume = read.assemble(inventory.series[0])
    assert np.array_equal(volume.array, expected.array)
    everything = [*inventory.findings, *volume.findings]
    abouts = {finding.about for finding in everything}
    assert {sha256(regular / name) for name in bad} <= abouts
    assert {"EMPTY_FILE", "NOT_DICOM", "PIXELS_UNREADABLE"} <= set(codes(everything))
    assert secret not in repr(everything) and "Nordmann" not in repr(everything)


def test_a_truncated_slice_without_a_copy_refuses_the_series(regular):
    path = regular / "IM007"
    path.write_bytes(path.read_bytes()[:-50])
    error = refusal(regular)
    assert (error.finding.code, error.finding.about) == ("PIXELS_UNREADABLE", sha256(path))


def test_objects_without_images_are_passed_over(regular):
    ds = plane(0, series="report")
    ds.Modality, ds.SOPClassUID = "SR", "1.2.840.10008.5.1.4.1.1.88.11"
    for name in ("Rows", "Columns", "PixelData"):
        delattr(ds, name)
    ds.save_as(regular / "report", enforce_file_format=True)
    inventory = scan(regular)
    assert len(inventory.series) == 1 and codes(inventory.findings) == ["NOT_AN_IMAGE"]


def test_an_input_that_is_not_there(tmp_path):
    with pytest.raises(NotFoundError):
        read.find(tmp_path / "nothing")


def test_refusals_survive_pickling(regular):
    import pickle

    (regular / "IM003").unlink()
    error = refusal(regular)
    again = pickle.loads(pickle.dumps(error))
    assert again.finding == error.finding and str(again) == str(error)


# ------------------------------------------------------------------------------------------ the real ones


@pytest.mark.shared
def test_t1_head_mr_equals_pydicom(shared_data):
    files = sorted((shared_data / "radiology" / "t1-head-mr").iterdir())
    array, affine = naive(files)
    volume = load(files[0].parent)
    assert volume.array.shape == (274, 384, 384) and np.array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine_lps, affine, atol=1e-6)
    assert codes(volume.findings) == ["OVERLONG_DECIMAL"]


@pytest.mark.shared
def test_the_tilted_ct_is_refused_with_tilt_and_gaps(shared_data):
    numbers = refusal(shared_data / "radiology" / "ct-head-tilted").finding.numbers
    assert numbers["tilt_degrees"] == pytest.approx(18.5, abs=0.01)
    assert (numbers["gap_min_mm"], numbers["gap_max_mm"]) == pytest.approx((1.08, 7.0), abs=0.01)


@pytest.mark.shared
@pytest.mark.parametrize("how", ["random", "middle"])
def test_eighty_slices_removed_from_the_head_are_refused(shared_data, tmp_path, how):
    files = sorted((shared_data / "radiology" / "t1-head-mr").iterdir())
    inside = range(1, len(files) - 1)
    gone = set(random.Random(1).sample(inside, 80)) if how == "random" else set(range(150, 230))
    for index, file in enumerate(files):
        if index not in gone:
            (tmp_path / file.name).symlink_to(file)
    finding = refusal(tmp_path).finding
    assert (finding.code, finding.numbers["missing"]) == ("MISSING_SLICES", 80)


@pytest.mark.shared
def test_the_head_with_duplicates_and_with_shuffled_numbers(shared_data, tmp_path):
    source = shared_data / "radiology" / "t1-head-mr"
    expected = load(source)
    shutil.copytree(source, tmp_path / "twice")
    for file in sorted(source.iterdir())[::4]:
        shutil.copyfile(file, tmp_path / "twice" / f"copy-{file.name}")
    twice = load(tmp_path / "twice")
    assert np.array_equal(twice.array, expected.array)
    assert twice.findings[0].numbers["dropped"] == 96
    numbers = random.Random(2).sample(range(1, 385), 384)
    (tmp_path / "shuffled").mkdir()
    for number, file in zip(numbers, sorted(source.iterdir()), strict=True):
        ds = dcmread(file)
        ds.InstanceNumber = number
        ds.save_as(tmp_path / "shuffled" / file.name)
    shuffled = load(tmp_path / "shuffled")
    assert np.array_equal(shuffled.array, expected.array)
    assert np.array_equal(shuffled.affine_lps, expected.affine_lps)


@pytest.mark.shared
def test_jpeg_2000_without_uids_is_read(shared_data):
    volume = load(shared_data / "radiology" / "ct-thorax-j2k")
    array, affine = naive(sorted((shared_data / "radiology" / "ct-thorax-j2k").iterdir()))
    assert np.array_equal(volume.array, array.astype(int) - 1024)
    np.testing.assert_allclose(volume.affine_lps, affine, atol=1e-6)


@pytest.mark.shared
def test_the_small_ct_descends(shared_data):
    volume = load(shared_data / "radiology" / "ct-3slice")
    assert [item.number for item in volume.slices] == [3, 2, 1]
    assert volume.spacing == pytest.approx((0.810547, 0.810547, 1.0))
