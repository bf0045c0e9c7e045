"""The bundle: its weights are those it pins, and its masks are deepbet's own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest

from permed_compute.errors import NotFoundError, RefusedInput, WorkloadError
from permed_compute.workloads.radiology import model, sample
from permed_compute.workloads.radiology.read import Volume

from .made import load


@pytest.fixture(scope="module")
def brain() -> model.BrainModel:
    return model.BrainModel(model.bundle(), threads=2)


@pytest.fixture(scope="module")
def head(tmp_path_factory) -> Volume:
    folder = tmp_path_factory.mktemp("head")
    sample.write_sample(folder, edge=128)
    return load(folder)


def deepbet_mask(volume: Volume) -> np.ndarray:
    from deepbet import BrainExtraction

    image = nibabel.Nifti1Image(np.asarray(volume.array), volume.affine_ras)
    _, mask, _ = BrainExtraction(no_gpu=True).run(image)
    return np.asarray(mask.dataobj) > 0


def dice(a: np.ndarray, b: np.ndarray) -> float:
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def test_the_mask_is_deepbets_on_the_sample(brain, head):
    mask = brain.segment(head)
    assert mask.dtype == bool and mask.shape == head.array.shape
    assert 800 < mask.sum() * head.voxel_ml < 2200
    assert np.array_equal(mask, deepbet_mask(head))
    assert np.array_equal(mask, brain.segment(head)), "the second call gives the same mask"


@pytest.mark.shared
def test_the_mask_is_deepbets_on_the_real_head(brain, shared_data):
    volume = load(shared_data / "radiology" / "t1-head-mr")
    assert dice(brain.segment(volume), deepbet_mask(volume)) >= 0.99


def test_the_mask_does_not_depend_on_how_the_volume_is_stored(brain, head):
    """The same head with its axes swapped and one reversed: the same voxels of the patient are brain."""
    affine = head.affine_lps[:, [2, 0, 1, 3]].copy()
    affine[:3, 3] += affine[:3, 0] * (head.array.shape[2] - 1)
    affine[:3, 0] *= -1
    turned = replace(head, array=head.array.transpose(2, 0, 1)[::-1], affine_lps=affine)
    expected = brain.segment(head).transpose(2, 0, 1)[::-1]
    assert np.array_equal(brain.segment(turned), expected)


@pytest.mark.parametrize("grey", [0, 7])
def test_what_is_not_a_head_is_refused(brain, head, grey):
    with pytest.raises(RefusedInput) as caught:
        brain.segment(replace(head, array=np.full((40, 40, 40), grey, np.int16), series="abc"))
    assert (caught.value.finding.code, caught.value.finding.about) == ("NO_BRAIN_FOUND", "abc")


def bundle_with(tmp_path: Path, **changes: object) -> model.Bundle:
    shutil.copytree(model.bundle().root, tmp_path / "bundle")
    path = tmp_path / "bundle" / "configs" / "inference.json"
    config = json.loads(path.read_text())
    config["weights"].update(changes)
    path.write_text(json.dumps(config))
    return model.Bundle(tmp_path / "bundle")


def test_other_weights_are_refused_before_they_are_loaded(tmp_path):
    changed = bundle_with(tmp_path, segmenter={"file": "data/models/model.pt", "sha256": "0" * 64})
    with pytest.raises(WorkloadError, match=r"pip install deepbet==1\.0\.2"):
        model.BrainModel(changed)
    assert changed.digest() != model.bundle().digest()


@pytest.mark.parametrize("change", [{"package": "no-such-package"}, {"locator": {"file": "nowhere.pt", "sha256": ""}}])
def test_missing_weights_say_what_to_install(tmp_path, change):
    with pytest.raises(NotFoundError, match="pip install"):
        model.BrainModel(bundle_with(tmp_path, **change))


def test_a_changed_script_changes_the_digest(tmp_path):
    changed = bundle_with(tmp_path)
    before = changed.digest()
    script = changed.root / "scripts" / "brain_extraction.py"
    script.write_text(script.read_text() + "\n# changed\n")
    assert before == model.bundle().digest() != changed.digest()


@pytest.mark.slow
def test_monai_runs_the_bundle_to_the_same_mask(brain, head, tmp_path):
    nibabel.save(nibabel.Nifti1Image(np.asarray(head.array), head.affine_ras), tmp_path / "head.nii.gz")
    command = [
        sys.executable, "-m", "monai.bundle", "run", "--config_file", "configs/inference.json", "--image",
        str(tmp_path / "head.nii.gz"), "--output_dir", str(tmp_path), "--device", "cpu",
    ]  # fmt: skip
    ran = subprocess.run(command, cwd=model.bundle().root, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-2000:]
    mask = np.asarray(nibabel.load(tmp_path / "head_brain-mask.nii.gz").dataobj)
    assert np.array_equal(mask.squeeze() > 0, brain.segment(head))


def test_metadata_names_what_a_bundle_must():
    metadata = json.loads((model.bundle().root / "configs" / "metadata.json").read_text())
    for key in ("version", "changelog", "monai_version", "pytorch_version", "numpy_version", "task", "intended_use"):
        assert metadata[key], key
    assert "not for clinical use" in metadata["intended_use"].lower()
    assert (model.bundle().root / "docs" / "README.md").is_file()
