"""NIfTI as nibabel reads it where it says what it is, and refused with numbers where a reader would have to guess."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest

from permed_compute.errors import RefusedInput
from permed_compute.workloads.radiology import nifti

AFFINE = np.array([[-0.8, 0, 0, 90], [0, 0.9, 0, -120], [0, 0, 2.5, -70], [0, 0, 0, 1.0]])


def save(path, array=None, *, affine=AFFINE, kind=nibabel.Nifti1Image, header=lambda h: None, raw=lambda data: data):
    """A NIfTI whose header is spoiled after nibabel has checked it."""
    if array is None:
        array = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8) - 100
    image = kind(array, affine)
    image.set_sform(affine, 1)
    image.set_qform(affine, 1)
    data = image.to_bytes()
    head = type(image.header)(binaryblock=data[: image.header.sizeof_hdr], check=False)
    header(head)
    data = raw(head.binaryblock + data[image.header.sizeof_hdr :])
    path.write_bytes(gzip.compress(data) if path.name.endswith(".gz") else data)
    return path


def refusal(path, **how):
    with pytest.raises(RefusedInput) as caught:
        nifti.read(path, "d" * 64, **how)
    assert caught.value.finding.about == "d" * 64
    return caught.value.finding


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.uint16, np.int32, np.float32])
def test_values_and_affine_are_nibabels(tmp_path, name, kind, dtype):
    path = save(tmp_path / name, np.arange(6 * 7 * 8).astype(dtype).reshape(6, 7, 8), kind=kind)
    volume, rescale = nifti.read(path, "d" * 64)
    image = nibabel.load(path)
    assert rescale is None and volume.findings == ()
    assert np.array_equal(volume.array, image.get_fdata())
    np.testing.assert_array_equal(volume.affine_ras, image.affine)
    assert volume.array.dtype == (np.float32 if dtype == np.float32 else np.int16)
    assert nifti.shape_of(path, "d" * 64) == (6, 7, 8)


def test_the_scaling_of_the_header_is_applied_and_told(tmp_path):
    def scale(header):
        header["scl_slope"], header["scl_inter"] = 0.5, -3

    path = save(tmp_path / "a.nii", header=scale)
    volume, rescale = nifti.read(path, "d" * 64)
    assert rescale == (0.5, -3.0) and np.array_equal(volume.array, nibabel.load(path).get_fdata())
    for nothing in (0.0, np.nan):

        def unscaled(header, value=nothing):
            header["scl_slope"] = value

        path = save(tmp_path / "b.nii", header=unscaled)
        assert nifti.read(path, "d" * 64)[1] is None


def test_big_endian_and_trailing_ones(tmp_path):
    array = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8, 1)
    image = nibabel.Nifti1Image(array, AFFINE).as_reoriented([[0, 1], [1, 1], [2, 1]])
    swapped = nibabel.Nifti1Image(array, AFFINE, nibabel.Nifti1Header(endianness=">"))
    swapped.to_filename(tmp_path / "big.nii")
    volume, _ = nifti.read(tmp_path / "big.nii", "d" * 64)
    assert np.array_equal(volume.array, np.asarray(image.dataobj)[..., 0])


def test_one_channel_of_four_dimensions(tmp_path):
    array = np.random.default_rng(0).integers(0, 99, (6, 7, 8, 3)).astype(np.int16)
    path = save(tmp_path / "a.nii.gz", array)
    assert np.array_equal(nifti.read(path, "d" * 64, channel=2)[0].array, array[..., 2])
    finding = refusal(path)
    assert finding.code == "DIMENSIONS" and finding.numbers["shape"] == [6, 7, 8, 3]


def spoiled(**fields):
    def edit(header):
        for name, value in fields.items():
            header[name] = value

    return edit


@pytest.mark.parametrize(
    ("code", "how"),
    [
        ("DIMENSIONS", {"array": np.zeros((4, 4, 4, 2, 3), np.int16)}),
        ("SINGLE_SLICE", {"array": np.zeros((4, 4, 1), np.int16)}),
        ("SPACING_INVALID", {"header": spoiled(pixdim=[1, -0.8, 0.9, 2.5, 0, 0, 0, 0])}),
        ("SPACING_INVALID", {"header": spoiled(pixdim=[1, 0.8, 0.9, np.nan, 0, 0, 0, 0])}),
        ("UNITS", {"header": spoiled(xyzt_units=3)}),
        ("NO_ORIENTATION", {"header": spoiled(sform_code=0, qform_code=0)}),
        ("AFFINE_INVALID", {"header": spoiled(srow_x=[0, 0, 0, 0])}),
        ("AFFINE_SHEARED", {"header": spoiled(srow_y=[0, 0.9, 0.5, 0])}),
        ("RESCALE_INVALID", {"header": spoiled(scl_slope=np.inf)}),
        ("NOT_GREYSCALE", {"array": np.zeros((4, 4, 4), np.complex64)}),
        ("PIXELS_UNREADABLE", {"raw": lambda data: data[:-90]}),
        ("NIFTI_UNREADABLE", {"raw": lambda data: data[:200]}),
        ("NIFTI_UNREADABLE", {"raw": lambda data: b"not at all " * 60}),
        ("NIFTI_UNREADABLE", {"raw": lambda data: b""}),
    ],
)
def test_what_would_be_guessed_is_refused(tmp_path, code, how):
    assert refusal(save(tmp_path / "a.nii", **how)).code == code


def test_a_gzip_cut_off_is_refused(tmp_path):
    path = save(tmp_path / "a.nii.gz", np.random.default_rng(0).integers(0, 9999, (30, 30, 30)).astype(np.int16))
    path.write_bytes(path.read_bytes()[:-2000])
    assert refusal(path).code == "PIXELS_UNREADABLE"


def test_sform_and_qform_that_disagree_are_told(tmp_path):
    def move(header):
        header["qoffset_x"] += 3.25

    (finding,) = nifti.read(save(tmp_path / "a.nii", header=move), "d" * 64)[0].findings
    assert finding.code == "AFFINES_DIFFER" and finding.numbers["apart_mm"] == pytest.approx(3.25, abs=1e-3)


def test_what_float32_cannot_hold_is_told(tmp_path):
    array = np.full((4, 4, 4), 2**24 + 1, np.int32)
    (finding,) = nifti.read(save(tmp_path / "a.nii", array), "d" * 64)[0].findings
    assert finding.code == "PRECISION_REDUCED" and finding.numbers["voxels"] == 64
    array = np.full((4, 4, 4), np.nan, np.float32)
    (finding,) = nifti.read(save(tmp_path / "b.nii", array), "d" * 64)[0].findings
    assert finding.code == "NOT_FINITE"
