"""Interrupt one training at random steps, in every way there is, and compare its weights with the uninterrupted run's.

    python tests/soak/gang.py --ranks 2 --loaders 0 --blows 20 --seed 1

Blows: SIGTERM to a rank (it has 30 s), SIGKILL of a rank and of the driver, `permed preempt`, preemption by admission
(a clinical job comes), and the death of a node. Two raylets, each in a network namespace of its own; ranks are half on
each. Prints what was done and the counts as JSON; exits 1 where a bit differs, a job is lost or a process stays.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from permed_compute.admission.policy import CPU, MEMORY, Account, Policy, Quota
from permed_compute.execution import processes, records
from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths, read_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.testing.cluster import RayCluster

CODE = Path(__file__).resolve().parents[1] / "execution" / "code"
BLOWS = ("sigterm", "sigkill", "driver", "preempt", "admission", "node")
STEPS_PER_EPOCH, STEP_S = 10, 0.4


class Run:
    def __init__(
        self, cluster: RayCluster, home: HomePaths, *, ranks: int, loaders: int, seed: int, epochs: int
    ) -> None:
        self.cluster, self.home, self.ranks, self.loaders = cluster, home, ranks, loaders
        self.random = random.Random(seed)
        self.settings = Settings(home=str(home.root), grace=30, heartbeat=5, ray_address=cluster.address)
        self.executor = RayExecutor(self.settings, home)
        self.queue = MemoryQueue()
        self.controller = Controller(self.queue, self.executor, home, self.settings)
        self.operator = JobService(self.queue, Caller("root", True), self.executor.nodes)
        self.nodes = cluster.add(2, cpus=ranks // 2)
        quotas = {CPU: Quota(ranks * 1000), MEMORY: Quota(ranks * 8192)}
        policy = Policy(accounts=(Account("local", quotas=quotas),), min_runtime=0).sealed()
        self.operator.admin("policy", {"policy": policy.row()})
        self.counts: Counter[str] = Counter()
        self.params = {"samples": 4 * STEPS_PER_EPOCH + 2, "epochs": epochs, "batch": 4, "loaders": loaders}

    def submit(self, name: str, **changes: Any) -> Job:
        row = {
            "name": name, "workload": "nets:train", "code": str(CODE), "seed": 3, "retries": 5,
            "resources": {"workers": self.ranks, "cpus": 1, "memory": "1GiB"},
            "params": self.params,
        }  # fmt: skip
        return self.queue.submit([JobSpec.model_validate(row | changes)], owner="kari")[0]

    def work(self, job: Job, until: Callable[[Job], bool], seconds: float = 240) -> Job:
        end = time.monotonic() + seconds

        def enough() -> bool:
            now = self.queue.job(job.id)
            if time.monotonic() > end:
                raise SystemExit(f"stuck: {now}\n{self.log(now)}")
            return until(now)

        self.controller.run(enough)
        return self.queue.job(job.id)

    def log(self, job: Job) -> str:
        path = self.home.job(job.id).attempt(max(1, job.attempt)).log
        return path.read_text()[-3000:] if path.exists() else ""

    def values(self, job: Job) -> dict[str, Any]:
        if job.state is not JobState.SUCCEEDED:
            raise SystemExit(f"ended {job.state}: {job.reason} {job.detail}\n{self.log(job)}")
        return dict((read_json(self.home.job(job.id).results / "result.json") or {})["values"])

    def steps(self, job: Job) -> int:
        """How many forward passes rank 0 of the present attempt has told of."""
        rows, _ = records.read(self.home.job(job.id).attempt(job.attempt).records("rank-0"))
        return sum(row["kind"] == "metric" and row["name"] == "step" for row in rows)

    def strike(self, job: Job, blow: str) -> Job:
        """Wait for a random step of the present attempt, and strike; returns the job once it is queued again."""
        at = self.random.randint(1, 5)
        job = self.work(job, lambda now: ended(now) or (now.state is JobState.RUNNING and self.steps(now) >= at))
        if ended(job):
            return job
        slots = processes.of_attempt(self.controller._attempt(job, job.attempt).name)
        rank = str(self.random.randrange(self.ranks))
        if blow in ("sigterm", "sigkill"):
            os.kill(min(slots[rank], key=lambda p: p.started).pid, getattr(signal, blow.upper()))
        elif blow == "driver":
            os.kill(min(slots["driver"], key=lambda p: p.started).pid, signal.SIGKILL)
        elif blow == "preempt":
            self.operator.preempt(job.id)
        elif blow == "admission":
            other = self.submit("urgent", workload="nets:nothing", band="clinical", params={})
            self.work(other, ended)
        elif blow == "node":
            lost = self.nodes.pop(self.random.randrange(2))
            lost.kill()
            self.nodes += self.cluster.add(1, cpus=self.ranks // 2)
        self.counts[blow] += 1
        attempt = job.attempt
        return self.work(job, lambda now: ended(now) or now.attempt > attempt or now.state is JobState.QUEUED)


def main(ranks: int, loaders: int, blows: int, seed: int, epochs: int) -> int:
    with tempfile.TemporaryDirectory(prefix="gang-") as folder, RayCluster() as cluster, cluster.inside():
        home = HomePaths(Path(folder) / "home").create()
        run = Run(cluster, home, ranks=ranks, loaders=loaders, seed=seed, epochs=epochs)
        whole = run.values(run.work(run.submit("whole"), ended))
        print(json.dumps({"whole": whole["weights"][:16], "steps": whole["steps"]}), flush=True)
        job = run.submit("broken", params=run.params | {"every": 1, "seconds": STEP_S}, band="opportunistic")
        planned = [BLOWS[number % len(BLOWS)] for number in range(blows)]
        run.random.shuffle(planned)
        for blow in planned:
            job = run.strike(job, blow)
            print(json.dumps({"blow": blow, "queued_for": job.reason, "attempt": job.attempt}), flush=True)
            job = run.work(job, lambda now: ended(now) or now.state is JobState.RUNNING)
            if ended(job):
                break
        broken = run.values(run.work(job, ended))
        left = processes.of_attempt(run.controller._attempt(job, job.attempt).name)
        run.controller.close()
        run.executor.close()
    told = {
        "ranks": ranks, "loaders": loaders, "blows": dict(run.counts), "blows_total": run.counts.total(),
        "attempts": run.queue.job(job.id).attempt, "steps": broken["steps"], "resumed_at": broken["resumed_at"],
        "same_weights": broken["weights"] == whole["weights"], "same_history": broken["history"] == whole["history"],
        "left": len(left),
    }  # fmt: skip
    print(json.dumps(told))
    return 0 if told["same_weights"] and told["same_history"] and not left else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("ranks", 2), ("loaders", 0), ("blows", 20), ("seed", 1), ("epochs", 12)):
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    sys.exit(main(given.ranks, given.loaders, given.blows, given.seed, given.epochs))
