"""Measurements, their structured report and the montage: against brute force, other people's readers and the source."""

from __future__ import annotations

import warnings
from pathlib import Path

import highdicom
import numpy as np
import pytest
from pydicom import dcmread
from scipy.spatial.distance import pdist

from permed_compute.spec import Purpose
from permed_compute.workloads.radiology import outputs, sample
from permed_compute.workloads.radiology.measure import Measurements, measure
from permed_compute.workloads.radiology.montage import montage, write_montage
from permed_compute.workloads.radiology.read import Volume
from permed_compute.workloads.radiology.report import write_report

from .made import load
from .test_outputs import ALGORITHM, ORGANS, blob, dciodvfy, organs


def test_volume_and_the_diameter_of_the_mesh(regular):
    from skimage.measure import marching_cubes

    volume = load(regular)
    mask = blob(volume)
    figures = measure(mask, volume)
    assert figures.volume_ml == pytest.approx(mask.sum() * np.prod(volume.spacing) / 1000)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        corners, *_ = marching_cubes(np.pad(mask.astype(float), 1), 0.5)
    assert figures.diameter_mm == pytest.approx(pdist((corners - 1) @ volume.affine_lps[:3, :3].T).max(), abs=1e-4)


def test_one_voxel_and_none(regular):
    volume = load(regular)
    mask = np.zeros(volume.array.shape, dtype=bool)
    assert measure(mask, volume) == Measurements(0, 0.0, 0.0)
    mask[3, 4, 5] = True
    assert measure(mask, volume).diameter_mm == pytest.approx(max(volume.spacing))


def test_suv_peak_is_the_best_millilitre(regular):
    volume = load(regular)
    mask = blob(volume)
    suv = np.random.default_rng(1).gamma(2, 2, volume.array.shape)
    figures = measure(mask, volume, suv)
    assert figures.suv_max == suv[mask].max() and figures.suv_mean == pytest.approx(suv[mask].mean())
    places = np.indices(mask.shape).reshape(3, -1).T * np.array(volume.spacing)
    best = max(suv.ravel()[np.linalg.norm(places - centre, axis=1) <= 6.2035].mean() for centre in places[mask.ravel()])
    assert figures.suv_peak == pytest.approx(best, rel=1e-9)


def reported(volume: Volume, folder: Path, purpose: Purpose = Purpose.RESEARCH, name: str = "r") -> Path:
    labels = organs(volume)
    outputs.write_seg(labels, volume, folder / f"{name}.seg.dcm", ORGANS, purpose)
    suv = volume.array / 100.0
    figures = [measure(labels == n, volume, suv) for n in (1, 2, 3)]
    write_report(figures, dcmread(folder / f"{name}.seg.dcm"), volume, folder / f"{name}.dcm", ORGANS, purpose)
    return folder / f"{name}.dcm"


def test_the_report_holds_each_segment_with_its_measurements(regular, tmp_path):
    volume = load(regular)
    path = reported(volume, tmp_path)
    sr, seg = highdicom.sr.srread(path), dcmread(tmp_path / "r.seg.dcm")
    groups = sr.content.get_volumetric_roi_measurement_groups()
    assert [group.finding_type.value for group in groups] == ["10200004", "78961009", "15825003"]
    labels = organs(volume)
    for n, group in enumerate(groups, 1):
        reference = group.reference_type
        assert reference == highdicom.sr.CodedConcept("121191", "DCM", "Referenced Segment")
        (segment,) = [i for i in group[0].ContentSequence if i.ConceptNameCodeSequence[0].CodeValue == "121191"]
        (item,) = segment.ReferencedSOPSequence
        assert (item.ReferencedSOPInstanceUID, item.ReferencedSegmentNumber) == (seg.SOPInstanceUID, n)
        found = {(m.name.value, m.derivation.value if m.derivation else ""): m for m in group.get_measurements()}
        assert set(found) == {
            ("118565006", ""), ("L0JK", ""), ("126401", "56851009"), ("126401", "373098007"), ("126401", "126031"),
        }  # fmt: skip
        ml = (labels == n).sum() * volume.voxel_ml
        assert found["118565006", ""].value == pytest.approx(ml, abs=1e-4) and found["118565006", ""].unit.value == "ml"
        assert found["126401", "56851009"].value == pytest.approx(volume.array[labels == n].max() / 100, abs=1e-4)


def test_the_report_is_unverified_and_the_sources_own(regular, tmp_path):
    volume = load(regular)
    sr, source = dcmread(reported(volume, tmp_path)), dcmread(regular / "IM000")
    assert (sr.VerificationFlag, sr.PreliminaryFlag, sr.CompletionFlag) == ("UNVERIFIED", "PRELIMINARY", "COMPLETE")
    assert "VerifyingObserverSequence" not in sr
    for name in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"):
        assert str(sr[name].value) == str(source[name].value), name
    assert sr.Modality == "SR" and sr.SeriesInstanceUID != source.SeriesInstanceUID
    assert sr.ContentTemplateSequence[0].TemplateIdentifier == "1500"
    (study,) = sr.CurrentRequestedProcedureEvidenceSequence
    named = {i.ReferencedSOPInstanceUID for s in study.ReferencedSeriesSequence for i in s.ReferencedSOPSequence}
    assert {item.sop_instance for item in volume.slices} < named and len(named) == len(volume.slices) + 1


def test_research_is_marked_and_equal_input_gives_equal_bytes(regular, tmp_path):
    volume = load(regular)
    one, two = reported(volume, tmp_path, name="a"), reported(volume, tmp_path, name="b")
    care = dcmread(reported(volume, tmp_path, Purpose.CARE, "c"))
    assert one.read_bytes() == two.read_bytes()
    assert dcmread(one).SeriesDescription == "RESEARCH Organs measurements"
    assert care.SeriesDescription == "Organs measurements" and care.SOPInstanceUID != dcmread(one).SOPInstanceUID
    picture = montage(organs(volume), volume)
    for name in ("a", "b"):
        write_montage(picture, volume, tmp_path / f"{name}.sc.dcm", ORGANS, Purpose.RESEARCH)
    assert (tmp_path / "a.sc.dcm").read_bytes() == (tmp_path / "b.sc.dcm").read_bytes()
    assert "RESEARCH" in dcmread(tmp_path / "a.sc.dcm").SeriesDescription


def test_an_empty_mask_has_no_report(regular, tmp_path):
    volume = load(regular)
    empty = np.zeros(volume.array.shape, dtype=bool)
    outputs.write_seg(empty, volume, tmp_path / "s.dcm", ALGORITHM, Purpose.CARE)
    with pytest.raises(ValueError, match="voxel"):
        write_report(
            [measure(empty, volume)], dcmread(tmp_path / "s.dcm"), volume, tmp_path / "r", ALGORITHM, Purpose.CARE
        )


def test_the_montage_shows_the_outline_on_the_side_where_it_lies(tmp_path):
    sample.write_sample(tmp_path / "in", edge=32)
    volume = load(tmp_path / "in")
    right = np.zeros(volume.to_ras(volume.array).shape, dtype=np.uint8)
    across = right.shape[0]
    right[across * 2 // 3 : across - 2, 4:-4, 4:-4] = 1  # RAS: high x is the patient's right
    picture = montage(volume.from_ras(right), volume)
    write_montage(picture, volume, tmp_path / "sc.dcm", ALGORITHM, Purpose.CARE)
    capture = dcmread(tmp_path / "sc.dcm")
    assert np.array_equal(capture.pixel_array, picture) and capture.BurnedInAnnotation == "NO"
    assert list(capture.PatientOrientation) == ["L", "P"] and capture.Modality == "OT"
    tile = picture[:, : picture.shape[1] // 5].astype(int)
    coloured = np.argwhere(tile[..., 0] - tile[..., 2] > 100)
    assert len(coloured) and coloured[:, 1].max() < tile.shape[1] * 0.45
    plain = montage(np.zeros_like(volume.array, dtype=np.uint8), volume).astype(int)
    assert (plain[..., 0] == plain[..., 2]).all()


@pytest.mark.dicom3tools
def test_report_and_montage_are_valid_dicom(tmp_path):
    sample.write_sample(tmp_path / "in", edge=24)
    volume = load(tmp_path / "in")
    assert dciodvfy(reported(volume, tmp_path)) == []
    write_montage(montage(blob(volume), volume), volume, tmp_path / "sc.dcm", ALGORITHM, Purpose.RESEARCH)
    assert dciodvfy(tmp_path / "sc.dcm") == []
