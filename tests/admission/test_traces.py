"""Trace readers, and the synthetic day."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from permed_compute.admission.policy import Policy
from permed_compute.admission.simulate import Rules, Simulation
from permed_compute.admission.traces import (
    HOUR_MS,
    MINUTE_MS,
    hospital_day,
    of_history,
    parse_machines,
    read,
    saturated,
)
from permed_compute.errors import SpecError
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Clock
from permed_compute.spec import Band

SACCT = """JobID|User|Account|State|Submit|Start|End|TimelimitRaw|AllocTRES
101|ada|nn9999k|COMPLETED|2026-05-01T08:00:00|2026-05-01T08:10:00|2026-05-01T09:10:00|120|billing=16,cpu=8,gres/gpu:a100=2,gres/gpu=2,mem=64G,node=1
101.batch||nn9999k|COMPLETED|2026-05-01T08:10:00|2026-05-01T08:10:00|2026-05-01T09:10:00||cpu=8,mem=64G,node=1
102|bob|nn9999k|CANCELLED by 7|2026-05-01T08:01:00|None|2026-05-01T08:02:00|60|
100|ada|nn9999k|TIMEOUT|2026-05-01T07:59:00|2026-05-01T08:00:00|2026-05-01T08:30:00|30|cpu=40,mem=172000M,node=2
"""


@pytest.mark.shared
def test_philly_derived(shared_data: Path) -> None:
    trace = read(shared_data / "traces" / "philly-derived-a.csv", seed=1)
    assert len(trace.jobs) == 1985
    assert trace.jobs[0].work == 3_828_694_100
    assert Counter(job.workers_min for job in trace.jobs) == {1: 1928, 2: 20, 4: 27, 8: 10}
    assert all(job.limit >= 1.1 * job.work for job in trace.jobs)
    assert 1.0 < trace.load(trace.nodes) < 1.2
    assert trace == read(shared_data / "traces" / "philly-derived-a.csv", seed=1)
    assert trace != read(shared_data / "traces" / "philly-derived-a.csv", seed=2)


def test_sacct(tmp_path: Path) -> None:
    file = tmp_path / "sacct.txt"
    file.write_text(SACCT)
    trace = read(file)
    assert trace.left_out == {"step": 1, "never started, or runs still": 1}
    first, second = trace.jobs
    assert (first.submit, first.work, first.limit) == (0, 30 * MINUTE_MS, 30 * MINUTE_MS)
    assert (first.workers_min, first.cpu_milli, first.memory, first.gpu_milli) == (2, 20_000, 86_000, 0)
    assert (second.submit, second.work, second.limit) == (MINUTE_MS, HOUR_MS, 2 * HOUR_MS)
    assert (second.workers_min, second.gpu_milli, second.flavors) == (2, 1000, ("a100",))
    assert second.owner == first.owner != "ada"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("when,what\n1,2\n", "no trace that we know"),
        ("submit_s,gpus,duration_s,kind\n0,one,5,x\n", "line 2"),
        ("JobID|User\n1|ada\n", "lacks the columns"),
        (SACCT.replace("2026-05-01T07:59:00", "yesterday"), "line 5"),
    ],
)
def test_bad_traces_say_where(tmp_path: Path, text: str, what: str) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(text)
    with pytest.raises(SpecError, match=what):
        read(file)


def test_our_own_history_comes_back_as_it_was(tmp_path: Path) -> None:
    queues: list[MemoryQueue] = []

    def opened(clock: Clock) -> MemoryQueue:
        queues.append(MemoryQueue(clock))
        return queues[0]

    trace = hospital_day(scale=0.03, seed=5)
    Simulation(trace, Policy(), opened, rules=Rules(cycle=1000, launch=0)).run()
    specs = {job.id: job.spec for job in queues[0].jobs()}
    again = of_history(queues[0].events(), specs.get)
    assert len(again.jobs) == len(trace.jobs)
    first = trace.jobs[0].submit
    for then, now in zip(trace.jobs, again.jobs, strict=True):
        assert now.submit == then.submit - first
        assert now.work == pytest.approx(then.work, abs=then.workers_max)
        assert (now.account, now.band, now.workers_max, now.flavors) == (
            then.account, then.band, then.workers_max, then.flavors,
        )  # fmt: skip


def test_a_hospital_day_is_what_its_recipe_says() -> None:
    trace = hospital_day(seed=0)
    assert trace == hospital_day(seed=0) != hospital_day(seed=1)
    assert [job.submit for job in trace.jobs] == sorted(job.submit for job in trace.jobs)
    kinds = Counter(job.kind for job in trace.jobs)
    assert (kinds["clinical night"], kinds["clinical day"], kinds["training"]) == (120, 40, 110)
    assert 0.8 < trace.load(trace.nodes) < 1.2
    assert len({job.account for job in trace.jobs}) == 8
    assert all(job.deadline > job.submit for job in trace.jobs if job.band is Band.CLINICAL)
    policy = trace.policy or Policy()
    floors = sum(quota.nominal for account in policy.accounts for quota in account.quotas.values())
    assert floors == 1000 * sum(len(node.gpus) for node in trace.nodes)


def test_saturated_offers_what_it_promises() -> None:
    trace = saturated(20_000)
    assert 0.95 <= trace.load(trace.nodes) <= 1.1


def test_machines_in_words() -> None:
    nodes = parse_machines("2x4:a100+1x0")
    assert [(len(node.gpus), {gpu.flavor for gpu in node.gpus}) for node in nodes] == [
        (4, {"a100"}),
        (4, {"a100"}),
        (0, set()),
    ]
    assert len({node.name for node in nodes}) == 3
    with pytest.raises(SpecError, match="16x4:a100"):
        parse_machines("many")
