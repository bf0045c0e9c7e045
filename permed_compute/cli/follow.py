"""What an attempt says of itself while it runs: its records, folded into parts done and a stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from permed_compute.execution import records
from permed_compute.paths import JobPaths
from permed_compute.queue.port import Job
from permed_compute.states import ENDED, JobState, PartState

_DONE = (PartState.DONE, PartState.REUSED)
_ENDED = (*_DONE, PartState.REFUSED, PartState.FAILED)


@dataclass(slots=True)
class Follower:
    """The newest attempt of one job; `look` reads what was appended since the last look."""

    paths: JobPaths
    attempt: int = 0
    total: int = 0
    parts: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """The newest record of each part."""
    stage: str = ""
    rounds: int = 0
    lost: int = 0
    retries: int = 0
    _offset: int = 0

    def look(self, job: Job) -> None:
        if job.attempt != self.attempt:
            self.attempt, self._offset, self.total, self.stage = job.attempt, 0, 0, ""
            self.parts, self.rounds, self.lost, self.retries = {}, 0, 0, 0
        if not job.attempt:
            return
        rows, self._offset = records.read(self.paths.attempt(job.attempt).records(), self._offset)
        for row in rows:
            self._fold(row)

    def _fold(self, row: Mapping[str, Any]) -> None:
        kind = row.get("kind")
        if kind == "started":
            self.stage = "planning"
        elif kind == "plan":
            self.total, self.stage = int(row["parts"]), "computing"
            # A new round plans new parts; what was reused was recorded just before its plan.
            self.parts = dict(list(self.parts.items())[-self.total :]) if self.total else {}
        elif kind == "gang":
            self.stage = "training"
        elif kind == "part":
            self.parts[str(row["name"])] = row
            if self.total and len(self.parts) >= self.total:
                self.stage = "reducing"
        elif kind == "round":
            self.rounds, self.parts, self.total, self.stage = int(row["round"]), {}, 0, "planning"
        elif kind == "stage" and (
            row.get("name") == "reduce" or (row.get("name"), self.stage) == ("train", "training")
        ):
            self.stage = "writing results"  # a part of a map may call a stage of its own "train"
        elif kind == "lost":
            self.lost += 1
        elif kind == "retry":
            self.retries += 1

    def counts(self) -> Counter[str]:
        """Parts by state."""
        return Counter(str(row["state"]) for row in self.parts.values())

    @property
    def ended(self) -> int:
        return len(self.parts)

    def sentence(self, job: Job) -> str:
        """Where it stands, in few words."""
        if job.state in ENDED:
            return ""
        if job.state is not JobState.RUNNING:
            return {JobState.LAUNCHING: "starting workers", JobState.PREEMPTING: "stopping where it can go on",
                    JobState.CANCELLING: "stopping"}.get(job.state, "")  # fmt: skip
        said = [self.stage or "starting"]
        counts = self.counts()
        said += [f"{counts[s.value]} {s.value.lower()}" for s in (PartState.REUSED, PartState.REFUSED, PartState.FAILED)
                 if counts[s.value]]  # fmt: skip
        said += [f"{self.lost} worker{'s' if self.lost > 1 else ''} lost"] if self.lost else []
        said += [f"round {self.rounds + 1}"] if self.rounds else []
        return ", ".join(said)
