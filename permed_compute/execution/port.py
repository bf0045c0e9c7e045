"""What the controller asks of an engine. In-process and Ray implement it; both pass
`permed_compute.testing.execution.ExecutorConformance`. An executor starts, watches and ends attempts; it never decides.

The truth about an attempt is first the exit record that it wrote itself (`AttemptPaths.exit`), then what the engine
says of its liveness. An engine that cannot be asked answers UNKNOWN, and the reservation is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from permed_compute.admission.demand import Demand
from permed_compute.admission.snapshot import Grant, Node
from permed_compute.paths import AttemptPaths, read_json, write_json
from permed_compute.spec import JobSpec, from_json


class Liveness(StrEnum):
    ALIVE = "ALIVE"
    GONE = "GONE"
    """Confirmed: no process of this attempt runs, and none will start."""
    UNKNOWN = "UNKNOWN"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One launch of one job. `number` is the fencing number; `grants` is one entry per worker or rank."""

    job_id: str
    number: int
    spec: JobSpec
    grants: tuple[Grant, ...]
    why: str
    """Why these devices: the sentence admission composed, copied into the manifest."""
    home: Path
    paths: AttemptPaths
    policy: str = ""
    """Version of the policy that admitted it."""
    model: str = ""
    """Digest of the model that was cleared for care: the driver refuses any other."""
    submitted: str = ""
    """Digest of the spec as it was submitted, where `spec` has received sets as the folders in which they stand."""
    sets: tuple[tuple[str, str], ...] = ()
    """(name, reference) of each received set that the job names."""

    @property
    def name(self) -> str:
        """Unique per attempt: the engine's name for it, so that launching twice finds the first."""
        return f"permed-{self.job_id}-{self.number:04d}"

    def write(self) -> None:
        """The launch intent, durable before the engine is asked."""
        write_json(
            self.paths.launch,
            {
                "job_id": self.job_id, "number": self.number, "spec": self.spec.canonical(), "why": self.why,
                "policy": self.policy, "model": self.model, "submitted": self.submitted, "sets": self.sets,
                "home": str(self.home), "grants": [asdict(grant) for grant in self.grants],
            },
        )  # fmt: skip

    @classmethod
    def read(cls, paths: AttemptPaths) -> Attempt | None:
        """The intent as it was written, or None."""
        row = read_json(paths.launch)
        if row is None:
            return None
        grants = tuple(Grant.from_row(grant) for grant in row["grants"])
        spec = from_json(row["spec"])
        return cls(
            row["job_id"], row["number"], spec, grants, row["why"], Path(row["home"]), paths, row.get("policy", ""),
            row.get("model", ""), row.get("submitted", ""), tuple((a, b) for a, b in row.get("sets", ())),
        )  # fmt: skip


class Executor(Protocol):
    """An owned engine. Methods are called from the controller's one thread and return soon (launch: seconds)."""

    name: str

    def nodes(self) -> tuple[Node, ...]:
        """What there is to reserve, now."""
        ...

    def launch(self, attempt: Attempt) -> None:
        """Start it, or do nothing where an attempt of that name is already there. Raises `EngineError`."""
        ...

    def liveness(self, attempt: Attempt) -> Liveness: ...

    def end(self, attempt: Attempt) -> bool:
        """Stop its processes without further ado and free what it held. True once that is confirmed."""
        ...

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        """End every attempt of this home that the engine has and `keep` does not name; returns their names."""
        ...

    def facts(self) -> Mapping[str, Any]:
        """For the manifest and `permed doctor`: engine, version, address, nodes."""
        ...

    def close(self) -> None:
        """Leave nothing running that this executor started and nobody needs any more."""
        ...


@runtime_checkable
class Scaling(Protocol):
    """An executor whose engine can get more nodes, and give them back."""

    def want(self, demand: Callable[[], Demand]) -> None:
        """There should be nodes for this. Returns soon; what cannot be said now is said by a later call."""
        ...
