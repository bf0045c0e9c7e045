"""DICOM → store → NIfTI against dcm2niix: voxel for voxel and the affine to 1e-4, or refused with numbers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.uid import ExplicitVRBigEndian, JPEG2000Lossless, JPEGLSLossless, RLELossless

from permed_compute.errors import RefusedInput
from permed_compute.workloads.radiology import read, straighten, volume_store
from permed_compute.workloads.radiology.volume_store import VolumeStore

from .made import plane, scan, sha256, write
from .test_read import enhanced


@pytest.fixture
def oracle(tmp_path):
    """Converts a folder: the NIfTI images that dcm2niix writes, canonical, by the end of their names."""
    program = Path(sys.executable).with_name("dcm2niix")
    if not program.exists():
        program = shutil.which("dcm2niix")
    if program is None:
        pytest.skip("dcm2niix (PyPI) is not installed")

    def convert(folder):
        out = tmp_path / "oracle"
        out.mkdir()
        command = [str(program), "-z", "n", "-b", "n", "-f", "x", "-o", str(out), str(folder)]
        subprocess.run(command, check=True, capture_output=True, timeout=120)
        return {path.stem: nibabel.as_closest_canonical(nibabel.load(path)) for path in out.glob("*.nii")}

    return convert


def ours(series, tmp_path):
    """The series through the store, as a canonical NIfTI image."""
    volume = read.assemble(series, threads=2)
    declared = {(item.slope, item.intercept) for item in volume.slices}
    volume_store.write(tmp_path / "v.zarr", volume, inputs=series.inputs, rescale=next(iter(declared)), threads=2)
    volume_store.write_nifti(VolumeStore(tmp_path / "v.zarr"), tmp_path / "v.nii")
    return nibabel.as_closest_canonical(nibabel.load(tmp_path / "v.nii"))


def compare(mine, theirs):
    np.testing.assert_allclose(mine.affine, theirs.affine, atol=1e-4)
    assert np.array_equal(mine.get_fdata(dtype=np.float32), theirs.get_fdata(dtype=np.float32))


# ------------------------------------------------------------------------------------------ the real ones


@pytest.mark.shared
@pytest.mark.parametrize("name", ["t1-head-mr", "ct-thorax-j2k", "ct-3slice"])
def test_the_shared_series(shared_data, tmp_path, oracle, name):
    folder = shared_data / "radiology" / name
    (theirs,) = oracle(folder).values()
    compare(ours(scan(folder).series[0], tmp_path), theirs)


def test_every_series_of_pydicoms_wheel_is_dcm2niixs_or_refused_with_numbers(tmp_path, oracle):
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    loaded = 0
    for series in read.scan(read.find(folder), sha256, threads=2).series:
        if not series.is_volume:
            continue
        try:
            read.check(series)
        except RefusedInput as error:
            assert error.finding.numbers, error.finding.code
            continue
        copy = tmp_path / f"{loaded}"
        copy.mkdir()
        for number, source in enumerate(series.sources):
            shutil.copyfile(source, copy / f"{number}.dcm")
        (theirs,) = oracle(copy).values()
        compare(ours(series, tmp_path), theirs)
        loaded += 1
    assert loaded == 1


@pytest.mark.shared
def test_the_tilted_head_is_corrected_to_dcm2niixs_result_on_request(shared_data, tmp_path, oracle):
    (series,) = scan(shared_data / "radiology" / "ct-head-tilted").series
    volume = straighten.assemble(series, threads=2)
    images = oracle(shared_data / "radiology" / "ct-head-tilted")
    (theirs,) = (image for name, image in images.items() if "_Tilt_Eq" in name)
    mine = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array, volume.affine_ras))
    np.testing.assert_allclose(mine.affine, theirs.affine, atol=1e-4)
    apart = np.abs(np.asarray(mine.dataobj).astype(int) - np.asarray(theirs.dataobj))
    # Both interpolate twice in float32 and round; where a value falls on a half the last bit decides.
    assert apart.max() <= 1 and (apart > 0).mean() < 1e-4
    finding = volume.findings[-1]
    assert (finding.code, finding.severity) == ("GANTRY_TILT_CORRECTED", "corrected")
    assert finding.numbers["tilt_degrees"] == pytest.approx(18.5) and finding.numbers["slices_made"] == 56


# ------------------------------------------------------------------------------------------ made ones, by coding


def unsigned(k, ds):
    ds.PixelRepresentation = 0
    return ds


def scaled(k, ds):
    ds.RescaleSlope, ds.RescaleIntercept = "0.5", "-7.25"
    return ds


def compressed(syntax):
    def edit(k, ds):
        ds = unsigned(k, ds)
        ds.compress(syntax, generate_instance_uid=False)
        return ds

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(lambda k, ds: ds, id="signed"),
        pytest.param(unsigned, id="unsigned"),
        pytest.param(scaled, id="half-steps"),
        pytest.param(compressed(RLELossless), id="rle"),
        pytest.param(compressed(JPEG2000Lossless), id="jpeg-2000"),
        pytest.param(compressed(JPEGLSLossless), id="jpeg-ls"),
    ],
)
def test_codings(tmp_path, oracle, edit):
    write(tmp_path / "series", edit=edit, rows=64, columns=48)
    (theirs,) = oracle(tmp_path / "series").values()
    compare(ours(scan(tmp_path / "series").series[0], tmp_path), theirs)


def test_big_endian(tmp_path, oracle):
    (tmp_path / "series").mkdir()
    for k in range(8):
        ds = plane(k, rows=64, columns=48)
        ds["PixelData"].VR = "OW"
        ds.PixelData = np.frombuffer(ds.PixelData, "<u2").astype(">u2").tobytes()
        ds.file_meta.TransferSyntaxUID = ExplicitVRBigEndian
        ds.save_as(tmp_path / "series" / str(k), little_endian=False, implicit_vr=False, enforce_file_format=True)
    (theirs,) = oracle(tmp_path / "series").values()
    compare(ours(scan(tmp_path / "series").series[0], tmp_path), theirs)


def test_an_enhanced_multi_frame_image(tmp_path, oracle):
    (tmp_path / "series").mkdir()
    enhanced(list(range(8))).save_as(tmp_path / "series" / "one", enforce_file_format=True)
    (theirs,) = oracle(tmp_path / "series").values()
    compare(ours(scan(tmp_path / "series").series[0], tmp_path), theirs)


# ------------------------------------------------------------------------------------------ made ones, tilted


def tilted(degrees, gaps=None):
    places = np.concatenate([[0], np.cumsum(gaps)]) if gaps is not None else 2.0 * np.arange(8)

    def edit(k, ds):
        lean = np.tan(np.radians(degrees)) * places[k]
        ds.Modality, ds.SOPClassUID = "CT", "1.2.840.10008.5.1.4.1.1.2"
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID
        ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [0, round(lean, 6), round(float(places[k]), 6)]
        ds.GantryDetectorTilt, ds.Manufacturer = str(degrees), "GE MEDICAL SYSTEMS"
        ds.PixelSpacing = ["0.75", "0.75"]
        return ds

    return edit


UNEVEN = (2, 2.5, 3, 2, 2, 4, 2)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("_Tilt", tilted(-15)),
        ("_Eq", tilted(0, [2, 2, 2, 3, 3, 3, 3])),
        ("_Eq", tilted(0, [1.3, 1.3, 1.3, 4, 4, 4, 4])),
        ("_Tilt_Eq", tilted(-12, UNEVEN)),
    ],
)
def test_made_tilt_and_gaps_are_corrected_to_dcm2niixs_result(tmp_path, oracle, name, edit):
    write(tmp_path / "series", edit=edit, rows=40, columns=32)
    (series,) = scan(tmp_path / "series").series
    with pytest.raises(RefusedInput):
        read.assemble(series)
    volume = straighten.assemble(series)
    (theirs,) = (image for key, image in oracle(tmp_path / "series").items() if name in key)
    mine = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array, volume.affine_ras))
    np.testing.assert_allclose(mine.affine, theirs.affine, atol=1e-4)
    assert mine.shape == theirs.shape
    assert np.abs(np.asarray(mine.dataobj).astype(int) - np.asarray(theirs.dataobj)).max() <= 1


@pytest.mark.parametrize("degrees", [-15, 15, -12.3, 12.3])
@pytest.mark.parametrize("gaps", [None, UNEVEN])
def test_a_corrected_voxel_shows_what_lies_at_its_place(tmp_path, degrees, gaps):
    """Independent of dcm2niix, which misplaces stacks that lean backwards by up to a row: pixels that are their own
    place stay so."""

    def place(k, ds):
        ds = tilted(degrees, gaps)(k, ds)
        _, y, z = (float(value) for value in ds.ImagePositionPatient)
        rows = np.round(100 * (y + 0.75 * np.arange(40)) + 1000 * z) + 1000
        ds.PixelData = np.repeat(rows[:, None], 32, axis=1).astype("<i2").tobytes()
        ds.PixelPaddingValue = -20000
        return ds

    write(tmp_path / "series", edit=place, rows=40, columns=32)
    volume = straighten.assemble(scan(tmp_path / "series").series[0])
    index = np.argwhere(volume.array != -20000)
    y, z = (index @ volume.affine_lps[:3, :3].T + volume.affine_lps[:3, 3])[:, 1:].T
    # The outermost row of a slice stands for the half pixel beyond it; between slices, padding there is mixed in.
    off = np.abs(volume.array[tuple(index.T)] - (100 * y + 1000 * z + 1000))
    assert np.percentile(off, 90) <= 2
    assert gaps or off.max() <= 80
    assert len(index) > 0.9 * 40 * 32 * 8


def test_what_is_not_tilt_is_still_refused_on_request(tmp_path):
    write(tmp_path / "holes", count=20, edit=lambda k, ds: None if k in (4, 5) else ds)
    with pytest.raises(RefusedInput, match="MISSING_SLICES"):
        straighten.assemble(scan(tmp_path / "holes").series[0])

    def sideways(k, ds):
        ds = tilted(15)(k, ds)
        ds.ImagePositionPatient = [k, ds.ImagePositionPatient[1], ds.ImagePositionPatient[2]]
        return ds

    write(tmp_path / "sideways", edit=sideways)
    with pytest.raises(RefusedInput, match="TILT_TWO_WAYS"):
        straighten.assemble(scan(tmp_path / "sideways").series[0])
