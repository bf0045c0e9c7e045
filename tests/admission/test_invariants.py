"""The invariants 1 to 10 of architecture.md, on the real controller with an engine of names and a clock of numbers."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

sys.path.insert(0, str(Path(__file__).parent))

from pool import account, node, policy

from permed_compute.admission.commit import stopping_instead
from permed_compute.admission.decide import decide
from permed_compute.admission.explain import CODES
from permed_compute.admission.fold import fold
from permed_compute.admission.replay import replay
from permed_compute.admission.snapshot import Grant, Node, grants_of
from permed_compute.execution.controller import Controller
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.records import Records
from permed_compute.paths import HomePaths, write_json
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Move, wall_clock
from permed_compute.settings import Settings
from permed_compute.spec import JobSpec
from permed_compute.states import ENDED, LIVE, JobState

POLICIES = [
    policy(account("a", 4), account("b", 4), min_runtime=60),
    policy(account("a", 2, borrowing_limit=2), account("b", 6, lending_limit=2), drain_after=120, backfill_depth=2),
    policy(account("a", 6), account("b", 2), min_runtime=0, entry_penalty=0),
]


class Names:
    """An engine whose attempts are names: what it is asked is what is tested."""

    name = "names"

    def __init__(self) -> None:
        self.alive: dict[str, Liveness] = {}
        self.attempts: dict[str, Attempt] = {}
        self.most = 0

    def nodes(self) -> tuple[Node, ...]:
        return (node("n1", 4, 8), node("n2", 4, 8))

    def launch(self, attempt: Attempt) -> None:
        self.alive.setdefault(attempt.name, Liveness.ALIVE)
        self.attempts[attempt.name] = attempt
        live = Counter(self.attempts[name].job_id for name, how in self.alive.items() if how is Liveness.ALIVE)
        self.most = max(self.most, *live.values())
        Records(attempt.paths.records()).write("started")

    def liveness(self, attempt: Attempt) -> Liveness:
        return self.alive.get(attempt.name, Liveness.GONE)

    def end(self, attempt: Attempt) -> bool:
        self.alive[attempt.name] = Liveness.GONE
        return True

    def sweep(self, keep: Iterable[Attempt]) -> list[str]:
        return []

    def facts(self) -> Mapping[str, Any]:
        return {}

    def close(self) -> None: ...


class Pool(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.now = wall_clock()
        self.queue = MemoryQueue(clock=lambda: self.now)
        self.engine = Names()
        self.home = HomePaths(self.folder)
        self.submitted: set[str] = set()
        self.controller = self.new_controller()

    def new_controller(self) -> Controller:
        made = Controller(
            self.queue, self.engine, self.home, Settings(home=str(self.folder), grace=10, lease=10**6),
            clock=lambda: self.now,
        )  # fmt: skip
        made.lead()
        return made

    def teardown(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    @rule(
        who=st.sampled_from(["a", "b"]), gpus=st.sampled_from([0, 0.5, 1, 1, 2, 4]), low=st.integers(1, 3),
        more=st.integers(0, 2), band=st.sampled_from(["clinical", "research", "opportunistic"]),
        minutes=st.integers(1, 90), count=st.integers(1, 4),
    )  # fmt: skip
    def submit(self, who: str, gpus: float, low: int, more: int, band: str, minutes: int, count: int) -> None:
        spec = JobSpec.model_validate({
            "name": "j", "workload": "m:f", "account": who, "band": band, "time_limit": f"{minutes}m",
            "resources": {"gpus": gpus, "cpus": 1, "memory": "1GiB", "workers": f"{low}..{low + more}",
                          "flavors": ["h100"] if gpus else []},
        })  # fmt: skip
        self.submitted |= {job.id for job in self.queue.submit([spec] * count, owner="kari")}

    @rule()
    def tick(self) -> None:
        self.controller.tick()

    @rule(seconds=st.sampled_from([1, 11, 70, 1800, 7200]))
    def wait(self, seconds: int) -> None:
        self.now += seconds * 1000
        self.controller.tick()

    def running(self) -> list[Attempt]:
        return [self.engine.attempts[name] for name, how in sorted(self.engine.alive.items()) if how is Liveness.ALIVE]

    @precondition(lambda self: self.running())
    @rule(data=st.data(), outcome=st.sampled_from(["SUCCEEDED", "FAILED", "gone"]))
    def end(self, data: st.DataObject, outcome: str) -> None:
        attempt = data.draw(st.sampled_from(self.running()))
        if outcome == "gone":
            self.engine.alive[attempt.name] = Liveness.GONE
        else:
            write_json(attempt.paths.exit, {"outcome": outcome, "reason": "ended", "sentence": "."})
        self.controller.tick()

    @precondition(lambda self: self.queue.jobs(states={JobState.QUEUED}))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job = data.draw(st.sampled_from(self.queue.jobs(states={JobState.QUEUED})))
        self.queue.apply([Move(job.id, job.version, JobState.CANCELLED, "cancelled-by-user", "kari")])

    @rule(which=st.integers(0, len(POLICIES) - 1))
    def apply_policy(self, which: int) -> None:
        self.queue.note("policy", actor="root", data={"policy": POLICIES[which].row()}, policy=POLICIES[which].version)

    @rule(reason=st.sampled_from(["drain", "undrain"]), name=st.sampled_from(["n1", "n2"]))
    def drain(self, reason: str, name: str) -> None:
        self.queue.note(reason, actor="root", data={"nodes": [name]})

    @rule()
    def crash(self) -> None:
        self.controller = self.new_controller()
        self.controller.tick()

    # ------------------------------------------------------------------------------------- 1, 3, 4, 5

    @invariant()
    def reservations_fit(self) -> None:
        jobs = self.queue.jobs(states=LIVE)
        self._fits([grant for job in jobs for grant in grants_of(job)])
        for job in jobs:
            workers = job.spec.resources.workers
            assert workers.min <= len(grants_of(job)) <= workers.max
        assert {attempt.job_id for attempt in self.running()} <= {job.id for job in jobs}

    @invariant()
    def promises_are_kept(self) -> None:
        promised = [job for job in self.queue.jobs(states={JobState.QUEUED}) if job.reason == "promised"]
        victims = {victim for job in promised for victim in job.detail["victims"]}
        grants = [Grant.from_row(row) for job in promised for row in job.detail["promised"]]
        staying = [job for job in self.queue.jobs(states=LIVE) if not (job.id in victims and _going(job.state))]
        self._fits([*grants, *(grant for job in staying for grant in grants_of(job))])

    def _fits(self, grants: list[Grant]) -> None:
        for each in self.engine.nodes():
            here = [grant for grant in grants if grant.node == each.name]
            assert sum(g.cpu_milli for g in here) <= each.cpu_milli and sum(g.memory for g in here) <= each.memory
            for gpu in each.gpus:
                assert sum(min(1000, g.gpu_milli) for g in here if gpu.index in g.devices) <= 1000

    # ------------------------------------------------------------------------------------- 2, 7, 8, 9, 10

    @invariant()
    def the_log_tells_all(self) -> None:
        jobs = {job.id: job for job in self.queue.jobs()}
        assert set(jobs) == self.submitted
        state = fold(self.queue.events(), lambda job_id: jobs[job_id].spec)
        assert state.jobs == jobs
        if self.controller.picture is not None:
            assert self.controller.picture.see(self.now)[0] == state.snapshot(self.now)
        plan = decide(state.snapshot(self.now), state.policy(self.now)[0], self.now)
        queued = [job.id for job in jobs.values() if job.state is JobState.QUEUED]
        assert Counter([w.job_id for w in plan.waits] + [a.job_id for a in plan.admissions]) == Counter(queued)
        assert all(wait.code in CODES for wait in plan.waits)
        assert all(event.actor and event.reason for event in self.queue.events())
        assert self.engine.most <= 1
        done = replay(self.queue.events(), lambda job_id: jobs[job_id].spec, stopping_instead)
        assert not done.different

    @invariant()
    def what_ended_holds_nothing(self) -> None:
        assert not any(job.detail.get("grants") for job in self.queue.jobs(states=ENDED | {JobState.QUEUED}))


def _going(state: JobState) -> bool:
    return state in (JobState.PREEMPTING, JobState.CANCELLING)


Pool.TestCase.settings = settings(
    max_examples=25, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
TestPool = Pool.TestCase
