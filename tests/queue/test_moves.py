"""Whatever is asked in whatever order, a queue moves jobs along the table of states and nowhere else."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from permed_compute.errors import StaleError, StateError
from permed_compute.queue.events import verify
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job, Queue
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.states import ALLOWED, JobState
from permed_compute.testing.queue import ManualClock, a_move, a_spec

STATES = st.sampled_from(list(JobState))


class Moves(RuleBasedStateMachine):
    """A queue beside the simplest model of it: a mapping of ids to jobs, and a count of events."""

    ids = Bundle("ids")

    def __init__(self) -> None:
        super().__init__()
        self.clock = ManualClock()
        self.queue = self.open()
        self.model: dict[str, Job] = {}
        self.count = 0

    def open(self) -> Queue:
        return MemoryQueue(self.clock)

    @rule(target=ids, held=st.booleans())
    def submit(self, held: bool) -> str:
        [job] = self.queue.submit([a_spec()], owner="ada", held=held)
        assert job.state is (JobState.HELD if held else JobState.QUEUED)
        self.model[job.id] = job
        self.count += 1
        return job.id

    @rule(ms=st.integers(0, 10_000))
    def wait(self, ms: int) -> None:
        self.clock.advance(ms)

    @rule(job_id=ids, to=STATES, behind=st.sampled_from([0, 0, 0, 1, -1]))
    def move(self, job_id: str, to: JobState, behind: int) -> None:
        before = self.model[job_id]
        move = replace(a_move(before, to), version=before.version - behind)
        if behind:
            with pytest.raises(StaleError):
                self.queue.apply([move])
        elif to not in ALLOWED[before.state]:
            with pytest.raises(StateError):
                self.queue.apply([move])
        else:
            self._moved(self.queue.apply([move]))

    @rule(first=ids, second=ids, to=STATES, other=STATES)
    def move_two(self, first: str, second: str, to: JobState, other: JobState) -> None:
        if first == second:
            return
        a, b = self.model[first], self.model[second]
        moves = [a_move(a, to), a_move(b, other)]
        if to in ALLOWED[a.state] and other in ALLOWED[b.state]:
            self._moved(self.queue.apply(moves))
        else:
            with pytest.raises(StateError):
                self.queue.apply(moves)

    def _moved(self, jobs: list[Job]) -> None:
        for job in jobs:
            assert job.version == self.model[job.id].version + 1
            assert job.changed_at == self.clock.now
            self.model[job.id] = job
            self.count += 1

    @invariant()
    def the_queue_is_as_the_model_says(self) -> None:
        assert {job.id: job for job in self.queue.jobs()} == self.model
        assert self.queue.head()[0] == self.count

    def teardown(self) -> None:
        assert verify(self.queue).count == self.count
        folded = {event.job_id: event.after for event in self.queue.events()}
        assert folded == {job.id: job.state.value for job in self.model.values()}
        self.queue.close()


class SqlMoves(Moves):
    def open(self) -> Queue:
        self.folder = tempfile.TemporaryDirectory()
        return SqlQueue(sqlite_url(Path(self.folder.name) / "queue.db"), self.clock)

    def teardown(self) -> None:
        super().teardown()
        self.folder.cleanup()


def test_in_memory() -> None:
    run_state_machine_as_test(Moves, settings=settings(max_examples=60, stateful_step_count=40, deadline=None))


def test_on_sqlite() -> None:
    quiet = [HealthCheck.too_slow]
    run_state_machine_as_test(
        SqlMoves, settings=settings(max_examples=10, stateful_step_count=25, deadline=None, suppress_health_check=quiet)
    )
