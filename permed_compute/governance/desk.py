"""What people do with models: validate, promote, retire, complain; and the gate's word on a job. All of it is logged.

A validation is computed here, from what jobs of this home have published: the digests that an evaluation judged must be
files that the prediction job made, and that job's manifest says which model made them. Nobody types a figure.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from permed_compute.errors import (
    ModelRefusedError,
    NotFoundError,
    PermissionDeniedError,
    Problem,
    SpecError,
    StateError,
    WorkloadError,
)
from permed_compute.governance import gate, records
from permed_compute.governance.records import Register, Standing, record_row
from permed_compute.learning import evidence
from permed_compute.learning.evidence import Evidence
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.queue.port import Clock, Event, Job, Queue, wall_clock
from permed_compute.spec import JobSpec, Purpose
from permed_compute.states import JobState
from permed_compute.transfer import receipts

_ELEVEN_DIGITS = re.compile(r"(?<!\d)\d{6}\s?\d{5}(?!\d)")


@dataclass(frozen=True, slots=True)
class Person:
    """Who acts: a user of the operating system, and whether an operator."""

    name: str
    operator: bool


@dataclass(slots=True)
class Desk:
    """register: as the log stands now. entity_of: legal entity of an account by the policy, '' where it says none."""

    queue: Queue
    home: HomePaths
    register: Callable[[], Register]
    entity_of: Callable[[str], str] = lambda account: ""
    clock: Clock = wall_clock

    # ------------------------------------------------------------------------------------- the gate

    def clear(self, spec: JobSpec) -> dict[str, str]:
        """{record, model} under which a job for care may run; {} where no model is used, or it is not for care.

        Raises `ModelRefusedError`.
        """
        if spec.purpose is not Purpose.CARE:
            return {}
        from permed_compute.governance.identify import used_by

        claimed = self.entity_of(spec.account)
        if claimed and claimed != spec.legal_entity:
            raise ModelRefusedError(
                f"Account {spec.account} belongs to {claimed}; the job says {spec.legal_entity}.",
                rule="model-of-another-entity", remedy=f"Write `legal_entity: {claimed}`.",
            )  # fmt: skip
        cleared = {}
        for single in _distinct(spec):
            used = used_by(receipts.located(single, self.home.transfers), self.home.cache)
            if used.digest:
                record = gate.clear(used, spec.legal_entity, self.register(), self.clock())
                cleared = {"record": record.id, "model": used.digest}
        return cleared

    def clear_submission(self, spec: JobSpec, person: str) -> None:
        """The same at submission: a refusal is in the log, although no job is."""
        try:
            self.clear(spec)
        except ModelRefusedError as error:
            self._note_refusal(error, spec, person, "")
            raise

    def clear_launch(self, job: Job, actor: str) -> str:
        """The same at launch, once more: files, records and time have moved on. Returns the digest that was cleared."""
        try:
            cleared = self.clear(job.spec)
        except ModelRefusedError as error:
            self._note_refusal(error, job.spec, actor, job.id)
            raise
        if cleared:
            self.queue.note(records.CLEARED, actor=actor, data=cleared, job_id=job.id)
        return cleared.get("model", "")

    def _note_refusal(self, error: ModelRefusedError, spec: JobSpec, actor: str, job_id: str) -> None:
        told = {
            "rule": error.rule, "sentence": error.message, "workload": spec.workload, "entity": spec.legal_entity,
            "account": spec.account, "spec": spec.digest(),
        }  # fmt: skip
        self.queue.note(records.REFUSED, actor=actor, data=told, job_id=job_id)

    # ------------------------------------------------------------------------------------- what people do

    def rule(self, action: str, data: Mapping[str, Any], person: Person) -> dict[str, Any]:
        """One action of `ACTIONS`; returns the record it concerns, as `record_row`."""
        if action not in ACTIONS:
            raise NotFoundError(f"There is no action {action!r} on models.", remedy=f"There are: {', '.join(ACTIONS)}.")
        event = ACTIONS[action](self, data, person)
        register = self.register()
        name = f"v{event.hash[:11]}" if action == "validate" else event.data.get("record") or event.data["records"][-1]
        return record_row(register, register.records[name], self.clock())

    def rows(self) -> list[dict[str, Any]]:
        """All records, oldest first."""
        register, now = self.register(), self.clock()
        return [record_row(register, record, now) for record in register.all()]

    def _validate(self, data: Mapping[str, Any], person: Person) -> Event:
        from permed_compute.governance.criteria import loads
        from permed_compute.governance.judge import judge

        criteria = loads(str(data["criteria"]), source=str(data.get("source", "criteria")))
        evaluation, predictions = (self._succeeded(str(data[name])) for name in ("evaluation", "predictions"))
        entity = evaluation.spec.legal_entity
        if predictions.spec.legal_entity != entity:
            raise StateError(
                f"The predictions were made for {predictions.spec.legal_entity}, the evaluation for {entity}.",
                remedy="Both must be jobs of the legal entity that is to use the model.",
            )
        told = evidence.read(self.home.job(evaluation.id).results)
        manifest = read_json(self.home.job(predictions.id).results / "manifest.json") or {}
        made = manifest.get("workload", {})
        if not made.get("model_digest") or made.get("code"):
            raise StateError(
                f"Job {predictions.id} does not say which model it ran.", remedy="Predict with a workload that ships."
            )
        self._made_by(told, criteria.model, predictions)
        judged = judge(told, criteria)
        use = criteria.intended_use
        row = {
            "title": criteria.title, "model": made["model_digest"], "entity": entity,
            "workloads": {made["name"]: made["version"], **{name: _version(name) for name in use.workloads}},
            "params": dict(predictions.spec.params), "dataset": told.dataset, "cases": told.cases,
            "patients": told.patients, "criteria": criteria.model_dump(mode="json"),
            "judged": [asdict(each) for each in judged.rows], "failures": list(judged.failures),
            "expires": self.clock() + criteria.valid * 1000, "evaluation": evaluation.id,
            "predictions": predictions.id, "seed": predictions.spec.seed,
            "code": manifest.get("code", {}), "packages": manifest.get("packages", {}),
            "machine": manifest.get("machine", {}), "devices": sorted({d["flavor"] for d in manifest["devices"]}),
            "kept": self._keep(told, predictions.spec),
        }  # fmt: skip
        return self.queue.note(records.VALIDATED, actor=person.name, data=row)

    def _succeeded(self, name: str) -> Job:
        job = self.queue.job(name)
        if job.state is not JobState.SUCCEEDED:
            raise StateError(
                f"Job {job.id} is {job.state}: what failed in it would be left out of the figures.",
                remedy="Mend what failed and `permed resume` it; a case that cannot be computed counts as missed.",
            )
        return job

    def _made_by(self, told: Evidence, model: str, job: Job) -> None:
        """Every prediction that was judged is a file that the job made."""
        from permed_compute.storage.digests import DigestCache

        judged = told.predictions.get(model, ())
        if not judged:
            raise StateError(
                f"The evaluation judged no prediction of a model {model!r}.",
                remedy=f"Its models are: {', '.join(told.predictions)}; write one as `model` in the criteria.",
            )
        digests = DigestCache(self.home.cache)
        results = self.home.job(job.id).results
        made = {digests.digest(path) for path in sorted(results.rglob("*")) if path.is_file()}
        digests.save()
        strange = [digest for digest in judged if digest not in made]
        if strange:
            raise StateError(
                f"{len(strange)} of {len(judged)} predictions that were judged are not files of job {job.id}: which"
                " model made them is not known.", remedy="Evaluate the files in that job's results as they are.",
            )  # fmt: skip

    def _keep(self, told: Evidence, spec: JobSpec) -> str:
        """Evidence and card, by digest, for as long as the home is there: results of jobs are removed some day."""
        card = _card(receipts.located(spec, self.home.transfers))
        kept = {"evidence": asdict(told), "card": card[0], "metadata": card[1]}
        name = evidence.digest_of([json.dumps(kept, sort_keys=True)])
        write_json(self.home.models / f"{name}.json", kept)
        return name

    def _promote(self, data: Mapping[str, Any], person: Person) -> Event:
        _operator(person, "promote a model")
        register = self.register()
        record = register.find(str(data["record"]))
        standing = register.standing(record, self.clock())
        if standing is not Standing.PASSED:
            why = f": {'; '.join(record.row['failures'])}" if record.row["failures"] else ""
            raise StateError(
                f"Record {record.id} is {standing}, not passed{why}.", remedy=f"permed model show {record.id}"
            )
        if any(not later.passed for later in register.after(record)):
            raise StateError(f"A newer validation than {record.id} failed.", remedy="Validate it again.")
        own_work = str(data.get("own_work", "")).strip()
        if record.by == person.name and not own_work:
            raise PermissionDeniedError(
                f"{person.name} validated it and cannot promote it alone.",
                remedy="Another operator promotes it; or say why nobody else can: --own-work WHY, it is in the record.",
            )
        return self.queue.note(
            records.PROMOTED, actor=person.name,
            data={"record": record.id, "model": record.model, "entity": record.entity, "own_work": own_work},
        )  # fmt: skip

    def _retire(self, data: Mapping[str, Any], person: Person) -> Event:
        _operator(person, "retire a model")
        register = self.register()
        record = register.find(str(data["record"]))
        why = _said(data, "why")
        same = [other.id for other in register.all() if other.key == record.key and not other.retired_at]
        if not same:
            raise StateError(f"Record {record.id} is retired already.", remedy="permed model list")
        told = {"records": same, "model": record.model, "entity": record.entity, "why": why}
        return self.queue.note(records.RETIRED, actor=person.name, data=told)

    def _issue(self, data: Mapping[str, Any], person: Person) -> Event:
        record = self.register().find(str(data["record"]))
        told = {"record": record.id, "text": _said(data, "text")}
        return self.queue.note(records.ISSUE, actor=person.name, data=told)


ACTIONS: dict[str, Callable[[Desk, Mapping[str, Any], Person], Event]] = {
    "validate": Desk._validate,
    "promote": Desk._promote,
    "retire": Desk._retire,
    "issue": Desk._issue,
}


def _distinct(spec: JobSpec) -> Iterator[JobSpec]:
    """The elements of an array that differ; the job itself where it is none."""
    seen: set[str] = set()
    for index in range(max(1, len(spec.array))):
        single = spec.element(index)
        text = json.dumps(dict(single.params), sort_keys=True, default=str)
        if text not in seen:
            seen.add(text)
            yield single


def _operator(person: Person, what: str) -> None:
    if not person.operator:
        raise PermissionDeniedError(
            f"Only an operator may {what}.", remedy="root, or the user that the controller runs as."
        )


def _said(data: Mapping[str, Any], name: str) -> str:
    """A sentence for the log. Raises `SpecError`."""
    text = str(data.get(name, "")).strip()
    if len(text) < 3 or _ELEVEN_DIGITS.search(text):
        what = "says nothing" if len(text) < 3 else "has eleven digits like a national identity number"
        raise SpecError(name, [Problem(name, f"{what}; it stays in the log for ever.")])
    return text


def _version(workload: str) -> str:
    from permed_compute.workloads import registry

    if workload not in registry.CATALOG:
        raise WorkloadError(f"There is no workload {workload!r} that ships.", remedy="See `permed catalog workloads`.")
    return registry.find(JobSpec(name="looked-at", workload=workload)).version


def _card(spec: JobSpec) -> tuple[str, Any]:
    """The model's card and metadata: of a bundle among the inputs, else of the model that ships under that name."""
    from permed_compute import catalog

    places = [Path(ref.path) for ref in spec.inputs]
    places += [Path(entry.path) for entry in catalog.entries("models") if entry.path and entry.name == spec.workload]
    for place in places:
        if (place / "configs" / "metadata.json").is_file():
            card = place / "docs" / "README.md"
            text = card.read_text(encoding="utf-8") if card.is_file() else ""
            return text, read_json(place / "configs" / "metadata.json")
    return "", None
