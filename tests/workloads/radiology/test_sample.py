"""The head that `permed demo` falls back to."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
from pydicom import dcmread

from permed_compute.errors import NotFoundError
from permed_compute.workloads.radiology import sample

from .made import load, scan
from .test_outputs import dciodvfy


def test_it_is_the_template_in_the_templates_place(tmp_path):
    info = sample.write_sample(tmp_path)
    volume = load(tmp_path)
    template = nibabel.as_closest_canonical(nibabel.load(sample.find_head()[0]))
    expected = np.asarray(template.dataobj, dtype=float).reshape(volume.to_ras(volume.array).shape)
    got = nibabel.as_closest_canonical(nibabel.Nifti1Image(volume.array, volume.affine_ras))
    np.testing.assert_allclose(got.affine, template.affine, atol=1e-5)
    correlation = np.corrcoef(np.asarray(got.dataobj).ravel(), np.clip(expected, 0, None).ravel())[0, 1]
    assert correlation > 0.9999
    assert len(info.files) == volume.array.shape[2] and volume.findings == ()
    assert info.skull_stripped == ("skull-stripped" in info.source)


def test_studies_differ_and_repeat(tmp_path):
    one = sample.write_sample(tmp_path / "a", studies=3, seed=7, edge=24)
    two = sample.write_sample(tmp_path / "b", studies=3, seed=7, edge=24)
    assert [file.read_bytes() for file in one.files] == [file.read_bytes() for file in two.files]
    series = scan(tmp_path / "a").series
    assert len(series) == 3
    assert len({item.patient for item in series}) == len({item.study for item in series}) == 3


def test_the_patient_is_marked_as_made_up(tmp_path):
    ds = dcmread(sample.write_sample(tmp_path, edge=24).files[0])
    assert ds.PatientIdentityRemoved == "YES" and "Sample" in str(ds.PatientName)


@pytest.mark.dicom3tools
def test_every_slice_is_valid_dicom(tmp_path):
    files = sample.write_sample(tmp_path, edge=24).files
    assert [dciodvfy(file) for file in (files[0], files[-1])] == [[], []]


def test_without_any_template_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(sample, "_DEBIAN", ("nowhere",))
    monkeypatch.setattr(sample, "_NILEARN", "nowhere")
    with pytest.raises(NotFoundError, match="nilearn"):
        sample.find_head()


def test_the_nilearn_head_is_used_where_debian_has_none(monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "_DEBIAN", ("nowhere",))
    info = sample.write_sample(tmp_path, edge=24)
    assert info.skull_stripped and "MNI152" in info.source
    assert load(tmp_path).array.max() > 1000
