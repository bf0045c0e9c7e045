"""The behaviour that every queue must show. An adapter's test subclasses `QueueConformance` and provides one fixture:

    class TestMine(QueueConformance):
        @pytest.fixture
        def open_queue(self, ...) -> Callable[[Clock], Queue]: ...

`open_queue(clock)` returns an empty queue that reads the time from `clock`; the suite closes it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from permed_compute.errors import LeaseLostError, NotFoundError, QueueError, StaleError, StateError
from permed_compute.queue.events import START, digest, verify
from permed_compute.queue.port import Clock, Job, Move, Queue
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

NOW = 1_800_000_000_000
"""Where the suite's clock starts, ms since 1970."""


class ManualClock:
    """A clock that stands still until it is moved. Milliseconds."""

    def __init__(self, now: int = NOW) -> None:
        self.now = now

    def __call__(self) -> int:
        return self.now

    def advance(self, ms: int) -> None:
        self.now += ms


def a_spec(**fields: Any) -> JobSpec:
    """A valid spec with some fields of its own."""
    return JobSpec(**({"name": "a-job", "workload": "radiology/brain-extraction"} | fields))


def a_move(job: Job, to: JobState, **fields: Any) -> Move:
    """A move of `job` as it is now."""
    return Move(job.id, job.version, to, **({"reason": "test", "actor": "tester"} | fields))


class QueueConformance:
    """Subclass it, provide `open_queue`, and pytest runs it all."""

    threads = 64

    @pytest.fixture
    def clock(self) -> ManualClock:
        return ManualClock()

    @pytest.fixture
    def queue(self, open_queue: Callable[[Clock], Queue], clock: ManualClock) -> Iterator[Queue]:
        queue = open_queue(clock)
        yield queue
        queue.close()

    # ------------------------------------------------------------------------------------- submit

    def test_an_empty_queue(self, queue: Queue) -> None:
        assert queue.jobs() == []
        assert queue.events() == []
        assert queue.head() == tuple(START)
        assert queue.submit([], owner="ada") == []
        assert queue.head() == tuple(START)

    def test_submit_stores_the_job_and_one_event(self, queue: Queue, clock: ManualClock) -> None:
        spec = a_spec(params={"threshold": 0.5, "name": "blåbær"}, resources={"gpus": 1, "memory": "4GiB"})
        [job] = queue.submit([spec], owner="ada")
        assert (job.state, job.version, job.attempt, job.owner) == (JobState.QUEUED, 1, 0, "ada")
        assert (job.submitted_at, job.changed_at, job.started_at) == (clock.now, clock.now, 0)
        assert (job.array_id, job.array_index, job.detail) == ("", -1, {})
        assert job.spec == spec
        assert queue.job(job.id) == job
        assert queue.jobs() == [job]
        [event] = queue.events()
        assert (event.seq, event.at, event.job_id, event.actor) == (job.seq, clock.now, job.id, "ada")
        assert (event.action, event.before, event.after) == ("SUBMITTED", "", "QUEUED")
        assert event.data["spec"] == spec.digest()
        assert queue.head() == (event.seq, event.hash)

    def test_submit_on_hold(self, queue: Queue) -> None:
        [job] = queue.submit([a_spec()], owner="ada", held=True)
        assert job.state is JobState.HELD
        assert queue.events()[0].after == "HELD"

    def test_several_specs_keep_their_order(self, queue: Queue) -> None:
        jobs = queue.submit([a_spec(name=f"n{i}") for i in range(5)], owner="ada")
        assert [job.spec.name for job in queue.jobs()] == [f"n{i}" for i in range(5)]
        assert [job.seq for job in jobs] == [1, 2, 3, 4, 5]

    def test_an_array_becomes_one_job_per_element(self, queue: Queue) -> None:
        spec = a_spec(params={"a": 1, "b": 2}, array=[{"b": i} for i in range(300)])
        jobs = queue.submit([a_spec(), spec], owner="ada")
        elements = jobs[1:]
        assert len(elements) == 300
        assert [job.array_index for job in elements] == list(range(300))
        assert len({job.array_id for job in elements}) == 1
        assert elements[0].array_id not in {"", *(job.id for job in jobs)}
        assert len({job.id for job in jobs}) == 301
        stored = queue.job(elements[17].id)
        assert stored == elements[17]
        assert stored.spec == spec.element(17)
        assert stored.spec.params == {"a": 1, "b": 17}
        assert queue.jobs() == jobs
        assert [event.seq for event in queue.events()] == list(range(1, 302))

    # ------------------------------------------------------------------------------------- look-up

    def test_a_job_by_unique_prefix(self, queue: Queue, clock: ManualClock) -> None:
        [first] = queue.submit([a_spec()], owner="ada")
        clock.advance(86_400_000)
        [second] = queue.submit([a_spec()], owner="ada")
        shared = next(n for n in range(16) if first.id[n] != second.id[n])
        least = max(4, shared + 1)
        assert queue.job(first.id[:least]) == first
        assert queue.job(second.id[:least]) == second
        with pytest.raises(NotFoundError):
            queue.job(first.id[:3])
        with pytest.raises(NotFoundError):
            queue.job("zzzzz")
        with pytest.raises(NotFoundError):
            queue.job("")
        with pytest.raises(NotFoundError):
            queue.job(first.id + "0")

    def test_an_ambiguous_prefix_names_no_job(self, queue: Queue) -> None:
        jobs = queue.submit([a_spec(), a_spec()], owner="ada")
        with pytest.raises(NotFoundError, match="Several"):
            queue.job(jobs[0].id[:5])

    def test_a_prefix_is_text_not_a_pattern(self, queue: Queue) -> None:
        queue.submit([a_spec()], owner="ada")
        for pattern in ("%%%%", "____", "****", "'; --"):
            with pytest.raises(NotFoundError):
                queue.job(pattern)

    def test_jobs_by_state_owner_and_limit(self, queue: Queue) -> None:
        a, b, c = (queue.submit([a_spec()], owner=owner)[0] for owner in ("ada", "bob", "cid"))
        b = queue.apply([a_move(b, JobState.HELD)])[0]
        assert queue.jobs(states=[JobState.HELD]) == [b]
        assert queue.jobs(states=iter([JobState.QUEUED])) == [a, c]
        assert queue.jobs(states=[]) == []
        assert queue.jobs(owner="cid") == [c]
        assert queue.jobs(owner="nobody") == []
        assert queue.jobs(limit=2) == [b, c]
        assert queue.jobs(limit=0) == []
        assert queue.jobs(states=[JobState.QUEUED], owner="ada", limit=9) == [a]

    # ------------------------------------------------------------------------------------- apply

    def test_a_move_changes_the_job_and_adds_its_event(self, queue: Queue, clock: ManualClock) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        clock.advance(1000)
        move = a_move(
            job, JobState.RESERVED, reason="admitted", actor="controller", policy="fifo-1", attempt=1,
            detail={"grants": [{"node": "n", "cpu_milli": 1000}], "pair": (1, 2), 3: "three"},
        )  # fmt: skip
        [after] = queue.apply([move])
        assert (after.state, after.version, after.attempt, after.reason) == (JobState.RESERVED, 2, 1, "admitted")
        assert (after.submitted_at, after.changed_at, after.started_at) == (clock.now - 1000, clock.now, 0)
        assert after.detail == {"grants": [{"node": "n", "cpu_milli": 1000}], "pair": [1, 2], "3": "three"}
        assert queue.job(job.id) == after
        event = queue.events(after=1)[0]
        assert (event.action, event.before, event.after) == ("MOVED", "QUEUED", "RESERVED")
        assert (event.reason, event.actor, event.policy, event.at) == ("admitted", "controller", "fifo-1", clock.now)
        assert event.data == {"version": 2, "attempt": 1, "detail": after.detail}

    def test_what_a_move_leaves_out_stays(self, queue: Queue) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        [job] = queue.apply([a_move(job, JobState.RESERVED, attempt=1, detail={"x": 1})])
        [job] = queue.apply([a_move(job, JobState.LAUNCHING)])
        [job] = queue.apply([a_move(job, JobState.RUNNING, started_at=NOW + 5)])
        [job] = queue.apply([a_move(job, JobState.SUCCEEDED)])
        assert (job.attempt, job.started_at, job.detail, job.version) == (1, NOW + 5, {"x": 1}, 5)
        assert queue.job(job.id) == job

    def test_two_moves_of_one_job_in_one_call(self, queue: Queue) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        first, second = a_move(job, JobState.RESERVED), Move(job.id, 2, JobState.LAUNCHING, "test", "tester")
        assert [j.state for j in queue.apply([first, second])] == [JobState.RESERVED, JobState.LAUNCHING]
        assert queue.job(job.id).version == 3
        assert queue.head()[0] == 3

    def test_a_stale_version_moves_nothing(self, queue: Queue) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        [held] = queue.apply([a_move(job, JobState.HELD)])
        with pytest.raises(StaleError):
            queue.apply([a_move(job, JobState.RESERVED)])
        assert queue.job(job.id) == held
        assert queue.head()[0] == 2

    def test_a_move_that_the_table_forbids(self, queue: Queue) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        with pytest.raises(StateError):
            queue.apply([a_move(job, JobState.RUNNING)])
        assert queue.job(job.id) == job

    def test_an_older_attempt_is_fenced_off(self, queue: Queue) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        [job] = queue.apply([a_move(job, JobState.RESERVED, attempt=2)])
        with pytest.raises(StateError):
            queue.apply([a_move(job, JobState.LAUNCHING, attempt=1)])
        assert queue.job(job.id) == job

    @pytest.mark.parametrize("place", [0, 1, 2])
    @pytest.mark.parametrize("kind", ["stale", "state", "missing", "json"])
    def test_one_bad_move_and_nothing_moves(self, queue: Queue, place: int, kind: str) -> None:
        jobs = queue.submit([a_spec() for _ in range(3)], owner="ada")
        moves = [a_move(job, JobState.HELD) for job in jobs]
        bad, error = {
            "stale": (Move(jobs[place].id, 9, JobState.HELD, "test", "tester"), StaleError),
            "state": (a_move(jobs[place], JobState.SUCCEEDED), StateError),
            "missing": (Move("0" * 16, 1, JobState.HELD, "test", "tester"), NotFoundError),
            "json": (a_move(jobs[place], JobState.HELD, detail={"x": float("nan")}), QueueError),
        }[kind]
        moves[place] = bad
        with pytest.raises(error):
            queue.apply(moves)
        assert queue.jobs() == jobs
        assert queue.head()[0] == 3

    # ------------------------------------------------------------------------------------- events

    def test_notes(self, queue: Queue, clock: ManualClock) -> None:
        event = queue.note("policy-applied", actor="ada", data={"quota": {"gpus": 4}}, policy="p2", job_id="j")
        assert queue.events() == [event]
        assert (event.seq, event.at, event.action, event.job_id) == (1, clock.now, "NOTED", "j")
        assert (event.before, event.after, event.reason, event.policy) == ("", "", "policy-applied", "p2")
        assert event.data == {"quota": {"gpus": 4}}

    def test_events_page_and_filter(self, queue: Queue) -> None:
        jobs = queue.submit([a_spec() for _ in range(4)], owner="ada")
        queue.apply([a_move(jobs[1], JobState.HELD)])
        assert [event.seq for event in queue.events(after=1, limit=2)] == [2, 3]
        assert [event.seq for event in queue.events(after=5)] == []
        assert [event.seq for event in queue.events(job_id=jobs[1].id)] == [2, 5]
        assert [event.seq for event in queue.events(job_id=jobs[1].id, after=2)] == [5]
        assert queue.events(job_id="nothing") == []

    def test_the_events_are_chained(self, queue: Queue) -> None:
        jobs = queue.submit([a_spec(array=3), a_spec()], owner="ada")
        queue.apply([a_move(job, JobState.HELD, detail={"ø": [1.5, None, True]}) for job in jobs])
        queue.note("n", actor="b", data={"x": "é"})
        previous = START.hash
        for number, event in enumerate(queue.events(), start=1):
            assert event.seq == number
            assert event.previous == previous
            assert event.hash == digest(event)
            previous = event.hash
        verified = verify(queue)
        assert (verified.count, verified.head) == queue.head() == (9, previous)

    # ------------------------------------------------------------------------------------- lease

    def test_one_holder_at_a_time(self, queue: Queue, clock: ManualClock) -> None:
        first = queue.acquire("a", 1000)
        assert first is not None
        assert (first.epoch, first.holder, first.expires_at) == (1, "a", clock.now + 1000)
        assert queue.acquire("b", 1000) is None
        clock.advance(999)
        assert queue.acquire("b", 1000) is None
        clock.advance(1)
        second = queue.acquire("b", 1000)
        assert second is not None and (second.epoch, second.holder) == (2, "b")
        with pytest.raises(LeaseLostError):
            queue.renew(first, 1000)
        assert queue.renew(second, 5000).expires_at == clock.now + 5000
        assert queue.acquire("a", 1000) is None

    def test_the_holder_itself_gets_a_higher_epoch(self, queue: Queue) -> None:
        first, again = queue.acquire("a", 1000), queue.acquire("a", 1000)
        assert first is not None and again is not None
        assert again.epoch == first.epoch + 1
        with pytest.raises(LeaseLostError):
            queue.renew(first, 1000)

    def test_a_released_lease_is_free(self, queue: Queue) -> None:
        first = queue.acquire("a", 1000)
        assert first is not None
        queue.release(first)
        second = queue.acquire("b", 1000)
        assert second is not None and second.epoch == first.epoch + 1
        queue.release(first)  # lost already: nothing happens
        assert queue.acquire("c", 1000) is None
        assert queue.renew(second, 1000).holder == "b"

    def test_apply_with_a_lost_lease_moves_nothing(self, queue: Queue, clock: ManualClock) -> None:
        [job] = queue.submit([a_spec()], owner="ada")
        first = queue.acquire("a", 1000)
        assert first is not None
        [job] = queue.apply([a_move(job, JobState.RESERVED)], lease=first)
        clock.advance(1000)
        [job] = queue.apply([a_move(job, JobState.LAUNCHING)], lease=first)  # expired, but still the newest
        second = queue.acquire("b", 1000)
        before = queue.head()
        with pytest.raises(LeaseLostError):
            queue.apply([a_move(job, JobState.RUNNING)], lease=first)
        assert queue.job(job.id) == job
        assert queue.head() == before
        assert queue.apply([a_move(job, JobState.RUNNING)], lease=second)[0].state is JobState.RUNNING

    # ------------------------------------------------------------------------------------- many threads

    def test_many_threads_submit(self, queue: Queue) -> None:
        def submit(number: int) -> list[Job]:
            return [queue.submit([a_spec(name=f"t{number}-{i}")], owner=f"u{number}")[0] for i in range(5)]

        with ThreadPoolExecutor(self.threads) as pool:
            acknowledged = [job for jobs in pool.map(submit, range(self.threads)) for job in jobs]
        stored = queue.jobs()
        assert len(stored) == 5 * self.threads
        assert sorted(acknowledged, key=lambda job: job.seq) == stored
        assert verify(queue).count == len(stored)

    def test_of_racing_moves_exactly_one_wins(self, queue: Queue) -> None:
        jobs = queue.submit([a_spec() for _ in range(3)], owner="ada")
        barrier = threading.Barrier(self.threads)

        def race(number: int) -> list[str]:
            barrier.wait()
            won = []
            for job in jobs:
                try:
                    queue.apply([a_move(job, JobState.HELD, reason=f"by-{number}")])
                    won.append(job.id)
                except StaleError:
                    pass
            return won

        with ThreadPoolExecutor(self.threads) as pool:
            winners = [job_id for won in pool.map(race, range(self.threads)) for job_id in won]
        assert sorted(winners) == sorted(job.id for job in jobs)
        assert {job.version for job in queue.jobs()} == {2}
        assert verify(queue).count == 6

    def test_good_and_bad_calls_together_each_get_their_own_answer(self, queue: Queue) -> None:
        jobs = queue.submit([a_spec() for _ in range(self.threads)], owner="ada")
        barrier = threading.Barrier(self.threads)

        def call(number: int) -> str:
            job = jobs[number]
            barrier.wait()
            try:
                if number % 3 == 0:
                    return queue.apply([a_move(job, JobState.HELD)])[0].id
                if number % 3 == 1:
                    queue.apply([a_move(jobs[number - 1], JobState.RUNNING)])
                return queue.note("n", actor=f"thread-{number}", data={}).actor
            except (StateError, StaleError) as error:
                return error.code

        with ThreadPoolExecutor(self.threads) as pool:
            answers = list(pool.map(call, range(self.threads)))
        for number, answer in enumerate(answers):
            if number % 3 == 0:
                assert answer == jobs[number].id
            elif number % 3 == 1:
                assert answer in ("state", "stale")
            else:
                assert answer == f"thread-{number}"
        held = {job.id for job in queue.jobs(states=[JobState.HELD])}
        assert held == {jobs[number].id for number in range(0, self.threads, 3)}
        verify(queue)

    def test_only_one_of_many_gets_the_lease(self, queue: Queue) -> None:
        with ThreadPoolExecutor(16) as pool:
            leases = list(pool.map(lambda number: queue.acquire(f"holder-{number}", 60_000), range(16)))
        assert sum(lease is not None for lease in leases) == 1
