"""Storms over the real controller and queue break no promise; a broken controller, engine, queue or ledger is told."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "soak"))

from faults import outcome_of, some

from permed_compute.admission.commit import clean
from permed_compute.admission.fold import Picture
from permed_compute.execution import controller
from permed_compute.execution.controller import Controller
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Clock, Job
from permed_compute.states import JobState
from permed_compute.storage.ledger import Ledger
from permed_compute.testing.engine import FakeEngine
from permed_compute.testing.storm import Storm

SEEDS = (*range(1, 151), 357, 371)
"""The last two strike what few runs come to: a preemption decided together with what takes its place."""
POINTS = (
    "acquire", "submit", "note nodes", "apply RESERVED", "apply LAUNCHING", "apply RUNNING",
    "apply QUEUED", "apply SUCCEEDED", "apply PREEMPTING+QUEUED", "apply CANCELLING", "apply CANCELLED",
    "write launch.json", "write fence", "write stop.json", "engine launch", "engine launch arrives",
    "engine liveness", "engine end", "engine end arrives", "engine nodes", "announce", "jobs", "job", "events", "head",
)  # fmt: skip


def test_no_promise_is_broken_and_every_commit_point_is_struck() -> None:
    counts, struck, _, broken = some(SEEDS)
    assert not broken, broken
    hit = {name.rpartition(": ")[0] for name in struck}
    missed = sorted(set(POINTS) - hit)
    assert not missed
    for happened in ("job SUCCEEDED", "job CANCELLED", "crashes", "stalls", "lease lost", "fenced", "parts"):
        assert counts[happened], happened
    assert counts["acknowledged"] > len(SEEDS)


def test_a_seed_gives_the_same_run_again(tmp_path: Path) -> None:
    for seed in (25, 26):  # on SQLite, and in memory
        first, second = (outcome_of(seed, tmp_path / name) for name in ("one", "two"))
        assert first.trace == second.trace and first.struck == second.struck and len(first.trace) > 20


# --------------------------------------------------------------------------------------------- what must be told


class ForgetsProcesses(FakeEngine):
    def end(self, attempt: Attempt) -> bool:
        self._running.pop(attempt.name, None)
        return True


class ReleasesOnTimeOut(Controller):
    def _ask_engine(self, job: Job, attempt: Attempt) -> bool:
        if self.executor.liveness(attempt) is not Liveness.UNKNOWN:
            return super()._ask_engine(job, attempt)
        self._move(job, JobState.QUEUED, "attempt-lost", detail=clean(job.detail))
        return True


class ForgetsJobs(MemoryQueue):
    def close(self) -> None:
        if self._jobs and self._events[-1].action == "SUBMITTED":
            del self._jobs[self._events.pop().job_id]
            self._tip = type(self._tip)(self._events[-1].seq, self._events[-1].hash)


class EditsItsLog(MemoryQueue):
    def close(self) -> None:
        if len(self._events) > 5:
            self._events[3] = replace(self._events[3], reason="nothing happened")


def no_fence(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(controller, "raise_fence", lambda paths: None)


def a_ledger_that_replaces(patch: pytest.MonkeyPatch) -> None:
    publish = Ledger.publish

    def replacing(self: Ledger, key: str, folder: Path, record: Any) -> Any:
        shutil.rmtree(self.folder(key), ignore_errors=True)
        return publish(self, key, folder, record)

    patch.setattr(Ledger, "publish", replacing)


def decides_blindly(patch: pytest.MonkeyPatch) -> None:
    see = Picture.see

    def blind(self: Picture, *args: Any) -> Any:
        snapshot, policy, jobs = see(self, *args)
        return replace(snapshot, live=()), policy, jobs

    patch.setattr(Picture, "see", blind)


def kept(kind: Callable[[Clock], MemoryQueue]) -> Callable[[Clock], MemoryQueue]:
    one: list[MemoryQueue] = []

    def open_again(clock: Clock) -> MemoryQueue:
        one[:] = one or [kind(clock)]
        return one[0]

    return open_again


@pytest.mark.parametrize(
    ("promise", "broken", "patch"),
    [
        ("release", lambda: {"engine_of": ForgetsProcesses}, None),
        ("orphan", lambda: {"engine_of": ForgetsProcesses}, None),
        ("release", lambda: {"controller_of": ReleasesOnTimeOut}, None),
        ("no job lost", lambda: {"store": kept(ForgetsJobs)}, None),
        ("audit chain", lambda: {"store": kept(EditsItsLog)}, None),
        ("one attempt writes", lambda: {"weather": {"cut": 0.15, "back": 0.15}}, no_fence),
        ("part published once", dict, a_ledger_that_replaces),
        ("capacity", dict, decides_blindly),
    ],
)
def test_a_broken_part_is_told(
    promise: str, broken: Callable[[], dict[str, Any]], patch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if patch is not None:
        patch(monkeypatch)
    told: Counter[str] = Counter()
    for seed in range(1, 60):
        told.update(one.promise for one in Storm(seed, tmp_path / str(seed), decisions=False, **broken()).run().broken)
        if told[promise]:
            return
    pytest.fail(f"60 runs and nobody noticed: {told}")
