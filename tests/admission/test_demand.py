"""What an engine that can get more nodes is asked for: what runs and what waits for nodes, as far as quotas reach."""

from __future__ import annotations

from typing import Any

from permed_compute.admission.decide import decide
from permed_compute.admission.demand import MOST, Demand, Shape, demand, spread
from permed_compute.admission.policy import CPU, MEMORY, Account, Policy, Quota
from permed_compute.admission.snapshot import Gpu, Grant, Node, Reservation, Snapshot, Waiting
from permed_compute.spec import Band

NOW = 1_800_000_000_000
ONE = Shape(1000, 1024, 0, "")


def waiting(name: str, workers: int = 1, *, cpu: int = 1000, gpu: int = 0, flavors: tuple[str, ...] = (CPU,),
            account: str = "local", seq: int = 1, **more: Any) -> Waiting:  # fmt: skip
    return Waiting(name, 1, seq, name, account, Band.RESEARCH, NOW, workers, workers, cpu, 1024, gpu, 0, flavors, 3600,
                   **more)  # fmt: skip


def running(name: str, *grants: Grant, account: str = "local") -> Reservation:
    return Reservation(name, name, account, Band.RESEARCH, grants, NOW + 3_600_000)


def asked(
    *jobs: Waiting, live: tuple[Reservation, ...] = (), nodes: tuple[Node, ...] = (), policy: Policy | None = None
) -> Demand:
    snapshot = Snapshot(nodes, live, jobs)
    policy = policy or Policy()
    return demand(snapshot, policy, decide(snapshot, policy, NOW), NOW)


def test_nothing_is_wanted_where_nothing_runs_or_waits() -> None:
    assert asked() == ()


def test_what_runs_what_starts_and_what_waits_for_nodes_is_wanted_together() -> None:
    node = Node("one", 2000, 8192)
    live = running("old", Grant("one", 1000, 1024, 0, CPU))
    wanted = asked(waiting("fits"), waiting("gang", 3, seq=2), live=(live,), nodes=(node,))
    assert wanted == ((ONE, 1 + 1 + 3),)
    assert list(spread(wanted)) == [ONE] * 5


def test_a_cluster_without_nodes_is_asked_for_the_kind_of_gpu_that_a_job_wishes_first() -> None:
    wanted = asked(
        waiting("h100", 2, gpu=1000, flavors=("h100", "a100")), waiting("any", gpu=500, flavors=("gpu",), seq=2)
    )
    assert wanted == ((Shape(1000, 1024, 500, ""), 1), (Shape(1000, 1024, 1000, "h100"), 2))


def test_a_node_that_is_too_small_is_no_reason_to_ask_for_nothing() -> None:
    assert asked(waiting("large", cpu=64_000), nodes=(Node("one", 2000, 8192),)) == ((Shape(64_000, 1024, 0, ""), 1),)


def test_what_waits_for_a_quota_a_pause_or_another_job_is_not_wanted() -> None:
    quotas = {CPU: Quota(2000), MEMORY: Quota(8192)}
    policy = Policy(accounts=(Account("local", quotas=quotas),))
    jobs = [waiting(f"job-{n}", seq=n) for n in range(5)]
    assert asked(*jobs, policy=policy) == ((ONE, 2),)
    assert asked(waiting("later", not_before=NOW + 1000)) == ()
    assert asked(waiting("stranger", account="unknown"), policy=policy) == ()


def test_what_runs_counts_to_the_quota() -> None:
    policy = Policy(accounts=(Account("local", quotas={CPU: Quota(2000), MEMORY: Quota(8192)}),))
    live = running("old", Grant("one", 1000, 1024, 0, CPU))
    node = Node("one", 1000, 8192)
    wanted = asked(waiting("one more"), waiting("too much", seq=2), live=(live,), nodes=(node,), policy=policy)
    assert wanted == ((ONE, 2),)


def test_a_node_of_the_right_kind_is_named_by_what_was_granted() -> None:
    node = Node("gpu", 8000, 8192, (Gpu("a100-mig-3g", 0, 20480),))
    live = running("old", Grant("gpu", 1000, 1024, 1000, "a100-mig-3g", (0,)))
    assert asked(live=(live,), nodes=(node,)) == ((Shape(1000, 1024, 1000, "a100-mig-3g"), 1),)


def test_a_flood_is_asked_for_piece_by_piece() -> None:
    jobs = [waiting(f"job-{n}", 100, seq=n) for n in range(MOST // 100 + 50)]
    assert sum(count for _, count in asked(*jobs)) == MOST
