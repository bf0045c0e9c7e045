"""`permed convert` of volumes: stores, findings beside them, and exit codes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from permed_compute.cli.exits import Exit
from permed_compute.workloads.radiology import nifti
from permed_compute.workloads.radiology.sample import find_head, write_sample


@pytest.fixture
def volumes(tmp_path):
    """A good NIfTI, one that is cut off, and a text."""
    folder = tmp_path / "Nordmann_Kari"
    folder.mkdir()
    array = np.random.default_rng(0).integers(0, 99, (12, 14, 16)).astype(np.int16)
    for name in ("good.nii.gz", "bad.nii.gz"):
        nifti.write(array + (name == "bad.nii.gz"), np.diag([0.8, 0.8, 2.5, 1.0]), folder / name)
    (folder / "bad.nii.gz").write_bytes((folder / "bad.nii.gz").read_bytes()[:-300])
    (folder / "readme.txt").write_text("not an image")
    return folder


def test_volumes_become_stores_and_a_bad_one_is_named_by_digest(permed, volumes, tmp_path):
    planned = permed("--json", "convert", volumes, "--to", tmp_path / "to", "--dry-run")
    assert planned.code == 0 and not (tmp_path / "to").exists()
    assert {row["files_most"] for row in json.loads(planned.out)} == {3}
    answer = permed("--json", "convert", volumes, "--to", tmp_path / "to")
    rows = json.loads(answer.out)
    assert answer.code == Exit.PARTIAL and sum("error" in row for row in rows) == 1
    (good,) = (row for row in rows if "error" not in row)
    assert (tmp_path / "to" / good["store"] / "zarr.json").is_file() and good["shape"] == [12, 14, 16]
    assert "NOT_DICOM" in answer.err
    told = permed("convert", volumes, "--to", tmp_path / "to")
    assert "PIXELS_UNREADABLE" in told.out and "Nordmann" not in told.out + told.err


def test_a_volume_that_was_changed_is_found(permed, volumes, tmp_path):
    permed("convert", volumes / "good.nii.gz", "--to", tmp_path / "to")
    (store,) = (path for path in (tmp_path / "to").iterdir() if path.suffix == ".zarr")
    answer = permed("verify", store)
    assert answer.code == 0 and "2,688 voxels" in answer.out
    row = json.loads((store / "zarr.json").read_text())
    row["attributes"]["permed"]["voxels"] = "crc32:00000000"
    (store / "zarr.json").write_text(json.dumps(row))
    assert permed("verify", store).code == Exit.FAILED


def test_dicom_is_told_from_slides(permed, tmp_path):
    try:
        find_head()
    except Exception:
        pytest.skip("no head to write")
    write_sample(tmp_path / "dicom", edge=24)
    answer = permed("convert", tmp_path / "dicom", "--to", tmp_path / "to")
    assert answer.code == 0 and "MR" in answer.out and "mm" in answer.out
