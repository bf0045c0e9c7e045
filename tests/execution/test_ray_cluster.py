"""Ray over several nodes, each in a network namespace: gangs that span them, nodes and heads that die, TLS."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from permed_compute.admission.policy import Policy
from permed_compute.execution import records
from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths, read_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job
from permed_compute.service import Caller, JobService
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

    def rule(self, policy: Policy) -> None:
        service = JobService(self.queue, Caller("root", True), self.executor.nodes)
        service.admin("policy", {"policy": policy.sealed().row()})

    def log(self, job: Job) -> str:
        path = self.home.job(job.id).attempt(max(1, job.attempt)).log
        return path.read_text()[-3000:] if path.exists() else ""

    def values(self, job: Job) -> dict[str, Any]:
        return dict((read_json(self.home.job(job.id).results / "result.json") or {})["values"])

    def parts(self, job: Job) -> list[Any]:
        """Those that its attempt has finished."""
        rows = records.read(self.home.job(job.id).attempt(max(1, job.attempt)).records())[0]
        return [row for row in rows if row["kind"] == "part"]

    def has_checkpoint(self, job: Job) -> bool:
        return job.state is JobState.RUNNING and bool(checkpoints.names(self.home.job(job.id).state))


@contextmanager
def before(home: HomePaths, cluster: RayCluster, code: Path) -> Iterator[Site]:
    made = Site(home, cluster, code)
    yield made
    made.executor.sweep(())
    made.controller.close()
    made.executor.close()


@pytest.fixture
def site(home: HomePaths, cluster: RayCluster, code: Path) -> Iterator[Site]:
    with before(home, cluster, code) as made:
        yield made


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


def test_a_map_whose_worker_dies_with_its_node_goes_on_elsewhere(site: Site, cluster: RayCluster) -> None:
    first, second = cluster.add(2, cpus=1)
    settle(site, [first, second])
    params = {"count": 30, "seconds": 0.4}
    job = site.submit(workload="toys:squares", params=params, retries=0)
    job = site.work(job, lambda now: len(site.parts(now)) > 3)
    [other] = [node for node in (first, second) if node.name == nodes_of(job)[1]]  # the driver stands on the first
    other.kill()
    [third] = cluster.add(1, cpus=1)
    job = site.work(job)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), (job, site.log(job))
    assert site.values(job) == {"total": sum(n * n for n in range(30))}
    assert "node-lost" in [event.reason for event in site.queue.events(job_id=job.id)]
    for node in {first, second, third} - {other}:
        node.kill()


@pytest.mark.parametrize("after_s", [0.0, 1.0, 2.0])
def test_a_node_that_dies_while_an_attempt_begins_on_it(site: Site, cluster: RayCluster, after_s: float) -> None:
    """Ray would look for another place for what is bound to it, for ever."""
    first, second = cluster.add(2, cpus=1)
    settle(site, [first, second])
    job = site.submit(retries=0)
    job = site.work(job, lambda now: now.state is JobState.LAUNCHING)
    end = time.monotonic() + after_s
    job = site.work(job, lambda _: time.monotonic() >= end)
    second.kill()
    [third] = cluster.add(1, cpus=1)
    job = site.work(job)
    assert job.state is JobState.SUCCEEDED and job.attempt > 1, (job, site.log(job))
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


def test_from_two_nodes_to_one_and_back_the_losses_stay_within_a_ten_thousandth(
    site: Site, cluster: RayCluster
) -> None:
    """An elastic training: its node dies, it goes on with the one that is left, and grows when another comes. The same
    batches are shared otherwise, so that sums differ in their last bits (docs/training.md states the tolerance)."""
    first, second = cluster.add(2, cpus=1)
    settle(site, [first, second])
    site.rule(Policy(min_runtime=0))
    params = {"samples": 22, "epochs": 10, "dropout": 0.0, "batch_norm": False}
    training = {"workload": "nets:train", "resources": {"workers": "1..2", "cpus": 1, "memory": "1GiB"}}
    whole = site.work(site.submit(params=params, **training))
    assert (whole.state, site.values(whole)["world"]) == (JobState.SUCCEEDED, 2), site.log(whole)

    job = site.submit(params={**params, "every": 1, "seconds": 0.6}, retries=0, **training)
    job = site.work(job, site.has_checkpoint)
    assert len(nodes_of(job)) == 2
    second.kill()
    job = site.work(job, lambda now: now.attempt == 2 and now.state is JobState.RUNNING)
    assert len(nodes_of(job)) == 1
    behind = checkpoints.names(site.home.job(job.id).state)[0]
    job = site.work(job, lambda now: checkpoints.names(site.home.job(job.id).state)[0] != behind)
    [third] = cluster.add(1, cpus=1)
    job = site.work(job)
    assert (job.state, job.attempt) == (JobState.SUCCEEDED, 3), (job, site.log(job))
    values, expected = site.values(job), site.values(whole)
    assert (values["world"], values["steps"]) == (2, expected["steps"])
    assert [row["loss"] for row in values["history"]] == pytest.approx(
        [row["loss"] for row in expected["history"]], rel=1e-4
    )
    for node in (first, third):
        node.kill()


# --------------------------------------------------------------------------------------------- the head


def test_a_head_that_dies_ends_the_attempt_and_the_job_goes_on_under_the_next(home: HomePaths, code: Path) -> None:
    with RayCluster() as cluster, cluster.inside(), before(home, cluster, code) as site:
        cluster.add(2, cpus=1)
        whole = site.work(site.submit(params={"steps": 80}))
        job = site.submit(params={"steps": 80, "every": 2, "seconds": 0.3}, retries=0)
        job = site.work(job, site.has_checkpoint)
        cluster.kill_head()
        job = site.work(job, lambda now: now.state is JobState.UNKNOWN)  # the nodes end themselves: nobody is asked
        assert nodes_of(job)  # and what it held is kept, until somebody says what became of it
        cluster.start_head()
        cluster.add(2, cpus=1)
        job = site.work(job)
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 2), (job, site.log(job))
        assert site.values(job) == site.values(whole)
        reasons = [event.reason for event in site.queue.events(job_id=job.id)]
        assert reasons[reasons.index("engine-silent") + 1] == "node-lost"


def test_under_a_head_that_keeps_what_it_knows_the_attempt_goes_on(home: HomePaths, code: Path) -> None:
    with RayCluster(durable=True) as cluster, cluster.inside(), before(home, cluster, code) as site:
        cluster.add(2, cpus=1)
        job = site.submit(params={"steps": 60, "every": 2, "seconds": 0.3}, retries=0)
        job = site.work(job, site.has_checkpoint)
        cluster.kill_head()
        cluster.start_head()
        job = site.work(job)
        assert (job.state, job.attempt) == (JobState.SUCCEEDED, 1), (job, site.log(job))
        after = site.work(site.submit())  # and the next job starts on the same nodes
        assert after.state is JobState.SUCCEEDED, site.log(after)


def test_what_waits_is_asked_of_rays_autoscaler(home: HomePaths, code: Path) -> None:
    with RayCluster() as cluster, cluster.inside(), before(home, cluster, code) as site:
        site.submit(resources={"workers": 3, "cpus": 1, "memory": "1GiB"})
        site.controller.lead()
        end = time.monotonic() + 60
        while asked_of(cluster) != [{"CPU": 1.0, "memory": float(2**30)}] * 3:
            assert time.monotonic() < end, asked_of(cluster)
            site.controller.tick()
            time.sleep(0.5)


def asked_of(cluster: RayCluster) -> Any:
    """What Ray's autoscaler would find as the cluster's wish."""
    return json.loads(_python(_ASKED, cluster.address) or "null")


_ASKED = """
import sys
from ray._raylet import GcsClient
from ray.autoscaler._private.constants import AUTOSCALER_RESOURCE_REQUEST_CHANNEL as channel
print((GcsClient(address=sys.argv[1]).internal_kv_get(channel, None) or b"").decode())
"""


def _python(program: str, *words: str) -> str:
    """What it prints, in this thread's network."""
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


# --------------------------------------------------------------------------------------------- TLS

_STRANGER = """
import json, os, sys
import grpc
address, token, ca, certificate, key = sys.argv[1:]
read = lambda path: open(path, "rb").read()
mutual = grpc.ssl_channel_credentials(read(ca), read(key), read(certificate))
one_sided = grpc.ssl_channel_credentials(read(ca))

def call(channel, token):
    metadata = [("authorization", "Bearer " + token)] if token else None
    with channel:
        try:
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", metadata=metadata, timeout=5)
            return "OK"
        except grpc.RpcError as error:
            return error.code().name

print(json.dumps({
    "plain": call(grpc.insecure_channel(address), token),
    "without certificate": call(grpc.secure_channel(address, one_sided), token),
    "without token": call(grpc.secure_channel(address, mutual), ""),
    "wrong token": call(grpc.secure_channel(address, mutual), "0" * 64),
    "as one of us": call(grpc.secure_channel(address, mutual), token),
}))
"""


def test_with_tls_a_gang_runs_and_who_has_no_certificate_is_refused(home: HomePaths, code: Path) -> None:
    for needed in ("cryptography", "grpc"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    with RayCluster(tls=True) as cluster, cluster.inside(), before(home, cluster, code) as site:
        cluster.add(2, cpus=1)
        job = site.work(site.submit())
        assert (job.state, len(set(nodes_of_whole(site, job)))) == (JobState.SUCCEEDED, 2), (job, site.log(job))
        files = [os.environ[f"RAY_TLS_{name}"] for name in ("CA_CERT", "SERVER_CERT", "SERVER_KEY")]
        answers = json.loads(_python(_STRANGER, cluster.address, cluster.token.read_text(), *files))
        assert answers == {
            "plain": "UNAVAILABLE", "without certificate": "UNAVAILABLE", "without token": "UNAUTHENTICATED",
            "wrong token": "UNAUTHENTICATED", "as one of us": "OK",
        }  # fmt: skip


def nodes_of_whole(site: Site, job: Job) -> list[str]:
    """Where an ended job ran."""
    launch = read_json(site.home.job(job.id).attempt(job.attempt).launch) or {}
    return [grant["node"] for grant in launch["grants"]]
