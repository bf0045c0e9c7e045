"""A store gives back what was put in, to the bit, and says where it lies; packing never loses a value."""

from __future__ import annotations

import json
import os
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from permed_compute.errors import RefusedInput
from permed_compute.workloads.radiology import nifti, volume_store
from permed_compute.workloads.radiology.read import Volume
from permed_compute.workloads.radiology.volume_store import VolumeStore, packed, rescaled

from .made import load


def volume(array, series="s" * 64):
    affine = np.diag([0.75, 1.25, 2.0, 1.0])
    affine[:3, 3] = [-30.0, 12.5, 41.25]
    return Volume(np.asarray(array), affine, (), None, series, "CT")


def test_a_series_comes_back_with_its_geometry_and_without_its_patient(regular, tmp_path):
    source = load(regular)
    told = volume_store.write(tmp_path / "a.zarr", source, inputs=["d1", "d2"], unit="HU", subject="pseudonym")
    store = VolumeStore(tmp_path / "a.zarr")
    back = store.volume()
    assert back.array.dtype == np.int16 and np.array_equal(back.array, source.array)
    assert np.array_equal(store.affine_ras, source.affine_ras)
    np.testing.assert_allclose(back.affine_lps, source.affine_lps, atol=0)
    assert store.spacing == pytest.approx((1.25, 0.75, 2.0)) and store.about["orientation"] == "LIP"
    assert store.about["inputs"] == ["d1", "d2"] and store.about["acquisition"] == {
        "Modality": "MR",
        "SliceThickness": 2.0,
    }
    text = (tmp_path / "a.zarr" / "zarr.json").read_text()
    for secret in ("Test^Patient", "P1", "ACC1", source.header.StudyInstanceUID):
        assert secret not in text
    assert told["files"] == 1 + len(list((tmp_path / "a.zarr").iterdir()))
    assert store.checksum() == store.about["voxels"]


@pytest.mark.parametrize(
    ("array", "hint", "dtype", "rescale"),
    [
        (np.array([[[-32768, 0, 32767]]], np.int32), None, np.int16, None),
        (np.array([[[0, 65535]]], np.float32), None, np.int16, (1.0, 32768.0)),
        (np.array([[[-1024, 60000]]], np.int32), None, np.int16, (1.0, 31744.0)),
        (np.array([[[0, 70000]]], np.int32), None, np.int32, None),
        (np.array([[[0.5, 70000]]], np.float32), None, np.float32, None),
        (rescaled(np.array([[[-5, 7, 30000]]]), (0.37, -12.5)), (0.37, -12.5), np.int16, (0.37, -12.5)),
        (rescaled(np.array([[[0, 65535]]]), (0.25, 1.5)), (0.25, 1.5), np.int16, (0.25, 1.5 + 32768 * 0.25)),
        (np.array([[[0.1, np.nan]]], np.float32), (0.1, 0.0), np.float32, None),
        (np.array([[[0.1, 0.25]]], np.float32), (0.1, 0.0), np.float32, None),
    ],
)
def test_packing_loses_nothing(array, hint, dtype, rescale):
    stored, found = packed(array, hint)
    assert stored.dtype == dtype
    assert found is None if rescale is None else found == pytest.approx(rescale)
    back = stored if found is None else rescaled(stored, found)
    assert np.array_equal(back, array.astype(back.dtype), equal_nan=array.dtype.kind == "f")


def test_a_rescaled_store_gives_the_modality_values(tmp_path):
    stored = np.random.default_rng(0).integers(-3000, 3000, (40, 41, 42))
    values = rescaled(stored, (0.0123, 4.5))
    told = volume_store.write(tmp_path / "a.zarr", volume(values), inputs=[], rescale=(0.0123, 4.5))
    store = VolumeStore(tmp_path / "a.zarr")
    assert store.dtype == np.int16 and told["about"]["rescale"] == [0.0123, 4.5]
    assert np.array_equal(store.volume().array, values)
    assert np.array_equal(store.values((1, 2, 3), (9, 9, 9)), values[1:10, 2:11, 3:12])


def test_labels_keep_their_classes_and_say_where_they_are(tmp_path):
    label = np.zeros((70, 40, 33), np.float32)
    label[:3, :3, :3], label[60:70, 35:40, 30:33] = 2, 7
    volume_store.write(tmp_path / "a.zarr", volume(label), inputs=[], kind="label")
    store = VolumeStore(tmp_path / "a.zarr")
    assert store.dtype == np.uint8 and np.array_equal(store.all(), label)
    chunks = store.class_chunks
    assert chunks[2] == [[0, 27]]
    assert sum(count for _, count in chunks[7]) == (label == 7).sum() and len(chunks[7]) == 4
    for wrong in (label + 0.5, label - 1):
        with pytest.raises(RefusedInput, match="LABEL_NOT_WHOLE"):
            volume_store.write(tmp_path / "b.zarr", volume(wrong), inputs=[], kind="label")
    assert not (tmp_path / "b.zarr").exists() and list(tmp_path.iterdir()) == [tmp_path / "a.zarr"]


def test_a_store_is_kept_for_its_source_and_never_replaced_by_another(tmp_path):
    path = tmp_path / "a.zarr"
    first = volume(np.arange(27, dtype=np.int16).reshape(3, 3, 3))
    volume_store.write(path, first, inputs=[], how={"tilt": "refuse"})
    marked = (path / "zarr.json").stat().st_mtime_ns
    again = volume_store.write(path, first, inputs=[], how={"tilt": "refuse"})
    assert (path / "zarr.json").stat().st_mtime_ns == marked and again["about"]["source"] == first.series
    for other, how in ((replace(first, series="o" * 64), {"tilt": "refuse"}), (first, {"tilt": "correct"})):
        with pytest.raises(RefusedInput, match="OTHER_STORE"):
            volume_store.write(path, other, inputs=[], how=how)


def test_what_a_killed_writer_left_goes_and_a_writer_that_was_first_stays(tmp_path, monkeypatch):
    path = tmp_path / "a.zarr"
    old, young = tmp_path / ".a.zarr.0001", tmp_path / ".a.zarr.0002"
    for left in (old, young):
        left.mkdir()
        (left / "c.0.0.0").write_bytes(b"half")
    os.utime(old, (0, 0))
    first = volume(np.arange(27, dtype=np.int16).reshape(3, 3, 3))
    real = volume_store.volumes.write

    def overtaken(folder, *given, **how):
        real(path, *given, **how)
        return real(folder, *given, **how)

    monkeypatch.setattr(volume_store.volumes, "write", overtaken)
    told = volume_store.write(path, first, inputs=[])
    assert told["files"] == 3 and np.array_equal(VolumeStore(path).all(), first.array)
    assert sorted(tmp_path.iterdir()) == [young, path]


def test_any_zarr_reader_opens_it_and_finds_the_affine(regular, tmp_path):
    zarr = pytest.importorskip("zarr")
    source = load(regular)
    volume_store.write(tmp_path / "a.zarr", source, inputs=[])
    opened = zarr.open_array(tmp_path / "a.zarr", mode="r")
    assert np.array_equal(opened[...], source.array)
    assert np.array_equal(opened.attrs["permed"]["affine_ras"], source.affine_ras)
    json.dumps(dict(opened.attrs))


def test_a_foreign_array_is_no_store(tmp_path):
    zarr = pytest.importorskip("zarr")
    zarr.save_array(tmp_path / "z.zarr", np.zeros((4, 4, 4)))
    with pytest.raises(RefusedInput, match="NOT_OUR_STORE"):
        VolumeStore(tmp_path / "z.zarr")


def test_nifti_of_a_store_is_the_volume(regular, tmp_path):
    source = load(regular)
    volume_store.write(tmp_path / "a.zarr", source, inputs=[])
    volume_store.write_nifti(VolumeStore(tmp_path / "a.zarr"), tmp_path / "a.nii.gz")
    image = nibabel.load(tmp_path / "a.nii.gz")
    assert image.get_data_dtype() == np.int16 and np.array_equal(np.asarray(image.dataobj), source.array)
    np.testing.assert_allclose(image.affine, source.affine_ras, atol=1e-4)
    again, _ = nifti.read(tmp_path / "a.nii.gz", "d" * 64)
    np.testing.assert_allclose(again.affine_lps, source.affine_lps, atol=1e-4)
    assert np.array_equal(again.array, source.array)


def test_nifti_keeps_a_rescale(tmp_path):
    values = rescaled(np.arange(64).reshape(4, 4, 4), (0.25, -3.0))
    volume_store.write(tmp_path / "a.zarr", volume(values), inputs=[], rescale=(0.25, -3.0))
    volume_store.write_nifti(VolumeStore(tmp_path / "a.zarr"), tmp_path / "a.nii")
    image = nibabel.load(tmp_path / "a.nii")
    assert image.get_data_dtype() == np.int16 and np.array_equal(image.get_fdata(), values)
