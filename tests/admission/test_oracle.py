"""Against brute force on small cases: what `decide` admits is admissible, and nothing more of it could have been."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import permutations
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from pool import GPU, NOW, account, job, node, policy, running, runs, snapshot, started

from permed_compute.admission.decide import decide
from permed_compute.admission.snapshot import Plan, Waiting
from permed_compute.spec import Band

KINDS = st.tuples(
    st.sampled_from(["a", "b"]), st.sampled_from([0.5, 1, 2, 3]), st.integers(1, 2), st.sampled_from([600, 3600])
)
MANY = st.lists(KINDS, max_size=6).map(
    lambda rows: [
        job(n, who, gpus, workers_min=least, workers_max=least, time_limit=limit)
        for n, (who, gpus, least, limit) in enumerate(rows)
        if gpus >= 1 or least == 1
    ]
)
NODES = (node("n1", 3), node("n2", 2))
POLICY = policy(account("a", 3, borrowing_limit=1), account("b", 2, lending_limit=1), backfill_depth=0)


def together(jobs: tuple[Waiting, ...]) -> bool:
    """Can these all run at once? Every way to hand out devices in some order is tried by workers, largest first."""
    used = {who: sum(int(j.gpu_milli) * j.workers_min for j in jobs if j.account == who) for who in "ab"}
    lent = min(1000, max(0, 2000 - used["b"]))  # of b's two, one may be lent
    if used["a"] > 4000 or used["a"] > 3000 + lent or used["b"] > 2000 + max(0, 3000 - used["a"]):
        return False
    workers = sorted((int(j.gpu_milli) for j in jobs for _ in range(j.workers_min)), reverse=True)
    return _pack(workers, ((1000,) * 3, (1000,) * 2))


def _pack(workers: list[int], free: tuple[tuple[int, ...], ...]) -> bool:
    if not workers:
        return True
    each, count = min(1000, workers[0]), max(1, workers[0] // 1000)
    tried = set()
    for place, devices in enumerate(free):
        fitting = sorted((left, n) for n, left in enumerate(devices) if left >= each)
        for start in range(len(fitting) - count + 1):
            chosen = [n for _, n in fitting[start : start + count]]
            left = tuple(sorted(had - each if n in chosen else had for n, had in enumerate(devices)))
            if (place, left) not in tried:
                tried.add((place, left))
                if _pack(workers[1:], (*free[:place], left, *free[place + 1 :])):
                    return True
    return False


@settings(max_examples=200, deadline=None)
@given(MANY)
def test_what_starts_could_start_and_nothing_more_could_be_added_in_place(jobs: list[Waiting]) -> None:
    plan = decide(snapshot(NODES, jobs), POLICY, NOW)
    by_id = {each.job_id: each for each in jobs}
    assert together(tuple(by_id[job_id] for job_id in started(plan)))
    rest = [each for each in jobs if each.job_id not in started(plan)]
    again = decide(snapshot(NODES, rest, running(plan, jobs)), POLICY, NOW + 1)
    assert started(again) == []  # decided again at once, nothing more starts: the decision was complete


@settings(max_examples=60, deadline=None)
@given(MANY.filter(lambda jobs: len(jobs) <= 4))
def test_a_set_that_fits_in_no_order_is_never_admitted_whole(jobs: list[Waiting]) -> None:
    admitted = {len(started(decide(snapshot(NODES, order), POLICY, NOW))) for order in permutations(jobs)}
    assert len(admitted) == 1  # the order in which the queue hands them over does not matter
    if not together(tuple(jobs)):
        assert admitted == {n for n in admitted if n < len(jobs)}


@settings(max_examples=150, deadline=None)
@given(MANY, st.integers(0, 3))
def test_removing_the_named_cause_starts_the_job_or_changes_its_reason(jobs: list[Waiting], depth: int) -> None:
    rule = replace(POLICY, backfill_depth=depth)
    first = decide(snapshot(NODES, jobs), rule, NOW)
    live = running(first, jobs)
    waiting = [each for each in jobs if each.job_id not in started(first)]
    plan = decide(snapshot(NODES, waiting, live), rule, NOW + 1)
    for wait in plan.waits:
        gone = set(wait.blockers)
        after = decide(
            snapshot(NODES, [w for w in waiting if w.job_id not in gone], [h for h in live if h.job_id not in gone]),
            rule, NOW + 1,
        )  # fmt: skip
        if wait.code in ("never-quota", "never-fits"):
            assert not gone
            continue
        assert gone, wait
        assert wait.job_id in started(after) or _told(after, wait.job_id) != (wait.code, wait.blockers)


def _told(plan: Plan, job_id: str) -> tuple[str, tuple[str, ...]]:
    [wait] = [wait for wait in plan.waits if wait.job_id == job_id]
    return wait.code, wait.blockers


def test_fair_tree_ranks_siblings_level_by_level_and_merges_ties() -> None:
    tree = policy(*(account(name) for name in ("x", "x/a", "x/b", "y", "y/c")), account("pool", 8))
    jobs = [job(n, who, 8) for n, who in enumerate(["x/a", "x/b", "y/c"])]

    def first(usage: dict[str, int]) -> list[str]:
        plan = decide(snapshot([node()], jobs, usage={who: {GPU: n} for who, n in usage.items()}), tree, NOW)
        return started(plan)

    assert first({"x/a": 10, "y/c": 5}) == ["job-2"]  # y has used less than x, whatever x/b has
    assert first({"x/a": 3, "x/b": 2, "y/c": 9}) == ["job-1"]
    assert first({"x/a": 4, "x/b": 1, "y/c": 5}) == ["job-1"]  # x and y tie: their children are ranked together


def test_golden_decision_to_the_byte() -> None:
    """Everything that a decision says of a fixed pool; change the file only with a change that is meant."""
    kinds = [Band.CLINICAL, Band.RESEARCH, Band.OPPORTUNISTIC]
    jobs = [job(n, "ab"[n % 2], [0.5, 1, 2][n % 3], kinds[n % 5 % 3], time_limit=600 * (1 + n % 4)) for n in range(16)]
    live = [runs("lent", "a", [0, 1], time_limit=7200), runs("map", "a", [0], "n2", workers_min=1, workers_max=3)]
    usage = {"a": {GPU: 5_000_000}, "b": {GPU: 1_000_000}}
    plan = decide(snapshot(NODES, jobs, live, usage=usage), replace(POLICY, backfill_depth=3), NOW)
    told = json.dumps(asdict(replace(plan, waits=tuple(plan.waits))), indent=1, sort_keys=True, default=str) + "\n"
    assert told == (Path(__file__).parent / "golden_decision.json").read_text(encoding="utf-8")
