from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from permed_compute.admission.fold import Picture
from permed_compute.errors import QueueError
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Event
from permed_compute.spec import JobSpec

_CALLERS = 16


class SlowQueue(MemoryQueue):
    """Counts its reads of the log, and holds each back until the gate is open."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.reads = 0
        self.fails = False

    def events(self, **asked: Any) -> list[Event]:
        self.reads += 1
        assert self.gate.wait(60)
        if self.fails:
            raise QueueError("The database is away.")
        return super().events(**asked)


class ToldLock:
    """Says when somebody wants it."""

    def __init__(self) -> None:
        self.wanted = threading.Semaphore(0)
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        self.wanted.release()
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def submit(queue: MemoryQueue, name: str) -> str:
    return queue.submit([JobSpec(name=name, workload="a:b")], owner="anna")[0].id


def test_callers_at_the_same_time_share_looks_and_each_sees_what_was_there() -> None:
    queue = SlowQueue()
    picture = Picture(queue)
    picture._lock = lock = ToldLock()  # type: ignore[assignment]

    def call(number: int) -> bool:
        mine = submit(queue, f"job-{number}")
        return mine in picture.look().jobs

    with ThreadPoolExecutor(_CALLERS) as pool:
        calls = [pool.submit(call, number) for number in range(_CALLERS)]
        for _ in calls:
            assert lock.wanted.acquire(timeout=60)
        queue.gate.set()
        assert all(each.result() for each in calls)
    assert queue.reads <= 2


def test_a_look_alone_is_taken_each_time() -> None:
    queue = SlowQueue()
    queue.gate.set()
    picture = Picture(queue)
    for number in range(3):
        mine = submit(queue, f"job-{number}")
        assert mine in picture.look().jobs
    assert queue.reads == 3


def test_a_look_that_failed_is_nobodys_answer() -> None:
    queue = SlowQueue()
    queue.fails = True
    picture = Picture(queue)
    picture._lock = lock = ToldLock()  # type: ignore[assignment]
    mine = submit(queue, "job")
    with ThreadPoolExecutor(3) as pool:  # the third would take the second's
        calls = [pool.submit(picture.look) for _ in range(3)]
        for _ in calls:
            assert lock.wanted.acquire(timeout=60)
        queue.gate.set()
        for each in calls:
            with pytest.raises(QueueError):
                each.result()
    queue.fails = False
    assert mine in picture.look().jobs
