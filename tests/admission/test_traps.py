"""The traps that other schedulers fell into (scheduling.md), each as a test with the issue that tells of it."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from pool import GPU, NOW, account, job, node, policy, reason, running, runs, snapshot, started, stopped

from permed_compute.admission.commit import stopping_instead
from permed_compute.admission.decide import decide
from permed_compute.admission.fold import State
from permed_compute.admission.quota import Tree
from permed_compute.admission.snapshot import Gpu, Grant, Node, Window
from permed_compute.spec import Band

TWO = policy(account("a", 4), account("b", 4))


def test_what_is_preempted_belongs_to_the_preemptor_kueue_3779_2821_13662_6947() -> None:
    live = [runs("lent", "b", range(8))]
    want = job(1, "a", 1, workers_min=4, workers_max=4)
    first = decide(snapshot([node()], [want], live), TWO, NOW)
    assert stopped(first) == {"lent"} and first.promises[0].job_id == "job-1"
    # The victim is queued again, and somebody else asks too: neither gets what was freed.
    promised = replace(want, version=2, promised=first.promises[0].grants)
    going = [replace(live[0], stoppable=False, ends_by=NOW + 30_000)]
    during = decide(snapshot([node()], [promised, job(2, "b")], going), TWO, NOW + 1000)
    assert started(during) == [] and not during.preemptions and reason(during, "job-1") == "preempting"
    again = job(3, "b", 1, workers_min=8, workers_max=8)
    after = decide(snapshot([node()], [promised, job(2, "b"), again]), TWO, NOW + 31_000)
    assert started(after) == ["job-1", "job-2"] and after.admissions[0].grants == first.promises[0].grants
    # And once the preemptor runs, its victim does not evict it.
    live = running(after, [promised, job(2, "b")], NOW)
    assert not decide(snapshot([node()], [again], live), TWO, NOW + 40_000_000).preemptions


def test_a_large_job_is_not_starved_by_small_ones_kueue_4809_8309_volcano_748_3095() -> None:
    # Small jobs come for ever; the large one starts when what ran before it has ended.
    small = [job(n, "a", 1, time_limit=7200) for n in range(2, 60)]
    live = [runs(f"r{device}", "a", [device], started_at=NOW - 600_000 * device) for device in range(8)]
    open_policy = policy(account("a", 8))
    large = job(1, "a", 8)
    now = NOW
    for _ in range(40):
        plan = decide(snapshot([node()], [large, *small], live), open_policy, now)
        if "job-1" in started(plan):
            break
        start = next(start.at for start in plan.starts if start.job_id == "job-1")
        live += running(plan, small, now)
        small = [each for each in small if each.job_id not in started(plan)]
        now += 600_000
        live = [each for each in live if each.ends_by > now]
    assert "job-1" in started(plan) and now <= start + 600_000


def test_an_old_job_has_a_reserved_start_beyond_the_first_k() -> None:
    shallow = policy(account("a", 8), account("b", 8), account("c"), backfill_depth=1, ageing=1000)
    live = [runs("busy", "c", range(4), band=Band.CLINICAL)]
    old = job(9, "b", 8, submitted_at=NOW - 2_000_000)
    usage = {"b": {GPU: 10**9}}
    plan = decide(snapshot([node()], [job(1, "a", 8), old], live, usage=usage), shallow, NOW)
    assert {start.job_id for start in plan.starts} == {"job-1", "job-9"}


def test_short_work_waits_little_for_long_and_long_work_no_more_than_its_length() -> None:
    rule = policy(account("a", 8))
    hour = 3_600_000
    long = job(1, "a", 8, time_limit=10 * 3600, submitted_at=NOW)

    def first(later: int, **limits: int) -> list[str]:
        short = job(2, "a", 8, submitted_at=NOW + later, time_limit=3600)
        return started(decide(snapshot([node()], [long, short]), replace(rule, **limits), NOW + later))

    assert first(8 * hour) == ["job-2"] and first(10 * hour) == ["job-1"]  # 9 hours shorter: as if 9 hours earlier
    assert first(8 * hour, short_first=0) == ["job-1"]  # strict order of submission
    assert first(8 * hour, ageing=7 * 3600) == ["job-1"]  # old enough: before all who are not
    # What its like took before says more than what it may take at most.
    known = replace(long, estimate=600)
    assert started(decide(snapshot([node()], [known, job(2, "a", 8)]), rule, NOW)) == ["job-1"]


def test_a_gang_never_half_starts_volcano_3373_5805() -> None:
    live = [runs("busy", "a", range(5))]
    gang = job(1, "a", 1, workers_min=4, workers_max=4)
    plan = decide(snapshot([node()], [gang], live), policy(account("a", 8)), NOW)
    assert started(plan) == [] and [len(start.grants) for start in plan.starts] == [4]


def test_usage_is_derived_so_that_nothing_leaks_or_counts_twice_kueue_12545_14609_11195_12783() -> None:
    tree = Tree(TWO)
    before = {flavor: list(figures.used) for flavor, figures in tree.flavors.items()}
    amounts = [{GPU: n * 1000} for n in (1, 5, 3, 7, 2)]
    for n, each in enumerate(amounts):
        tree.add("ab"[n % 2], each)
    for n, each in enumerate(amounts):
        tree.remove("ab"[n % 2], each)
    assert {flavor: list(figures.used) for flavor, figures in tree.flavors.items()} == before


def test_fairness_is_integer_and_ends_kueue_6994() -> None:
    thirds = policy(account("a", 0, weight=3), account("b", 0, weight=7), account("c", 8, weight=1))
    usage = {name: {GPU: 10**15 // 3} for name in "abc"}
    waiting = [job(n, "abc"[n % 3]) for n in range(30)]
    plan = decide(snapshot([node()], waiting, usage=usage), thirds, NOW)
    again = decide(snapshot([node()], waiting, usage=usage), thirds, NOW)
    assert plan == again and len(started(plan)) == 8


def test_many_jobs_of_one_account_do_not_buy_a_larger_share_kueue_9345() -> None:
    even = policy(account("a", 0), account("b", 0), account("pool", 8))
    waiting = [job(n, "a") for n in range(40)] + [job(n, "b") for n in range(40, 44)]
    plan = decide(snapshot([node()], waiting), even, NOW)
    who = [next(w.account for w in waiting if w.job_id == job_id) for job_id in started(plan)]
    assert who.count("a") == who.count("b") == 4


def test_sums_that_fit_are_not_a_place_that_fits_kueue_12422() -> None:
    live = [runs(f"r{n}", "a", range(7), node=f"n{n}") for n in range(2)]
    plan = decide(snapshot([node("n0"), node("n1")], [job(1, "a", 2)], live), policy(account("a", 16)), NOW)
    assert started(plan) == [] and reason(plan, "job-1") == "capacity"  # two are free, one on each node


def test_a_victim_never_evicts_its_evictor() -> None:
    three = policy(account("a", 3), account("b", 3), account("c", 2))
    live = [runs("b1", "b", range(8))]
    first = decide(snapshot([node()], [job(1, "a", 1, workers_min=3, workers_max=3)], live), three, NOW)
    assert stopped(first) == {"b1"}
    live = [runs("job-1", "a", range(3))]
    back = job(2, "b", 1, workers_min=8, workers_max=8)
    assert not decide(snapshot([node()], [back], live), three, NOW).preemptions


def test_least_work_is_lost_and_what_need_not_go_is_filled_back() -> None:
    live = [
        runs("old", "b", [0, 1], kept_at=NOW - 3_000_000),
        runs("fresh", "b", [2, 3], kept_at=NOW - 1_000),
        runs("mid", "b", [4, 5, 6, 7], kept_at=NOW - 60_000),
    ]
    plan = decide(snapshot([node()], [job(1, "a", 2)], live), TWO, NOW)
    assert stopped(plan) == {"fresh"}
    plan = decide(snapshot([node()], [job(1, "a", 4)], live), TWO, NOW)
    assert stopped(plan) == {"mid"}  # fresh was taken first, and given back once mid alone did it


def test_minimum_run_time_is_that_of_the_victims_branch() -> None:
    slow = policy(account("a", 4), replace(account("b", 4), min_runtime=7200))
    live = [runs("young", "b", range(8), started_at=NOW - 3_600_000)]
    assert not decide(snapshot([node()], [job(1, "a")], live), slow, NOW).preemptions
    assert stopped(decide(snapshot([node()], [job(1, "a")], live), slow, NOW + 3_600_000)) == {"young"}


def test_opportunistic_work_goes_from_the_first_second_and_takes_nothing() -> None:
    rule = policy(account("a", 4), account("b", 4), min_runtime=36_000)
    live = [runs("spare", "b", range(8), band=Band.OPPORTUNISTIC, started_at=NOW - 1)]
    assert stopped(decide(snapshot([node()], [job(1, "a")], live), rule, NOW)) == {"spare"}
    live = [runs("lent", "b", range(8))]
    greedy = job(1, "a", band=Band.OPPORTUNISTIC)
    assert not decide(snapshot([node()], [greedy], live), rule, NOW).preemptions


def test_clinical_work_takes_back_its_quota_and_is_never_preempted() -> None:
    live = [runs("lent", "b", range(8))]
    plan = decide(snapshot([node()], [job(1, "a", band=Band.CLINICAL)], live), TWO, NOW)
    assert stopped(plan) == {"lent"}
    live = [runs("care", "b", range(8), band=Band.CLINICAL)]
    assert not decide(snapshot([node()], [job(1, "a")], live), TWO, NOW).preemptions


def test_nobody_preempts_beyond_their_own_quota() -> None:
    live = [runs("lent", "b", range(8))]
    assert not decide(snapshot([node()], [job(1, "a", 1, workers_min=5, workers_max=5)], live), TWO, NOW).preemptions


def test_an_elastic_job_shrinks_before_anything_is_stopped() -> None:
    live = [runs("map", "b", range(8), workers_min=2, workers_max=8)]
    plan = decide(snapshot([node()], [job(1, "a", 2)], live), TWO, NOW)
    assert not plan.preemptions
    assert [(r.job_id, len(r.grants), r.for_job) for r in plan.resizes] == [("map", 2, "job-1")]


def test_an_elastic_job_grows_into_what_nobody_waits_for() -> None:
    rule = policy(account("a", 8), account("b", 0), min_runtime=600)
    live = [runs("map", "a", range(2), workers_min=1, workers_max=6)]
    [grown] = decide(snapshot([node()], [], live), rule, NOW).resizes
    assert (len(grown.grants), grown.for_job) == (6, "")
    # What cannot be resized is stopped and starts anew with more.
    stop = stopping_instead(decide(snapshot([node()], [], live), rule, NOW))
    assert [(each.job_id, each.reason) for each in stop.preemptions] == [("map", "grown")] and not stop.resizes


@pytest.mark.parametrize("how", ["young", "not doubled", "wanted", "protected", "off"])
def test_an_elastic_job_does_not_grow_where_it_would_cost_more_than_it_brings(how: str) -> None:
    rule = policy(account("a", 8), account("b", 8, borrowing_limit=0), min_runtime=600, grows=how != "off")
    began = NOW - (599_000 if how == "young" else 3_600_000)
    band = Band.CLINICAL if how == "protected" else Band.RESEARCH
    held = range(5) if how == "not doubled" else range(2)
    live = [runs("map", "a", held, started_at=began, band=band, workers_min=1, workers_max=8)]
    waiting = [job(1, "b", 8)] if how == "wanted" else []
    assert not decide(snapshot([node()], waiting, live), rule, NOW).resizes


def test_a_lowered_quota_stops_borrowing_and_drains_after_the_stated_delay() -> None:
    lowered = policy(account("a", 2, borrowing_limit=0), account("b", 6), drain_after=3600)
    live = [runs("x", "a", range(4), kept_at=NOW), runs("y", "a", [4, 5])]
    early = decide(snapshot([node()], [job(1, "a")], live, policy_since=NOW), lowered, NOW + 1000)
    assert started(early) == [] and not early.preemptions and reason(early, "job-1") == "quota"
    later = decide(snapshot([node()], [], live, policy_since=NOW), lowered, NOW + 3_600_000)
    assert stopped(later) == {"x"} and later.preemptions[0].reason == "quota-lowered"


def test_what_is_drained_holds_its_quota_until_it_has_ended_and_nobody_else_is_stopped_for_it() -> None:
    lowered, now = policy(account("a", 2, borrowing_limit=0), account("b", 6), drain_after=0), NOW + 1000
    live = [runs("x", "a", range(4), kept_at=NOW), runs("y", "a", [4])]
    small = job(1, "a", 1)
    plan = decide(snapshot([node()], [small], live, policy_since=NOW), lowered, now)
    assert stopped(plan) == {"x"} and started(plan) == [] and reason(plan, "job-1") == "quota"
    going = [replace(live[0], stoppable=False, ends_by=now + 30_000), live[1]]
    during = decide(snapshot([node()], [small], going, policy_since=NOW), lowered, now + 1000)
    assert not during.preemptions and started(during) == []
    after = decide(snapshot([node()], [small], live[1:], policy_since=NOW), lowered, now + 31_000)
    assert started(after) == ["job-1"]


def test_a_promise_on_a_full_cluster_is_no_lowered_quota() -> None:
    rule = policy(account("a", 4), account("b", 4, borrowing_limit=0), drain_after=0)
    going = replace(runs("lent", "b", range(4)), stoppable=False, ends_by=NOW + 30_000)
    grants = runs("", "a", range(4)).grants
    waiting = [replace(job(1, "a", 1, workers_min=4, workers_max=4), promised=grants)]
    for mine in ("a", "b"):  # neither who is owed nor who owes has more than it may: the victim is still there
        plan = decide(
            snapshot([node()], waiting, [going, runs("kept", mine, range(4, 8))], policy_since=NOW), rule, NOW + 1
        )
        assert not plan.preemptions and reason(plan, "job-1") == "preempting"


def test_clinical_batches_go_by_slack() -> None:
    care = policy(account("a", 8), account("b", 8))
    soon = job(9, "b", 8, Band.CLINICAL, deadline=NOW + 4_000_000)
    late = job(1, "a", 8, Band.CLINICAL, deadline=NOW + 40_000_000)
    none = job(2, "a", 8, Band.CLINICAL)
    assert started(decide(snapshot([node()], [late, none, soon]), care, NOW)) == ["job-9"]


def test_windows_keep_nodes_free_and_are_for_who_reserved_them() -> None:
    window = Window("course", ("n1",), NOW + 1_800_000, NOW + 7_200_000, ("a",))
    two = policy(account("a", 4), account("b", 4))
    jobs = [job(1, "a"), job(2, "b"), job(3, "b", time_limit=600)]
    plan = decide(snapshot([node()], jobs, windows=(window,)), two, NOW)
    assert sorted(started(plan)) == ["job-1", "job-3"] and reason(plan, "job-2") == "window"


def test_drained_frozen_and_unknown() -> None:
    plan = decide(snapshot([node()], [job(1, "a")], drained=("n1",)), TWO, NOW)
    assert reason(plan, "job-1") == "drained"
    plan = decide(snapshot([node()], [job(1, "a"), job(2, "c"), job(3, "b")], frozen=("a",)), TWO, NOW)
    assert (reason(plan, "job-1"), reason(plan, "job-2"), started(plan)) == ("frozen", "unknown-account", ["job-3"])


def test_use_that_nobody_else_wanted_is_charged_little() -> None:
    idle = decide(snapshot([node()], [job(1, "a")]), TWO, NOW)
    assert idle.admissions[0].charge == TWO.idle_charge
    busy = decide(snapshot([node()], [job(n, "a") for n in range(1, 12)]), TWO, NOW)
    assert {new.charge for new in busy.admissions} == {1000}


def test_shares_of_a_device_and_mig_slices_are_flavors_of_their_own() -> None:
    mig = Node("m", 8000, 65536, (Gpu("a100-mig-3g", 0, 20480), Gpu("a100-mig-3g", 1, 20480)))
    want = [job(n, "a", 0.5, flavors=("a100-mig-3g",)) for n in range(1, 6)]
    plan = decide(snapshot([mig], want), policy(account("a", 8)), NOW)
    assert len(started(plan)) == 4


def test_the_first_that_waits_for_quota_is_not_passed_by_its_own_account_for_ever() -> None:
    own = policy(account("a", 4, borrowing_limit=0), account("b", 4))
    live = [runs("r", "a", range(3))]
    first, long = job(1, "a", 4, submitted_at=NOW - 90_000_000), job(2, "a", time_limit=86_400)
    jobs = [first, replace(long, submitted_at=NOW - 87_000_000), job(3, "a", time_limit=60)]
    plan = decide(snapshot([node()], jobs, live), own, NOW)
    assert started(plan) == ["job-3"]
    assert reason(plan, "job-1") == "quota" and reason(plan, "job-2") == "behind"


def test_a_preemptor_waits_for_its_victims_quota_though_other_devices_are_free() -> None:
    strict = policy(account("a", 4), account("b", 4, borrowing_limit=0))
    mine = tuple(Grant("n1", 1000, 1024, 1000, "h100", (device,)) for device in range(4, 8))
    urgent = job(1, "b", 1, Band.CLINICAL, workers_min=4, workers_max=4, promised=mine)
    victim = runs("victim", "b", range(4), band=Band.OPPORTUNISTIC, stoppable=False)
    plan = decide(snapshot([node()], [urgent], [victim]), strict, NOW)
    assert not started(plan) and reason(plan, "job-1") == "preempting"
    assert started(decide(snapshot([node()], [urgent]), strict, NOW)) == ["job-1"]


def test_a_promise_lapses_where_the_quota_was_lowered_since() -> None:
    mine = (Grant("n1", 2000, 1024, 2000, "h100", (4, 5)),)
    urgent = job(1, "b", 2, Band.CLINICAL, promised=mine)
    lowered = policy(account("a", 7), account("b", 1, borrowing_limit=0))
    plan = decide(snapshot([node()], [urgent, job(2, "a", 7)]), lowered, NOW)
    assert reason(plan, "job-1") == "never-quota" and started(plan) == ["job-2"]


def test_a_policy_that_was_applied_holds_though_the_clock_was_set_back() -> None:
    state = State(lambda job_id: pytest.fail("no job"))
    state.policies.append((NOW, TWO))
    assert state.policy(NOW - 3_600_000) == (TWO, NOW)
    later = replace(TWO, effective_from=NOW + 1000)
    state.policies.append((NOW, later))
    assert state.policy(NOW)[0] == TWO and state.policy(NOW + 1000)[0] == later
