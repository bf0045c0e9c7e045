"""The traps of recovery that other job layers fell into (scheduling.md), each by the issue that tells of it."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from test_invariants import Names

from permed_compute.errors import QueueError
from permed_compute.execution.controller import Controller
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.queue.events import verify
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job, Move, wall_clock
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

SECOND = 1000


def spec(gpus: int = 1) -> JobSpec:
    return JobSpec.model_validate({
        "name": "j", "workload": "m:f", "time_limit": "2h",
        "resources": {"gpus": gpus, "cpus": 1, "memory": "1GiB", "flavors": ["h100"]},
    })  # fmt: skip


class Blinking(MemoryQueue):
    """A queue whose database is away for a while."""

    away = False

    def head(self) -> tuple[int, str]:
        self._there()
        return super().head()

    def jobs(self, **which: Any) -> list[Job]:
        self._there()
        return super().jobs(**which)

    def _there(self) -> None:
        if self.away:
            raise QueueError("The queue's database failed.")


class Home:
    """A controller on an engine of names, and its end and return."""

    def __init__(self, folder: Path) -> None:
        self.now = wall_clock()
        self.queue = Blinking(clock=lambda: self.now)
        self.engine = Names()
        self.folder = folder
        self.controller = self.controller_anew()

    def controller_anew(self) -> Controller:
        settings = Settings(home=str(self.folder), grace=10, lease=10**6)
        made = Controller(self.queue, self.engine, HomePaths(self.folder), settings, clock=lambda: self.now)
        made.lead()
        return made

    def ticks(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now += SECOND
            self.controller.tick()

    def submit(self, count: int = 1) -> list[Job]:
        return self.queue.submit([spec()] * count, owner="kari")

    def state(self, job: Job) -> JobState:
        return self.queue.job(job.id).state

    def attempt(self, job: Job) -> Attempt:
        number = self.queue.job(job.id).attempt
        return next(a for a in self.engine.attempts.values() if (a.job_id, a.number) == (job.id, number))


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home(tmp_path)


def test_a_controller_that_dies_while_launching_starts_nothing_twice_skypilot_9868(home: Home) -> None:
    [job] = home.submit()
    launch = home.engine.launch

    def dies(attempt: Attempt) -> None:
        launch(attempt)
        raise KeyboardInterrupt  # it lives, and its controller never learns

    home.engine.launch = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        home.ticks(2)
    home.engine.launch = launch  # type: ignore[method-assign]
    home.controller = home.controller_anew()
    home.ticks(5)
    assert home.state(job) is JobState.RUNNING
    assert len(home.engine.attempts) == 1 and home.engine.most == 1


def test_a_database_that_is_away_for_a_minute_fails_no_job_skypilot_9748(home: Home) -> None:
    [job] = home.submit()
    home.ticks(3)
    before = home.queue.job(job.id)
    home.queue.away = True
    for _ in range(60):
        with pytest.raises(QueueError):
            home.ticks(1)
    home.queue.away = False
    home.ticks(3)
    assert home.queue.job(job.id) == before and before.state is JobState.RUNNING
    write_json(home.attempt(job).paths.exit, {"outcome": "SUCCEEDED", "reason": "ended", "sentence": "."})
    home.ticks(1)
    assert home.state(job) is JobState.SUCCEEDED


def test_many_writers_and_readers_of_one_file_do_not_lock_each_other_out_skypilot_4552_4649(tmp_path: Path) -> None:
    url = sqlite_url(tmp_path / "queue.db")
    queues = [SqlQueue(url) for _ in range(4)]  # each with a writer of its own, as four processes have
    failed: list[BaseException] = []

    def storm(queue: SqlQueue, name: str) -> None:
        try:
            for _ in range(25):
                [job] = queue.submit([spec()], owner=name)
                queue.apply([Move(job.id, job.version, JobState.CANCELLED, "cancelled-by-user", name)])
                queue.jobs(limit=5)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=storm, args=(queue, f"u{n}")) for n, queue in enumerate(queues)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert len(queues[0].jobs(states={JobState.CANCELLED})) == 100
    verify(queues[0])  # nobody wrote between another's reading the tip and its commit
    for queue in queues:
        queue.close()


def test_an_engine_that_fails_over_fails_no_live_job_ray_65025_65608(home: Home) -> None:
    [job] = home.submit()
    home.ticks(3)
    name = home.attempt(job).name
    home.engine.alive[name] = Liveness.UNKNOWN  # its head is gone: nobody knows
    home.ticks(300)
    assert home.state(job) is JobState.UNKNOWN
    home.engine.alive[name] = Liveness.ALIVE
    home.ticks(5)
    assert home.state(job) is JobState.RUNNING and home.queue.job(job.id).attempt == 1


def test_an_attempt_has_one_name_however_often_it_is_launched_ray_31356(home: Home) -> None:
    launched: list[str] = []

    def slowly(attempt: Attempt) -> None:
        """Nothing of it is heard before the next controller looks."""
        launched.append(attempt.name)
        home.engine.attempts[attempt.name] = attempt
        home.engine.alive.setdefault(attempt.name, Liveness.ALIVE)

    home.engine.launch = slowly  # type: ignore[method-assign]
    [job] = home.submit()
    home.ticks(2)
    for _ in range(3):  # none of these knows whether the one before it got as far as launching
        home.controller = home.controller_anew()
        home.ticks(1)
    assert len(launched) == 4 and set(launched) == set(home.engine.alive)
    assert home.queue.job(job.id).attempt == 1


def test_the_engine_gets_only_what_has_a_place_ray_jobs_that_time_out_pending(home: Home) -> None:
    jobs = home.submit(11)  # of one GPU each; eight are here
    home.ticks(60)
    assert len(home.engine.attempts) == 8
    waiting = [job for job in jobs if home.state(job) is JobState.QUEUED]
    home.ticks(1200)  # a supervisor that has not started in 15 min would be failed
    assert [home.state(job) for job in waiting] == [JobState.QUEUED] * 3


def test_a_job_is_asked_to_stop_and_has_its_grace_before_it_is_ended_ray_jobs_3_s(home: Home) -> None:
    [job] = home.submit()
    home.ticks(2)
    attempt, ended = home.attempt(job), []
    home.engine.end = lambda attempt: not ended.append(home.now)  # type: ignore[method-assign]
    now = home.queue.job(job.id)
    home.queue.apply([Move(job.id, now.version, JobState.CANCELLING, "cancelled-by-user", "kari")])
    asked = home.now
    home.ticks(1)
    assert read_json(attempt.paths.stop) is not None and not ended
    home.ticks(12)
    assert ended[0] - asked >= 10 * SECOND and home.state(job) is JobState.CANCELLED
