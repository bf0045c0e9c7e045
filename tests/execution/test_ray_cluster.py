"""Ray over several nodes, each in a network namespace: gangs that span them, nodes that die or are cut off."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths, read_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.storage import checkpoints
from permed_compute.testing.cluster import ClusterNode, RayCluster, networks_possible

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,  # starting raylets takes longer than what is tested
    pytest.mark.skipif(not networks_possible(), reason="network namespaces need root and `ip`"),
]


@pytest.fixture(scope="module")
def cluster() -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="ray is not installed")
    with RayCluster() as made, made.inside():
        yield made


class Site:
    """A queue and a controller before a given Ray."""

    def __init__(self, home: HomePaths, cluster: RayCluster, code: Path) -> None:
        self.home, self.code, self.cluster = home, code, cluster
        self.settings = Settings(home=str(home.root), grace=10, heartbeat=5, ray_address=cluster.address)
        self.executor = RayExecutor(self.settings, home)
        self.queue = MemoryQueue()
        self.controller = Controller(self.queue, self.executor, home, self.settings)

    def submit(self, **changes: Any) -> Job:
        row = {
            "name": "training", "workload": "toys:train", "code": str(self.code), "seed": 5,
            "resources": {"workers": 2, "cpus": 1, "memory": "1GiB"}, "params": {"steps": 12}, **changes,
        }  # fmt: skip
        return self.queue.submit([JobSpec.model_validate(row)], owner="kari")[0]

    def work(self, job: Job, until: Callable[[Job], bool] = ended, seconds: float = 150) -> Job:
        end = time.monotonic() + seconds

        def enough() -> bool:
            now = self.queue.job(job.id)
            assert time.monotonic() < end, (now, self.log(now))
            return until(now)

        self.controller.run(enough)
        return self.queue.job(job.id)

    def log(self, job: Job) -> str:
        path = self.home.job(job.id).attempt(max(1, job.attempt)).log
        return path.read_text()[-3000:] if path.exists() else ""

    def values(self, job: Job) -> dict[str, Any]:
        return dict((read_json(self.home.job(job.id).results / "result.json") or {})["values"])

    def has_checkpoint(self, job: Job) -> bool:
        return job.state is JobState.RUNNING and bool(checkpoints.names(self.home.job(job.id).state))


@pytest.fixture
def site(home: HomePaths, cluster: RayCluster, code: Path) -> Iterator[Site]:
    made = Site(home, cluster, code)
    yield made
    made.executor.sweep(())
    made.controller.close()
    made.executor.close()


def nodes_of(job: Job) -> list[str]:
    return [grant["node"] for grant in job.detail["grants"]]


def test_a_gang_spans_two_nodes_one_dies_and_the_job_ends_right(site: Site, cluster: RayCluster) -> None:
    first, second = cluster.add(2, cpus=1)
    whole = site.work(site.submit())
    assert whole.state is JobState.SUCCEEDED, (whole, site.log(whole))

    job = site.submit(params={"steps": 12, "every": 2, "seconds": 0.3}, retries=0)
    job = site.work(job, site.has_checkpoint)
    assert sorted(nodes_of(job)) == sorted([first.name, second.name])
    second.kill()
    job = site.work(job, lambda now: now.state is JobState.QUEUED)
    assert job.reason == "node-lost"  # which has a budget of its own: the job allows no retry
    [third] = cluster.add(1, cpus=1)
    job = site.work(job)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), (job, site.log(job))
    assert site.values(job) == site.values(whole)  # bit by bit
    for node in (first, third):
        node.kill()


def alive(site: Site, names: list[str]) -> bool:
    return {node.name for node in site.executor.nodes() if node.cpu_milli} == set(names)


def settle(site: Site, nodes: list[ClusterNode]) -> None:
    end = time.monotonic() + 30
    while not alive(site, [node.name for node in nodes]):
        assert time.monotonic() < end
        time.sleep(0.2)


def test_a_node_that_is_cut_off_is_as_one_that_died(site: Site, cluster: RayCluster) -> None:
    first, second = cluster.add(2, cpus=1)
    settle(site, [first, second])
    whole = site.work(site.submit())
    job = site.submit(params={"steps": 12, "every": 2, "seconds": 0.3}, retries=0)
    job = site.work(job, site.has_checkpoint)
    cluster.cut(second)
    job = site.work(job, lambda now: now.state is JobState.QUEUED)
    assert job.reason == "node-lost"
    [third] = cluster.add(1, cpus=1)
    job = site.work(job)
    assert (job.state, site.values(job)) == (JobState.SUCCEEDED, site.values(whole)), site.log(job)
    for node in (first, second, third):
        node.kill()


def test_an_elastic_training_goes_on_with_the_node_that_is_left(site: Site, cluster: RayCluster) -> None:
    first, second = cluster.add(2, cpus=1)
    settle(site, [first, second])
    resources = {"workers": "1..2", "cpus": 1, "memory": "1GiB"}
    job = site.submit(params={"steps": 12, "every": 2, "seconds": 0.3}, retries=0, resources=resources)
    job = site.work(job, site.has_checkpoint)
    assert len(nodes_of(job)) == 2
    second.kill()
    job = site.work(job)
    assert (job.state, site.values(job)["world"]) == (JobState.SUCCEEDED, 1), site.log(job)
    first.kill()
