"""A mask as DICOM SEG, NIfTI and picture: read back by other people's libraries, in the source's geometry."""

from __future__ import annotations

import shutil
import subprocess
import warnings
from dataclasses import replace
from pathlib import Path

import highdicom
import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from permed_compute.errors import WorkloadError
from permed_compute.spec import Purpose
from permed_compute.workloads.radiology import outputs, sample
from permed_compute.workloads.radiology.read import Volume

from .made import load, plane, write
from .test_read import enhanced

ALGORITHM = outputs.Algorithm("deepbet", "1.0.2", "5e" * 32, "threshold=0.5")


def blob(volume: Volume) -> np.ndarray:
    """A lopsided mask that touches no slice at either end: no flip or shift of it is itself."""
    grid = np.indices(volume.array.shape).astype(float)
    size = np.array(volume.array.shape)[:, None, None, None]
    place = (grid + 0.5) / size - np.array([0.4, 0.55, 0.45])[:, None, None, None]
    mask = (place**2 / np.array([0.09, 0.04, 0.06])[:, None, None, None]).sum(axis=0) < 1
    mask[0:2, 0:3, volume.array.shape[2] // 2] = True
    return mask


def written(volume: Volume, path: Path, purpose: Purpose = Purpose.RESEARCH) -> np.ndarray:
    mask = blob(volume)
    outputs.write_seg(mask, volume, path, ALGORITHM, purpose)
    return mask


def read_back(path: Path, volume: Volume) -> np.ndarray:
    """The SEG's mask in the axes of `volume`, placed by the SEG's own geometry: on the grid to 1e-6 mm."""
    got = highdicom.seg.segread(path).get_volume(combine_segments=True)
    to_index = np.linalg.inv(volume.affine_lps) @ got.affine
    rounded = np.round(to_index)
    corners = np.array(np.meshgrid(*[(0, length - 1) for length in got.spatial_shape])).reshape(3, -1)
    corners = np.vstack([corners, np.ones(corners.shape[1])])
    np.testing.assert_allclose(got.affine @ corners, volume.affine_lps @ rounded @ corners, atol=1e-6)
    index = (rounded @ np.vstack([np.indices(got.spatial_shape).reshape(3, -1), np.ones(got.array.size)])).astype(int)
    placed = np.zeros(volume.array.shape, dtype=bool)
    placed[tuple(index[:3])] = got.array.ravel() > 0
    return placed


def check_all_three_agree(volume: Volume, folder: Path) -> None:
    mask = written(volume, folder / "s.dcm")
    outputs.write_nifti(mask, volume, folder / "m.nii.gz")
    image = nibabel.load(folder / "m.nii.gz")
    assert np.array_equal(read_back(folder / "s.dcm", volume), mask)
    assert np.array_equal(np.asarray(image.dataobj) > 0, mask)
    assert np.array_equal(image.affine.astype(np.float32), volume.affine_ras.astype(np.float32))
    assert np.array_equal(image.get_sform(), image.affine) and int(image.header["qform_code"]) == 1
    np.testing.assert_allclose(image.get_qform(), image.affine, atol=1e-3)


def test_seg_and_nifti_are_the_mask_in_the_source_geometry(regular, tmp_path):
    check_all_three_agree(load(regular), tmp_path)


def test_frames_carry_the_positions_of_the_source_to_1e_6(regular, tmp_path):
    volume = load(regular)
    written(volume, tmp_path / "s.dcm")
    seg = dcmread(tmp_path / "s.dcm")
    got = [frame.PlanePositionSequence[0].ImagePositionPatient for frame in seg.PerFrameFunctionalGroupsSequence]
    got = sorted(tuple(float(value) for value in position) for position in got)
    np.testing.assert_allclose(got, sorted(item.position for item in volume.slices), atol=1e-6)
    shared = seg.SharedFunctionalGroupsSequence[0]
    np.testing.assert_allclose(
        [float(v) for v in shared.PlaneOrientationSequence[0].ImageOrientationPatient], volume.slices[0].orientation,
        atol=1e-6,
    )  # fmt: skip
    assert [float(v) for v in shared.PixelMeasuresSequence[0].PixelSpacing] == [0.75, 1.25]


def test_patient_study_and_references_are_the_sources(regular, tmp_path):
    volume = load(regular)
    written(volume, tmp_path / "s.dcm")
    seg, source = dcmread(tmp_path / "s.dcm"), dcmread(regular / "IM000")
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber", "FrameOfReferenceUID"):
        assert str(seg[name].value) == str(source[name].value), name
    assert seg.SeriesInstanceUID != source.SeriesInstanceUID and seg.Modality == "SEG"
    (series,) = seg.ReferencedSeriesSequence
    assert series.SeriesInstanceUID == source.SeriesInstanceUID
    assert {item.ReferencedSOPInstanceUID for item in series.ReferencedInstanceSequence} == {
        item.sop_instance for item in volume.slices
    }
    frame = seg.PerFrameFunctionalGroupsSequence[3]
    refers = frame.DerivationImageSequence[0].SourceImageSequence[0].ReferencedSOPInstanceUID
    place = frame.PlanePositionSequence[0].ImagePositionPatient
    by_uid = {item.sop_instance: item.position for item in volume.slices}
    np.testing.assert_allclose(np.array(place, float), by_uid[refers], atol=1e-6)


def test_codes_and_algorithm(regular, tmp_path):
    written(load(regular), tmp_path / "s.dcm")
    (segment,) = dcmread(tmp_path / "s.dcm").SegmentSequence
    kind, category = segment.SegmentedPropertyTypeCodeSequence[0], segment.SegmentedPropertyCategoryCodeSequence[0]
    assert (kind.CodeValue, kind.CodingSchemeDesignator) == ("12738006", "SCT")
    assert (category.CodeValue, category.CodingSchemeDesignator) == ("91723000", "SCT")
    algorithm = segment.SegmentationAlgorithmIdentificationSequence[0]
    assert (algorithm.AlgorithmName, algorithm.AlgorithmVersion) == ("deepbet", "1.0.2")
    assert algorithm.AlgorithmParameters == "threshold=0.5"


def test_only_care_is_not_marked_as_research(regular, tmp_path):
    volume = load(regular)
    written(volume, tmp_path / "research.dcm")
    written(volume, tmp_path / "care.dcm", Purpose.CARE)
    research, care = dcmread(tmp_path / "research.dcm"), dcmread(tmp_path / "care.dcm")
    assert research.ContentQualification == "RESEARCH" and "RESEARCH" in research.SeriesDescription
    assert research.ContentLabel.startswith("RESEARCH")
    assert "ContentQualification" not in care and "RESEARCH" not in str(care)
    assert research.SOPInstanceUID != care.SOPInstanceUID


def test_the_same_input_gives_the_same_bytes(regular, tmp_path):
    for name in ("a", "b"):
        volume = load(regular)
        mask = written(volume, tmp_path / f"{name}.dcm")
        outputs.write_nifti(mask, volume, tmp_path / f"{name}.nii.gz")
        outputs.write_overlay(mask, volume, tmp_path / f"{name}.png")
    for kind in ("dcm", "nii.gz", "png"):
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes(), kind


def test_no_identifier_reaches_a_warning_and_latin_1_names_survive(tmp_path):
    def name(k, ds):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds.SpecificCharacterSet = "ISO_IR 100"
            ds.PatientName, ds.PatientID = "Sjøgren Hemmelig", "01019012345"
            ds.PatientBirthDate, ds.PatientAge = "1.1.90", "42"
        return ds

    write(tmp_path / "a", edit=name)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        volume = load(tmp_path / "a")
        written(volume, tmp_path / "s.dcm")
    said = " ".join(str(item.message) for item in caught)
    assert not any(secret in said for secret in ("Sj", "Hemmelig", "01019012345", "1.1.90"))
    seg = dcmread(tmp_path / "s.dcm")
    assert seg.PatientName == "Sjøgren Hemmelig" and seg.SpecificCharacterSet == "ISO_IR 192"
    assert "PatientAge" not in seg


def test_a_multiframe_source(tmp_path):
    (tmp_path / "in").mkdir()
    enhanced([3, 0, 1, 2, 7, 6, 5, 4]).save_as(tmp_path / "in" / "x", enforce_file_format=True)
    check_all_three_agree(load(tmp_path / "in"), tmp_path)


def test_the_overlay_is_a_picture_with_an_outline(regular, tmp_path):
    volume = load(regular)
    outputs.write_overlay(blob(volume), volume, tmp_path / "with.png")
    outputs.write_overlay(np.zeros(volume.array.shape, bool), volume, tmp_path / "without.png")
    outlined, plain = (np.asarray(Image.open(tmp_path / f"{n}.png").convert("RGB"), int) for n in ("with", "without"))
    assert outlined.shape == (420, 1200, 3)
    orange = (outlined[..., 0] - outlined[..., 2] > 100).sum()
    assert orange > 100 and (plain[..., 0] != plain[..., 2]).sum() == 0


ORGANS = replace(
    ALGORITHM,
    label="Organs",
    segments=(
        outputs.Segment("Liver", ("10200004", "SCT", "Liver")),
        outputs.Segment("Spleen", ("78961009", "SCT", "Spleen")),
        outputs.Segment("Aorta", ("15825003", "SCT", "Aorta")),
    ),
)


def organs(volume: Volume) -> np.ndarray:
    """Three labels, the last one on one slice only."""
    labels = blob(volume).astype(np.uint8)
    labels[: labels.shape[0] // 3][labels[: labels.shape[0] // 3] > 0] = 2
    labels[-1, -1, 1] = 3
    return labels


@pytest.mark.parametrize("coding", ["BINARY", "LABELMAP"])
def test_a_label_map_comes_back_label_by_label(regular, tmp_path, coding):
    volume = load(regular)
    labels = organs(volume)
    outputs.write_seg(labels, volume, tmp_path / "s.dcm", ORGANS, Purpose.CARE, coding)
    seg = highdicom.seg.segread(tmp_path / "s.dcm")
    assert seg.SegmentationType == coding
    assert [seg.get_segment_description(n).segment_label for n in (1, 2, 3)] == ["Liver", "Spleen", "Aorta"]
    for k, item in enumerate(volume.slices):
        planes = seg.get_pixels_by_source_instance(
            [item.sop_instance],
            combine_segments=True,
            ignore_spatial_locations=True,
            assert_missing_frames_are_empty=True,
        )
        assert np.array_equal(planes[0].T, labels[:, :, k])


def test_a_label_that_nothing_describes(regular, tmp_path):
    volume = load(regular)
    with pytest.raises(WorkloadError, match="label 2"):
        outputs.write_seg(organs(volume).clip(0, 2), volume, tmp_path / "s.dcm", ALGORITHM, Purpose.CARE)
    assert not (tmp_path / "s.dcm").exists()


def dciodvfy(path: Path) -> list[str]:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy (Debian dicom3tools) is not on this machine; `make real-parts` brings it")
    ran = subprocess.run(["dciodvfy", str(path)], capture_output=True, text=True, errors="replace")
    return [line for line in (ran.stdout + ran.stderr).splitlines() if line.startswith(("Error", "Abort"))]


@pytest.mark.dicom3tools
def test_the_checker_does_find_errors(tmp_path):
    ds = plane(0)
    del ds.Rows
    ds.save_as(tmp_path / "x", enforce_file_format=True)
    assert dciodvfy(tmp_path / "x")


@pytest.mark.dicom3tools
@pytest.mark.parametrize("purpose", [Purpose.RESEARCH, Purpose.CARE])
def test_seg_of_the_sample_is_valid_dicom(tmp_path, purpose):
    sample.write_sample(tmp_path / "in", edge=32)
    written(load(tmp_path / "in"), tmp_path / "s.dcm", purpose)
    assert dciodvfy(tmp_path / "s.dcm") == []


@pytest.mark.shared
@pytest.mark.dicom3tools
def test_over_long_decimals_of_the_source_do_not_reach_the_seg(shared_data, tmp_path):
    volume = load(shared_data / "radiology" / "t1-head-mr")
    check_all_three_agree(volume, tmp_path)
    assert dciodvfy(tmp_path / "s.dcm") == []
