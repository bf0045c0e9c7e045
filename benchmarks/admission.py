"""Deciding and committing: a cycle under load, Kueue's published specs, a long trace, growth; then the baselines."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.harness import Case, LeftOutError
from benchmarks.rigs.home import disk_folder
from permed_compute.admission.baselines import BASELINES
from permed_compute.admission.commit import moves_of
from permed_compute.admission.decide import decide
from permed_compute.admission.measures import quantile, summary
from permed_compute.admission.policy import Account, Policy, Quota
from permed_compute.admission.simulate import Outcome, Rules, Simulation
from permed_compute.admission.snapshot import Snapshot, take, waiting_of
from permed_compute.admission.traces import (
    MINUTE_MS,
    Trace,
    TraceJob,
    hospital_day,
    machines,
    read,
    saturated,
)
from permed_compute.queue.events import Anchor
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Job
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.spec import Band
from permed_compute.states import LIVE, JobState

TITLE = "Admission"
WHY = (
    "Goals: a decision must not take longer than people notice, whoever waits: p99 of a cycle ≤ 100 ms with "
    "10,000 waiting jobs on 1,000 GPUs (CPU time of the deciding thread), cost growing no worse than n log n. The "
    "two specs that Kueue publishes (15,000 workloads in 30 queues; 50,000 in 1,000) go through the real "
    "committer on SQLite, each admission durable with its chained event; goal 2,000 a second. Kueue's published "
    "42 to 43 a second include simulated run times and an API server, so that the two figures are not of the same "
    "thing: `makespan` shows ours with such run times on the virtual clock. A trace of 100,000 jobs must simulate "
    "in 60 s of one core, so that an admin's question is answered while they wait. Last: completion times beside "
    "five baselines on real and synthetic traces; the page docs/simulation.md explains them."
)


def cases(quick: bool) -> list[Case]:
    waiting, trace = (1000, 2000) if quick else (10_000, 100_000)
    found = [
        Case("one decision", f"p99, {waiting} waiting, 1,000 GPUs", "s", "lower", lambda: _cycle(waiting, 20),
             goal="≤ 100 ms", limit=0.1),
        Case("a trace on the virtual clock", f"{trace} jobs, load 0.97", "s", "lower", lambda: _long(trace),
             goal="≤ 60 s", limit=60),
    ]  # fmt: skip
    for workloads, queues in ((1500, 30), (2000, 40)) if quick else ((15_000, 30), (50_000, 1000)):
        name = f"{workloads} workloads, {queues} queues"
        found.append(
            Case("admissions through SQLite", name, "admissions/s", "higher",
                 lambda workloads=workloads, queues=queues: _admissions(workloads, queues),
                 goal="≥ 2,000/s", limit=2000)
        )  # fmt: skip
        found.append(
            Case("makespan with Kueue's run times", name, "virtual s", "lower",
                 lambda workloads=workloads, queues=queues: _makespan(workloads, queues))
        )  # fmt: skip
    sizes = (100, 1000) if quick else (1000, 3000, 10_000, 30_000, 100_000)
    found += [
        Case("cost by jobs waiting", f"{size} waiting", "µs/job", "lower",
             lambda size=size: _cycle(size, 3) / size * 1e6) for size in sizes
    ]  # fmt: skip
    for label, make in _traces(quick):
        for what, key in (("mean completion", "completion_mean_s"), ("p99 completion", "completion_p99_s"),
                          ("in use", "utilisation"), ("deadlines missed", "deadlines_missed")):  # fmt: skip
            for name, rule in {"ours": decide, **BASELINES}.items():
                unit = "s" if key.endswith("_s") else "share" if key == "utilisation" else "jobs"
                better = "higher" if key == "utilisation" else "lower"
                found.append(
                    Case(f"{label}: {what}", name, unit, better,
                         lambda label=label, make=make, name=name, rule=rule, key=key: _figure(
                             label, make, name, rule, key),
                         peer=name != "ours")
                )  # fmt: skip
    return found


# --------------------------------------------------------------------------------------------- one decision


def _cycle(waiting: int, rounds: int) -> float:
    """p99 of `rounds` decisions on a full pool of 1,000 GPUs with so many jobs waiting."""
    trace = saturated(waiting + 700, seed=1)
    policy = trace.policy or Policy()
    snapshot = _full(trace, policy, waiting)
    seconds = []
    for turn in range(rounds):
        began = time.thread_time()
        decide(snapshot, policy, trace.start + MINUTE_MS * (20 + turn))
        seconds.append(time.thread_time() - began)
    return quantile(seconds, 99)


def _full(trace: Trace, policy: Policy, waiting: int) -> Snapshot:
    """The pool after its first decision: full, and so many wait."""
    queue = MemoryQueue(lambda: trace.start)
    jobs = queue.submit([job.spec(trace.start) for job in trace.jobs], owner="bench")
    now = trace.start
    first = take(trace.nodes, jobs, {}, grace_ms=30_000)
    moves = moves_of(decide(first, policy, now), {job.id: job for job in jobs}.__getitem__, actor="bench")
    queue.apply(moves)
    live = queue.jobs(states=LIVE)
    rest = queue.jobs(states={JobState.QUEUED})[:waiting]
    return take(trace.nodes, [*live, *rest], {}, grace_ms=30_000)


def _long(count: int) -> float:
    """CPU seconds of one core. Decisions every 15 minutes, commits batched as group commit does, launch at once."""
    trace = saturated(count)
    rules = Rules(cycle=15 * MINUTE_MS, launch=0, batched=True)
    began = time.process_time()
    outcome = Simulation(trace, trace.policy or Policy(), MemoryQueue, rules=rules).run()
    seconds = time.process_time() - began
    said = summary(outcome, trace.policy)
    if said["unfinished"] or (count >= 10_000 and said["queue_p50"] < 500):
        raise RuntimeError(f"{said['unfinished']} jobs are unfinished; {said['queue_p50']:.0f} wait at the median.")
    return seconds


# --------------------------------------------------------------------------------------------- Kueue's specs

_CLASSES = ((1, 0.7, 200), (5, 0.2, 500), (20, 0.1, 1000))
"""CPU request, share of the workloads, run time in ms of Kueue's small, medium and large class (test/performance)."""


def kueue_trace(workloads: int, queues: int) -> tuple[Trace, Policy]:
    """Queues in cohorts of five or six, 20 CPU each, half of it to borrow; workloads arrive 100 ms apart per queue."""
    cohorts = max(1, queues // 6)
    quotas = {"cpu": Quota(nominal=20_000, borrowing_limit=100_000)}
    accounts = [Account(f"cohort{number}") for number in range(cohorts)]
    accounts += [Account(f"q{number}", f"cohort{number % cohorts}", quotas=quotas) for number in range(queues)]
    each, jobs = workloads // queues, []
    for number, queue in itertools.product(range(each), range(queues)):
        place, cpus, ms = number / each, 1, 200
        for cpus, share, ms in _CLASSES:  # noqa: B007 - the class that the place falls into
            if place < share:
                break
            place -= share
        jobs.append(
            TraceJob(f"w{len(jobs)}", number * 100, ms, 60_000, account=f"q{queue}", band=Band.RESEARCH,
                     cpu_milli=cpus * 1000, memory=0)
        )  # fmt: skip
    nodes = machines(queues, 0, "cpu", cpus=20, gib=64)
    policy = Policy(accounts=tuple(accounts), backfill_depth=1, gpu_charge=1).sealed()
    return Trace("kueue", tuple(jobs), "", nodes=nodes, policy=policy), policy


def _admissions(workloads: int, queues: int) -> float:
    """Admissions a second: snapshot, decide and durable commit on SQLite, until every workload has been admitted.

    Run times do not count: what has been admitted ends before the next cycle, outside the measured time.
    """
    trace, policy = kueue_trace(workloads, queues)
    seconds, admitted, now = 0.0, 0, trace.start
    with disk_folder() as folder:
        queue = SqlQueue(sqlite_url(folder / "queue.db"), clock=lambda: now, anchor=Anchor(folder / "anchor"))
        try:
            stored = queue.submit([job.spec(now) for job in trace.jobs], owner="bench")
            jobs: dict[str, Job] = {job.id: job for job in stored}
            waiting = {job.id: waiting_of(job, {}) for job in stored}  # kept up from events, as the controller does
            lease = queue.acquire("bench", 1 << 50)
            while waiting:
                now += 1000
                began = time.perf_counter()
                plan = decide(Snapshot(trace.nodes, (), tuple(waiting.values())), policy, now)
                moved = queue.apply(moves_of(plan, jobs.__getitem__, actor="bench"), lease=lease)
                started = [job.id for job in moved if job.state is JobState.RESERVED]
                for job_id in started:
                    del waiting[job_id]
                seconds += time.perf_counter() - began
                if not started:
                    raise RuntimeError(f"{len(waiting)} workloads cannot start.")
                admitted += len(started)
        finally:
            queue.close()
    return admitted / seconds


@cache
def _makespan(workloads: int, queues: int) -> float:
    """Virtual seconds from the first arrival to the last end, run times included, decisions every 100 ms.

    The same every time: run once.
    """
    trace, policy = kueue_trace(workloads, queues)
    outcome = Simulation(trace, policy, MemoryQueue, rules=Rules(cycle=100, launch=0, batched=True)).run()
    return outcome.makespan / 1000


# --------------------------------------------------------------------------------------------- beside the baselines

_done: dict[tuple[str, str], dict[str, Any]] = {}
"""A run is the same every time (it is deterministic): measured once, shown in four groups."""


def _traces(quick: bool) -> Sequence[tuple[str, Callable[[], tuple[Trace, Rules]]]]:
    scale = 0.1 if quick else 1.0
    day = ("hospital day", lambda: (hospital_day(scale=scale), Rules(cycle=10_000)))
    if quick:
        return [day]
    return [day, *((f"philly-derived-{n}", lambda n=n: (_philly(n), Rules(cycle=300_000))) for n in "ab")]


def _philly(name: str) -> Trace:
    file = Path(__file__).resolve().parents[2] / "shared" / "data" / "traces" / f"philly-derived-{name}.csv"
    if not file.is_file():
        raise LeftOutError("the published traces (../shared/data/traces) are not beside this checkout")
    return read(file)


def _figure(label: str, make: Callable[[], tuple[Trace, Rules]], name: str, rule: Any, key: str) -> float:
    if (label, name) not in _done:
        trace, rules = make()
        policy = trace.policy or Policy()
        outcome: Outcome = Simulation(trace, policy, MemoryQueue, decide=rule, rules=rules, name=name).run()
        _done[label, name] = summary(outcome, policy)
    return float(_done[label, name][key])
