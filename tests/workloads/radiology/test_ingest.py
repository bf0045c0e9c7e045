"""Everything that a folder may hold becomes stores, or a refusal named by digest; the rest goes on."""

from __future__ import annotations

import csv
import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread

from permed_compute import spec
from permed_compute.errors import SpecError, WorkloadError
from permed_compute.paths import write_json
from permed_compute.spec import DataClass, DataRef, JobSpec
from permed_compute.testing.context import LocalContext, run_map
from permed_compute.workloads.radiology import ingest, nifti
from permed_compute.workloads.radiology.deidentify import Deidentifier
from permed_compute.workloads.radiology.patches import Samples as PatchSamples
from permed_compute.workloads.radiology.patches import Whole, cases
from permed_compute.workloads.radiology.volume_store import VolumeStore

from .made import load, plane, sha256, write
from .test_pet import edit as as_pet

AFFINE = np.diag([0.8, 0.9, 2.5, 1.0])


def job(*inputs, **params):
    return JobSpec(
        name="t", workload="radiology/ingest", inputs=[DataRef(path=str(path)) for path in inputs], params=params
    )


def run(root, *inputs, **params):
    return run_map(ingest.WORKLOAD, job(*inputs, **params), root / "run")


def codes(outcome):
    return sorted(error.finding.code for error in outcome.failures.values())


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    nifti.write(np.asarray(array, np.int16), AFFINE, path, level=1)


def volumes(seed, shape=(20, 24, 12)):
    random = np.random.default_rng(seed)
    return random.integers(-500, 500, shape), random.integers(0, 3, shape)


# ------------------------------------------------------------------------------------------ what comes in


def test_series_and_files_become_stores_with_a_table(tmp_path):
    write(tmp_path / "in" / "a", series="a")
    write(tmp_path / "in" / "b", series="b", count=5)
    save(tmp_path / "in" / "c.nii.gz", volumes(0)[0])
    outcome = run(tmp_path, tmp_path / "in", to=str(tmp_path / "to"))
    assert not outcome.failures and outcome.context.findings == []
    stores = {path.name: VolumeStore(path) for path in (tmp_path / "to").iterdir()}
    assert len(stores) == 3
    (file,) = (name for name in stores if name.startswith("volume-"))
    assert file == f"volume-{sha256(tmp_path / 'in' / 'c.nii.gz')[:16]}.zarr"
    assert np.array_equal(stores[file].all(), volumes(0)[0])
    series = load(tmp_path / "in" / "a")
    store = stores[f"series-{series.series[:16]}.zarr"]
    assert np.array_equal(store.all(), series.array) and store.about["modality"] == "MR"
    assert store.about["subject"] == LocalContext(tmp_path / "x", job()).pseudonym("P1")
    assert set(store.about["inputs"]) == {sha256(path) for path in (tmp_path / "in" / "a").iterdir()}
    with (outcome.context.out / "volumes.csv").open(encoding="utf-8") as file:
        assert {row["store"] for row in csv.DictReader(file)} == set(stores)
    assert outcome.result.metrics["volumes"] == 3 and outcome.result.metrics["files"] == 9


def test_without_a_folder_stores_lie_with_their_parts(regular, tmp_path):
    outcome = run(tmp_path, regular)
    (done,) = outcome.done
    assert VolumeStore(done.folder / done.values["store"]).shape == (10, 12, 8)


def decathlon(folder):
    """Two training cases of two modalities on the fourth axis, one test case; returns the arrays."""
    arrays = []
    for number in range(3):
        image = np.stack([volumes(10 * number + c)[0] for c in range(2)], -1)
        label = volumes(10 * number)[1]
        arrays.append((image, label))
        save(folder / ("imagesTr" if number < 2 else "imagesTs") / f"case_{number}.nii.gz", image)
        if number < 2:
            save(folder / "labelsTr" / f"case_{number}.nii.gz", label)
    rows = [{"image": f"./imagesTr/case_{n}.nii.gz", "label": f"./labelsTr/case_{n}.nii.gz"} for n in range(2)]
    write_json(folder / "dataset.json", {
        "modality": {"0": "FLAIR", "1": "T1w"}, "labels": {"0": "background", "1": "liver", "2": "tumour"},
        "training": rows, "test": ["./imagesTs/case_2.nii.gz"],
    })  # fmt: skip
    return arrays


def nnunet(folder, version):
    """The same as nnU-Net has it: a file per channel."""
    arrays = decathlon(folder)
    for split, numbers in (("Tr", (0, 1)), ("Ts", (2,))):
        for number in numbers:
            (folder / f"images{split}" / f"case_{number}.nii.gz").unlink()
            for channel in range(2):
                save(folder / f"images{split}" / f"case_{number}_{channel:04d}.nii.gz", arrays[number][0][..., channel])
    if version == 2:
        write_json(folder / "dataset.json", {
            "channel_names": {"0": "FLAIR", "1": "T1w"}, "labels": {"background": 0, "liver": 1, "tumour": 2},
            "numTraining": 2, "file_ending": ".nii.gz",
        })  # fmt: skip
    return arrays


@pytest.mark.parametrize(
    "make", [decathlon, lambda folder: nnunet(folder, 1), lambda folder: nnunet(folder, 2)],
    ids=["decathlon", "nnunet-1", "nnunet-2"],
)  # fmt: skip
def test_data_sets_become_a_list_of_stores(tmp_path, make):
    arrays = make(tmp_path / "set")
    outcome = run(tmp_path, tmp_path / "set", to=str(tmp_path / "to"))
    assert not outcome.failures and outcome.context.findings == []
    index = json.loads((tmp_path / "to" / "dataset.json").read_text())
    assert index["labels"] == {"0": "background", "1": "liver", "2": "tumour"}
    assert index["modality"] == {"0": "FLAIR", "1": "T1w"} and (index["numTraining"], index["numTest"]) == (2, 1)
    for split, numbers in (("training", (0, 1)), ("test", (2,))):
        found = cases(tmp_path / "to" / "dataset.json", split)
        for number, case in zip(numbers, found, strict=True):
            sample = PatchSamples([case], Whole())[0]
            assert np.array_equal(sample["image"].numpy(), arrays[number][0].transpose(3, 0, 1, 2))
            assert number == 2 or np.array_equal(sample["label"][0].numpy(), arrays[number][1])
    assert "case_" not in (tmp_path / "to" / "dataset.json").read_text()


def test_a_case_of_which_a_file_is_bad_is_left_out_of_the_list(tmp_path):
    decathlon(tmp_path / "set")
    label = tmp_path / "set" / "labelsTr" / "case_1.nii.gz"
    label.write_bytes(label.read_bytes()[:60])
    (tmp_path / "set" / "imagesTs" / "case_2.nii.gz").unlink()
    outcome = run(tmp_path, tmp_path / "set", to=str(tmp_path / "to"))
    assert codes(outcome) == ["NIFTI_UNREADABLE"]
    (finding,) = outcome.context.findings
    assert (finding.code, finding.numbers["files"]) == ("FILE_MISSING", 1)
    index = json.loads((tmp_path / "to" / "dataset.json").read_text())
    assert (index["numTraining"], index["numTest"]) == (1, 0)


def test_names_in_a_list_do_not_lead_out_of_its_folder(tmp_path):
    save(tmp_path / "secret.nii.gz", volumes(0)[0])
    decathlon(tmp_path / "set")
    index = json.loads((tmp_path / "set" / "dataset.json").read_text())
    index["test"] = ["../secret.nii.gz", {"image": str(tmp_path / "secret.nii.gz")}]
    write_json(tmp_path / "set" / "dataset.json", index)
    outcome = run(tmp_path, tmp_path / "set")
    assert outcome.context.findings[0].numbers["files"] == 2 and len(outcome.done) == 6
    (tmp_path / "set" / "dataset.json").write_text("{")
    with pytest.raises(WorkloadError, match=r"dataset\.json"):
        run(tmp_path, tmp_path / "set")


def test_pet_is_stored_in_suv_or_as_it_is(tmp_path):
    write(tmp_path / "pet", edit=as_pet())
    write(tmp_path / "untold", series="b", edit=as_pet(change={"PatientWeight": None}))
    outcome = run(tmp_path, tmp_path / "pet", tmp_path / "untold", to=str(tmp_path / "to"))
    assert codes(outcome) == ["PET_NO_WEIGHT"]
    (path,) = (tmp_path / "to").iterdir()
    assert VolumeStore(path).about["unit"] == "SUVbw" and VolumeStore(path).dtype == np.int16
    kept = run(tmp_path / "again", tmp_path / "pet", tmp_path / "untold", pet="stored")
    assert {done.values["unit"] for done in kept.done} == {"BQML"}


# ------------------------------------------------------------------------------------------ resuming and budgets


def test_a_store_that_stands_is_not_made_again_and_one_cut_off_leaves_nothing(regular, tmp_path, monkeypatch):
    to = tmp_path / "to"
    run(tmp_path, regular, to=str(to))
    (path,) = to.iterdir()
    before = {file.name: file.stat().st_mtime_ns for file in path.iterdir()}
    decoded = []
    monkeypatch.setattr(ingest.read, "assemble", lambda *a: decoded.append(a))
    again = run(tmp_path / "again", regular, to=str(to))
    assert not decoded and again.done[0].values["store"] == path.name and again.done[0].values["files"] == 3
    assert {file.name: file.stat().st_mtime_ns for file in path.iterdir()} == before
    monkeypatch.undo()
    shutil.rmtree(path)

    def killed(*a, **k):
        raise KeyboardInterrupt

    monkeypatch.setattr(ingest.volume_store.volumes, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", regular, to=str(to))
    assert list(to.iterdir()) == []


def test_other_options_do_not_pass_for_the_same_store(tmp_path):
    write(tmp_path / "pet", edit=as_pet())
    run(tmp_path, tmp_path / "pet", to=str(tmp_path / "to"))
    assert codes(run(tmp_path / "b", tmp_path / "pet", to=str(tmp_path / "to"), pet="stored")) == ["OTHER_STORE"]


@pytest.mark.parametrize(("budget", "words"), [({"max_files": 5}, "5"), ({"max_gib": 1e-6}, "GiB")])
def test_what_exceeds_the_budget_is_refused_before_a_byte_is_written(tmp_path, budget, words):
    write(tmp_path / "in" / "a", series="a")
    write(tmp_path / "in" / "b", series="b")
    with pytest.raises(WorkloadError, match=words) as caught:
        run(tmp_path, tmp_path / "in", to=str(tmp_path / "to"), **budget)
    assert "nothing was written" in str(caught.value) and not (tmp_path / "to").exists()


def test_the_budget_counts_what_lies_there_and_a_site_has_one(regular, tmp_path):
    (tmp_path / "to").mkdir()
    for number in range(8):
        (tmp_path / "to" / str(number)).write_bytes(b"x")
    with pytest.raises(WorkloadError, match="8 are there"):
        run(tmp_path, regular, to=str(tmp_path / "to"), max_files=10)
    assert len(run(tmp_path, regular, to=str(tmp_path / "to"), max_files=11).done) == 1
    saga = ingest.Params.of({"site": "saga"}).budget
    assert (saga.files, saga.bytes) == (1_000_000, 1024 * 2**30)
    assert ingest.Params.of({"site": "saga", "max_files": 7}).budget.files == 7


def test_wrong_parameters_are_all_named():
    with pytest.raises(SpecError) as caught:
        ingest.Params.of({"role": "mask", "modalities": ["US"], "max_files": -1, "pet": 1, "nonsense": 2})
    assert {problem.where for problem in caught.value.problems} == {
        "params.role", "params.modalities", "params.max_files", "params.pet", "params.nonsense",
    }  # fmt: skip


def test_the_shipped_job_says_the_defaults():
    shipped = spec.load(Path(str(resources.files("permed_compute.jobs"))) / "radiology" / "ingest" / "job.yaml")
    assert ingest.Params.of(shipped.params) == ingest.Params()


# ------------------------------------------------------------------------------------------ bad input


def spoil(folder, name):
    """A series or file below `folder` with one thing wrong."""
    secret = folder / "Nordmann_Kari_01019012345"
    if name == "truncated":
        files = write(secret, series=name)
        files[3].write_bytes(files[3].read_bytes()[:-40])
    elif name == "wrong transfer syntax":

        def jpeg(k, ds):
            ds.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.4.90"
            ds["PixelData"].is_undefined_length = True
            ds.PixelData = b"\xfe\xff\x00\xe0\x00\x00\x00\x00\xfe\xff\x00\xe0\x10\x00\x00\x00" + bytes(16)
            return ds

        write(secret, series=name, edit=jpeg)
    elif name == "5-D":
        save(secret / "x.nii.gz", np.zeros((6, 6, 6, 2, 3)))
    elif name == "negative spacing in NIfTI":
        save(secret / "x.nii", volumes(0)[0])
        data = bytearray((secret / "x.nii").read_bytes())
        data[80:84] = np.float32(-0.8).tobytes()
        (secret / "x.nii").write_bytes(data)
    else:
        edits = {
            "zero slope": lambda k, ds: _set(ds, RescaleSlope="0", RescaleIntercept="0"),
            "mixed patients": lambda k, ds: _set(ds, PatientID=f"Nordmann{k % 2}"),
            "duplicate UIDs": lambda k, ds: _set(ds, SOPInstanceUID="1.2.3") if k in (2, 5) else ds,
            "negative spacing": lambda k, ds: _set(ds, PixelSpacing=["-0.75", "1.25"]),
            "one slice": lambda k, ds: ds if k == 0 else None,
            "missing slices": lambda k, ds: None if k == 4 else ds,
        }
        write(secret, series=name, edit=edits[name])


def _set(ds, **values):
    for name, value in values.items():
        setattr(ds, name, value)
    return ds


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("truncated", "PIXELS_UNREADABLE"),
        ("wrong transfer syntax", "PIXELS_UNREADABLE"),
        ("zero slope", "RESCALE_INVALID"),
        ("mixed patients", "MIXED_PATIENTS"),
        ("duplicate UIDs", "DUPLICATE_SOP_UID"),
        ("negative spacing", "SPACING_INVALID"),
        ("negative spacing in NIfTI", "SPACING_INVALID"),
        ("one slice", "SINGLE_SLICE"),
        ("5-D", "DIMENSIONS"),
        ("missing slices", "MISSING_SLICES"),
    ],
)
def test_a_bad_item_is_refused_by_name_and_the_batch_goes_on(tmp_path, name, code):
    write(tmp_path / "in" / "good", series="good")
    spoil(tmp_path / "in", name)
    outcome = run(tmp_path, tmp_path / "in", to=str(tmp_path / "to"))
    assert codes(outcome) == [code] and len(outcome.done) == 1
    ((part, error),) = outcome.failures.items()
    assert part.startswith(("series-", "volume-")) and len(error.finding.about) == 64 and error.remedy is not None
    told = repr([str(error), error.as_dict(), outcome.context.logs, outcome.context.findings, part])
    assert "Nordmann" not in told and "01019012345" not in told
    assert [path.name for path in (tmp_path / "to").iterdir()] == [outcome.done[0].values["store"]]


def test_a_header_with_impossible_values_is_a_finding(regular, tmp_path):
    ds = plane(0)
    ds.NumberOfFrames = "1"
    ds.save_as(regular / "odd", enforce_file_format=True)
    raw = (regular / "odd").read_bytes()
    at = raw.index(b"\x28\x00\x08\x00IS")
    (regular / "odd").write_bytes(raw[: at + 8] + b"1A" + raw[at + 10 :])
    outcome = run(tmp_path, regular)
    assert [finding.code for finding in outcome.context.findings] == ["BROKEN_HEADER"]
    assert len(outcome.done) == 1


@pytest.mark.shared
def test_the_shared_series_are_stored_and_the_tilted_one_refused_or_straightened(shared_data, tmp_path):
    folders = [shared_data / "radiology" / name for name in ("ct-head-tilted", "ct-3slice", "ct-thorax-j2k")]
    outcome = run(tmp_path, *folders, to=str(tmp_path / "to"))
    assert codes(outcome) == ["GANTRY_TILT"] and len(outcome.done) == 2
    straight = run(tmp_path / "b", folders[0], tilt="correct")
    assert not straight.failures and straight.done[0].values["shape"] == [512, 611, 56]
    assert "GANTRY_TILT_CORRECTED" in straight.done[0].values["findings"]


# ------------------------------------------------------------------------------------------ data classes


@pytest.mark.parametrize(("data_class", "kept"), [("red", 2), ("yellow", 1), ("green", 1)])
def test_a_store_without_persons_takes_clean_images_only(tmp_path, data_class, kept):
    write(tmp_path / "in" / "known", series="a")
    write(tmp_path / "clean-in", series="b")
    by = Deidentifier(b"k" * 32, vouched=True)
    (tmp_path / "in" / "clean").mkdir()
    for number, file in enumerate(sorted((tmp_path / "clean-in").iterdir())):
        by.apply(dcmread(file)).dataset.save_as(tmp_path / "in" / "clean" / f"{number}.dcm", enforce_file_format=True)
    asked = job(tmp_path / "in", to=str(tmp_path / "to")).model_copy(update={"data_class": DataClass(data_class)})
    outcome = run_map(ingest.WORKLOAD, asked, tmp_path / "run")
    assert len(list((tmp_path / "to").iterdir())) == kept
    assert codes(outcome) == ["NOT_DEIDENTIFIED"] * (2 - kept)
