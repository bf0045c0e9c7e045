"""One seeded run of the real controller on a real queue and a fake engine, through bad weather, and its reckoning.

    outcome = Storm(seed=7, folder=tmp_path).run()
    assert not outcome.broken

First the storm: users submit, cancel, hold and preempt; drivers, workers, nodes and the engine's head die; the clock
jumps; and at the controller's own commit points `faults` strikes. A controller that dies is started again, sometimes
on another host. Then the calm: everything is repaired, and every job must come to its end. Last, every promise is
checked. The same seed gives the same run (job ids differ; nothing depends on them).
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from permed_compute.admission.fold import Picture
from permed_compute.admission.policy import Account, Member, Policy, Quota
from permed_compute.admission.snapshot import Gpu, Node
from permed_compute.errors import EngineError, LeaseLostError, PermedError, QueueError, StaleError, StateError
from permed_compute.execution.controller import Controller
from permed_compute.paths import HomePaths
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Clock, Job, Queue
from permed_compute.service import Caller, JobService
from permed_compute.settings import Settings
from permed_compute.spec import Band, JobSpec
from permed_compute.states import ENDED, LIVE, JobState
from permed_compute.testing.engine import Body, FakeEngine
from permed_compute.testing.faults import KINDS, Crash, Faults, FaultyQueue, faulty_files
from permed_compute.testing.invariants import Broken, examine

START = 1_800_000_000_000
"""The clock's first moment, ms since 1970."""
NODES = tuple(Node(f"n{n}", 8_000, 32_768, tuple(Gpu("h100", place, 81_920) for place in range(4))) for n in range(3))
_MEMBERS = (Member("kari", bands=tuple(Band)),)
POLICY = Policy(
    accounts=(
        Account("a", quotas={"gpu:h100": Quota(6000)}, members=_MEMBERS),
        Account("b", quotas={"gpu:h100": Quota(6000, borrowing_limit=0)}, members=_MEMBERS),
    ),
    min_runtime=0,
).sealed()
CEILINGS = {"b": {"gpu:h100": 6000}}
_LEASE_S, _GRACE_S, _HEARTBEAT_S = 30, 10, 10
_CALM_MS = (1_000,) * 60 + (10_000,) * 60 + (120_000,) * 120
WEATHER = ("driver", "member", "node", "cut", "back", "silence", "engine", "clock", "restart")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run came to. `trace` is the log without ids: equal for equal seeds."""

    seed: int
    broken: tuple[Broken, ...]
    counts: Counter[str]
    struck: Counter[tuple[str, str]]
    passed: Counter[str]
    trace: tuple[tuple[Any, ...], ...]


class Elsewhere(Controller):
    """A controller on another host: its lease is not this one's."""

    @property
    def holder(self) -> str:
        return f"elsewhere-{super().holder}"


@dataclass
class Storm:
    """See the module. What is given replaces the real thing: tests put broken ones in and expect to be told."""

    seed: int
    folder: Path
    store: Callable[[Clock], Queue] | None = None
    """Opens the queue, and opens it again after its process has died. Default: one in memory that outlives it."""
    engine_of: Callable[..., FakeEngine] = FakeEngine
    controller_of: Callable[..., Controller] = Controller
    weather: Mapping[str, float] | None = None
    """Kind → probability at each step, instead of what the seed chooses."""
    steps: int = 40
    decisions: bool = True
    """Take every decision again at the end."""
    counts: Counter[str] = field(default_factory=Counter)
    now: int = START
    skew: int = 0

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)
        # Each run has some kinds of trouble and not others: mixed evenly, the commonest would hide the rest.
        self.faults = Faults(self._chance("faults"), self._some(KINDS, (0.004, 0.015, 0.05)))
        self.faults.stall = self._stand_still
        chosen = self._some(WEATHER, (0.02, 0.06, 0.15))
        self.rates = dict(chosen if self.weather is None else self.weather)
        self.home = HomePaths(self.folder / "home")
        self.home.root.mkdir(parents=True)
        kept = MemoryQueue(self._time)
        self.open = self.store or (lambda clock: kept)
        self.queue = self.open(self._time)
        self.engine = self.engine_of(
            NODES, lambda: self.now, self._chance("engine"), self.faults, lambda: self.queue.head()[0]
        )
        self.settings = Settings(home=str(self.home.root), grace=_GRACE_S, heartbeat=_HEARTBEAT_S, lease=_LEASE_S)
        self.controller: Controller | None = None
        self.elsewhere = False
        self.acknowledged: set[str] = set()
        self.broken: list[Broken] = []
        self.ended_as: dict[str, JobState] = {}

    def run(self) -> Outcome:
        """The storm, the calm, and the reckoning."""
        try:
            with faulty_files(self.faults):
                self._service("root").admin("policy", {"policy": POLICY.row()})
                for _ in range(self.steps):
                    self._blow()
                self._calm_down()
            return self._reckon()
        finally:
            self.queue.close()
            shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------- the storm

    def _blow(self) -> None:
        chance = self.chance
        self.now += chance.choice((200, 1000, 1000, 2000, 5000))
        self.engine.advance()
        for kind, rate in self.rates.items():
            if chance.random() < rate:
                self.counts[f"weather {kind}"] += 1
                getattr(self, f"_{kind}")()
        with self.faults.armed():
            if self.controller is not None and chance.random() < 0.5:
                self._alive(self._user)
            self._tick()

    def _driver(self) -> None:
        if body := self._somebody():
            self.engine.kill_driver(body)

    def _member(self) -> None:
        if body := self._somebody():
            self.engine.kill_member(body)

    def _node(self) -> None:
        self.engine.lose(self._some_node())

    def _cut(self) -> None:
        self.engine.cut(self._some_node())

    def _some_node(self) -> str:
        body = self._somebody()
        return self.chance.choice(body.grants).node if body else self.chance.choice(NODES).name

    def _back(self) -> None:
        for name in sorted(set(self.engine.all_nodes) - self.engine.up)[:1]:
            self.engine.restore(name)

    def _silence(self) -> None:
        self.engine.silent = not self.engine.silent

    def _engine(self) -> None:
        self.engine.die()

    def _clock(self) -> None:
        self.skew = self.chance.choice((0, 0, -3_600_000, -20_000, 20_000, 3_600_000))

    def _restart(self) -> None:
        self._died(self.controller)

    def _somebody(self) -> Body | None:
        bodies = self.engine.bodies()
        return self.chance.choice(bodies) if bodies else None

    # ------------------------------------------------------------------------------------- users

    def _user(self) -> None:
        jobs = self.queue.jobs()
        what = self.chance.choice(("submit",) * 5 + ("cancel", "hold", "release", "resume", "preempt"))
        if what == "submit" or not jobs:
            self._submit(jobs)
            return
        service = self._service("root" if what == "preempt" else "kari")
        job = self.chance.choice(jobs)
        self.counts[what] += 1
        try:
            getattr(service, what)(job.id)
        except (StateError, StaleError):
            self.counts[f"{what} refused"] += 1

    def _submit(self, jobs: list[Job]) -> None:
        chance = self.chance
        gang = chance.random() < 0.35
        spec = a_job(
            gang, chance.choice("ab"), chance.choice(("clinical", "research", "research", "opportunistic")),
            chance.choice(("1", "2", "1..3", "3") if not gang else ("2", "4")), chance.choice((0, 0.5, 1, 1, 2)),
            chance.choice((1, 2, 4)), chance.choice((1, 3)), chance.choice((3600, 3600, 3600, 15)),
            chance.randrange(3),
        )  # fmt: skip
        if jobs and chance.random() < 0.1:
            spec = spec.model_copy(update={"dependencies": (chance.choice(jobs).id,)})
        self.acknowledged |= {job.id for job in self._service("kari").submit([spec] * chance.choice((1, 1, 2)))}
        self.counts["submit"] += 1

    def _service(self, name: str) -> JobService:
        picture = self.controller.picture if self.controller is not None else None
        queue = FaultyQueue(self.queue, self.faults)
        return JobService(queue, Caller(name, name == "root"), self.engine.nodes, picture, clock=self._time)

    # ------------------------------------------------------------------------------------- the controller

    def _tick(self) -> None:
        if self.controller is None:
            self._alive(self._start)
        if self.controller is not None:
            self._alive(self.controller.tick)

    def _start(self) -> None:
        controller = self._new(Elsewhere if self.elsewhere else self.controller_of)
        controller.lead()
        self.controller = controller
        self.counts["controllers"] += 1

    def _new(self, kind: Callable[..., Controller]) -> Controller:
        queue = FaultyQueue(self.queue, self.faults)
        return kind(
            queue, self.engine, self.home, self.settings, clock=self._time, announce=self._announce,
            picture=Picture(queue, grace_ms=_GRACE_S * 1000),
        )  # fmt: skip

    def _alive(self, step: Callable[[], Any]) -> None:
        """A step of the controller's process, which may end it."""
        mine = self.controller
        try:
            step()
        except Crash:
            self.counts["crashes"] += 1
            self._died(mine)
        except LeaseLostError:
            self.counts["lease lost"] += 1
            self._died(mine)
        except (QueueError, EngineError, OSError) as error:
            self.counts[f"stumbled: {type(error).__name__}"] += 1
            if self.chance.random() < 0.3:
                self._died(mine)
        except PermedError as error:
            self._break("the controller goes on", f"{type(error).__name__}: {error.message}")
            self._died(mine)

    def _died(self, who: Controller | None) -> None:
        """Nothing of the process is left; its queue is opened anew, unless another leads by now."""
        if self.controller is not who:
            return
        self.controller = None
        self.elsewhere = self.chance.random() < 0.2
        self.queue.close()
        self.queue = self.open(self._time)

    def _stand_still(self) -> None:
        """What happens while a controller stands still in the middle of a step for longer than its lease."""
        mine, self.controller = self.controller, None
        was, self.elsewhere = self.elsewhere, not self.elsewhere
        self.counts["stalls"] += 1
        self.now += _LEASE_S * 1000 + 1
        for _ in range(self.chance.randrange(1, 8)):
            self.engine.advance()
            self._tick()
            self.now += self.chance.choice((500, 2000, 6000))
        if self.controller is None:
            self.controller, self.elsewhere = mine, was

    def _announce(self, job: Job, state: JobState, exit_record: Any) -> None:
        self.faults.around("announce", ("crash-before", "crash-after", "lost"), lambda: None, PermedError("No spool."))
        self.ended_as[job.id] = state

    def _time(self) -> int:
        return self.now + self.skew

    # ------------------------------------------------------------------------------------- calm, and the reckoning

    def _calm_down(self) -> None:
        self.skew = 0
        self.engine.heal()
        for job in self.queue.jobs(states={JobState.HELD}):
            self._service("kari").release(job.id)
        for step in _CALM_MS:
            self.now += step
            self.engine.advance()
            self._tick()
            if self._settled():
                return

    def _settled(self) -> bool:
        if self.engine.bodies() or self.queue.jobs(states=LIVE):
            return False
        return not any(self._might_start(job) for job in self.queue.jobs(states={JobState.QUEUED}))

    def _might_start(self, job: Job) -> bool:
        """Not where a job that it depends on has ended otherwise, or will never start itself."""
        others = [self.queue.job(other) for other in job.spec.dependencies]
        return all(
            other.state is JobState.SUCCEEDED if other.state in ENDED else self._might_start(other) for other in others
        )

    def _reckon(self) -> Outcome:
        engine = self.engine
        self.broken += examine(
            self.queue, acknowledged=self.acknowledged, lives=engine.lives, ceilings=CEILINGS,
            first_publications=engine.first_publications, writes=engine.writes, decisions=self.decisions,
        )  # fmt: skip
        jobs = self.queue.jobs()
        for job in jobs:
            if job.state is JobState.SUCCEEDED and job.id not in engine.results:
                self._break("no job lost", f"job {job.id} succeeded without results")
            if job.state is JobState.TIMED_OUT and job.spec.time_limit >= 3600 and not self.counts["weather clock"]:
                self._break("no job lost", f"job {job.id} timed out before its time")
            if job.state is JobState.CANCELLED and not self.counts["cancel"]:
                self._break("no job lost", f"job {job.id} was cancelled by nobody")
        names = {job.id: number for number, job in enumerate(jobs)}
        trace = tuple(
            (event.at, names.get(event.job_id), event.action, event.after, event.reason, event.data.get("attempt"))
            for event in self.queue.events()
        )
        self.counts.update(f"job {job.state}" for job in jobs)
        self.counts.update(
            jobs=len(jobs), attempts=len(engine.lives), events=len(trace), acknowledged=len(self.acknowledged),
            parts=len(engine.first_publications), fenced=engine.refused,
        )  # fmt: skip
        return Outcome(self.seed, tuple(self.broken), self.counts, self.faults.struck, self.faults.passed, trace)

    def _break(self, promise: str, what: str) -> None:
        self.broken.append(Broken(promise, what, self.queue.head()[0]))

    def _chance(self, purpose: str) -> random.Random:
        return random.Random(f"{self.seed} {purpose}")

    def _some(self, kinds: tuple[str, ...], rates: tuple[float, ...]) -> dict[str, float]:
        chosen = [kind for kind in kinds if self.chance.random() < 0.5]
        return {kind: self.chance.choice(rates) for kind in chosen}


@cache
def a_job(
    gang: bool, account: str, band: str, workers: str, gpus: float, size: int, seconds: int, time_limit: int, bag: int
) -> JobSpec:
    """A map of `size` parts (of a bag that jobs share), or a gang of 2 × `size` steps."""
    shape = {"steps": 2 * size} if gang else {"bag": bag, "parts": size}
    return JobSpec.model_validate({
        "name": "j", "workload": "m:f", "account": account, "band": band, "time_limit": f"{time_limit}s", "retries": 20,
        "continuations": 2 if gang else 0, "params": {**shape, "seconds": seconds},
        "resources": {"gpus": gpus, "cpus": 1, "memory": "1GiB", "workers": workers,
                      "flavors": ["h100"] if gpus else []},
    })  # fmt: skip
