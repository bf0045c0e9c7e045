"""What a controller outlives, found by storms (`permed_compute.testing.storm`): databases, disks, clocks, users."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from permed_compute.errors import LeaseLostError, QueueError, StaleError, StateError
from permed_compute.execution.context import check_fence, raise_fence
from permed_compute.execution.controller import Controller
from permed_compute.paths import HomePaths, write_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job, wall_clock
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.states import LIVE, JobState
from permed_compute.testing.engine import FakeEngine
from permed_compute.testing.faults import Faults
from permed_compute.testing.storm import NODES, a_job


class Calm:
    """A controller on a fake engine without faults; `later` lets time go by."""

    def __init__(self, folder: Path) -> None:
        self.now = wall_clock()
        self.ahead = 0
        self.queue = MemoryQueue(self.clock)
        chance = random.Random(1)
        self.engine = FakeEngine(NODES, lambda: self.now, chance, Faults(chance, {}), lambda: self.queue.head()[0])
        self.home = HomePaths(folder)
        self.settings = Settings(home=str(folder), grace=10, heartbeat=10)
        self.controller = self.another()
        self.controller.lead()
        self.service = JobService(self.queue, Caller("kari", False), self.engine.nodes, clock=self.clock)

    def another(self) -> Controller:
        return Controller(self.queue, self.engine, self.home, self.settings, clock=self.clock)

    def clock(self) -> int:
        return self.now + self.ahead

    def submit(self, parts: int = 1000, time_limit: int = 3600) -> Job:
        spec = a_job(False, "local", "research", "1", 1, parts, 1, time_limit, 0)
        return self.service.submit([spec])[0]

    def later(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += 1000
            self.engine.advance()
            self.controller.tick()

    def state(self, job: Job) -> JobState:
        return self.queue.job(job.id).state


@pytest.fixture
def calm(tmp_path: Path) -> Calm:
    return Calm(tmp_path)


def test_the_loop_goes_on_after_a_dropped_connection_but_not_at_the_first_round(
    calm: Calm, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds: list[Any] = []
    tick = Controller.tick

    def sometimes(self: Controller) -> bool:
        rounds.append(None)
        if len(rounds) in fails:
            raise QueueError("The queue's database failed.")
        return tick(self)

    monkeypatch.setattr(Controller, "tick", sometimes)
    fails = {2, 3}
    job = calm.submit()
    calm.controller.run(lambda: len(rounds) >= 5)
    assert calm.state(job) is JobState.LAUNCHING
    rounds.clear()
    fails = {1}
    with pytest.raises(QueueError):
        calm.controller.run(lambda: len(rounds) >= 5)


def test_a_job_whose_folder_cannot_be_written_keeps_no_other_waiting(calm: Calm) -> None:
    first, second = calm.submit(), calm.submit()
    blocked = calm.home.job(first.id).root
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")  # where a folder belongs
    calm.later(6)
    assert calm.state(first) is JobState.RESERVED and calm.state(second) is JobState.RUNNING
    blocked.unlink()
    calm.later(6)
    assert calm.state(first) is JobState.RUNNING


def test_what_cannot_be_fenced_off_has_not_ended(calm: Calm) -> None:
    """A full disk: something of it may start late, and would not know."""
    job = calm.submit()
    calm.later(6)
    fence = calm.home.job(job.id).fence
    assert calm.state(job) is JobState.RUNNING
    fence.unlink()
    fence.mkdir()
    calm.engine.die()
    calm.later(20)
    assert calm.state(job) in LIVE and calm.queue.job(job.id).attempt == 1
    fence.rmdir()
    calm.later(20)
    assert calm.queue.job(job.id).attempt == 2


def test_only_what_waits_can_be_held_and_it_keeps_nothing(calm: Calm, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = calm.submit()
    calm.later(5)
    for state in (JobState.RUNNING, JobState.CANCELLING):
        assert calm.state(runs) is state
        with pytest.raises(StateError, match="does not wait"):
            calm.service.hold(runs.id)
        if state is JobState.RUNNING:
            calm.service.cancel(runs.id)
    for leave in (calm.service.hold, calm.service.cancel):
        job = calm.submit()
        monkeypatch.setattr(Controller, "_launch", lambda self, job: False)
        calm.later(1)
        assert calm.state(job) is JobState.RESERVED
        leave(job.id)
        assert "grants" not in calm.queue.job(job.id).detail


def test_an_attempt_that_dies_after_the_clock_was_set_back_is_missed(calm: Calm) -> None:
    calm.ahead = 3_600_000
    job = calm.submit()
    calm.later(5)
    calm.ahead = 0
    calm.engine.die()
    calm.later(10)
    assert calm.state(job) in (JobState.QUEUED, JobState.RESERVED, JobState.LAUNCHING, JobState.RUNNING)
    assert [event.reason for event in calm.queue.events(job_id=job.id)].count("attempt-lost") == 1


def test_the_grace_of_a_time_limit_is_counted_by_the_clock_that_asked(calm: Calm) -> None:
    job = calm.submit(time_limit=15)
    calm.later(18)
    body = calm.engine.bodies()[0]
    body.stop_at = calm.now + 10**9  # it does not listen
    calm.later(9)
    assert calm.state(job) is JobState.RUNNING
    calm.later(4)
    assert calm.state(job) is JobState.TIMED_OUT and body.gone is not None


def test_an_attempt_that_fell_silent_may_turn_out_to_have_reached_its_limit(calm: Calm) -> None:
    job = calm.submit(time_limit=15)
    calm.later(10)
    body = calm.engine.bodies()[0]
    body.stop_at = calm.now + 10**9
    calm.later(10)
    assert body.attempt.paths.stop.exists()
    calm.engine.silent = True
    calm.ahead = -60_000  # not over its time any more, says the clock
    body.exited = True
    calm.later(30)
    assert calm.state(job) is JobState.UNKNOWN
    write_json(body.attempt.paths.exit, {"outcome": "STOPPED", "reason": "stopped", "sentence": "."})
    calm.engine.silent, calm.ahead = False, 0
    calm.later(3)
    assert calm.state(job) is JobState.TIMED_OUT


def test_the_fence_is_never_lowered(tmp_path: Path) -> None:
    job = HomePaths(tmp_path).job("j")
    first, second = job.attempt(1), job.attempt(2)
    raise_fence(first)
    check_fence(first)
    raise_fence(second)
    raise_fence(first)
    check_fence(second)
    with pytest.raises(StaleError):
        check_fence(first)


def test_a_controller_that_stood_still_touches_no_further_attempt(calm: Calm, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = calm.submit(), calm.submit()
    stopped = calm.controller
    launch = FakeEngine.launch

    def stands_still(self: FakeEngine, attempt: Any) -> None:
        monkeypatch.setattr(FakeEngine, "launch", launch)
        calm.now += stopped.settings.lease * 1000 + 1
        calm.controller = calm.another()
        calm.controller.lead()
        calm.later(8)
        launch(self, attempt)

    monkeypatch.setattr(FakeEngine, "launch", stands_still)
    with pytest.raises(LeaseLostError):
        stopped.tick()
    written = calm.home.job(second.id).attempt(1).launch.stat().st_mtime_ns
    assert calm.state(first) is calm.state(second) is JobState.RUNNING
    assert written == calm.home.job(second.id).attempt(1).launch.stat().st_mtime_ns
