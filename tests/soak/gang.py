"""Interrupt one training at random steps, in every way there is, and compare its weights with the uninterrupted run's.

    python tests/soak/gang.py --ranks 2 --loaders 0 --blows 20 --seed 1
    python tests/soak/gang.py --ranks 2 --keep DIR --seconds 100     # a piece of it; the same again goes on from there

Blows: SIGTERM to a rank (it has 30 s), SIGKILL of a rank and of the driver, `permed preempt`, preemption by admission
(a clinical job comes), and the death of a node. Two raylets, each in a network namespace of its own; ranks are half on
each. A piece ends as Ctrl-C does: the job is held, and resumed by the next piece on a new Ray.
Prints what was done and the counts as JSON. Exits 1 where a bit differs, a job is lost or a process stays; 3 where the
seconds were over first.
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
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from permed_compute.admission.policy import CPU, MEMORY, Account, Policy, Quota
from permed_compute.execution import processes, records
from permed_compute.execution.controller import Controller, ended
from permed_compute.execution.processes import ATTEMPT_MARK, ProcessTable
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.queue.port import Job
from permed_compute.queue.sql import SqlQueue
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState
from permed_compute.testing.cluster import RayCluster

CODE = Path(__file__).resolve().parents[1] / "execution" / "code"
BLOWS = ("sigterm", "sigkill", "driver", "preempt", "admission", "node")
STEPS_PER_EPOCH, STEP_S = 10, 0.15
NOT_YET = 3


class Run:
    """A training before a Ray of two nodes, and what was done to it so far (`notes`, kept between pieces)."""

    def __init__(self, cluster: RayCluster, folder: Path, case: dict[str, int]) -> None:
        self.cluster, self.ranks, self.seed = cluster, case["ranks"], case["seed"]
        self.home = HomePaths(folder / "home").create()
        self.file = folder / "notes.json"
        self.notes: dict[str, Any] = read_json(self.file) or {"case": case, "blows": []}
        if self.notes["case"] != case:
            raise SystemExit(f"{folder} holds another case: {self.notes['case']}")
        self.settings = Settings(home=str(self.home.root), grace=30, heartbeat=5, ray_address=cluster.address)
        self.executor = RayExecutor(self.settings, self.home)
        self.queue = SqlQueue(f"sqlite:///{self.home.database}")
        self.controller = Controller(self.queue, self.executor, self.home, self.settings)
        self.operator = JobService(self.queue, Caller("root", True), self.executor.nodes)
        self.nodes = cluster.add(2, cpus=self.ranks // 2)
        quotas = {CPU: Quota(self.ranks * 1000), MEMORY: Quota(self.ranks * 8192)}
        policy = Policy(accounts=(Account("local", quotas=quotas),), min_runtime=0).sealed()
        self.operator.admin("policy", {"policy": policy.row()})
        self.params = {
            "samples": 4 * STEPS_PER_EPOCH + 2, "epochs": case["epochs"], "batch": 4, "loaders": case["loaders"],
        }  # fmt: skip

    def close(self) -> None:
        self.controller.close()
        self.executor.close()
        self.queue.close()

    def submit(self, name: str, **changes: Any) -> Job:
        row = {
            "name": name, "workload": "nets:train", "code": str(CODE), "seed": 3, "retries": 5,
            "resources": {"workers": self.ranks, "cpus": 1, "memory": "1GiB"},
            "params": self.params,
        }  # fmt: skip
        return self.queue.submit([JobSpec.model_validate(row | changes)], owner="kari")[0]

    def keep(self, **more: Any) -> None:
        self.notes |= more
        write_json(self.file, self.notes)

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

    def whole(self) -> dict[str, Any]:
        """What the training gives that nobody interrupts."""
        if "whole" not in self.notes:
            self.keep(whole=self.values(self.work(self.submit("whole"), ended)))
        return dict(self.notes["whole"])

    def broken(self) -> Job:
        """The training that is interrupted: submitted, or taken up again."""
        if "job" not in self.notes:
            params = self.params | {"every": 1, "seconds": STEP_S}
            self.keep(job=self.submit("broken", params=params, band="opportunistic").id)
        job = self.queue.job(self.notes["job"])
        if job.state is JobState.PREEMPTING:  # the last piece was ended while it was holding the job
            job = self.work(job, ended)
        if job.state in (JobState.LAUNCHING, JobState.RUNNING):  # it was killed: its attempt went with its Ray
            job = self.work(job, lambda now, was=job.attempt: ended(now) or now.attempt > was)
        return self.operator.resume(job.id) if job.state is JobState.HELD else job

    def strike(self, job: Job, number: int) -> Job:
        """Wait for a random step of the present attempt, and strike; returns the job once it has left that attempt."""
        chance = random.Random(f"{self.seed}-{number}")
        order = random.Random(f"{self.seed}-{number // len(BLOWS)}").sample(BLOWS, len(BLOWS))
        blow, at = order[number % len(BLOWS)], chance.randint(1, 5)
        job = self.work(job, lambda now: ended(now) or (now.state is JobState.RUNNING and self.steps(now) >= at))
        if ended(job):
            return job
        time.sleep(chance.uniform(0, STEP_S))  # anywhere within the step, its checkpoint included
        began, attempt = time.monotonic(), job.attempt
        getattr(self, f"_{blow}")(job, chance)
        job = self.work(job, lambda now: ended(now) or now.attempt > attempt or now.state is JobState.QUEUED)
        told = {"blow": blow, "step": at, "of_attempt": attempt, "became": job.reason}
        self.keep(blows=[*self.notes["blows"], told])
        print(json.dumps(told | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
        return job

    def _sigterm(self, job: Job, chance: random.Random) -> None:
        self._signal(job, str(chance.randrange(self.ranks)), signal.SIGTERM)

    def _sigkill(self, job: Job, chance: random.Random) -> None:
        self._signal(job, str(chance.randrange(self.ranks)), signal.SIGKILL)

    def _driver(self, job: Job, chance: random.Random) -> None:
        self._signal(job, "driver", signal.SIGKILL)

    def _signal(self, job: Job, slot: str, number: int) -> None:
        found = processes.of_attempt(self.controller._attempt(job, job.attempt).name)[slot]
        os.kill(min(found, key=lambda process: process.started).pid, number)

    def _preempt(self, job: Job, chance: random.Random) -> None:
        self.operator.preempt(job.id)

    def _admission(self, job: Job, chance: random.Random) -> None:
        one = {"workers": 1, "cpus": 1, "memory": "1GiB"}
        self.work(
            self.submit("urgent", workload="toys:squares", band="clinical", params={"count": 1}, resources=one), ended
        )

    def _node(self, job: Job, chance: random.Random) -> None:
        lost = self.nodes.pop(chance.randrange(2))
        with ThreadPoolExecutor(1) as beside:
            coming = beside.submit(self.cluster.add, 1, cpus=self.ranks // 2)
            lost.kill()
            self.nodes += coming.result()

    def left(self) -> int:
        """Processes of any attempt of the training."""
        marks = ProcessTable().look().marked(ATTEMPT_MARK).values()
        return sum(mark.startswith(f"permed-{self.notes['job']}-") for mark in marks)


def main(case: dict[str, int], folder: Path, seconds: float) -> int:
    over = time.monotonic() + seconds
    with RayCluster() as cluster, cluster.inside(), ExitStack() as stack:
        run = Run(cluster, folder, case)
        stack.callback(run.close)
        whole = run.whole()
        print(json.dumps({"whole": whole["weights"][:16], "steps": whole["steps"]}), flush=True)
        job = run.broken()
        while len(run.notes["blows"]) < case["blows"] and not ended(job):
            if time.monotonic() > over:
                run.controller.interrupt(20)
                print(json.dumps({"held_after": len(run.notes["blows"])}), flush=True)
                return NOT_YET
            job = run.strike(job, len(run.notes["blows"]))
        broken = run.values(run.work(job, ended))
        left, attempts = run.left(), run.queue.job(job.id).attempt
    struck = run.notes["blows"]
    told = {
        **case, "struck": dict(Counter(each["blow"] for each in struck)), "struck_in_all": len(struck),
        "attempts": attempts, "steps": broken["steps"], "resumed_at": broken["resumed_at"],
        "same_weights": broken["weights"] == whole["weights"], "same_history": broken["history"] == whole["history"],
        "left": left,
    }  # fmt: skip
    print(json.dumps(told))
    right = told["same_weights"] and told["same_history"] and not left and len(struck) == case["blows"]
    return 0 if right else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name, default in (("ranks", 2), ("loaders", 0), ("blows", 20), ("seed", 1), ("epochs", 18)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--keep", type=Path, default=None, help="folder that a later piece goes on from")
    parser.add_argument("--seconds", type=float, default=3600.0, help="no new blow after that")
    given = vars(parser.parse_args())
    keep, limit = given.pop("keep"), given.pop("seconds")
    # Or nodes would stay: their processes are ended when the program leaves its blocks.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="gang-") as there:
        sys.exit(main(given, keep or Path(there), limit))
