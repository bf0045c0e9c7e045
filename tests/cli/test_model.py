"""Between a model and patients: unvalidated, other entity, changed, failed, retired, expired: refused, and logged."""

from __future__ import annotations

import getpass
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from permed_compute.client import open_client
from permed_compute.errors import ModelRefusedError
from permed_compute.governance.desk import Desk
from permed_compute.governance.identify import used_by
from permed_compute.paths import HomePaths, read_json
from permed_compute.queue.port import Event
from permed_compute.spec import JobSpec
from permed_compute.workloads import registry

CASES = 12
TOYS = '''
"""A domain of its own: a model that is a file, predictions, and an evaluation of them."""
from pathlib import Path

from permed_compute.learning.evidence import Evidence, Figure, digest_of
from permed_compute.workloads.port import Map, Part, PartResult, Result


def plan(spec, state, ctx):
    return [Part(f"case-{k}", (str(k),), dict(spec.params)) for k in range(12)]


def run(part, model, ctx):
    (ctx.out / "prediction.txt").write_text(part.name)
    return PartResult()


def reduce(results, state, ctx):
    return Result()


def judged(results, state, ctx):
    files = sorted(ctx.input("predictions").rglob("prediction.txt"))
    figures = []
    for who, mean in ctx.spec.params["dice"].items():
        trait, _, group = who.partition(" ")
        patients = 6 if trait else 12
        figures.append(Figure("ours", "dice", True, mean, mean - 0.05, mean + 0.05, 12, patients, trait, group))
    predictions = {"ours": tuple(ctx.digest(file) for file in files)}
    Evidence(digest_of(["truth"]), 12, 12, 0, predictions, tuple(figures)).write(ctx.out)
    return Result()


def one(spec, state, ctx):
    return [Part("all", (), dict(spec.params))]


PREDICT = Map(plan=plan, run=run, reduce=reduce, model_digest=lambda spec, ctx: ctx.digest(ctx.input("model")))
EVALUATE = Map(plan=one, run=lambda part, model, ctx: PartResult(), reduce=judged)
'''
CRITERIA: dict[str, Any] = {
    "title": "Toy", "model": "ours", "least_patients": 10,
    "intended_use": {
        "name": "toy-use", "statement": "Says nothing about anybody, read by nobody.", "free": ["colour"],
    },
    "thresholds": [{"measure": "dice", "least": 0.8}],
    "subgroups": {"traits": ["sex"], "thresholds": [{"measure": "dice", "least": 0.7, "of": "mean"}]},
    "institution": {"name": "Toy hospital", "address": "Toy street 1"},
}  # fmt: skip
GOOD = {"": 0.9, "sex F": 0.9, "sex M": 0.8}


class Ward:
    """A home in which a model can be validated."""

    def __init__(self, permed: Any, home: HomePaths, folder: Path) -> None:
        self.permed, self.home, self.folder = permed, home, folder
        self.model = folder / "model.bin"
        self.model.write_bytes(b"weights")

    def job(self, workload: str = "toy/predict", **values: Any) -> Path:
        spec = {
            "name": "toy", "workload": workload, "inputs": [{"name": "model", "path": str(self.model)}],
            "legal_entity": "ous", "time_limit": "5m", "retries": 0, **values,
        }  # fmt: skip
        file = self.folder / f"job-{time.time_ns()}.yaml"
        file.write_text(yaml.safe_dump(spec))
        return file

    def ran(self, **values: Any) -> str:
        answer = self.permed("run", self.job(**values), "--json")
        assert answer.code == 0, answer.err
        return json.loads(answer.out)["jobs"][0]["id"]

    def care(self, **values: Any) -> Any:
        return self.permed("run", self.job(purpose="care", **values), "--json")

    def refused(self, rule: str, **values: Any) -> dict[str, Any]:
        """It is refused at submission by this rule, and the log says so; returns the error."""
        before = len(self.events("care-refused"))
        answer = self.care(**values)
        error = json.loads(answer.err.splitlines()[-1])
        assert (answer.code, error["code"], error["rule"]) == (5, "model-refused", rule), answer.err
        noted = self.events("care-refused")
        assert len(noted) == before + 1 and noted[-1].data["rule"] == rule
        assert not [job for job in self.permed("jobs", "--json").json if job["spec"]["purpose"] == "care"]
        return error

    def validate(self, dice: dict[str, float] = GOOD, entity: str = "ous", **changes: Any) -> Any:
        predictions = self.ran(legal_entity=entity)
        inputs = [{"name": "predictions", "path": str(self.home.job(predictions).results)}]
        judged = self.ran(workload="toy/evaluate", inputs=inputs, params={"dice": dice}, legal_entity=entity)
        criteria = self.folder / "criteria.yaml"
        criteria.write_text(yaml.safe_dump({**CRITERIA, **changes}))
        return self.permed("model", "validate", judged, "--predictions", predictions, "--criteria", criteria, "--json")

    def promoted(self, **how: Any) -> str:
        record = self.validate(**how).json["record"]
        assert self.permed("model", "promote", record, "--own-work", "one person in a test").code == 0
        return record

    def work_off(self, job: str) -> None:
        with open_client() as client:
            client.wait([job])

    def events(self, reason: str) -> list[Event]:
        with open_client() as client:
            return [event for event in client.service.events() if event.reason == reason]


@pytest.fixture
def ward(permed: Any, home: HomePaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ward:
    (tmp_path / "gate_toys.py").write_text(TOYS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.CATALOG, "toy/predict", "gate_toys:PREDICT")
    monkeypatch.setitem(registry.CATALOG, "toy/evaluate", "gate_toys:EVALUATE")
    return Ward(permed, home, tmp_path)


def test_from_refusal_to_use_and_all_of_it_in_the_log(ward: Ward) -> None:
    assert "permed model validate" in ward.refused("model-unvalidated")["remedy"]
    answer = ward.validate()
    row = answer.json
    assert answer.code == 0 and row["standing"] == "passed" and row["patients"] == CASES and row["entity"] == "ous"
    error = ward.refused("model-not-promoted")
    assert error["remedy"].endswith(f"permed model promote {row['record']}")
    alone = ward.permed("model", "promote", row["record"])
    assert alone.code == 5 and "--own-work" in alone.err
    assert ward.permed("model", "promote", row["record"][:5], "--own-work", "a test").code == 0
    done = ward.care()
    assert done.code == 0, done.err
    job = json.loads(done.out)["jobs"][0]["id"]
    assert read_json(ward.home.job(job).results / "manifest.json")["workload"]["model_digest"] == row["model"]
    [cleared] = ward.events("care-cleared")
    assert cleared.job_id == job and cleared.data == {"record": row["record"], "model": row["model"]}
    assert len(ward.events("model-validated")) == len(ward.events("model-promoted")) == 1
    [listed] = ward.permed("model", "list", "--json").json
    assert listed["standing"] == "promoted" and listed["uses"] == 1 and listed["own_work"] == "a test"
    assert ward.permed("audit", "verify").code == 0


def test_another_entity_is_refused(ward: Ward) -> None:
    ward.promoted()
    error = ward.refused("model-of-another-entity", legal_entity="unn")
    assert "validated for ous, not for unn" in error["message"] and "5(5)" in error["message"]
    ward.promoted(entity="unn")
    assert ward.care(legal_entity="unn").code == 0


def test_an_account_is_of_the_entity_that_the_policy_says(ward: Ward) -> None:
    ward.promoted()
    policy = ward.folder / "quota.yaml"
    policy.write_text(
        "version: 1\ncapacity: {cpu: 2, memory: 4GiB}\naccounts:\n  local:\n    legal_entity: unn\n"
        "    quota: {cpu: {nominal: 2}, memory: {nominal: 4GiB}}\n"
        f"    members: [{{user: {getpass.getuser()}, bands: [research], purposes: [care]}}]\n"
    )
    applied = ward.permed("quota", "apply", policy)
    assert applied.code == 0, applied.err
    assert "belongs to unn" in ward.refused("model-of-another-entity")["message"]


def test_a_changed_model_is_refused(ward: Ward) -> None:
    record = ward.promoted()
    ward.model.write_bytes(b"weightz")
    error = ward.refused("model-changed")
    assert record in error["message"]
    ward.model.write_bytes(b"weights")
    assert ward.care().code == 0


def test_a_failed_subgroup_is_refused_and_named(ward: Ward) -> None:
    answer = ward.validate({**GOOD, "sex M": 0.6})
    assert answer.code == 1 and answer.json["standing"] == "failed"
    assert "dice, sex M: 0.600" in answer.json["failures"][0]
    promote = ward.permed("model", "promote", answer.json["record"], "--own-work", "hurry")
    assert promote.code == 5 and "sex M" in promote.err
    assert "sex M" in ward.refused("model-failed")["message"]


def test_a_later_failure_takes_a_promoted_model_out_of_care(ward: Ward) -> None:
    record = ward.promoted()
    ward.validate({**GOOD, "": 0.5})
    assert ward.permed("model", "show", record, "--json").json["standing"] == "suspended"
    ward.refused("model-failed")
    ward.promoted()
    assert ward.care().code == 0


def test_a_retired_model_is_refused_and_needs_a_new_validation(ward: Ward) -> None:
    record = ward.promoted()
    assert ward.permed("model", "retire", record, "--why", "replaced").code == 0
    assert "replaced" in ward.refused("model-retired")["message"]
    assert ward.permed("model", "promote", record, "--own-work", "again").code == 5
    assert [event.data["why"] for event in ward.events("model-retired")] == ["replaced"]
    ward.promoted()
    assert ward.care().code == 0


def test_an_expired_validation_is_refused(ward: Ward) -> None:
    row = ward.validate(valid="1s").json
    time.sleep(max(0.0, row["expires"] / 1000 - time.time()) + 0.05)
    assert ward.permed("model", "promote", row["record"], "--own-work", "late").code == 5
    assert "expired" in ward.refused("model-expired")["message"]


def test_another_use_than_the_validated_one_is_refused(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    ward.promoted()
    assert "params.threshold 0.9" in ward.refused("model-other-use", params={"threshold": 0.9})["message"]
    assert "params.threshold" in ward.refused("model-other-use", array=[{}, {"threshold": 0.1}])["message"]
    assert ward.care(params={"colour": "red"}).code == 0
    monkeypatch.setitem(registry.CATALOG, "toy/other", "gate_toys:PREDICT")
    assert "workload toy/other" in ward.refused("model-other-use", workload="toy/other")["message"]


def test_what_was_cleared_at_submission_is_looked_at_again_at_launch(ward: Ward) -> None:
    record = ward.promoted()
    job = ward.permed("submit", ward.job(purpose="care"), "--json").json[0]["id"]
    ward.permed("model", "retire", record, "--why", "recalled")
    ward.work_off(job)
    told = ward.permed("why", job, "--json").json
    assert told["state"] == "FAILED" and told["code"] == "model-refused" and "recalled" in told["sentence"]
    assert told["change"].endswith(f"permed resume {job}") and ward.events("care-refused")[-1].job_id == job
    ward.promoted()
    assert ward.permed("resume", job).code == 0
    ward.work_off(job)
    assert ward.permed("why", job, "--json").json["state"] == "SUCCEEDED"


def test_a_model_that_changes_after_its_launch_is_not_used(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    ward.promoted()
    monkeypatch.setattr(Desk, "clear_launch", lambda self, job, actor: "0" * 64 if job.spec.purpose == "care" else "")
    answer = ward.care()
    assert answer.code == 1
    [job] = json.loads(answer.out)["jobs"]
    assert job["reason"] == "model-refused" and "become another" in job["detail"]["sentence"]


def test_figures_of_other_predictions_than_the_jobs_are_no_validation(ward: Ward) -> None:
    predictions = ward.ran()
    elsewhere = ward.folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "prediction.txt").write_text("better")
    inputs = [{"name": "predictions", "path": str(elsewhere)}]
    judged = ward.ran(workload="toy/evaluate", inputs=inputs, params={"dice": GOOD})
    criteria = ward.folder / "criteria.yaml"
    criteria.write_text(yaml.safe_dump(CRITERIA))
    answer = ward.permed("model", "validate", judged, "--predictions", predictions, "--criteria", criteria)
    assert answer.code == 5 and "1 of 1 predictions" in answer.err
    other = ward.ran(workload="toy/evaluate", inputs=inputs, params={"dice": GOOD}, legal_entity="unn")
    answer = ward.permed("model", "validate", other, "--predictions", predictions, "--criteria", criteria)
    assert answer.code == 5 and "unn" in answer.err
    assert ward.permed("model", "list", "--json").json == []


def test_a_job_whose_model_cannot_be_known_is_refused(ward: Ward) -> None:
    ward.refused("model-unknown", workload="toy/evaluate")
    ward.refused("model-unknown", workload="gate_toys:PREDICT")
    ward.refused("model-unknown", code=str(ward.folder))
    ward.refused("model-unknown", inputs=[])
    ward.refused("model-unknown", inputs=[{"name": "model", "path": str(ward.folder / "nothing")}])
    for workload in ("radiology/train-segmentation", "omics/prs"):
        with pytest.raises(ModelRefusedError, match="does not say"):
            used_by(JobSpec(name="t", workload=workload, purpose="care"), ward.home.cache)
    assert used_by(JobSpec(name="t", workload="radiology/ingest", purpose="care"), ward.home.cache).digest == ""
    assert len(used_by(JobSpec(name="t", workload="radiology/brain-extraction"), ward.home.cache).digest) == 64


def test_a_polygenic_score_is_a_model_and_its_files_are_the_digest(ward: Ward) -> None:
    files = {name: ward.folder / f"{name}.txt" for name in ("genotypes", "score", "frequencies", "reference")}

    def digest() -> str:
        inputs = [{"name": name, "path": str(file)} for name, file in files.items()]
        spec = JobSpec(name="t", workload="omics/prs", purpose="care", inputs=inputs)
        return used_by(spec, ward.home.cache).digest

    for name, file in files.items():
        file.write_text(name)
    first = digest()
    files["genotypes"].write_text("somebody else's")
    assert digest() == first and len(first) == 64
    known = {first}
    for name in ("score", "frequencies", "reference"):
        files[name].write_text("another one")
        assert digest() not in known
        known.add(digest())


def test_the_documentation_is_rendered_from_records(ward: Ward) -> None:
    record = ward.promoted()
    ward.care()
    ward.permed("model", "issue", record, "misses small ones")
    named = ward.permed("model", "issue", record, "seen in 010190 12345")
    assert named.code == 2 and "eleven digits" in named.err
    folder = ward.folder / "mdr"
    answer = ward.permed("model", "doc", record, "--to", folder, "--json")
    assert answer.code == 3
    missing = " ".join(answer.json["missing"])
    assert "quality management" in missing and "equivalent" in missing and "card" in missing and "name" not in missing
    text = (folder / "documentation.md").read_text()
    row = ward.permed("model", "show", record, "--json").json
    for said in (
        row["model"], row["dataset"], "misses small ones", "1 launches for care", "one person in a test",
        "| dice | sex M | 6 | 0.800 (mean) | at least 0.7 | met |", "12 cases of 12", "**not stated**",
    ):  # fmt: skip
        assert said in text, said
    assert "Toy hospital" in (folder / "declaration.md").read_text()
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    complete = {name: "as it should be" for name in CRITERIA["institution"] | {
        "quality_system": "", "justification": "", "requirements": "", "review": ""}}  # fmt: skip
    second = ward.promoted(institution=complete)
    told = ward.permed("model", "doc", second, "--to", folder, "--json").json["missing"]
    assert told == ["(f) the model's card: design and training data"]


def test_a_restored_home_can_still_document_its_models(ward: Ward, tmp_path: Path) -> None:
    record = ward.promoted()
    assert ward.permed("model", "doc", record, "--to", tmp_path / "here").code == 3
    assert "1 documents" in ward.permed("backup", tmp_path / "copy").out
    other = tmp_path / "other"
    assert ward.permed("restore", tmp_path / "copy", "--home", other).code == 0
    [kept] = ward.home.models.iterdir()
    assert [path.name for path in HomePaths(other).models.iterdir()] == [kept.name]
    assert ward.permed("model", "doc", record, "--to", tmp_path / "there", "--home", other).code == 3
    for path in (tmp_path / "here").iterdir():
        assert (tmp_path / "there" / path.name).read_bytes() == path.read_bytes(), path.name


def test_through_the_controllers_socket_it_is_the_same(ward: Ward, tmp_path: Path) -> None:
    from permed_compute.client import RemoteService
    from permed_compute.queue.server import connect

    record = ward.promoted()
    with open_client():
        gateway = connect(ward.home.socket)
        try:
            remote = RemoteService(gateway)
            assert [row["record"] for row in remote.models()] == [record]
            assert remote.model("retire", {"record": record, "why": "by socket"})["standing"] == "retired"
            spec = JobSpec(
                name="t", workload="toy/predict", purpose="care", legal_entity="ous",
                inputs=[{"name": "model", "path": str(ward.model)}],
            )  # fmt: skip
            with pytest.raises(ModelRefusedError, match="by socket") as caught:
                remote.submit([spec])
            assert caught.value.rule == "model-retired"
            with pytest.raises(ModelRefusedError):
                remote.preview(spec)
        finally:
            gateway.close()
