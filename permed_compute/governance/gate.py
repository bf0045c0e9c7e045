"""May this model be used on patients of this entity in this way? Pure: a model, a register, a moment; yes, or why not.

Every refusal names the rule, says what stands against it, and gives the command that would mend it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from permed_compute.errors import ModelRefusedError
from permed_compute.governance.identify import Used
from permed_compute.governance.records import Register, Standing, Validation

_VALIDATE = "permed model validate EVALUATION --predictions JOB --criteria FILE"


def clear(used: Used, entity: str, register: Register, now: int) -> Validation:
    """The promoted record that covers it. Raises `ModelRefusedError`."""
    of_model = [record for record in register.all() if record.model == used.digest]
    if not of_model:
        raise _unvalidated(used, entity, register, now)
    of_entity = [record for record in of_model if record.entity == entity]
    if not of_entity:
        raise _another_entity(used, entity, of_model)
    covering = [record for record in of_entity if not differences(used, record)]
    if not covering:
        raise _other_use(used, of_entity[-1])
    for record in reversed(covering):
        if register.standing(record, now) is Standing.PROMOTED:
            return record
    raise _not_standing(covering, register, now)


def differences(used: Used, record: Validation) -> list[str]:
    """In what a use differs from the one that was validated; empty where the record covers it."""
    versions = record.row["workloads"]
    if used.workload not in versions:
        return [f"workload {used.workload}, validated was {', '.join(versions)}"]
    found = []
    if versions[used.workload] != used.version:
        found.append(f"version {used.version} of {used.workload}, validated was {versions[used.workload]}")
    validated, free = record.row["params"], {*record.row["criteria"]["intended_use"]["free"]}
    for name in sorted(({*used.params} | {*validated}) - free):
        mine, its = (_shown(params.get(name)) for params in (used.params, validated))
        if mine != its:
            found.append(f"params.{name} {mine}, validated was {its}")
    return found


def _shown(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str) if value is not None else "unset"


def _unvalidated(used: Used, entity: str, register: Register, now: int) -> ModelRefusedError:
    promoted = [
        record
        for record in register.all()
        if record.entity == entity
        and used.workload in record.row["workloads"]
        and register.standing(record, now) is Standing.PROMOTED
    ]
    if promoted:
        known = promoted[-1]
        return ModelRefusedError(
            f"The model is not the one that was validated: its digest is {used.digest[:16]}, that of"
            f" {known.row['title']} (record {known.id}) is {known.model[:16]}.", rule="model-changed",
            remedy=f"Use the model that was validated, or validate this one: {_VALIDATE}",
        )  # fmt: skip
    return ModelRefusedError(
        f"No validation of this model (digest {used.digest[:16]}) is on record.", rule="model-unvalidated",
        remedy=f"Evaluate it on data of {entity}, then: {_VALIDATE}",
    )  # fmt: skip


def _another_entity(used: Used, entity: str, of_model: Sequence[Validation]) -> ModelRefusedError:
    names = ", ".join(sorted({record.entity for record in of_model}))
    return ModelRefusedError(
        f"Model {used.digest[:16]} was validated for {names}, not for {entity}; an in-house model is not passed on to"
        " another legal entity (MDR Article 5(5)(a)).", rule="model-of-another-entity",
        remedy=f"{entity} validates it on data of its own: {_VALIDATE}",
    )  # fmt: skip


def _other_use(used: Used, record: Validation) -> ModelRefusedError:
    return ModelRefusedError(
        f"Record {record.id} ({record.use}) does not cover this use: {'; '.join(differences(used, record))}.",
        rule="model-other-use", remedy=f"Run it as it was validated, or validate this use: {_VALIDATE}",
    )  # fmt: skip


def _not_standing(covering: Sequence[Validation], register: Register, now: int) -> ModelRefusedError:
    """The newest record's word."""
    record = covering[-1]
    standing = register.standing(record, now)
    again = f"Validate it again: {_VALIDATE}"
    if standing is Standing.FAILED:
        said = f"Its validation {record.id} failed: {'; '.join(record.row['failures'])}."
        return ModelRefusedError(said, rule="model-failed", remedy=again)
    if standing is Standing.RETIRED:
        said = f"The model was retired for {record.entity}: {record.why}"
        return ModelRefusedError(said.rstrip(".") + ".", rule="model-retired", remedy=again)
    if standing is Standing.EXPIRED:
        said = f"Its validation {record.id} has expired."
        return ModelRefusedError(said, rule="model-expired", remedy=again)
    if standing is Standing.SUSPENDED:
        failed = next(later for later in register.after(record) if not later.passed)
        said = f"Its newer validation {failed.id} failed: {'; '.join(failed.row['failures'])}."
        return ModelRefusedError(said, rule="model-failed", remedy=again)
    return ModelRefusedError(
        f"Its validation {record.id} passed, but nobody has promoted it to care.", rule="model-not-promoted",
        remedy=f"An operator who did not validate it: permed model promote {record.id}",
    )  # fmt: skip
