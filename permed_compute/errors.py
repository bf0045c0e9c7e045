"""Every error permed_compute raises on purpose.

    PermedError                     anything below; carries `remedy`, what the reader can do about it
    ├── SpecError                   a job file or object is wrong; carries `problems`, each with its line
    ├── NotFoundError               no such job, part, model, file
    ├── StateError                  the move is not allowed from the job's present state
    ├── PermissionDeniedError       this caller may not do this to this job
    │   └── ModelRefusedError       this model may not be used on patients here; carries `rule`
    ├── StaleError                  somebody else moved first; look again and decide again
    │   └── LeaseLostError          another controller leads this queue now
    ├── QueueError                  the queue's store cannot be used (unreachable, wrong version, bad file system)
    ├── AuditError                  the event log has been edited, cut or reordered; carries `seq`
    ├── SettingsError               a setting is unknown or its value impossible
    ├── EngineError                 an executor cannot do what was asked (Ray did not start, no such node)
    ├── SiteRefusalError            a site's rules forbid this job; carries `refusals`, each with its source
    ├── WorkloadError               a workload cannot be found, or does not have one of the two shapes
    ├── StoppedError                a part was asked to stop and gave up half-way; it is computed again
    ├── TransferError               files could not be sent or received now; what is there is gone on from
    │   ├── NoRoomError             the place they should go to is full; nothing half-written is left
    │   └── DamagedError            what arrived is not what was signed and sent
    └── RefusedInput                this input must not be computed on; carries `finding` (coded, with numbers)

Rules: a message says what was wrong, where, and `remedy` says what to do. Messages never carry a patient's identifiers:
files are named by digest. Errors cross process borders, so each survives pickling (`__reduce__`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class PermedError(Exception):
    """Base of the tree. `str(error)` is one paragraph; `remedy` is what the reader can do, or ''."""

    code = "error"

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message} {self.remedy}".strip()

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.__dict__.copy())

    def as_dict(self) -> dict[str, Any]:
        """The error for `--json`: code, message, remedy."""
        return {"code": self.code, "message": self.message, "remedy": self.remedy}


def _rebuild(kind: type[PermedError], attributes: dict[str, Any]) -> PermedError:
    error = kind.__new__(kind)
    Exception.__init__(error, attributes["message"])
    error.__dict__.update(attributes)
    return error


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong in a job file: where (dotted path and line, 0 = unknown), what, and what to write."""

    where: str
    what: str
    line: int = 0
    remedy: str = ""

    def __str__(self) -> str:
        place = f"line {self.line}, {self.where}" if self.line else self.where
        return f"{place}: {self.what}" + (f" {self.remedy}" if self.remedy else "")


class SpecError(PermedError):
    """A job description is wrong. All problems at once, so that one round of mending is enough."""

    code = "spec"

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        super().__init__(f"{source}: " + "; ".join(str(problem) for problem in problems))
        self.source = source
        self.problems = tuple(problems)

    def as_dict(self) -> dict[str, Any]:
        rows = [{"where": p.where, "line": p.line, "what": p.what, "remedy": p.remedy} for p in self.problems]
        return super().as_dict() | {"source": self.source, "problems": rows}


class NotFoundError(PermedError):
    """No such job, part, model or file."""

    code = "not-found"


class StateError(PermedError):
    """The move is not allowed from the job's present state."""

    code = "state"


class PermissionDeniedError(PermedError):
    """This caller may not do this."""

    code = "permission"


class ModelRefusedError(PermissionDeniedError):
    """This model may not be used on patients here. `rule` says which rule stands against it."""

    code = "model-refused"

    def __init__(self, message: str, *, rule: str, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.rule = rule

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"rule": self.rule}


class StaleError(PermedError):
    """A compare-and-set failed: somebody else moved first."""

    code = "stale"


class LeaseLostError(StaleError):
    """Another controller has taken the queue's lease; this one must stop writing."""

    code = "lease-lost"


class QueueError(PermedError):
    """The queue's store cannot be used."""

    code = "queue"


class AuditError(PermedError):
    """The event log is not what was written. `seq` is the first record that is wrong."""

    code = "audit"

    def __init__(self, message: str, *, seq: int, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.seq = seq

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"seq": self.seq}


class SettingsError(PermedError):
    """A setting is unknown, or its value impossible."""

    code = "settings"


class EngineError(PermedError):
    """An executor cannot do what was asked."""

    code = "engine"


class SiteRefusalError(PermedError):
    """A site would not take this job, or must not be given it. All rules at once, each with the page it stands on.

    refusals: `{"rule", "sentence", "remedy", "source", "verified"}` of each.
    """

    code = "site-refused"

    def __init__(self, site: str, refusals: Sequence[Mapping[str, Any]]) -> None:
        super().__init__(
            "; ".join(f"{row['sentence']} ({row['rule']}; {row['source']})" for row in refusals),
            remedy=" ".join(dict.fromkeys(str(row["remedy"]) for row in refusals)),
        )
        self.site = site
        self.refusals = tuple(dict(row) for row in refusals)

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"site": self.site, "refusals": list(self.refusals)}


class WorkloadError(PermedError):
    """A workload cannot be found, or has neither of the two shapes."""

    code = "workload"


class StoppedError(PermedError):
    """A part saw `ctx.should_stop()` and gave up half-way. It has not failed: the next attempt computes it."""

    code = "stopped"


class TransferError(PermedError):
    """Files could not be sent or received now. Running the same command again goes on from what is there."""

    code = "transfer"


class NoRoomError(TransferError):
    """The place they should go to is full. Nothing half-written is left there."""

    code = "no-room"


class DamagedError(TransferError):
    """What arrived is not what was signed and sent. Nothing of it was put in place."""

    code = "damaged"


@dataclass(frozen=True, slots=True)
class Finding:
    """Something an input shows that a reader must know: a coded fact with its numbers, never an identifier.

    code: closed vocabulary of the domain, e.g. `GANTRY_TILT`; severity: `refused`, `corrected` or `note`;
    numbers: JSON scalars or lists of them (degrees, millimetres, counts); about: digest of the file or series.
    """

    code: str
    sentence: str
    severity: str = "note"
    about: str = ""
    numbers: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        return {
            "code": self.code, "sentence": self.sentence, "severity": self.severity,
            "about": self.about, "numbers": dict(self.numbers),
        }  # fmt: skip


class RefusedInput(PermedError):  # noqa: N818 - "refused" is the field's word for it
    """This input must not be computed on. Deterministic: the same bytes are refused again without being read."""

    code = "refused"

    def __init__(self, finding: Finding, *, remedy: str = "") -> None:
        super().__init__(f"{finding.code}: {finding.sentence}", remedy=remedy)
        self.finding = finding

    def as_dict(self) -> dict[str, Any]:
        return super().as_dict() | {"finding": self.finding.as_dict()}
