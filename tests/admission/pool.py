"""Pools, policies and jobs in a line each, for the tests of admission."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from permed_compute.admission.policy import Account, Policy, Quota
from permed_compute.admission.snapshot import Admission, Gpu, Grant, Node, Plan, Reservation, Snapshot, Waiting
from permed_compute.spec import Band

NOW = 1_000_000_000
GPU = "gpu:h100"


def node(name: str = "n1", gpus: int = 8, cpus: int = 64) -> Node:
    return Node(name, cpus * 1000, 512 * 1024, tuple(Gpu("h100", i, 81920) for i in range(gpus)))


def account(name: str, gpus: int = 0, **changes: object) -> Account:
    limits = {key: changes.pop(key) for key in ("lending_limit", "borrowing_limit", "weight") if key in changes}
    limits = {key: value if key == "weight" else value * 1000 for key, value in limits.items() if value is not None}
    quotas = {GPU: Quota(gpus * 1000, **limits)}
    return Account(name, name.rpartition("/")[0], quotas=quotas, **changes)


def policy(*accounts: Account, **changes: object) -> Policy:
    return Policy(accounts=accounts, **{"min_runtime": 0, **changes}).sealed()


def job(seq: int, who: str = "a", gpus: float = 1, band: Band = Band.RESEARCH, **changes: object) -> Waiting:
    made = Waiting(
        f"job-{seq}", 1, seq, f"name-{seq}", who, band, NOW - 1000, 1, 1, 1000, 1024, int(gpus * 1000), 0,
        ("h100",) if gpus else ("cpu",), 3600,
    )  # fmt: skip
    return replace(made, **changes)


def runs(
    name: str, who: str, devices: Iterable[int], node: str = "n1", band: Band = Band.RESEARCH, **changes: object
) -> Reservation:
    grants = tuple(Grant(node, 1000, 1024, 1000, "h100", (device,)) for device in devices)
    began = int(changes.pop("started_at", NOW - 3_600_000))
    values = {"version": 5, "started_at": began, "kept_at": began, "time_limit": 7200, **changes}
    return Reservation(name, name, who, band, grants, began + 7_230_000, **values)


def snapshot(
    nodes: Iterable[Node], waiting: Iterable[Waiting] = (), live: Iterable[Reservation] = (), **changes: object
) -> Snapshot:
    return Snapshot(tuple(nodes), tuple(live), tuple(waiting), **changes)


def started(plan: Plan) -> list[str]:
    return [admission.job_id for admission in plan.admissions]


def stopped(plan: Plan) -> set[str]:
    return {stop.job_id for stop in plan.preemptions}


def reason(plan: Plan, job_id: str) -> str:
    [wait] = [wait for wait in plan.waits if wait.job_id == job_id]
    return wait.code


def running(plan: Plan, waiting: Iterable[Waiting], now: int = NOW) -> list[Reservation]:
    """What a plan's admissions are once they run."""
    by_id = {each.job_id: each for each in waiting}
    return [_live(by_id[new.job_id], new, now) for new in plan.admissions]


def _live(asked: Waiting, new: Admission, now: int) -> Reservation:
    elastic = asked.workers_max > asked.workers_min
    return Reservation(
        asked.job_id, asked.name, asked.account, asked.band, new.grants, now + asked.time_limit * 1000 + 30_000,
        asked.version + 1, now, now, asked.time_limit, asked.workers_min if elastic else 0,
        asked.workers_max if elastic else 0, True, new.charge,
    )  # fmt: skip
