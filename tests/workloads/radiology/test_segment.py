"""The job: any bundle over series, variants measured once, studies decoded ahead within a budget."""

from __future__ import annotations

import csv
import gc
import threading
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
from pydicom import dcmread

from permed_compute.errors import RefusedInput, SpecError, StoppedError, WorkloadError
from permed_compute.spec import DataRef, JobSpec
from permed_compute.testing.context import LocalContext, run_map
from permed_compute.workloads.radiology import bundle, pet, segment, studies, volume_store
from permed_compute.workloads.radiology.segment import NIFTI, OVERLAY, SEG, WORKLOAD, params_of
from permed_compute.workloads.radiology.studies import BUDGET, Budget

from .bundles import config, write_bundle
from .made import load, write
from .test_pet import edit as pet_edit

SEGMENTS = [{"label": name, "code": [str(n), "99PERMED", name]} for n, name in enumerate(("One", "Two"), 1)]


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A bundle that an operator has allowed."""
    made = write_bundle(tmp_path / "bundle", config())
    listed = tmp_path / "bundles.yaml"
    listed.write_text(f"allowed: {{{bundle.check(made).digest}: for a test}}\n")
    monkeypatch.setenv(bundle.ALLOWED, str(listed))
    return made


def spec(images: Path, root: Path, **params: object) -> JobSpec:
    inputs = (DataRef(path=str(images)), DataRef(path=str(root), name="bundle"))
    return JobSpec(name="t", workload="radiology/segment", inputs=inputs, params={"modalities": ["MR"], **params})


def test_each_series_gives_labels_a_seg_a_picture_and_rows(tmp_path, root):
    write(tmp_path / "in" / "a")
    write(tmp_path / "in" / "b", series="b", gap=1.5)
    outcome = run_map(WORKLOAD, spec(tmp_path / "in", root, segments=SEGMENTS), tmp_path / "w")
    assert len(outcome.done) == 2 and not outcome.failures
    runner = bundle.Plain(root, bundle.Options(), device="cpu", threads=1, scratch=tmp_path)
    runner.decision = None  # as MONAI's evaluator
    for item in outcome.done:
        assert {file.name for file in item.folder.iterdir()} == {SEG, NIFTI, OVERLAY}
        volume = next(v for v in (load(tmp_path / "in" / n) for n in "ab") if v.series == item.values["series"])
        studies.write_image(volume, tmp_path / "i.nii")
        expected = runner.segment(tmp_path / "i.nii", volume.array.shape, volume.affine_ras).labels
        found = nibabel.load(item.folder / NIFTI)
        assert np.array_equal(np.asarray(found.dataobj), expected)
        assert np.allclose(found.affine, volume.affine_ras, atol=1e-4)
        assert [s.SegmentLabel for s in dcmread(item.folder / SEG).SegmentSequence] == ["One", "Two"]
        assert item.values["streamed"] and not item.values["sealed"] and item.values["variant"] == "eager"
        for label, volume_ml in item.values["volumes_ml"].items():
            assert volume_ml == pytest.approx((expected == int(label)).sum() * volume.voxel_ml, abs=1e-3)
    rows = list(csv.DictReader((outcome.context.out / "volumes.csv").read_text().splitlines()))
    assert len(rows) == sum(len(item.values["volumes_ml"]) for item in outcome.done)
    assert outcome.result.values["bundle_digest"] == bundle.check(root).digest
    assert not list((tmp_path / "w").rglob("*.nii")), "nothing decoded is left behind"


def test_without_codes_there_is_no_seg(tmp_path, root):
    write(tmp_path / "in")
    (item,) = run_map(WORKLOAD, spec(tmp_path / "in", root), tmp_path / "w").done
    assert not (item.folder / SEG).exists() and (item.folder / NIFTI).exists()


def test_stores_and_nifti_give_the_labels_of_their_series(tmp_path, root):
    write(tmp_path / "in" / "dicom")
    volume = load(tmp_path / "in" / "dicom")
    studies.write_image(volume, tmp_path / "in" / "image.nii.gz")
    volume_store.write(tmp_path / "in" / "image.zarr", volume, inputs=["a" * 64], subject="p-1")
    volume_store.write(tmp_path / "in" / "label.zarr", volume, inputs=["b" * 64], kind="label")
    outcome = run_map(WORKLOAD, spec(tmp_path / "in", root, segments=SEGMENTS), tmp_path / "w")
    assert not outcome.failures and len(outcome.done) == 3
    first, *others = [np.asarray(nibabel.load(item.folder / NIFTI).dataobj) for item in outcome.done]
    assert all(np.array_equal(first, other) for other in others)
    of_files = [item for item in outcome.done if item.part.name.startswith("volume-")]
    assert [(item.folder / SEG).exists() for item in of_files] == [False, False]
    assert all("NO_SEG" in [finding.code for finding in item.findings] for item in of_files)
    assert sorted(item.part.subject for item in of_files) == ["", "p-1"]
    assert {item.values["modality"] for item in outcome.done} == {"MR"}
    assert [finding.code for finding in outcome.context.findings] == ["LABELS_PASSED_OVER"], "DICOM looks past them"


def test_what_lies_above_an_input_makes_no_store_of_it(tmp_path, root):
    above = tmp_path / "cohort.zarr"
    write(above / "in" / "dicom")
    volume_store.write(above / "in" / "image.zarr", load(above / "in" / "dicom"), inputs=["a" * 64])
    outcome = run_map(WORKLOAD, spec(above / "in", root), tmp_path / "w")
    assert len(outcome.done) == 2 and not outcome.failures and not outcome.context.findings


def test_a_store_that_is_not_what_the_bundle_wants_is_refused(tmp_path, root):
    write(tmp_path / "dicom")
    volume = load(tmp_path / "dicom")
    volume_store.write(tmp_path / "in" / "mr.zarr", volume, inputs=["a" * 64])
    activity = replace(volume, modality="PT")
    volume_store.write(tmp_path / "in" / "pet.zarr", activity, inputs=["b" * 64], unit="BQML")
    outcome = run_map(WORKLOAD, spec(tmp_path / "in", root, modalities=["PT"]), tmp_path / "w")
    assert sorted(error.finding.code for error in outcome.failures.values()) == ["MODALITY_UNSUITABLE", "PET_UNITS"]
    outcome = run_map(
        WORKLOAD, spec(tmp_path / "in" / "pet.zarr", root, modalities=["PT"], pet="stored"), tmp_path / "v"
    )
    assert len(outcome.done) == 1 and not outcome.failures


@pytest.mark.parametrize("metadata", [None, "{", "[]", "{}", '{"node_type": "array", "shape": [4]}'])
def test_a_store_that_cannot_be_opened_is_a_finding_and_the_others_go_on(tmp_path, root, metadata):
    write(tmp_path / "in" / "dicom")
    (tmp_path / "in" / "broken.zarr").mkdir()
    if metadata is not None:
        (tmp_path / "in" / "broken.zarr" / "zarr.json").write_text(metadata)
    outcome = run_map(WORKLOAD, spec(tmp_path / "in", root), tmp_path / "w")
    assert len(outcome.done) == 1 and not outcome.failures
    (finding,) = outcome.context.findings
    assert finding.severity == "refused" and "broken" not in finding.sentence + finding.about


def test_pet_reaches_the_network_in_suv_unless_the_job_says_otherwise(tmp_path, root):
    write(tmp_path / "in", edit=pet_edit())
    activity = load(tmp_path / "in")
    for how, expected in (({}, pet.as_suv(activity)[0].array), ({"pet": "stored"}, activity.array)):
        job = spec(tmp_path / "in", root, modalities=["PT"], **how)
        ctx = LocalContext(tmp_path / "w", job)
        (part,) = segment.plan(job, {}, ctx)
        study = segment.load(part, ctx)
        assert np.array_equal(np.asarray(nibabel.load(study.image).dataobj), expected)
        study.release()
    write(tmp_path / "untold", edit=pet_edit(change={"PatientWeight": None}))
    outcome = run_map(WORKLOAD, spec(tmp_path / "untold", root, modalities=["PT"]), tmp_path / "u")
    assert [error.finding.code for error in outcome.failures.values()] == ["PET_NO_WEIGHT"]


def test_a_bad_series_fails_alone_and_gives_its_memory_back(tmp_path, root):
    write(tmp_path / "in" / "a")
    write(tmp_path / "in" / "b", series="b", edit=lambda k, ds: None if k == 3 else ds)
    outcome = run_map(WORKLOAD, spec(tmp_path / "in", root), tmp_path / "w")
    (error,) = outcome.failures.values()
    assert isinstance(error, RefusedInput) and error.finding.code == "MISSING_SLICES" and len(outcome.done) == 1
    gc.collect()
    assert BUDGET._held == 0


def test_the_variant_is_measured_once_and_is_part_of_the_key(tmp_path, root, monkeypatch):
    write(tmp_path / "in")
    asked = []

    def measured(self, tolerance):
        asked.append(tolerance)
        return {"variant": "jit", "machine": self.machine, "seconds": {"eager": 2.0, "jit": 1.0}}

    monkeypatch.setattr(bundle.Plain, "calibrate", measured)
    job = spec(tmp_path / "in", root, variant="auto", tolerance=0.01)
    outcome = run_map(WORKLOAD, job, tmp_path / "w")
    (item,) = outcome.done
    assert asked == [0.01] and item.part.params["variant"] == "jit" and item.values["variant"] == "jit"
    ctx = LocalContext(tmp_path / "p", job)
    (first,) = WORKLOAD.plan(job, {}, ctx)
    assert first.params["step"] == "calibrate" and first.inputs == (bundle.check(root).digest,)
    assert list(WORKLOAD.plan(job, {}, ctx)) == [first], "the same key: the ledger measures no second time"
    eager = spec(tmp_path / "in", root)
    (other,) = WORKLOAD.plan(eager, {}, LocalContext(tmp_path / "q", eager))
    assert other.name == item.part.name and other.params != item.part.params


def test_another_bundle_than_the_one_named_is_refused_before_anything_runs(tmp_path, root):
    write(tmp_path / "in")
    with pytest.raises(WorkloadError, match="digest"):
        run_map(WORKLOAD, spec(tmp_path / "in", root, bundle_digest="0" * 64), tmp_path / "w")


def test_wrong_parameters_are_all_named():
    wrong = {"variant": "int3", "flips": [[3]], "segments": [{"label": "x"}], "keep_memory": 5, "colour": 1}
    with pytest.raises(SpecError) as caught:
        params_of(wrong)
    assert {problem.where for problem in caught.value.problems} == {f"params.{name}" for name in wrong}


def test_a_study_waits_for_memory_and_one_always_may():
    budget, order = Budget(), []
    budget.admit(100, 10, lambda: False)

    def second():
        budget.admit(6, 10, lambda: False)
        order.append("second")

    waiting = threading.Thread(target=second, daemon=True)
    waiting.start()
    waiting.join(0.2)
    assert not order
    order.append("released")
    budget.release(100)
    waiting.join(10)
    assert order == ["released", "second"]
    budget.admit(4, 10, lambda: False)
    with pytest.raises(StoppedError):
        budget.admit(1, 10, lambda: True)


def test_the_shipped_job_is_valid():
    from importlib import resources

    from permed_compute import spec as specs

    job = specs.load(Path(str(resources.files("permed_compute.jobs"))) / "radiology/segment/job.yaml")
    given = params_of(job.params)
    assert job.workload == "radiology/segment" and given == params_of(replace_lists(given))


def replace_lists(given):
    return {name: value for name, value in given.items() if name not in ("bundle_digest", "accept_incomplete")}


@pytest.mark.gpu
def test_the_job_on_a_gpu(tmp_path, root):
    write(tmp_path / "in")
    job = spec(tmp_path / "in", root)
    cpu, gpu = (run_map(WORKLOAD, job, tmp_path / device, device=device) for device in ("cpu", "cuda:0"))
    one, two = (np.asarray(nibabel.load(o.done[0].folder / NIFTI).dataobj) for o in (cpu, gpu))
    assert (one != two).mean() <= 1e-3
