"""A plan as the real controller carries it out, where attempts cannot be resized."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from test_recovery_traps import Home

from permed_compute.admission.commit import stopping_instead
from permed_compute.admission.replay import replay
from permed_compute.admission.snapshot import grants_of
from permed_compute.paths import read_json, write_json
from permed_compute.queue.port import Job
from permed_compute.spec import JobSpec
from permed_compute.states import JobState


def gpu_job(workers: str) -> JobSpec:
    return JobSpec.model_validate({
        "name": "j", "workload": "m:f", "time_limit": "8h",
        "resources": {"gpus": 1, "cpus": 1, "memory": "1GiB", "workers": workers, "flavors": ["h100"]},
    })  # fmt: skip


def ends(home: Home, job: Job, outcome: str) -> None:
    write_json(home.attempt(job).paths.exit, {"outcome": outcome, "reason": "ended", "sentence": "."})


def test_an_elastic_job_that_began_with_one_worker_is_started_anew_with_all(tmp_path: Path) -> None:
    home = Home(tmp_path)  # eight GPUs on two nodes
    rigid = home.queue.submit([gpu_job("1")] * 7, owner="kari")
    [wide] = home.queue.submit([gpu_job("1..8")], owner="kari")
    home.ticks(3)
    assert len(grants_of(home.queue.job(wide.id))) == 1
    for job in rigid:
        ends(home, job, "SUCCEEDED")
    home.ticks(500)
    assert home.state(wide) is JobState.RUNNING  # not before its minimum run time of ten minutes
    home.ticks(104)
    assert home.state(wide) is JobState.PREEMPTING and home.queue.job(wide.id).reason == "grown"
    assert (read_json(home.attempt(wide).paths.stop) or {})["reason"] == "grown"
    ends(home, wide, "STOPPED")  # its checkpoint is written
    home.ticks(3)
    grown = home.queue.job(wide.id)
    assert (grown.state, grown.attempt, len(grants_of(grown))) == (JobState.RUNNING, 2, 8)
    home.ticks(1200)
    assert home.queue.job(wide.id).attempt == 2  # it has all there is
    specs = {job.id: job.spec for job in home.queue.jobs()}
    assert not replay(home.queue.events(), specs.__getitem__, stopping_instead).different
