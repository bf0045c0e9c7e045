"""The simulator: the same to the byte, the queue's rules hold, faults start nothing twice, and figures by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from permed_compute.admission.baselines import BASELINES
from permed_compute.admission.decide import decide
from permed_compute.admission.measures import jain, quantile, series, service, shifts, summary
from permed_compute.admission.policy import Account, Policy, Quota
from permed_compute.admission.simulate import Faults, Outcome, Rules, Simulation
from permed_compute.admission.traces import HOUR_MS, Trace, TraceJob, flood, hospital_day, machines, saturated
from permed_compute.admission.whatif import changed
from permed_compute.errors import SpecError
from permed_compute.queue.events import verify
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Clock
from permed_compute.spec import Band
from permed_compute.states import JobState

MINUTE = 60_000
NOTHING = Rules(cycle=1000, launch=0, checks=True)


def job(name: str, submit: int, minutes: int, **fields: Any) -> TraceJob:
    """One GPU for so many minutes, submitted at minute `submit`, with twice the time as its limit."""
    gpu: dict[str, Any] = {"gpu_milli": 1000, "flavors": ("a100",), "account": "a"}
    return TraceJob(name, submit * MINUTE, minutes * MINUTE, 2 * minutes * MINUTE, **(gpu | fields))


def run(jobs: list[TraceJob], gpus: int = 2, policy: Policy | None = None, rule: Any = decide, **how: Any) -> Outcome:
    trace = Trace("t", tuple(jobs), "", nodes=machines(1, gpus, "a100"))
    how = {"rules": NOTHING} | how
    return Simulation(trace, policy or Policy(), MemoryQueue, decide=rule, **how).run()


def starts(outcome: Outcome) -> dict[str, int]:
    """Minute of each job's first start."""
    return {record.job.name: record.first_start // MINUTE for record in outcome.records}


def two_accounts(**quota: Any) -> Policy:
    floor = {"gpu:a100": Quota(nominal=1000, **quota)}
    return Policy(accounts=(Account("pool"), Account("a", "pool", quotas=floor), Account("b", "pool", quotas=floor)))


def test_three_jobs_on_two_gpus_by_hand() -> None:
    outcome = run([job("x", 0, 10), job("y", 0, 20), job("z", 1, 5)])
    assert starts(outcome) == {"x": 0, "y": 0, "z": 10}
    assert [record.end // MINUTE for record in outcome.records] == [10, 20, 15]
    said = summary(outcome)
    assert said["completion_mean_s"] == pytest.approx((10 + 20 + 14) * 60 / 3)
    assert said["wait_p99_s"] == 9 * 60
    assert (said["waste"], said["goodput"], said["unfinished"]) == (0, 1, 0)


def test_an_elastic_job_shares_its_work_among_its_workers() -> None:
    outcome = run([job("wide", 0, 60, workers_max=4)], gpus=4)
    assert outcome.records[0].end == 15 * MINUTE


def test_an_elastic_job_that_began_small_takes_the_pool_once_it_is_empty() -> None:
    jobs = [job("first", 0, 20, workers_min=3, workers_max=3), job("wide", 0, 100, workers_max=4, checkpoint=MINUTE)]
    wide = run(jobs, gpus=4).records[1]
    assert wide.preempted == 1
    # 20 minutes with one worker; asked to stop once the others have ended, 30 s of grace, then 80 min with four.
    assert wide.end == 20 * MINUTE + 30_000 + 20 * MINUTE


def test_a_job_longer_than_its_limit_is_timed_out() -> None:
    [record] = run([replace(job("long", 0, 30), limit=10 * MINUTE)]).records
    assert (record.outcome, record.end // MINUTE) == ("TIMED_OUT", 10)


def test_what_fits_nowhere_ends_the_run_and_is_reported() -> None:
    outcome = run([job("x", 0, 10), job("huge", 0, 10, workers_min=5, workers_max=5)])
    assert summary(outcome)["unfinished"] == 1


@pytest.mark.parametrize("on_request", [True, False])
def test_a_borrower_gives_back_after_its_minimum_run_time_and_grace(on_request: bool) -> None:
    borrower = [job(f"x{n}", 0, 120, checkpoint=25 * MINUTE) for n in range(2)]
    rules = replace(NOTHING, on_request=on_request)
    outcome = run([*borrower, job("owner", 15, 10, account="b")], policy=two_accounts(), rules=rules)
    record = outcome.records[2]
    assert 30_000 <= record.wait <= 32_000  # b's floor: the borrower's grace, and no more
    stopped = [record for record in outcome.records if record.preempted]
    assert len(stopped) == 1
    lost = stopped[0].lost / 1000
    assert lost == 30_000 if on_request else lost == pytest.approx(30_000 + 15 * MINUTE, abs=2000)
    assert all(record.outcome == "SUCCEEDED" for record in outcome.records)


def test_two_runs_say_the_same_to_the_byte() -> None:
    trace = hospital_day(scale=0.08, seed=3)
    texts = []
    for _ in range(2):
        outcome = Simulation(trace, trace.policy or Policy(), MemoryQueue, rules=Rules(cycle=30_000, checks=True)).run()
        texts.append(json.dumps({**summary(outcome, trace.policy), "series": series(outcome)}, sort_keys=True))
    assert texts[0] == texts[1]
    assert json.loads(texts[0])["unfinished"] == 0


def test_jobs_of_one_moment_are_told_apart_by_their_order_alone() -> None:
    trace = saturated(700, gpus=80)  # hundreds are submitted in the same millisecond; their ids are drawn
    policy = trace.policy or Policy()
    rules = Rules(cycle=15 * MINUTE, launch=0, batched=True)
    first, second = (
        [(r.first_start, r.end, r.preempted) for r in Simulation(trace, policy, MemoryQueue, rules=rules).run().records]
        for _ in range(2)
    )
    assert first == second


@pytest.mark.parametrize("name", sorted(BASELINES))
def test_every_baseline_ends_every_job_and_keeps_the_invariants(name: str) -> None:
    trace = hospital_day(scale=0.05, seed=1)
    rules = Rules(cycle=60_000, checks=True)
    outcome = Simulation(trace, Policy(), MemoryQueue, decide=BASELINES[name], rules=rules).run()
    assert {record.outcome for record in outcome.records} == {"SUCCEEDED"}


@pytest.mark.parametrize("seed", range(3))
def test_faults_start_nothing_twice_and_lose_nothing(seed: int) -> None:
    queues: list[MemoryQueue] = []

    def opened(clock: Clock) -> MemoryQueue:
        queues.append(MemoryQueue(clock))
        return queues[0]

    trace = hospital_day(scale=0.06, seed=seed)
    faults = Faults(seed, node_losses=6, lost_acks=300, duplicate_acks=300, late_exits=200, races=30)
    simulation = Simulation(
        trace, trace.policy or Policy(), opened, rules=Rules(cycle=30_000, checks=True), faults=faults
    )
    outcome = simulation.run()
    assert {"nodes lost", "lost acks", "duplicate acks", "late exits"} <= set(outcome.faults)
    assert {record.outcome for record in outcome.records} <= {"SUCCEEDED", "CANCELLED", "TIMED_OUT"}
    assert sum(record.outcome == "CANCELLED" for record in outcome.records) <= outcome.faults.get("races", 0)
    verify(queues[0])  # the log of it all is a chain
    live: dict[str, int] = {}
    for event in queues[0].events():
        if event.after == JobState.LAUNCHING:
            assert event.data["attempt"] == live.get(event.job_id, 0) + 1  # each launch has its own fencing number
            live[event.job_id] = event.data["attempt"]


def test_batched_commits_change_nothing_but_their_number() -> None:
    trace = hospital_day(scale=0.05, seed=2)
    runs = [
        Simulation(trace, trace.policy or Policy(), MemoryQueue, rules=Rules(cycle=30_000, batched=batched)).run()
        for batched in (False, True)
    ]
    assert [r.end for r in runs[0].records] == [r.end for r in runs[1].records]
    assert runs[1].commits < runs[0].commits


def test_a_region_that_floods_does_not_starve_the_others() -> None:
    trace = flood(hours=3, gpus=8, factor=3)
    policy = trace.policy or Policy()
    floors = {account.name: 2000 for account in policy.accounts if account.quotas}
    found = {}
    for name, rule in (("ours", decide), ("fifo", BASELINES["fifo"])):
        outcome = Simulation(trace, policy, MemoryQueue, decide=rule, rules=Rules(cycle=30_000)).run()
        got = service(outcome, lambda record: record.job.account, (0, 3 * HOUR_MS), floors)
        found[name] = jain(got.values())
    assert found["ours"] >= 0.9
    assert found["fifo"] < 0.5


def test_clinical_work_within_its_floor_starts_within_grace() -> None:
    policy = two_accounts()
    others = [job(f"x{n}", 0, 300, checkpoint=5 * MINUTE) for n in range(2)]
    outcome = run([*others, job("ward", 20, 10, account="b", band=Band.CLINICAL)], policy=policy)
    assert outcome.records[2].wait <= 30_000 + 30_000


# --------------------------------------------------------------------------------------------- figures


def test_jain_and_quantiles() -> None:
    assert jain([1, 1, 1, 1]) == 1
    assert jain([4, 0, 0, 0]) == 0.25
    assert jain([]) == 1
    assert quantile([5, 1, 3, 2, 4], 50) == 3
    assert quantile(list(range(1, 101)), 99) == 99
    assert quantile([], 99) == 0


def test_who_gains_and_who_loses() -> None:
    before = summary(run([job("x", 0, 10), job("y", 0, 10)], gpus=1))
    after = summary(run([job("x", 0, 10), job("y", 0, 10)], gpus=2))
    [row] = shifts(before, after, "sector")
    assert (row["name"], row["change_s"]) == ("a", -300.0)


def test_a_floor_that_is_missed_is_counted_and_lending_is_seen() -> None:
    jobs = [job(f"x{n}", 0, 60) for n in range(2)] + [
        job("owner0", 5, 60, account="b"),
        job("owner1", 5, 60, account="b"),
    ]
    policy = two_accounts()
    fifo = summary(run(jobs, policy=policy, rule=BASELINES["fifo"]), policy)
    ours = summary(run(jobs, policy=policy), policy)
    assert fifo["floor_longest_s"] == 0  # one GPU short, and its largest job is one GPU: within the allowance
    assert ours["idle_lent"] == 1.0


# --------------------------------------------------------------------------------------------- what if


def test_a_change_is_laid_over_the_policy() -> None:
    policy = hospital_day(scale=0.01).policy or Policy()
    new = changed(policy, ["helse/nord.gpu:nominal+=8", "uh/uio.gpu:lending_limit-=16"])
    accounts = {account.name: account.quotas for account in new.accounts}
    assert accounts["helse/nord"]["gpu:a100"].nominal == 16_000
    assert accounts["uh/uio"]["gpu:a100"].lending_limit == 4_000  # of 20 that it lends as a whole
    assert new.version != policy.version


@pytest.mark.parametrize(
    ("change", "hint"),
    [("helse/nord:8", "Write e.g."), ("nowhere.gpu:nominal+=1", "Accounts:"), ("uh/uio.tpu:nominal=1", "It has:")],
)
def test_a_change_that_makes_no_sense_says_what_to_write(change: str, hint: str) -> None:
    with pytest.raises(SpecError, match=hint):
        changed(hospital_day(scale=0.01).policy or Policy(), [change])
