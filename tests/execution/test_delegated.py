"""What the controller does with an engine that places jobs itself: away for a while, pausing, keeping time limits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from permed_compute.errors import PermedError, SettingsError
from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.delegated import EngineAwayError, Word, ask_pause, paused_file, unpause
from permed_compute.execution.inprocess import InProcessExecutor
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.slurm import SlurmExecutor
from permed_compute.paths import HomePaths
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.testing.execution import Toys, wait_for


class Far(InProcessExecutor):
    """In this process, but placed by somebody else who is `away` at times and may lose attempts (`lost`)."""

    away = False
    lost = ""
    asked = 0

    def launch(self, attempt: Attempt) -> None:
        self.asked += 1
        if self.away:
            raise EngineAwayError("It does not answer.")
        if not self.lost:
            super().launch(attempt)

    def liveness(self, attempt: Attempt) -> Liveness:
        return Liveness.GONE if self.lost else super().liveness(attempt)

    def require(self, spec: JobSpec) -> None: ...
    def queued(self, jobs: Sequence[Job]) -> None: ...
    def expect(self, arrays: Mapping[str, Sequence[Attempt]]) -> None: ...
    def how_lost(self, attempt: Attempt) -> str:
        return self.lost

    def says(self, attempt: Attempt) -> Word | None:
        return None


@pytest.fixture
def executor(home: HomePaths) -> Iterator[Far]:
    executor = Far(Settings(home=str(home.root), executor="inprocess"))
    yield executor
    executor.close()


@pytest.fixture
def toys(home: HomePaths, code: Path, tmp_path: Path) -> Toys:
    return Toys(home, code, tmp_path / "tally")


class World:
    """A queue with one job and its controller, on a clock that is `late` ms ahead."""

    def __init__(self, home: HomePaths, executor: Far, code: Path, tally: Path) -> None:
        self.late = 0
        self.queue = MemoryQueue(clock=self.now)
        settings = Settings(home=str(home.root), grace=1)
        self.controller = Controller(self.queue, executor, home, settings, clock=self.now)
        self.spec = JobSpec(
            name="far", workload="toys:squares", code=str(code), time_limit="1s",
            params={"count": 3, "tally": str(tally), "seconds": 1.0}, resources={"cpus": 0.5, "memory": "512MiB"},
        )  # fmt: skip

    def now(self) -> int:
        return time.time_ns() // 1_000_000 + self.late

    def job(self) -> Job:
        return self.queue.jobs()[0]

    def work(self, true: Callable[[Job], bool]) -> Job:
        end = time.monotonic() + 90
        self.controller.run(lambda: true(self.job()) or time.monotonic() > end)
        assert true(self.job()), self.job()
        return self.job()


@pytest.fixture
def world(home: HomePaths, executor: Far, code: Path, tmp_path: Path) -> World:
    (tmp_path / "tally").mkdir(exist_ok=True)
    world = World(home, executor, code, tmp_path / "tally")
    world.queue.submit([world.spec], owner="kari")
    return world


def test_a_launch_waits_for_an_engine_that_is_away_and_costs_no_try(world: World, executor: Far) -> None:
    executor.away = True
    job = world.work(lambda job: executor.asked > 10)
    assert (job.state, job.attempt) == (JobState.LAUNCHING, 1) and not job.detail.get("losses")
    executor.away = False
    job = world.work(ended)  # its limit of 1 s is the engine's to keep: three parts of 1 s are not stopped by us
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1)


def test_a_job_that_was_never_sent_is_cancelled_at_once(world: World, executor: Far) -> None:
    from permed_compute.service import Caller, JobService

    executor.away = True
    job = world.work(lambda job: job.state is JobState.LAUNCHING)
    JobService(world.queue, Caller("kari", operator=False), executor.nodes).cancel(job.id)
    assert world.work(ended).state is JobState.CANCELLED


def test_the_engines_time_limit_ends_the_job(world: World, executor: Far) -> None:
    world.work(lambda job: job.state is JobState.RUNNING)
    executor.lost, world.late = "time-limit", 10_000
    assert world.work(ended).state is JobState.TIMED_OUT


def test_a_limit_that_comes_before_anything_began_is_a_loss(world: World, executor: Far) -> None:
    executor.lost = "time-limit"
    world.work(lambda job: job.state is JobState.LAUNCHING)
    world.late = 10_000
    job = world.work(lambda job: job.state is JobState.QUEUED)
    assert job.detail["losses"] == {"time-limit": 1}


def test_a_pause_leaves_no_exit_record_and_the_attempt_goes_on(executor: Far, toys: Toys) -> None:
    attempt = toys.attempt("squares", count=12, seconds=0.1)
    executor.launch(attempt)
    wait_for(lambda: toys.rows(attempt, "part"), "the first part")
    ask_pause(attempt.paths, "preempted")
    wait_for(paused_file(attempt.paths).exists, "the pause")
    assert not attempt.paths.exit.exists()
    assert executor.end(attempt)
    unpause(attempt.paths)
    executor.launch(attempt)
    assert toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert [toys.runs(n) for n in range(12)] == [1] * 12


# ------------------------------------------------------------------------------------- what is said about the site


def test_what_was_said_at_submission_is_kept_for_whoever_sends(home: HomePaths, toys: Toys) -> None:
    base = {"home": str(home.root), "executor": "slurm", "site": "olivia", "site_account": "nn9999k"}
    said = Settings(**base, site_qos="devel", site_image="/cluster/permed.sif", site_options="--reservation=course",
                    site_stage_in="/nird/in:/cluster/in")  # fmt: skip
    attempt = toys.attempt("squares", count=1)
    jobs = MemoryQueue().submit([attempt.spec], owner="kari")
    executor = SlurmExecutor(said, home)
    executor.queued([_renamed(jobs[0], attempt.job_id)])
    script = SlurmExecutor(Settings(**base), home).script(attempt)
    for words in ("--qos=devel", "--reservation=course", "#STAGE IN", "/nird/in", "/cluster/permed.sif",
                  "--account=nn9999k", f"--job-name={attempt.name}", "--signal=B:USR1@120", "--requeue"):  # fmt: skip
        assert words in script, script
    assert "--qos" not in SlurmExecutor(Settings(**base), home).script(toys.attempt("squares", job="other", count=1))


def _renamed(job: Job, job_id: str) -> Job:
    from dataclasses import replace

    return replace(job, id=job_id)


def test_staging_that_is_no_pair_is_refused_before_the_queue(home: HomePaths, toys: Toys) -> None:
    settings = Settings(home=str(home.root), executor="slurm", site="olivia", site_stage_in="in:out")
    with pytest.raises(SettingsError, match="FROM:TO"):
        SlurmExecutor(settings, home).require(toys.attempt("squares", count=1).spec)


def test_a_site_without_slurm_is_no_site_for_this_engine(home: HomePaths) -> None:
    with pytest.raises(PermedError, match="not run by Slurm"):
        SlurmExecutor(Settings(home=str(home.root), executor="slurm", site="local"), home)


def test_a_job_that_may_do_without_a_gpu_does_where_there_is_none(home: HomePaths, toys: Toys) -> None:
    settings = Settings(home=str(home.root), executor="slurm", site="saga", site_account="nn9999k")
    spec = toys.attempt("squares", count=1).spec
    wish = {"cpus": 2, "memory": "4GiB", "gpus": 1, "flavors": ["h200", "cpu"]}
    made = SlurmExecutor(settings, home).request(
        spec.model_copy(update={"resources": spec.resources.__class__(**wish)})
    )
    assert (made.gpus, made.partition) == (0, "normal")
