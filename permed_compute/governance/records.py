"""The register of models, folded from the event log: validated, promoted, retired, used, complained about.

The log is the register's only store: a record is as hard to change unseen as the log itself, and its name is its
event's hash. `model-validated` {the record}, `model-promoted` {record, own_work}, `model-retired` {records, why},
`model-issue` {record, text}; `care-cleared` {record} of a job that was launched with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from permed_compute.errors import NotFoundError
from permed_compute.queue.port import Event

VALIDATED, PROMOTED, RETIRED, ISSUE = "model-validated", "model-promoted", "model-retired", "model-issue"
CLEARED, REFUSED = "care-cleared", "care-refused"

_LEAST_PREFIX = 4


class Standing(StrEnum):
    """Of a record, now. Only PROMOTED lets a model be used."""

    PASSED = "passed"
    PROMOTED = "promoted"
    FAILED = "failed"
    SUSPENDED = "suspended"
    """It was promoted, and a newer validation of the same model for the same use has failed."""
    RETIRED = "retired"
    EXPIRED = "expired"


@dataclass(frozen=True, slots=True)
class Validation:
    """A record: this model, for this legal entity and intended use, judged on this dataset by these criteria.

    row: the record as `desk` composed it. Times are ms since 1970 UTC, 0 where it has not happened.
    """

    id: str
    at: int
    by: str
    row: Mapping[str, Any]
    promoted_at: int = 0
    promoted_by: str = ""
    own_work: str = ""
    retired_at: int = 0
    why: str = ""
    uses: int = 0
    last_use: int = 0
    issues: tuple[tuple[int, str, str], ...] = ()
    """(when, who, what)."""

    @property
    def model(self) -> str:
        """Digest of weights and code."""
        return str(self.row["model"])

    @property
    def entity(self) -> str:
        return str(self.row["entity"])

    @property
    def use(self) -> str:
        """Name of the intended use."""
        return str(self.row["criteria"]["intended_use"]["name"])

    @property
    def passed(self) -> bool:
        return not self.row["failures"]

    @property
    def expires(self) -> int:
        return int(self.row["expires"])

    @property
    def key(self) -> tuple[str, str, str]:
        return self.model, self.entity, self.use


@dataclass(slots=True)
class Register:
    """All records, oldest first."""

    records: dict[str, Validation] = field(default_factory=dict)

    def all(self) -> tuple[Validation, ...]:
        """A copy: the log may grow while somebody looks."""
        return tuple(self.records.values())

    def apply(self, event: Event) -> None:
        """Take one NOTED event; those of other matters are passed over."""
        data = event.data
        match event.reason:
            case "model-validated":
                self.records[f"v{event.hash[:11]}"] = Validation(f"v{event.hash[:11]}", event.at, event.actor, data)
            case "model-promoted":
                self._change(data, promoted_at=event.at, promoted_by=event.actor, own_work=data["own_work"])
            case "model-retired":
                for name in data["records"]:
                    self._change({"record": name}, retired_at=event.at, why=data["why"])
            case "model-issue":
                issues = self.records[data["record"]].issues
                self._change(data, issues=(*issues, (event.at, event.actor, data["text"])))
            case "care-cleared":
                self._change(data, uses=self.records[data["record"]].uses + 1, last_use=event.at)

    def _change(self, data: Mapping[str, Any], **values: Any) -> None:
        name = data["record"]
        self.records[name] = replace(self.records[name], **values)

    def standing(self, record: Validation, now: int) -> Standing:
        """What the record is worth now."""
        if record.retired_at:
            return Standing.RETIRED
        if not record.passed:
            return Standing.FAILED
        if now >= record.expires:
            return Standing.EXPIRED
        if any(not later.passed and not later.retired_at for later in self.after(record)):
            return Standing.SUSPENDED
        return Standing.PROMOTED if record.promoted_at else Standing.PASSED

    def after(self, record: Validation) -> Iterator[Validation]:
        """Newer validations of the same model for the same entity and use."""
        seen = False
        for other in self.all():
            if seen and other.key == record.key:
                yield other
            seen = seen or other.id == record.id

    def find(self, name: str) -> Validation:
        """By its name or the beginning of it; of a model's digest, its newest record. Raises `NotFoundError`."""
        rows = [{"record": record.id, "model": record.model} for record in self.all()]
        return self.records[named(rows, name)["record"]]


def named(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """The one of these (oldest first) that a record's name or a model's digest begins with: of a model its newest.

    Raises `NotFoundError`.
    """
    if len(name) < _LEAST_PREFIX:
        raise NotFoundError(f"{name!r} is too short.", remedy=f"Write at least {_LEAST_PREFIX} characters.")
    records = [row for row in rows if row["record"].startswith(name)]
    of_model = [row for row in rows if row["model"].startswith(name)]
    if len(records) > 1 or len({row["model"] for row in of_model}) > 1:
        raise NotFoundError(f"Several records begin with {name!r}.", remedy="Write more of it.")
    if not records and not of_model:
        raise NotFoundError(f"There is no record or model {name!r}.", remedy="permed model list")
    return (records or of_model)[-1]


def record_row(register: Register, record: Validation, now: int) -> dict[str, Any]:
    """The record as JSON, with what it is worth now."""
    return {
        "record": record.id, "standing": register.standing(record, now).value, "validated_at": record.at,
        "validated_by": record.by, "promoted_at": record.promoted_at, "promoted_by": record.promoted_by,
        "own_work": record.own_work, "retired_at": record.retired_at, "why": record.why, "uses": record.uses,
        "last_use": record.last_use, "issues": [list(issue) for issue in record.issues], **record.row,
    }  # fmt: skip
