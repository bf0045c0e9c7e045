"""The controller with the in-process executor on a queue in memory: launch, watch, adopt, cancel, time out, lose."""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from permed_compute.admission.snapshot import Node
from permed_compute.errors import EngineError, LeaseLostError, PermissionDeniedError
from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.inprocess import InProcessExecutor
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job, Move
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.transfer import receipts
from permed_compute.transfer.receipts import Receipt

NODE = (Node("local", 2000, 8192),)

CODE = """
    import time
    from pathlib import Path
    from permed_compute import Map, Part, PartResult
    from permed_compute.errors import Finding, RefusedInput

    def plan(spec, state, ctx):
        return [Part(f"n-{n}", inputs=(str(n),), params={"n": n}) for n in range(spec.params["count"])]

    def run(part, model, ctx):
        n = part.params["n"]
        (Path(ctx.spec.params["tally"]) / f"{part.name}-{time.time_ns()}").touch()
        if n in ctx.spec.params.get("raise", []):
            raise ValueError("as the test asked")
        if n in ctx.spec.params.get("refuse", []):
            raise RefusedInput(Finding("ODD", f"number {n} is refused", "refused", numbers={"n": n}))
        (ctx.out / "square.txt").write_text(str(n * n))
        return PartResult(values={"square": n * n})

    squares = Map(plan=plan, run=run)

    def sleep(spec, ctx):
        while not ctx.should_stop():
            time.sleep(0.02)
        ctx.checkpoint(lambda folder: (folder / "state.txt").write_text("here"))

    def count(spec, ctx):
        from permed_compute import Result
        found = ctx.restore()
        done = 1 + (int((found / "rank-0" / "n.txt").read_text()) if found else 0)
        if done >= spec.params["count"]:
            return Result(values={"done": done})
        while not ctx.should_stop():
            time.sleep(0.02)
        if not spec.params.get("idle"):
            ctx.checkpoint(lambda folder: (folder / "n.txt").write_text(str(done)))

    def deaf(spec, ctx):
        while not Path(spec.params["until"]).exists():
            time.sleep(0.02)
        from permed_compute import Result
        return Result()
"""


@pytest.fixture
def world(tmp_path: Path, home: HomePaths) -> World:
    world = World(tmp_path, home)
    yield world
    world.executor.close()


class World:
    """A queue, a controller and toy workloads."""

    def __init__(self, folder: Path, home: HomePaths, executor: Any = None) -> None:
        self.code = folder / "code"
        self.code.mkdir(exist_ok=True)
        (self.code / "toy.py").write_text(textwrap.dedent(CODE))
        self.tally = folder / "tally"
        self.tally.mkdir(exist_ok=True)
        self.home = home
        self.settings = Settings(home=str(home.root), grace=20, heartbeat=1)
        self.queue = MemoryQueue()
        self.executor = executor or InProcessExecutor(self.settings, NODE)
        self.told: list[tuple[str, JobState]] = []
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        def announce(job: Job, state: JobState, record: Mapping[str, Any] | None) -> None:
            self.told.append((job.id, state))

        return Controller(self.queue, self.executor, self.home, self.settings, announce=announce)

    def submit(self, what: str, **changes: Any) -> Job:
        params = {"tally": str(self.tally), "count": 4, **changes.pop("params", {})}
        spec = JobSpec.model_validate(
            {"name": what, "workload": f"toy:{what}", "code": str(self.code), "params": params, **changes}
        )
        return self.queue.submit([spec], owner="kari")[0]

    def work(self, *jobs: Job, until: Any = None, seconds: float = 90) -> list[Job]:
        end = time.monotonic() + seconds

        def enough() -> bool:
            assert time.monotonic() < end, [self.queue.job(job.id) for job in jobs]
            now = [self.queue.job(job.id) for job in jobs]
            return until(now) if until else all(ended(job) for job in now)

        self.controller.run(enough)
        return [self.queue.job(job.id) for job in jobs]

    def result(self, job: Job) -> dict[str, Any]:
        return json.loads((self.home.job(job.id).results / "result.json").read_text())


def running(jobs: list[Job]) -> bool:
    return all(job.state is JobState.RUNNING for job in jobs)


def test_a_map_job_succeeds_with_results_manifest_and_page(world: World) -> None:
    [job] = world.work(world.submit("squares"))
    assert job.state is JobState.SUCCEEDED
    folder = world.home.job(job.id).results
    assert (folder / "parts" / "n-3" / "square.txt").read_text() == "9"
    assert {"manifest.json", "result.json", "index.html"} <= {path.name for path in folder.iterdir()}
    manifest = read_json(folder / "manifest.json")
    assert manifest["why"] == "CPU: the job asks for no GPU." and manifest["job"]["attempt"] == 1
    assert [event.after for event in world.queue.events(job_id=job.id)] == [
        "QUEUED", "RESERVED", "LAUNCHING", "RUNNING", "SUCCEEDED",
    ]  # fmt: skip
    assert world.told == [(job.id, JobState.SUCCEEDED)]


def test_what_is_done_is_never_done_again_within_a_scope(world: World) -> None:
    world.work(world.submit("squares"))
    assert len(list(world.tally.iterdir())) == 4
    [again] = world.work(world.submit("squares"))
    assert len(list(world.tally.iterdir())) == 4 and again.state is JobState.SUCCEEDED
    assert {row["state"] for row in world.result(again)["parts"]} == {"REUSED"}
    world.work(world.submit("squares", params={"count": 5}))
    assert len(list(world.tally.iterdir())) == 5
    world.work(world.submit("squares", purpose="quality"))
    assert len(list(world.tally.iterdir())) == 9  # another scope shares nothing


def test_failed_and_refused_parts_leave_the_good_results(world: World) -> None:
    params = {"raise": [1], "refuse": [2]}
    [job] = world.work(world.submit("squares", params=params, retries=2))
    assert job.state is JobState.PARTIAL and "2 of 4 parts" in job.detail["sentence"]
    states = {row["name"]: row["state"] for row in world.result(job)["parts"]}
    assert states == {"n-0": "DONE", "n-1": "FAILED", "n-2": "REFUSED", "n-3": "DONE"}
    tries = [path.name.rsplit("-", 1)[0] for path in world.tally.iterdir()]
    assert tries.count("n-1") == 3 and tries.count("n-2") == 1  # a refusal is deterministic: never retried
    [again] = world.work(world.submit("squares", params=params, retries=0))
    tries = [path.name.rsplit("-", 1)[0] for path in world.tally.iterdir()]
    assert tries.count("n-2") == 1 and tries.count("n-1") == 4 and again.state is JobState.PARTIAL


def test_two_jobs_that_want_everything_never_overlap(world: World) -> None:
    resources = {"cpus": 2, "memory": "1GiB"}
    first, second = (world.submit("sleep", resources=resources) for _ in range(2))
    [one, two] = world.work(first, second, until=lambda jobs: running(jobs[:1]))
    assert (one.state, two.state) == (JobState.RUNNING, JobState.QUEUED)


def test_the_second_is_reserved_only_after_the_first_has_ended(world: World) -> None:
    first, second = (world.submit("squares", resources={"cpus": 2}, params={"count": n}) for n in (3, 5))
    world.work(first, second)
    seq = {(event.job_id, event.after): event.seq for event in world.queue.events()}
    assert seq[first.id, "SUCCEEDED"] < seq[second.id, "RESERVED"]


def test_cancel_signals_waits_and_confirms(world: World) -> None:
    job = world.submit("sleep")
    [job] = world.work(job, until=running)
    from permed_compute.queue.port import Move

    world.queue.apply([Move(job.id, job.version, JobState.CANCELLING, "cancelled-by-user", "kari")])
    [job] = world.work(job)
    assert job.state is JobState.CANCELLED and "grants" not in job.detail


def test_time_limit_stops_with_the_checkpoint_kept(world: World) -> None:
    [job] = world.work(world.submit("sleep", time_limit="1s"))
    assert job.state is JobState.TIMED_OUT and "time limit" in job.detail["sentence"]
    assert (world.home.job(job.id).state / "checkpoint-000001" / "rank-0" / "state.txt").exists()


def test_a_long_training_is_a_chain_of_attempts_within_the_limit(world: World) -> None:
    [job] = world.work(world.submit("count", params={"count": 3}, time_limit="1s", continuations=2))
    assert (job.state, job.attempt, world.result(job)["values"]) == (JobState.SUCCEEDED, 3, {"done": 3})
    reasons = [event.reason for event in world.queue.events(job_id=job.id)]
    assert reasons.count("continued") == 2


def test_a_chain_ends_with_its_last_link_or_where_one_gets_no_further(world: World) -> None:
    [job] = world.work(world.submit("count", params={"count": 9}, time_limit="1s", continuations=1))
    assert (job.state, job.attempt) == (JobState.TIMED_OUT, 2)
    idle = world.submit("count", params={"count": 9, "idle": True}, time_limit="1s", continuations=5)
    [job] = world.work(idle)
    assert (job.state, job.attempt) == (JobState.TIMED_OUT, 1)


def test_an_operator_preempts_and_it_goes_on_from_its_checkpoint(world: World) -> None:
    [job] = world.work(world.submit("count", params={"count": 2}), until=running)
    operator = JobService(world.queue, Caller("root", True), world.executor.nodes)
    with pytest.raises(PermissionDeniedError):
        JobService(world.queue, Caller("kari", False), world.executor.nodes).preempt(job.id)
    assert operator.preempt(job.id).state is JobState.PREEMPTING
    [job] = world.work(job)
    assert (job.state, job.attempt, world.result(job)["values"]) == (JobState.SUCCEEDED, 2, {"done": 2})
    assert "losses" not in job.detail


def test_interrupt_holds_what_runs(world: World) -> None:
    [job] = world.work(world.submit("sleep"), until=running)
    world.controller.interrupt(grace_s=5)
    job = world.queue.job(job.id)
    assert (job.state, job.reason) == (JobState.HELD, "interrupted")


def test_a_thread_that_cannot_be_ended_keeps_its_reservation(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("permed_compute.execution.inprocess._END_WAIT_S", 0.1)
    world.settings = replace(world.settings, grace=1)
    world.controller = world.new_controller()
    answers, end, until = list[bool](), world.executor.end, world.tally / "until"
    monkeypatch.setattr(world.executor, "end", lambda attempt: answers.append(end(attempt)) or answers[-1])
    job = world.submit("deaf", params={"until": str(until)}, time_limit="1s")
    [job] = world.work(job, until=lambda jobs: len(answers) >= 2)
    assert not any(answers)  # over its limit and its grace, but not confirmed
    assert job.state is JobState.RUNNING and job.detail["grants"]
    until.touch()
    [job] = world.work(job)
    assert job.state in (JobState.SUCCEEDED, JobState.TIMED_OUT)


# -------------------------------------------------------------------------- a controller that dies, an engine that lies


class FakeEngine:
    """An engine whose attempts are only names: what the controller asks of it is what is tested."""

    name = "fake"

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.alive: dict[str, Liveness] = {}
        self.refuse = False

    def nodes(self) -> tuple[Node, ...]:
        return NODE

    def launch(self, attempt: Attempt) -> None:
        if self.refuse:
            raise EngineError("as the test asked")
        self.launches.append(attempt.name)
        self.alive.setdefault(attempt.name, Liveness.ALIVE)

    def liveness(self, attempt: Attempt) -> Liveness:
        return self.alive.get(attempt.name, Liveness.GONE)

    def end(self, attempt: Attempt) -> bool:
        if self.alive.get(attempt.name) is Liveness.UNKNOWN:
            return False
        self.alive[attempt.name] = Liveness.GONE
        return True

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        return []

    def facts(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None: ...


@pytest.fixture
def fake(tmp_path: Path, home: HomePaths, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr("permed_compute.execution.controller._ASK_ENGINE_MS", 0)
    monkeypatch.setattr("permed_compute.execution.controller._QUIET_MS", 0)
    return World(tmp_path, home, FakeEngine())


def start(world: World, job: Job) -> Attempt:
    """What an attempt does first."""
    [job] = world.work(job, until=lambda jobs: jobs[0].state is JobState.LAUNCHING)
    attempt = world.controller._attempt(job, job.attempt)
    Records(attempt.paths.records()).write("started")
    return attempt


def test_interrupt_gives_the_whole_grace_before_it_ends_what_does_not_stop(fake: World) -> None:
    job = fake.submit("squares")
    attempt = start(fake, job)
    fake.work(job, until=running)
    ended_at = []
    fake.executor.end = lambda attempt: ended_at.append(fake.controller.clock()) or True
    fake.controller.interrupt(grace_s=0.5)
    asked = read_json(attempt.paths.stop)["at"]
    assert ended_at[0] - asked >= 450
    assert fake.queue.job(job.id).state is JobState.HELD


def test_after_a_crash_what_runs_is_adopted_not_launched_again(fake: World) -> None:
    job = fake.submit("squares")
    attempt = start(fake, job)
    fake.work(job, until=running)
    fake.queue.release(fake.controller.lease)  # kill -9 and the lease's expiry, in one
    fake.controller = fake.new_controller()
    end = time.monotonic() + 0.5
    fake.controller.run(lambda: time.monotonic() > end)
    assert fake.executor.launches == [attempt.name]
    write_json(attempt.paths.exit, {"outcome": "SUCCEEDED", "reason": "ended", "sentence": "Done."})
    [job] = fake.work(job)
    assert job.state is JobState.SUCCEEDED and job.attempt == 1


def test_a_crash_between_intent_and_launch_launches_the_same_attempt(fake: World) -> None:
    job = fake.submit("squares")
    [job] = fake.work(job, until=lambda jobs: jobs[0].state is JobState.LAUNCHING)
    fake.executor.launches.clear()
    fake.executor.alive.clear()
    fake.queue.release(fake.controller.lease)
    fake.controller = fake.new_controller()
    attempt = start(fake, job)
    assert set(fake.executor.launches) <= {attempt.name} and attempt.number == 1


def test_an_attempt_that_is_gone_is_queued_again_with_a_pause_and_then_failed(fake: World) -> None:
    job = fake.submit("squares", retries=1)
    for number in (1, 2):
        attempt = start(fake, job)
        assert attempt.number == number
        fake.work(job, until=running)
        fake.executor.alive[attempt.name] = Liveness.GONE
        [job] = fake.work(job, until=lambda jobs: not running(jobs))
        if number == 1:
            assert job.state is JobState.QUEUED and job.reason == "attempt-lost"
            assert job.detail["not_before"] > 0 and "grants" not in job.detail
    assert job.state is JobState.FAILED and "2 times in a row" in job.detail["sentence"]


def test_what_was_lost_with_its_node_has_its_own_budget_and_words(fake: World, monkeypatch: pytest.MonkeyPatch) -> None:
    job = fake.submit("squares", retries=0)
    attempt = start(fake, job)
    fake.work(job, until=running)
    monkeypatch.setattr(fake.executor, "nodes", lambda: ())
    fake.executor.alive[attempt.name] = Liveness.GONE
    [job] = fake.work(job, until=lambda jobs: not running(jobs))
    assert (job.state, job.reason) == (JobState.QUEUED, "node-lost")
    monkeypatch.undo()
    said = JobService(fake.queue, Caller("kari", False), fake.executor.nodes).why(job.id)
    assert said.code == "back-off" and "node that it ran on is gone" in said.sentence and "1 of 20" in said.sentence


def test_an_engine_that_cannot_be_asked_keeps_the_reservation(fake: World) -> None:
    job = fake.submit("squares", time_limit="1h")
    attempt = start(fake, job)
    fake.executor.alive[attempt.name] = Liveness.UNKNOWN
    [job] = fake.work(job, until=lambda jobs: jobs[0].state is JobState.UNKNOWN)
    assert job.detail["grants"]
    fake.executor.alive[attempt.name] = Liveness.ALIVE
    [job] = fake.work(job, until=running)


def test_an_end_that_is_not_confirmed_does_not_free_the_capacity(fake: World) -> None:
    job = fake.submit("squares", resources={"cpus": 2})
    waiting = fake.submit("sleep", resources={"cpus": 2})
    attempt = start(fake, job)
    fake.executor.alive[attempt.name] = Liveness.UNKNOWN
    write_json(attempt.paths.exit, {"outcome": "SUCCEEDED", "reason": "ended", "sentence": "Done."})
    end = time.monotonic() + 0.5
    fake.controller.run(lambda: time.monotonic() > end)
    assert fake.queue.job(job.id).state is JobState.RUNNING
    assert fake.queue.job(waiting.id).state is JobState.QUEUED


def test_a_launch_that_the_engine_refuses_is_tried_again_later(fake: World) -> None:
    fake.executor.refuse = True
    job = fake.submit("squares", retries=1)
    [job] = fake.work(job, until=lambda jobs: jobs[0].reason == "launch-failed")
    fake.executor.refuse = False
    assert start(fake, job).number == 2


class Other(Controller):
    """A controller of another home."""

    holder = property(lambda self: "another")


def test_a_second_controller_does_not_lead_and_a_deposed_one_stops(fake: World) -> None:
    fake.controller.lead()
    other = Other(fake.queue, fake.executor, fake.home, fake.settings)
    with pytest.raises(LeaseLostError):
        other.lead()
    fake.queue.release(fake.controller.lease)
    other.lead()
    job = fake.submit("squares")
    with pytest.raises(LeaseLostError):
        fake.controller.run(lambda: fake.queue.job(job.id).state is not JobState.QUEUED)


def test_a_job_whose_files_were_removed_waits_for_them_again(world: World, tmp_path: Path) -> None:
    """`permed gc` between admission and launch: nothing of the job has begun, and its place is free."""
    job = world.submit("squares", inputs=["transfer:cohort"])
    assert (job.state, job.reason) == (JobState.HELD, "transfer")
    world.queue.apply([Move(job.id, job.version, JobState.QUEUED, "files-received", "test")])
    [job] = world.work(job)
    assert (job.state, job.reason, job.attempt) == (JobState.HELD, "transfer", 0) and "grants" not in job.detail
    here = tmp_path / "received"
    here.mkdir()
    reference = "ab" * 32
    write_json(receipts.file(world.home.transfers, reference), asdict(Receipt(reference, str(here), 0, 0, "black", "")))
    receipts.give_name(world.home.transfers, "cohort", reference)
    world.queue.apply([Move(job.id, job.version, JobState.QUEUED, "files-received", "test")])
    [job] = world.work(job)
    assert (job.state, job.reason) == (JobState.FAILED, "permission") and "is black" in job.detail["sentence"]
