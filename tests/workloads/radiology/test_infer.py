"""The workload over mixtures of studies, with a stand-in for the network: what becomes a part, and what a failure."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from permed_compute.errors import SpecError, WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.testing.context import LocalContext, run_map
from permed_compute.workloads.radiology import sample
from permed_compute.workloads.radiology.infer import NIFTI, OVERLAY, SEG, WORKLOAD, load

from .made import codes, plane, write


class Threshold:
    """A model in a millisecond: brain is what is brighter than a share of the brightest."""

    name, version, digest, device = "threshold", "1", "77" * 32, "cpu"

    def segment(self, volume, threshold):
        return volume.array > threshold * volume.array.max()


QUICK = replace(WORKLOAD, model=lambda spec, ctx: Threshold(), model_digest=lambda spec, ctx: Threshold.digest)


def spec(*inputs: Path, **params: object) -> JobSpec:
    return JobSpec(
        name="t", workload="radiology/brain-extraction", inputs=tuple(str(path) for path in inputs), params=params
    )


def test_one_part_per_series_with_its_three_files(tmp_path):
    sample.write_sample(tmp_path / "in", studies=3, edge=24)
    outcome = run_map(QUICK, spec(tmp_path / "in"), tmp_path / "work")
    assert len(outcome.done) == 3 and not outcome.failures
    for item in outcome.done:
        assert {file.name for file in item.folder.iterdir()} == {SEG, NIFTI, OVERLAY}
        assert item.part.name.startswith("series-") and item.part.subject
        assert item.values["volume_ml"] == pytest.approx(
            item.values["voxels"] * np.prod(item.values["spacing_mm"]) / 1e3
        )
    result = outcome.result
    assert result.metrics["series"] == 3 and result.metrics["volume_ml_mean"] > 0
    assert [name for name, _ in result.figures] == [f"{item.part.name}-overlay.png" for item in outcome.done]
    assert all((outcome.context.out / name).is_file() for name, _ in result.figures)
    rows = list(csv.DictReader((outcome.context.out / "volumes.csv").read_text().splitlines()))
    assert [row["part"] for row in rows] == [item.part.name for item in outcome.done]


def test_twenty_studies_of_which_three_are_broken(tmp_path):
    sample.write_sample(tmp_path / "in", studies=20, edge=24)
    hole, tilt, cut = (sorted((tmp_path / "in" / f"study-{n:03d}").iterdir()) for n in (3, 8, 15))
    hole[5].unlink()
    cut[6].write_bytes(cut[6].read_bytes()[:-100])
    for k, file in enumerate(tilt):
        ds = dcmread(file)
        ds.ImagePositionPatient[1] += 0.5 * k
        ds.save_as(file)
    outcome = run_map(QUICK, spec(tmp_path / "in"), tmp_path / "work")
    assert len(outcome.done) == 17
    assert sorted(error.finding.code for error in outcome.failures.values()) == [
        "GANTRY_TILT", "MISSING_SLICES", "PIXELS_UNREADABLE",
    ]  # fmt: skip


def test_changing_one_study_changes_one_part(tmp_path):
    files = sample.write_sample(tmp_path / "in", studies=4, edge=24).files
    ctx = LocalContext(tmp_path / "work", spec(tmp_path / "in"))
    before = {part.name: part for part in WORKLOAD.plan(ctx.spec, {}, ctx)}
    ds = dcmread(files[0])
    ds.PixelData = bytes(len(ds.PixelData))
    ds.save_as(files[0])
    after = {part.name: part for part in WORKLOAD.plan(ctx.spec, {}, ctx)}
    assert len(before) == len(after) == 4
    assert len(before.keys() & after.keys()) == 3


def test_parts_are_the_same_wherever_the_files_lie(tmp_path):
    sample.write_sample(tmp_path / "a", edge=24)
    (tmp_path / "b").mkdir()
    for number, file in enumerate(sorted((tmp_path / "a").rglob("*.dcm"), reverse=True)):
        (tmp_path / "b" / f"secret-name-{number}").write_bytes(file.read_bytes())
    one, two = (
        list(WORKLOAD.plan(s, {}, LocalContext(tmp_path / "w", s)))
        for s in (spec(tmp_path / "a"), spec(tmp_path / "b"))
    )
    assert [(p.name, p.inputs, p.params) for p in one] == [(p.name, p.inputs, p.params) for p in two]
    assert "secret-name" not in repr([(p.name, p.inputs, p.params, p.subject) for p in two])


def test_other_modalities_localisers_and_reports_are_passed_over(tmp_path):
    sample.write_sample(tmp_path / "in", edge=24)
    write(tmp_path / "in" / "ct", series="ct", edit=lambda k, ds: with_(ds, Modality="CT"))
    scout = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    write(tmp_path / "in" / "scout", series="scout", count=3, edit=lambda k, ds: with_(ds, ImageType=scout))
    outcome = run_map(QUICK, spec(tmp_path / "in"), tmp_path / "work")
    assert len(outcome.done) == 1 and not outcome.failures
    assert codes(outcome.context.findings) == ["SERIES_PASSED_OVER", "SERIES_PASSED_OVER"]


def with_(ds, **values):
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


def test_where_nothing_is_suitable_each_series_is_a_named_failure(tmp_path):
    write(tmp_path / "in", edit=lambda k, ds: with_(ds, Modality="CT"))
    outcome = run_map(QUICK, spec(tmp_path / "in"), tmp_path / "work")
    (error,) = outcome.failures.values()
    assert error.finding.code == "MODALITY_UNSUITABLE" and outcome.result.metrics == {"series": 0.0}


@pytest.mark.shared
def test_the_tilted_ct_is_refused_by_its_geometry_first(shared_data, tmp_path):
    outcome = run_map(QUICK, spec(shared_data / "radiology" / "ct-head-tilted"), tmp_path)
    (error,) = outcome.failures.values()
    assert error.finding.code == "GANTRY_TILT"
    assert error.finding.numbers["tilt_degrees"] == pytest.approx(18.5, abs=0.01)


def test_an_incomplete_series_is_refused_unless_accepted(tmp_path):
    write(tmp_path / "in", edit=lambda k, ds: with_(ds, InstanceNumber=k + 41))
    outcome = run_map(QUICK, spec(tmp_path / "in"), tmp_path / "a")
    (error,) = outcome.failures.values()
    assert error.finding.code == "INCOMPLETE_SUSPECTED" and error.finding.numbers["first_number"] == 41
    accepted = run_map(QUICK, spec(tmp_path / "in", accept_incomplete=True), tmp_path / "b")
    assert len(accepted.done) == 1 and codes(accepted.done[0].findings) == ["INCOMPLETE_SUSPECTED"]


def test_without_study_uid_there_is_nothing_to_point_to(tmp_path):
    write(tmp_path / "in", edit=lambda k, ds: with_(ds, StudyInstanceUID=""))
    (error,) = run_map(QUICK, spec(tmp_path / "in"), tmp_path / "w").failures.values()
    assert error.finding.code == "NO_STUDY_OR_SERIES_UID"


def test_files_that_changed_after_planning_are_not_computed(tmp_path):
    files = write(tmp_path / "in")
    ctx = LocalContext(tmp_path / "w", spec(tmp_path / "in"))
    (part,) = WORKLOAD.plan(ctx.spec, {}, ctx)
    plane(2, series="a").save_as(files[3], enforce_file_format=True)
    with pytest.raises(WorkloadError, match="planned"):
        load(part, ctx)


def test_wrong_parameters_are_all_named(tmp_path):
    wrong = spec(tmp_path, treshold=0.4, threshold=2, modalities="MR", accept_incomplete="yes")
    with pytest.raises(SpecError) as caught:
        list(WORKLOAD.plan(wrong, {}, LocalContext(tmp_path / "w", wrong)))
    assert [problem.where for problem in caught.value.problems] == [
        "params.treshold", "params.threshold", "params.modalities", "params.accept_incomplete",
    ]  # fmt: skip


def test_a_job_without_input(tmp_path):
    with pytest.raises(WorkloadError, match="input"):
        list(WORKLOAD.plan(spec(), {}, LocalContext(tmp_path, spec())))


def test_importing_the_workload_loads_nothing_heavy():
    heavy = ["torch", "monai", "highdicom", "matplotlib", "nibabel", "pydicom", "pandas", "deepbet", "ray", "mlflow"]
    code = f"import sys, permed_compute.workloads.radiology.infer; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.slow
def test_the_real_network_end_to_end(tmp_path):
    sample.write_sample(tmp_path / "in", edge=96)
    outcome = run_map(WORKLOAD, spec(tmp_path / "in"), tmp_path / "work")
    assert not outcome.failures
    (item,) = outcome.done
    assert 800 < item.values["volume_ml"] < 2200
    algorithm = dcmread(item.folder / SEG).SegmentSequence[0].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "deepbet"
    assert set(outcome.context.stages) == {"scan", "load model"}


def test_the_shipped_job_is_valid():
    from importlib import resources

    from permed_compute import spec as specs
    from permed_compute.workloads.radiology.infer import Params

    job = specs.load(Path(str(resources.files("permed_compute.jobs"))) / "radiology/brain-extraction/job.yaml")
    assert job.workload == "radiology/brain-extraction"
    assert Params.of(job.params) == Params()
