"""Usage as a fold of events: hours by hand, and the same as the simulator's own count."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from permed_compute.admission.billing import HOUR_MS, tariff
from permed_compute.admission.policy import Account, Policy, Quota
from permed_compute.admission.simulate import Rules, Simulation
from permed_compute.admission.traces import hospital_day
from permed_compute.admission.usage import Decayed, Spell, by_month, spells, table
from permed_compute.cli.report import write
from permed_compute.errors import NotFoundError, SettingsError
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Clock


def spell(account: str, start: float, hours: float, *, gpus: int = 1, **fields: object) -> Spell:
    begin = int(datetime(2026, 5, 1, tzinfo=UTC).timestamp() * 1000) + int(start * HOUR_MS)
    values: dict[str, object] = {
        "job_id": f"{account}{start}", "account": account, "band": "research", "owner": "u", "flavor": "a100",
        "start": begin, "end": begin + int(hours * HOUR_MS), "workers": gpus, "nodes": 1, "cpu_milli": 8000 * gpus,
        "memory": 65_536 * gpus, "gpu_milli": 1000 * gpus, "asked": int(2 * hours * HOUR_MS), "outcome": "succeeded",
    }  # fmt: skip
    return Spell(**(values | fields))  # type: ignore[arg-type]


def test_hours_by_account() -> None:
    rows = table([spell("a", 0, 2, gpus=4), spell("a", 5, 1), spell("b", 0, 3)], ["account"])
    assert [(row.group["account"], row.gpu_hours, row.jobs) for row in rows] == [("a", 9, 2), ("b", 3, 1)]
    assert rows[0].requested_gpu_hours == 18
    assert rows[0].cpu_hours == 72


def test_billing_units_of_a_site() -> None:
    [row] = table([spell("a", 0, 2, gpus=2)], ["account"], tariff=tariff("saga", "a100"))
    assert (row.units, row.reserved_units) == (32, 64)  # max(16 cores, 128 GiB × 0.032, 2 × 8) = 16 an hour
    [row] = table([spell("a", 0, 2, gpus=4)], ["account"], tariff=tariff("olivia", "accel"))
    assert (row.units, row.pool_gpu_hours) == (0, 8)


def test_what_one_borrows_another_lends() -> None:
    floor = {"gpu:a100": Quota(nominal=2000)}
    policy = Policy(accounts=(Account("a", quotas=floor), Account("b", quotas=floor), Account("c", quotas=floor)))
    rows = {
        row.group["account"]: row
        for row in table([spell("a", 0, 2, gpus=4), spell("b", 0, 2)], ["account"], policy=policy)
    }
    assert rows["a"].borrowed == 4
    assert rows["b"].lent + rows["c"].lent == pytest.approx(4)
    assert rows["c"].lent == 2 * rows["b"].lent  # it leaves twice as much unused


def test_a_month_ends_at_midnight_and_waste_is_the_end_of_a_spell() -> None:
    long = spell("a", 30 * 24 + 20, 10, outcome="preempted", wasted=5 * HOUR_MS)
    may, june = by_month(long)
    assert (may.ms, june.ms) == (4 * HOUR_MS, 6 * HOUR_MS)
    assert (may.wasted, june.wasted) == (0, 5 * HOUR_MS)
    assert (may.asked, june.asked) == (20 * HOUR_MS, 0)
    rows = table([long], ["month"])
    assert {row.group["month"]: row.gpu_hours for row in rows} == {"2026-05": 4, "2026-06": 6}
    assert sum(row.wasted_preempted for row in rows) == 5


def test_sector_and_region_come_from_the_policy_or_the_path() -> None:
    policy = Policy(accounts=(Account("helse", sector="health"), Account("helse/nord", "helse", region="north")))
    [row] = table([spell("helse/nord", 0, 1)], ["sector", "region"], policy=policy)
    assert row.group == {"sector": "health", "region": "north"}
    [row] = table([spell("uh/uit/x", 0, 1)], ["sector", "region"])
    assert row.group == {"sector": "uh", "region": "uh/uit"}


def test_an_unknown_grouping_says_which_there_are() -> None:
    with pytest.raises(NotFoundError, match="month"):
        table([], ["colour"])


def test_the_fold_of_a_simulated_day_is_what_the_machines_held() -> None:
    queues: list[MemoryQueue] = []

    def opened(clock: Clock) -> MemoryQueue:
        queues.append(MemoryQueue(clock))
        return queues[0]

    trace = hospital_day(scale=0.06, seed=4)
    outcome = Simulation(trace, trace.policy or Policy(), opened, rules=Rules(cycle=30_000)).run()
    events = queues[0].events()
    specs = {job.id: job.spec for job in queues[0].jobs()}
    found = spells(events, specs.get, until=events[-1].at)
    assert sum(each.gpu_milli * each.ms for each in found) == sum(record.held for record in outcome.records)
    assert sum(bool(each.asked) for each in found) == sum(record.attempts for record in outcome.records)
    assert sum(each.outcome == "preempted" for each in found) == sum(record.preempted for record in outcome.records)


def test_decay_does_not_depend_on_how_often_one_looks() -> None:
    policy = Policy(half_life=3600, epoch=600)
    rare, often = Decayed(policy, 0), Decayed(policy, 0)
    for usage in (rare, often):
        usage.hold("a", {"gpu:a100": 1000}, 1000, 0)
    for at in range(0, 7_200_000, 7_000):
        often.at(at)
    for usage in (rare, often):
        usage.hold("a", {"gpu:a100": 1000}, -1000, 7_200_000)
    assert rare.at(7_200_000) == often.at(7_200_000)
    then = rare.at(7_200_000)["a"]["gpu:a100"]
    assert rare.at(7_200_000 + 3_600_000)["a"]["gpu:a100"] == pytest.approx(then / 2, rel=1e-6)


def test_a_report_as_parquet_reads_as_it_was_written(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [row.as_dict() for row in table([spell("a", 0, 2, gpus=4), spell("b", 700, 50)], ["account", "month"])]
    write({"by": ["account", "month"], "rows": rows}, tmp_path / "usage.parquet")
    assert len(rows) == 3 and pq.read_table(tmp_path / "usage.parquet").to_pylist() == rows
    write({"by": ["account"], "rows": []}, tmp_path / "none.parquet")
    assert pq.read_table(tmp_path / "none.parquet").num_rows == 0
    with pytest.raises(SettingsError, match="no format"):
        write({"by": ["account"], "rows": rows}, tmp_path / "usage.xlsx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.parquet", "usage.parquet"]
