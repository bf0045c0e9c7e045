"""Gangs: how soon the ranks have met, what a checkpoint costs, and what 1,000 running jobs cost the controller."""

from __future__ import annotations

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs.bare_ray import WORK, BareRay, ray_environment, run, start_ray
from benchmarks.rigs.home import new_home
from permed_compute.admission.snapshot import Node
from permed_compute.cli.live import with_use
from permed_compute.client import Client, open_client
from permed_compute.execution.controller import Controller
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths, read_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import JobState

TITLE = "Gangs, checkpoints, and many running jobs"
WHY = (
    "A training that is preempted often must start soon and save cheaply. Gang start: from submit (ours) or fit()"
    " (Ray Train) to the first collective of two ranks on CPU, on a Ray that runs already. Checkpoint: how long the"
    " training stands still; ours is synced to the disk and hashed, torch.save alone is neither. Cycle: one round of"
    " the controller while 1,000 attempts run and nothing happens, and a look at what each of them uses. Goals: a gang"
    " starts no later than Ray Train's; a round and a look take a quarter of a second at most."
)


def cases(quick: bool) -> list[Case]:
    rig = _Rig(mib=8 if quick else 128)
    jobs = 50 if quick else 1000
    start, pause, cycle = (
        "gang of 2 ranks: start to first collective",
        f"checkpoint of {rig.mib} MiB",
        f"{jobs} running jobs",
    )
    return [
        Case(start, "ours, on Ray", "s", "lower", rig.ours, close=rig.close, goal="≤ Ray Train's", ratio=1.0),
        Case(start, "bare TorchTrainer", "s", "lower", rig.trainer, peer=True),
        Case(pause, "ours, training stands still", "ms", "lower", lambda: rig.save(beside=False)),
        Case(pause, "ours, beside training", "ms", "lower", lambda: rig.save(beside=True)),
        Case(pause, "torch.save alone", "ms", "lower", rig.plain, peer=True),
        Case(cycle, "a round of the controller", "ms", "lower", lambda: rig.round(jobs), goal="≤ 250 ms", limit=250.0),
        Case(cycle, "a look by permed top", "ms", "lower", lambda: rig.look(jobs), goal="≤ 250 ms", limit=250.0),
    ]  # fmt: skip


class _Rig:
    def __init__(self, mib: int) -> None:
        self.mib = mib
        self._stack = ExitStack()
        self._client: Client | None = None
        self._bare: BareRay | None = None
        self._model: Any = None
        self._ctx: Any = None
        self._controller: Controller | None = None
        self._runs = itertools.count()

    def close(self) -> None:
        self._stack.close()

    def _folder(self) -> Path:
        return Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="permed-bench-")))

    # ------------------------------------------------------------------------------------- start

    def ours(self) -> float:
        if self._client is None:
            self._client = self._stack.enter_context(open_client(self._stack.enter_context(new_home("ray"))))
        spec = JobSpec(
            name="gang", workload="ours:meet", code=str(WORK), params={"run": next(self._runs)},
            resources={"workers": 2, "cpus": 1, "memory": "1GiB"},
        )  # fmt: skip
        began = time.time()
        [job] = self._client.wait([job.id for job in self._client.submit(spec)])
        if job.state is not JobState.SUCCEEDED:
            raise RuntimeError(f"The job ended {job.state}: {job.detail.get('sentence', '')}")
        result: Any = read_json(self._client.paths(job).results / "result.json")
        return float(result["values"]["met"]) - began

    def trainer(self) -> float:
        if find_spec("pandas") is None:
            raise LeftOutError("what Ray Train needs is not installed (extra: bench)")
        if self._bare is None:
            environment = self._stack.enter_context(ray_environment())
            self._bare = start_ray(environment, os.cpu_count() or 2, dashboard=False)
        command = [sys.executable, str(WORK / "bare_train.py"), self._bare.address, str(self._folder())]
        return float(run(command, self._bare.environment, timeout_s=200).splitlines()[-1])

    # ------------------------------------------------------------------------------------- checkpoints

    def _state(self) -> Any:
        import torch

        if self._model is None:
            torch.manual_seed(0)
            self._model = {f"layer-{n}": torch.randn(2**18) for n in range(self.mib)}  # 1 MiB each
        return self._model

    def save(self, *, beside: bool) -> float:
        """Milliseconds that the training stands still, once: copying, or everything."""
        from permed_compute.execution.worker import make_context
        from permed_compute.learning import snapshot

        if self._ctx is None:
            home = HomePaths(self._folder() / "home").create()
            spec = JobSpec(name="checkpoint", workload="ours:meet", code=str(WORK))
            paths = home.job("checkpoint").attempt(1)
            attempt = Attempt("checkpoint", 1, spec, (), "", home.root, paths)
            attempt.write()
            scratch = paths.scratch
            scratch.mkdir(parents=True)
            self._ctx = make_context(attempt, emit=lambda *a, **k: None, device="cpu", threads=1, scratch=scratch)
        state = self._state()
        self._ctx.settle()
        began = time.perf_counter()
        shared = snapshot.frozen(state) if beside else state
        self._ctx.checkpoint(snapshot.writer(shared, {}, {}), beside=beside)
        return (time.perf_counter() - began) * 1000

    def plain(self) -> float:
        import torch

        state, target = self._state(), self._folder() / "state.pt"
        began = time.perf_counter()
        torch.save(state, target)
        return (time.perf_counter() - began) * 1000

    # ------------------------------------------------------------------------------------- the controller

    def round(self, jobs: int) -> float:
        """Milliseconds of one tick, the mean of ten, while the attempts beat every 2 s as they do."""
        if self._controller is None:
            self._controller = self._running(jobs)
        self._beat()
        began = time.perf_counter()
        for _ in range(10):
            self._controller.tick()
        return (time.perf_counter() - began) * 100

    def _beat(self) -> None:
        """As drivers do."""
        use = {"cpus": 1.0, "memory": 900, "done": 10, "total": 100, "rate": 0.5}
        for records in self._records:
            records.write("use", **use)

    def look(self, jobs: int) -> float:
        """Milliseconds until `permed top` knows what all of them use, the controller's own part included."""
        if self._controller is None:
            self._controller = self._running(jobs)
        controller = self._controller
        service = JobService(
            controller.queue, Caller("bench", True), controller.executor.nodes, controller._seen()
        )  # fmt: skip
        self._beat()
        began = time.perf_counter()
        found = with_use(controller.home, service.top().live, int(time.time() * 1000))
        took = (time.perf_counter() - began) * 1000
        if sum(row["use"] is not None for row in found) != jobs:
            raise RuntimeError("A job's use is missing.")
        return took

    def _running(self, jobs: int) -> Controller:
        home = HomePaths(self._folder() / "home").create()
        settings = Settings(home=str(home.root))
        queue = MemoryQueue()
        controller = Controller(queue, _Names(jobs), home, settings)
        spec = JobSpec(name="running", workload="ours:meet", time_limit="12h", resources={"cpus": 1, "memory": "1GiB"})
        queue.submit([spec] * jobs, owner="bench")
        controller.lead()
        end = time.monotonic() + 120
        self._records: list[Records] = []
        while len(queue.jobs(states={JobState.RUNNING})) < jobs and time.monotonic() < end:
            controller.tick()
            for job in queue.jobs(states={JobState.LAUNCHING}):
                records = Records(home.job(job.id).attempt(job.attempt).records())
                records.write("started")
                self._records.append(records)
        self._stack.callback(lambda: [records.close() for records in self._records])
        return controller


class _Names:
    """An engine whose attempts are only names: what is measured is the controller."""

    name = "names"

    def __init__(self, jobs: int) -> None:
        self._nodes = tuple(Node(f"node-{n:03d}", 64_000, 512 * 1024) for n in range(-(-jobs // 64)))

    def nodes(self) -> tuple[Node, ...]:
        return self._nodes

    def launch(self, attempt: Attempt) -> None: ...

    def liveness(self, attempt: Attempt) -> Liveness:
        return Liveness.ALIVE

    def end(self, attempt: Attempt) -> bool:
        return True

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        return []

    def facts(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None: ...
