"""A worklist against a real Orthanc: in, computed, back in the same study, each once, and an answer per row."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from pydicom import dcmread

from permed_compute.errors import (
    NotFoundError,
    PermissionDeniedError,
    SpecError,
    WorkloadError,
)
from permed_compute.paths import HomePaths
from permed_compute.spec import DataRef, JobSpec
from permed_compute.testing.context import LocalContext, run_map
from permed_compute.workloads.radiology import answer, bundle, pet, read, sample, worklist
from permed_compute.workloads.radiology.archives import read_archives
from permed_compute.workloads.radiology.networks import Brain
from permed_compute.workloads.radiology.orders import read_orders
from permed_compute.workloads.radiology.pacs import Archive, ArchiveError

from .bundles import config, write_bundle
from .made import sha256, write
from .orthanc import PASSWORD, Orthanc
from .test_infer import Threshold
from .test_pet import edit as pet_edit

pytestmark = pytest.mark.orthanc
QUICK = replace(
    worklist.WORKLOAD,
    model=lambda spec, ctx: Brain(Threshold(), spec.params.get("threshold", 0.5)),
    model_digest=lambda spec, ctx: Threshold.digest,
)


def push(orthanc: Orthanc, folder: Path) -> None:
    Archive(read_archives(orthanc.archives())["pacs"])._c_store(read_files(folder))


def read_files(folder: Path) -> list[Path]:
    return [Path(source) for source in read.find(folder)]


def listed(folder: Path, *rows: tuple[str, str]) -> Path:
    lines = ["accession_number,study_instance_uid", *(",".join(row) for row in rows)]
    (folder / "worklist.csv").write_text("\n".join(lines) + "\n")
    return folder / "worklist.csv"


def spec(orthanc: Orthanc, rows: Path, purpose: str = "research", **params: object) -> JobSpec:
    return JobSpec(
        name="t", workload="radiology/worklist", purpose=purpose,
        inputs=({"name": "worklist", "path": str(rows)}, {"name": "archives", "path": str(orthanc.archives())}),
        params={"archive": "pacs", **params},
    )  # fmt: skip


@pytest.fixture(scope="module")
def ten(orthanc, tmp_path_factory) -> Path:
    """Ten studies, pushed by C-STORE."""
    folder = tmp_path_factory.mktemp("ten")
    sample.write_sample(folder, studies=10, seed=41, edge=16)
    push(orthanc, folder)
    return folder


def study_of(folder: Path) -> tuple[str, str]:
    """(accession, study UID) of a folder's images."""
    ds = dcmread(read_files(folder)[0], stop_before_pixels=True)
    return str(ds.AccessionNumber), str(ds.StudyInstanceUID)


def ten_rows(ten: Path) -> list[tuple[str, str]]:
    """Every second one by UID, the others by UID and accession: the accession numbers of samples repeat elsewhere."""
    rows = [study_of(folder) for folder in sorted(ten.iterdir())]
    return [(accession if number % 2 else "", uid) for number, (accession, uid) in enumerate(rows)]


def modalities(orthanc: Orthanc, study: str) -> Counter[str]:
    found = Archive(read_archives(orthanc.archives())["pacs"]).instances(study)
    assert len({item.sop for item in found}) == len(found)
    return Counter(item.modality for item in found)


def test_ten_studies_go_in_and_their_results_come_back_into_them(orthanc, ten, tmp_path):
    rows = listed(tmp_path, *ten_rows(ten))
    job = spec(orthanc, rows, returns=["pacs"], send_by="stow", outputs=["seg", "sr", "montage"])
    before = [modalities(orthanc, study_of(folder)[1]) for folder in sorted(ten.iterdir())]
    outcome = run_map(QUICK, job, tmp_path / "work")
    assert len(outcome.done) == 10 and not outcome.failures
    assert outcome.result.metrics["instances_sent"] == 30 and outcome.result.metrics["instances_already_there"] == 0
    for number, (folder, earlier) in enumerate(zip(sorted(ten.iterdir()), before, strict=True), 1):
        study = study_of(folder)[1]
        assert modalities(orthanc, study) - earlier == {"SEG": 1, "SR": 1, "OT": 1}
        (item,) = [done for done in outcome.done if done.part.sources[0].endswith(f"#{number}")]
        check_returned(orthanc, folder, [item.folder / name for name in item.values["files"]], tmp_path / f"{number}")


def check_returned(orthanc: Orthanc, source: Path, sent: list[Path], folder: Path) -> None:
    """What WADO gives back is what was sent, pixel by pixel, and says whose it is as the source does."""
    header = dcmread(read_files(source)[0], stop_before_pixels=True)
    pacs = Archive(read_archives(orthanc.archives())["pacs"])
    for path in sent:
        mine = dcmread(path)
        pacs.fetch(header.StudyInstanceUID, [mine.SeriesInstanceUID], folder / path.name)
        (got,) = [dcmread(found) for found in (folder / path.name).iterdir()]
        assert got.SOPInstanceUID == mine.SOPInstanceUID
        for keyword in ("PatientID", "PatientName", "StudyInstanceUID", "AccessionNumber"):
            assert str(got[keyword].value) == str(header[keyword].value)
        assert "PixelData" not in mine or np.array_equal(got.pixel_array, mine.pixel_array)
        assert got.Modality != "SR" or got.VerificationFlag == "UNVERIFIED"


def test_a_second_run_computes_the_same_instances_and_sends_none(orthanc, ten, tmp_path):
    job = spec(orthanc, listed(tmp_path, *ten_rows(ten)[:3]), returns=["pacs"], threshold=0.55)
    first = run_map(QUICK, job, tmp_path / "a")
    again = run_map(QUICK, job, tmp_path / "b")
    assert first.result.metrics["instances_sent"] == 6 and again.result.metrics["instances_sent"] == 0
    assert again.result.metrics["instances_already_there"] == 6
    assert [done.part.inputs for done in first.done] == [done.part.inputs for done in again.done]
    for one, two in zip(first.done, again.done, strict=True):
        for name in one.values["files"]:
            assert (one.folder / name).read_bytes() == (two.folder / name).read_bytes()


def test_stopped_between_two_destinations_nothing_is_doubled(orthanc, ten, tmp_path):
    """The first archive has the results, the second refuses; mended, the first is not filled again."""
    rows = listed(tmp_path, *ten_rows(ten)[3:4])
    broken = run_map(QUICK, spec(orthanc, rows, returns=["pacs", "stranger"], threshold=0.45), tmp_path / "a")
    assert [error.code for error in broken.failures.values()] == ["workload"]
    mended = run_map(QUICK, spec(orthanc, rows, returns=["pacs", "clinic"][:1], threshold=0.45), tmp_path / "b")
    assert mended.result.metrics == {
        "studies": 1, "series": 1, "instances_sent": 0, "instances_already_there": 2,
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ killed


CODE = """
import os, time
from dataclasses import replace
from pathlib import Path
from permed_compute.workloads.radiology import worklist
from permed_compute.workloads.radiology.networks import Brain

class Slow:  # from the sixth study on until the test says so
    name, version, digest, device, begun = "threshold", "1", "77" * 32, "cpu", 0
    def segment(self, volume, threshold):
        Slow.begun += 1
        while Slow.begun > 5 and not Path(os.environ["PERMED_HOME"], "go").exists():
            time.sleep(0.02)
        return volume.array > threshold * volume.array.max()

WORKLOAD = replace(
    worklist.WORKLOAD, model=lambda spec, ctx: Brain(Slow(), 0.52), model_digest=lambda spec, ctx: Slow.digest
)
"""


@pytest.fixture
def permed(tmp_path):
    """Runs the program in a home of its own; ends what is left."""
    home = HomePaths(tmp_path / "home")
    environment = os.environ | {
        "PERMED_HOME": str(home.root), "PERMED_EXECUTOR": "inprocess", "PERMED_TRACKING_URI": "none",
        "PERMED_ANCHOR": str(tmp_path / "anchor"), "PERMED_CPUS": "2", "PERMED_LEASE": "1",
    }  # fmt: skip
    started = []

    def start(*words: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "permed_compute.cli", *words], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()
    import shutil

    shutil.rmtree(home.runtime, ignore_errors=True)


def job_file(folder: Path, code: str, workload: str, **params: object) -> Path:
    (folder / "code").mkdir(exist_ok=True)
    (folder / "code" / "quick.py").write_text(code)
    job = {
        "name": "night", "workload": workload, "code": str(folder / "code"), "inputs": [], "retries": 0,
        "params": params, "resources": {"cpus": 1, "memory": "512MiB"},
    }  # fmt: skip
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def test_killed_in_the_middle_and_repeated_the_archive_holds_each_once(orthanc, ten, tmp_path, permed):
    rows = ten_rows(ten)
    studies = [uid for _, uid in rows]
    before = {study: modalities(orthanc, study) for study in studies}
    job = job_file(tmp_path, CODE, "quick:WORKLOAD", threshold=0.52, send_by="c-store")
    words = [
        "radiology", "worklist", str(listed(tmp_path, *rows)), "--archives", str(orthanc.archives()), "--from", "pacs",
        "--return", "pacs", "--job", str(job), "--to", str(tmp_path / "answer"), "--json",
    ]  # fmt: skip

    def returned() -> int:
        return sum((modalities(orthanc, study) - before[study]).total() for study in studies)

    first = permed(*words)
    deadline = time.monotonic() + 120
    while returned() < 5 and time.monotonic() < deadline and first.poll() is None:
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    left = returned()
    assert 5 <= left < 20, "it was to be killed in the middle"
    (tmp_path / "home" / "go").touch()
    again = permed(*words)
    said, complaint = again.communicate(timeout=120)
    assert again.returncode == 0, complaint
    assert json.loads(said)["counts"] == {"done": 10, "rejected": 0, "failed": 0}
    told = permed("radiology", "answer", json.loads(said)["job"], "--to", str(tmp_path / "again"), "--json")
    assert json.loads(told.communicate(timeout=60)[0])["counts"]["done"] == 10
    assert (tmp_path / "again" / "answer.csv").read_bytes() == (tmp_path / "answer" / "answer.csv").read_bytes()
    for study in studies:
        assert modalities(orthanc, study) - before[study] == {"SEG": 1, "SR": 1}
    (results,) = (tmp_path / "home" / "jobs").glob("*/results/parts")
    for part in results.iterdir():
        (seg,) = part.glob("*segmentation.dcm")
        folder = next(f for f in ten.iterdir() if study_of(f)[1] == str(dcmread(seg).StudyInstanceUID))
        check_returned(orthanc, folder, sorted(part.glob("*.dcm")), tmp_path / "back" / part.name)
    table = list(csv.DictReader((tmp_path / "answer" / "answer.csv").read_text().splitlines()))
    assert [row["study_instance_uid"] for row in table] == studies
    page = (tmp_path / "answer" / "answer.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 10 and not any(study in page for study in studies)
    # Neither the log nor the results that tracking takes say which examination it was, or with which password.
    kept = [path for path in (tmp_path / "home").rglob("*") if path.is_file() and path.suffix != ".dcm"]
    for path in kept:
        text = path.read_bytes()
        assert PASSWORD.encode() not in text, path.name
        assert not any(study.encode() in text for study in studies), path.name


# ------------------------------------------------------------------------------------------------ answers


def with_(**values: object):
    def edit(k, ds):
        for name, value in values.items():
            setattr(ds, name, value)
        return ds

    return edit


def test_every_kind_of_rejection_has_its_reason_and_the_others_go_on(orthanc, tmp_path):
    def study(name: str, series: str = "", **how: object) -> tuple[str, str]:
        uid = worklist_uid(name)
        values = {"StudyInstanceUID": uid, "AccessionNumber": f"REJ-{name}"[:16], **how.pop("values", {})}
        spoil = how.pop("spoil", lambda k, ds: ds)
        write(
            tmp_path / "in" / f"{name}{series}", series=f"rej-{name}{series}",
            edit=lambda k, ds: spoil(k, with_(**values)(k, ds)), **how,
        )  # fmt: skip
        return values["AccessionNumber"], uid

    good = study("good")
    ct = study("ct", values={"Modality": "CT"})
    hole = study("hole", spoil=lambda k, ds: ds if k != 3 else None)
    study("twin-a", values={"AccessionNumber": "REJ-TWINS"})
    study("twin-b", values={"AccessionNumber": "REJ-TWINS"})
    study("mixed", "-a")
    mixed = study("mixed", "-b", values={"PatientID": "P2"})
    push(orthanc, tmp_path / "in")
    rows = listed(
        tmp_path, good, ct, hole, ("REJ-TWINS", ""), mixed, ("NOWHERE", ""), ("REJ*", ""), ("", "1.2.x"), good,
        (ct[0], good[1]),
    )  # fmt: skip
    outcome = run_map(QUICK, spec(orthanc, rows, returns=["pacs"]), tmp_path / "work")
    ctx = LocalContext(tmp_path / "n", spec(orthanc, rows))
    orders = read_orders(rows)
    names = [worklist.item_name(ctx.pseudonym, order) for order in orders]
    codes = [outcome.failures[name].finding.code if name in outcome.failures else "" for name in names]
    assert codes == [
        "", "NO_SUITABLE_SERIES", "MISSING_SLICES", "STUDY_AMBIGUOUS", "STUDY_AMBIGUOUS", "STUDY_NOT_FOUND",
        "WORKLIST_ROW", "WORKLIST_ROW", "WORKLIST_ROW", "STUDY_NOT_FOUND",
    ]  # fmt: skip
    assert modalities(orthanc, good[1])["SEG"] == 1 and modalities(orthanc, ct[1])["SEG"] == 0
    said = " ".join(str(error.as_dict()) for error in outcome.failures.values()) + " ".join(names)
    assert not any(secret in said for secret in ("REJ-", "P2", good[1], ct[1], "Test"))


def worklist_uid(name: str) -> str:
    from permed_compute.workloads.dicomresult import derived_uid

    return derived_uid("test-worklist", name)


def test_one_good_series_of_a_study_is_enough_and_the_other_is_told(orthanc, tmp_path):
    uid = worklist_uid("two")
    write(tmp_path / "in" / "a", series="two-a", edit=with_(StudyInstanceUID=uid))
    write(
        tmp_path / "in" / "b", series="two-b", edit=lambda k, ds: with_(StudyInstanceUID=uid)(k, ds) if k != 3 else None
    )
    push(orthanc, tmp_path / "in")
    outcome = run_map(QUICK, spec(orthanc, listed(tmp_path, ("", uid)), returns=["pacs"]), tmp_path / "work")
    (done,) = outcome.done
    assert len(done.values["series"]) == 1 and "MISSING_SLICES" in done.values["findings"]


@pytest.mark.parametrize(
    ("name", "words"), [("locked", "credentials"), ("no-such-service", "404"), ("gone", "reached")]
)
def test_an_archive_that_does_not_answer_fails_each_row_with_its_reason(orthanc, tmp_path, name, words):
    gone = {"gone": {"clinical": False, "timeout": "2s", "dicomweb": {"url": "http://127.0.0.1:9/dicom-web"}}}
    rows = listed(tmp_path, *[(f"A{n}", "") for n in range(5)])
    job = spec(orthanc, rows).model_copy(update={"params": {"archive": name}})
    job = job.model_copy(
        update={"inputs": (job.inputs[0], job.inputs[1].model_copy(update={"path": str(orthanc.archives(**gone))}))}
    )
    outcome = run_map(QUICK, job, tmp_path / "work")
    assert len(outcome.failures) == 5 and not outcome.done
    assert all(isinstance(error, WorkloadError) for error in outcome.failures.values())
    assert words in " ".join(map(str, outcome.failures.values()))


def test_one_study_that_the_archive_chokes_on_does_not_stop_the_batch(orthanc, ten, tmp_path, monkeypatch):
    (_, first), (_, second), _ = rows = ten_rows(ten)[:3]
    instances, fetch = Archive.instances, Archive.fetch

    def listing(self: Archive, study: str) -> object:
        if study == first:
            raise ArchiveError("Archive pacs answered with an error (500).")
        return instances(self, study)

    def fetching(self: Archive, study: str, *words: object) -> int:
        if study == second:
            raise ArchiveError("Archive pacs did not answer within 20 s.")
        return fetch(self, study, *words)

    monkeypatch.setattr(Archive, "instances", listing)
    monkeypatch.setattr(Archive, "fetch", fetching)
    outcome = run_map(QUICK, spec(orthanc, listed(tmp_path, *rows)), tmp_path / "work")
    assert [done.part.sources[0][-2:] for done in outcome.done] == ["#3"]
    assert sorted(str(error)[:40] for error in outcome.failures.values()) == [
        "Archive pacs answered with an error (500)"[:40], "Archive pacs did not answer within 20 s."[:40],
    ]  # fmt: skip
    assert all(name.startswith("item-") for name in outcome.failures)


def test_pet_comes_back_with_suvs(orthanc, tmp_path):
    import highdicom

    uid = worklist_uid("pet")
    write(tmp_path / "in", series="pet", edit=lambda k, ds: with_(StudyInstanceUID=uid)(k, pet_edit()(k, ds)))
    push(orthanc, tmp_path / "in")
    job = spec(orthanc, listed(tmp_path, ("", uid)), returns=["pacs"], modalities=["PT"])
    (done,) = run_map(QUICK, job, tmp_path / "work").done
    ((series, figures),) = done.values["series"].items()
    suv = pet.as_suv(read.assemble(read.scan(read.find(tmp_path / "in"), sha256).series[0]))[0].array
    assert figures["Brain"]["suv_max"] == pytest.approx(float(suv.max()), rel=1e-4)
    (group,) = highdicom.sr.srread(
        done.folder / f"{series}-measurements.dcm"
    ).content.get_volumetric_roi_measurement_groups()
    named = {(m.name.value, m.derivation.value if m.derivation else "") for m in group.get_measurements()}
    assert ("126401", "56851009") in named and "PET_SUV" in done.values["findings"]


def test_images_that_come_while_a_study_is_computed_are_not_overlooked(orthanc, tmp_path):
    uid = worklist_uid("growing")
    write(tmp_path / "in", series="growing", count=8, edit=with_(StudyInstanceUID=uid))
    files = read_files(tmp_path / "in")
    pacs = Archive(read_archives(orthanc.archives())["pacs"])
    pacs._c_store(files[:7])
    job = spec(orthanc, listed(tmp_path, ("", uid)))
    ctx = LocalContext(tmp_path / "w", job)
    (planned,) = worklist.plan(job, {}, ctx)
    pacs._c_store(files[7:])
    with pytest.raises(WorkloadError, match="changed in the archive"):
        worklist.load(planned, ctx)
    (anew,) = worklist.plan(job, {}, ctx)
    assert anew.inputs != planned.inputs and anew.name == planned.name
    item = worklist.load(anew, ctx)
    assert item.volumes[0].array.shape[2] == 8
    # Results of ours in the study change nothing about what is to be computed.
    run = worklist.run(
        item,
        Brain(Threshold()),
        LocalContext(tmp_path / "r", spec(orthanc, listed(tmp_path, ("", uid)), returns=["pacs"])),
    )
    assert run.values["returned"]["pacs"]["sent"] == 2
    assert [part.inputs for part in worklist.plan(job, {}, ctx)] == [anew.inputs]


def test_half_of_a_study_is_an_error_and_not_a_smaller_study(orthanc, ten, tmp_path, monkeypatch):
    job = spec(orthanc, listed(tmp_path, ten_rows(ten)[0]))
    ctx = LocalContext(tmp_path / "w", job)
    (part,) = worklist.plan(job, {}, ctx)
    fetch = Archive.fetch
    monkeypatch.setattr(Archive, "fetch", lambda self, *words: fetch(self, *words) - 1)
    with pytest.raises(ArchiveError, match="images"):
        worklist.load(part, ctx)
    assert not list((tmp_path / "w" / "scratch").iterdir())


def test_research_is_refused_by_a_clinical_archive_before_anything_is_asked(orthanc, tmp_path, monkeypatch):
    monkeypatch.setattr(Archive, "find", lambda self, **words: pytest.fail("asked"))
    rows = listed(tmp_path, ("A1", ""))
    for purpose in ("research", "quality"):
        with pytest.raises(PermissionDeniedError, match="clinical"):
            run_map(QUICK, spec(orthanc, rows, purpose, returns=["clinic"]), tmp_path / "w")


def test_care_reaches_a_clinical_archive_unmarked(orthanc, ten, tmp_path):
    rows = listed(tmp_path, ten_rows(ten)[0])
    outcome = run_map(QUICK, spec(orthanc, rows, "care", returns=["clinic"], threshold=0.51), tmp_path / "w")
    (done,) = outcome.done
    assert done.values["returned"]["clinic"]["sent"] == 2
    assert not any("RESEARCH" in str(dcmread(path)) for path in done.folder.glob("*.dcm"))


# ------------------------------------------------------------------------------------------------ lists and answers


def test_a_list_in_excels_own_way(tmp_path):
    (tmp_path / "w.csv").write_bytes("\ufeffWard;Accession Number;Study UID\r\nB2;A1;\r\n;;\r\nB3;;1.2.3\r\n".encode())
    first, second = read_orders(tmp_path / "w.csv")
    assert (first.number, first.accession, first.study) == (1, "A1", "") and (second.number, second.study) == (
        2,
        "1.2.3",
    )
    assert "A1" not in repr(first)


@pytest.mark.parametrize(
    ("text", "words"), [("ward,bed\n1,2\n", "study UID"), ("accession_number\n", "0"), ("", "study UID")]
)
def test_lists_that_are_none(tmp_path, text, words):
    (tmp_path / "w.csv").write_text(text)
    with pytest.raises(SpecError, match=words):
        read_orders(tmp_path / "w.csv")
    with pytest.raises(NotFoundError):
        read_orders(tmp_path / "none.csv")


def test_wrong_parameters_are_all_named():
    wrong = {
        "archive": "",
        "returns": "pacs",
        "send_by": "mail",
        "outputs": ["sr"],
        "coding": "FRACTIONAL",
        "treshold": 1,
    }
    with pytest.raises(SpecError) as caught:
        worklist.Params.of(JobSpec(name="t", workload="radiology/worklist", params=wrong))
    assert {problem.where for problem in caught.value.problems} == {
        "params.archive", "params.returns", "params.send_by", "params.outputs", "params.coding", "params.treshold",
    }  # fmt: skip


def test_an_unknown_archive_is_named_with_those_that_there_are(orthanc, tmp_path):
    job = spec(orthanc, listed(tmp_path, ("A1", "")), returns=["elsewhere"])
    with pytest.raises(SpecError, match="pacs"):
        run_map(QUICK, job, tmp_path / "w")


def test_the_answer_has_a_row_for_each_row(tmp_path):
    rows = listed(tmp_path, ("A1", ""), ("=cmd()", ""), ("A3", ""), ("A4", ""))
    result = {"parts": [
        {"name": "item-1", "state": "DONE", "values": {"series": {"s": {"Brain": {"volume_ml": 1200.5}}},
         "returned": {"pacs": {"by": "stow", "sent": 2, "already": 0}}, "thumbnails": [], "findings": []}},
        {"name": "item-2", "state": "REFUSED", "reason": "X: no", "findings": [
            {"code": "STUDY_NOT_FOUND", "sentence": "Not there.", "severity": "refused"}]},
        {"name": "item-3", "state": "FAILED", "code": "archive", "reason": "Archive pacs gave an error (500)."},
    ]}  # fmt: skip
    found = answer.rows_of(read_orders(rows), lambda order: f"item-{order.number}", result)
    assert [row.outcome for row in found] == ["done", "rejected", "failed", "failed"]
    assert [row.code for row in found] == ["", "STUDY_NOT_FOUND", "archive", "not-run"]
    assert answer.counts(found) == {"done": 1, "rejected": 1, "failed": 2}
    answer.write_answer(found, tmp_path / "results", tmp_path / "answer")
    table = list(csv.DictReader((tmp_path / "answer" / "answer.csv").read_text().splitlines()))
    assert [row["accession_number"] for row in table] == ["A1", "'=cmd()", "A3", "A4"]
    assert (
        json.loads(table[0]["measurements"]) == {"Brain.volume_ml": 1200.5} and table[0]["returned"] == "pacs:stow:2+0"
    )
    record = json.loads((tmp_path / "answer" / "answer.json").read_text())
    assert record["rows"][1]["accession_number"] == "=cmd()"
    page = (tmp_path / "answer" / "answer.html").read_text()
    assert "error (500)" in page and "A3" not in page and page.index("Row 2") < page.index("Row 1")


# ------------------------------------------------------------------------------------------------ models


@pytest.mark.slow
def test_any_bundle_segments_a_worklist(orthanc, ten, tmp_path, monkeypatch):
    """Three structures by an untrained network: names and codes are the job's, the bundle's digest signs."""
    root = write_bundle(tmp_path / "bundle", config(classes=4, roi=16))
    (tmp_path / "allowed.yaml").write_text(yaml.safe_dump({"allowed": {bundle.check(root).digest: "made up"}}))
    monkeypatch.setenv(bundle.ALLOWED, str(tmp_path / "allowed.yaml"))
    names = [
        {"label": "Liver", "code": ["10200004", "SCT", "Liver"]},
        {"label": "Spleen", "code": ["78961009", "SCT", "Spleen"]},
        {"label": "Aorta", "code": ["15825003", "SCT", "Aorta"]},
    ]
    job = spec(
        orthanc, listed(tmp_path, ten_rows(ten)[5]), returns=["pacs"], modalities=["MR"], segments=names,
        outputs=["seg", "sr", "nifti"], coding="LABELMAP",
    )  # fmt: skip
    job = job.model_copy(update={"inputs": (*job.inputs, DataRef(name="bundle", path=str(root)))})
    (done,) = run_map(worklist.WORKLOAD, job, tmp_path / "work").done
    ((series, figures),) = done.values["series"].items()
    seg = dcmread(done.folder / f"{series}-segmentation.dcm")
    assert list(figures) == ["Liver", "Spleen", "Aorta"] and seg.SegmentationType == "LABELMAP"
    assert seg.DeviceSerialNumber == bundle.check(root).digest[:16] and seg.ManufacturerModelName.startswith("Made up")
    assert done.values["returned"]["pacs"]["sent"] == 2
    unnamed = job.model_copy(update={"params": {"archive": "pacs"}})
    with pytest.raises(SpecError, match="segments"):
        run_map(worklist.WORKLOAD, unnamed, tmp_path / "w")


BROKEN = """
import json, shutil
from dataclasses import replace
from pathlib import Path
from permed_compute.workloads.radiology import model, worklist
from permed_compute.workloads.radiology.networks import Brain

def load(spec, ctx):
    folder = Path(ctx.scratch) / "bundle"
    shutil.copytree(model.bundle().root, folder, dirs_exist_ok=True)
    config = json.loads((folder / "configs" / "inference.json").read_text())
    config["weights"]["segmenter"]["sha256"] = "00" * 32
    (folder / "configs" / "inference.json").write_text(json.dumps(config))
    return Brain(model.BrainModel(model.Bundle(folder)))

WORKLOAD = replace(worklist.WORKLOAD, model=load, model_digest=lambda spec, ctx: "00")
"""


@pytest.mark.slow
def test_weights_with_the_wrong_digest_fail_each_study_by_name(orthanc, ten, tmp_path, permed):
    job = job_file(tmp_path, BROKEN, "quick:WORKLOAD")
    rows = listed(tmp_path, *ten_rows(ten)[:2], ("NOWHERE", ""))
    ran = permed(
        "radiology", "worklist", str(rows), "--archives", str(orthanc.archives()), "--from", "pacs", "--job", str(job),
        "--to", str(tmp_path / "answer"),
    )  # fmt: skip
    _, complaint = ran.communicate(timeout=120)
    assert ran.returncode == 1, complaint
    table = list(csv.DictReader((tmp_path / "answer" / "answer.csv").read_text().splitlines()))
    assert [row["outcome"] for row in table] == ["failed", "failed", "rejected"]
    assert "weights" in table[0]["reason"] and table[0]["item"].startswith("item-")


def test_the_shipped_job_is_valid():
    from importlib import resources

    from permed_compute import spec as specs

    job = specs.load(Path(str(resources.files("permed_compute.jobs"))) / "radiology/worklist/job.yaml")
    assert job.workload == "radiology/worklist" and worklist.Params.of(job).archive == "pacs"


def test_importing_the_workload_loads_nothing_heavy():
    heavy = ["torch", "highdicom", "matplotlib", "pydicom", "pynetdicom", "dicomweb_client", "requests", "scipy", "ray"]
    code = f"import sys, permed_compute.workloads.radiology.worklist; print([m for m in {heavy!r} if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"
