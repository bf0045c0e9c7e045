"""Jobs and events survive the way over JSON."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.rows import event_from_row, event_row, job_from_row, job_row
from permed_compute.spec import Band
from permed_compute.states import JobState
from permed_compute.testing.queue import a_move, a_spec


def test_there_and_back() -> None:
    queue = MemoryQueue()
    spec = a_spec(
        params={"a": [1, None, 2.5], "ø": "é"}, inputs=["/data/x"], band=Band.CLINICAL, time_limit="1h30m",
        deadline=datetime(2027, 1, 1, tzinfo=UTC), resources={"gpus": 1, "memory": "4GiB", "workers": "1..8"},
        array=[{"a": 1}, {"b": {"c": 2}}],
    )  # fmt: skip
    jobs = queue.submit([spec, a_spec()], owner="ada")
    queue.apply([a_move(jobs[0], JobState.RESERVED, attempt=1, started_at=3, detail={"x": {"y": [1]}})])
    for job in queue.jobs():
        assert job_from_row(json.loads(json.dumps(job_row(job)))) == job
    for event in queue.events():
        assert event_from_row(json.loads(json.dumps(event_row(event)))) == event
