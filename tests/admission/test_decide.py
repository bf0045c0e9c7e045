"""`decide`: named cases, and the invariants of architecture.md as properties on random small clusters."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from permed_compute.admission.decide import decide
from permed_compute.admission.explain import CODES
from permed_compute.admission.snapshot import (
    Dependency,
    Gpu,
    Grant,
    Node,
    Plan,
    Policy,
    Reservation,
    Snapshot,
    Waiting,
)
from permed_compute.spec import Band
from permed_compute.states import JobState

POLICY = Policy()


def node(name: str = "n1", cpus: int = 4, memory: int = 16384, gpus: tuple[Gpu, ...] = ()) -> Node:
    return Node(name, cpus * 1000, memory, gpus)


def job(seq: int, **changes: object) -> Waiting:
    base = Waiting(
        f"job-{seq}", 1, seq, f"name-{seq}", "local", Band.RESEARCH, 0, 1, 1, 1000, 1024, 0, 0, ("cpu",), 3600
    )
    return replace(base, **changes)


def held(name: str, *grants: Grant) -> Reservation:
    return Reservation(name, f"name of {name}", "local", Band.RESEARCH, grants, ends_by=99_000)


def plan(nodes: list[Node], waiting: list[Waiting], live: list[Reservation] | None = None, now: int = 0) -> Plan:
    return decide(Snapshot(tuple(nodes), tuple(live or ()), tuple(waiting)), POLICY, now)


def started(result: Plan) -> list[str]:
    return [admission.job_id for admission in result.admissions]


def wait_of(result: Plan, job_id: str) -> tuple[str, tuple[str, ...]]:
    [wait] = [wait for wait in result.waits if wait.job_id == job_id]
    return wait.code, wait.blockers


def test_two_that_want_everything_and_the_second_names_the_first() -> None:
    result = plan([node(cpus=2)], [job(1, cpu_milli=2000), job(2, cpu_milli=2000)])
    assert started(result) == ["job-1"] and wait_of(result, "job-2") == ("capacity", ("job-1",))


def test_bands_come_before_submission_order() -> None:
    waiting = [
        job(1, cpu_milli=2000, band=Band.OPPORTUNISTIC),
        job(2, cpu_milli=2000),
        job(3, cpu_milli=2000, band=Band.CLINICAL),
    ]
    assert started(plan([node(cpus=2)], waiting)) == ["job-3"]
    assert started(plan([node(cpus=4)], waiting)) == ["job-3", "job-2"]


def test_backfill_passes_a_reserved_start_only_without_delaying_it() -> None:
    busy = [held("busy", Grant("n1", 3000, 1024, 0, "cpu"))]  # until 99 s
    first = job(1, cpu_milli=4000, submitted_at=-7_200_000)
    waiting = [first, job(2, submitted_at=-3_600_000), job(3, time_limit=60)]
    result = plan([node(cpus=4)], waiting, busy)
    assert started(result) == ["job-3"] and result.admissions[0].reason == "backfilled"
    assert result.starts[0].job_id == "job-1" and result.starts[0].at == 99_000
    assert wait_of(result, "job-1") == ("capacity", ("busy",)) and wait_of(result, "job-2") == ("behind", ("job-1",))
    beside = plan([node(cpus=4)], [job(1, cpu_milli=2000), job(2)], busy)
    assert started(beside) == ["job-2"]  # three cores are left when busy ends: two for job-1


def test_a_job_that_can_never_start_stands_in_nobodys_way() -> None:
    result = plan([node(cpus=4)], [job(1, cpu_milli=64_000), job(2, gpu_milli=1000, flavors=("h100",)), job(3)])
    assert started(result) == ["job-3"]
    assert wait_of(result, "job-1")[0] == "never-fits" and wait_of(result, "job-2")[0] == "no-such-device"


def test_a_gang_is_all_or_nothing_and_spreads_only_where_it_must() -> None:
    nodes = [node("a", cpus=2), node("b", cpus=4), node("c", cpus=2)]
    four = plan(nodes, [job(1, workers_min=4, workers_max=4)])
    assert {grant.node for grant in four.admissions[0].grants} == {"b"}
    assert started(plan(nodes, [job(1, workers_min=9, workers_max=9)])) == []
    eight = plan(nodes, [job(1, workers_min=8, workers_max=8)])
    assert Counter(grant.node for grant in eight.admissions[0].grants) == {"a": 2, "b": 4, "c": 2}


def test_an_elastic_job_takes_what_there_is() -> None:
    busy = [held("busy", Grant("n1", 1000, 1024, 0, "cpu"))]
    [admission] = plan([node(cpus=4)], [job(1, workers_min=1, workers_max=8)], busy).admissions
    assert len(admission.grants) == 3


def test_flavors_in_order_and_why() -> None:
    h100 = node("h", gpus=(Gpu("h100", 0, 81920),))
    wish = job(1, gpu_milli=1000, flavors=("h100", "a100", "cpu"))
    [got] = plan([h100], [wish]).admissions
    assert got.grants[0].devices == (0,) and "first choice" in got.why
    taken = [held("busy", Grant("h", 1000, 1024, 1000, "h100", (0,)))]
    [got] = plan([h100], [wish], taken).admissions
    assert got.grants[0].flavor == "cpu" and got.grants[0].gpu_milli == 0 and "allows CPU" in got.why
    forbids = replace(wish, flavors=("h100", "a100"))
    assert wait_of(plan([h100], [forbids], taken), "job-1") == ("capacity", ("busy",))
    assert wait_of(plan([node()], [forbids]), "job-1")[0] == "no-such-device"


def test_gpu_memory_is_a_floor_and_any_gpu_means_any() -> None:
    small = node("s", gpus=(Gpu("t4", 0, 16384),))
    assert started(plan([small], [job(1, gpu_milli=1000, gpu_memory=20_000, flavors=("gpu",))])) == []
    assert started(plan([small], [job(1, gpu_milli=1000, gpu_memory=10_000, flavors=("gpu",))])) == ["job-1"]


def test_shares_of_a_gpu_are_placed_on_devices_not_on_sums() -> None:
    two = node("g", gpus=(Gpu("a100", 0, 40960), Gpu("a100", 1, 40960)))
    sixty = [held("x", Grant("g", 1, 1, 600, "a100", (0,))), held("y", Grant("g", 1, 1, 600, "a100", (1,)))]
    assert started(plan([two], [job(1, gpu_milli=500, flavors=("a100",))], sixty)) == []  # 0.8 free, 0.4 on each
    [got] = plan([two], [job(1, gpu_milli=400, flavors=("a100",))], sixty[:1]).admissions
    assert got.grants[0].devices == (0,)  # fills the one in use, keeps a whole one free


def test_dependencies_and_back_off_hold() -> None:
    after = job(1, dependencies=(Dependency("first", JobState.RUNNING),))
    failed = job(2, dependencies=(Dependency("first", JobState.FAILED),))
    done = job(3, dependencies=(Dependency("first", JobState.SUCCEEDED),))
    result = plan([node()], [after, failed, done, job(4, not_before=50)], now=10)
    assert started(result) == ["job-3"]
    assert wait_of(result, "job-1") == ("dependency", ("first",))
    assert wait_of(result, "job-2") == ("dependency-failed", ("first",)) and wait_of(result, "job-4")[0] == "back-off"
    assert started(plan([node()], [job(4, not_before=50)], now=50)) == ["job-4"]


# ------------------------------------------------------------------------------------------- properties

gpus = st.lists(st.sampled_from(["a100", "h100"]), max_size=3).map(
    lambda names: tuple(Gpu(name, i, 40960) for i, name in enumerate(names))
)
nodes_ = st.lists(st.tuples(st.integers(1, 8), st.integers(1, 16), gpus), min_size=1, max_size=3).map(
    lambda rows: [node(f"n{i}", cpus, mem * 1024, g) for i, (cpus, mem, g) in enumerate(rows)]
)


@st.composite
def jobs(draw: st.DrawFn) -> list[Waiting]:
    out = []
    for seq in range(draw(st.integers(0, 8))):
        low = draw(st.integers(1, 4))
        gpu = draw(st.sampled_from([0, 0, 300, 500, 1000, 2000]))
        flavors = (
            draw(st.sampled_from([("gpu",), ("h100", "cpu"), ("a100", "h100"), ("gpu", "cpu")])) if gpu else ("cpu",)
        )
        out.append(
            job(
                seq,
                band=draw(st.sampled_from(list(Band))),
                workers_min=low,
                workers_max=low + draw(st.integers(0, 4)),
                cpu_milli=draw(st.integers(1, 4000)),
                memory=draw(st.integers(1, 8192)),
                gpu_milli=gpu,
                flavors=flavors,
            )
        )
    return out


def live_of(result: Plan) -> list[Reservation]:
    return [held(admission.job_id, *admission.grants) for admission in result.admissions]


@settings(max_examples=300, deadline=None)
@given(nodes_, jobs(), jobs())
def test_invariants(nodes: list[Node], earlier: list[Waiting], waiting: list[Waiting]) -> None:
    live = [replace(each, job_id=f"live-{each.job_id}") for each in live_of(plan(nodes, earlier))]
    result = plan(nodes, waiting, live)
    assert result == plan(nodes, waiting, live)  # deterministic
    by_id = {each.job_id: each for each in waiting}
    # 1. per node and device, reservations never exceed capacity
    for each in nodes:
        grants = [g for r in [*live, *live_of(result)] for g in r.grants if g.node == each.name]
        assert sum(g.cpu_milli for g in grants) <= each.cpu_milli and sum(g.memory for g in grants) <= each.memory
        for gpu in each.gpus:
            used = [g for g in grants if gpu.index in g.devices]
            assert sum(min(1000, g.gpu_milli) for g in used) <= 1000
            assert all(g.flavor == gpu.flavor for g in used)
    # 4. a gang is all or nothing, and gets what it asked for
    for admission in result.admissions:
        asked = by_id[admission.job_id]
        assert asked.workers_min <= len(admission.grants) <= asked.workers_max
        for grant in admission.grants:
            assert grant.flavor == "cpu" or len(grant.devices) == max(1, asked.gpu_milli // 1000)
            assert grant.flavor in asked.flavors or ("gpu" in asked.flavors and grant.flavor != "cpu")
    # 7. every waiting job has exactly one leading reason, of the closed list
    assert Counter(started(result)) + Counter(w.job_id for w in result.waits) == Counter(list(by_id))
    assert all(wait.code in CODES for wait in result.waits)


@settings(max_examples=150, deadline=None)
@given(nodes_, jobs(), jobs())
def test_removing_the_named_cause_starts_the_job_or_changes_its_reason(
    nodes: list[Node], earlier: list[Waiting], waiting: list[Waiting]
) -> None:
    live = [replace(each, job_id=f"live-{each.job_id}") for each in live_of(plan(nodes, earlier))]
    result = plan(nodes, waiting, live)
    for wait in result.waits:
        if wait.code not in ("capacity", "behind"):
            continue
        gone = set(wait.blockers)
        after = plan(nodes, [w for w in waiting if w.job_id not in gone], [r for r in live if r.job_id not in gone])
        changed = wait.job_id in started(after) or wait_of(after, wait.job_id) != (wait.code, wait.blockers)
        assert wait.blockers and changed


def test_an_empty_cluster_starts_the_first_of_any_that_could() -> None:
    result = plan([node(cpus=4)], [job(1, workers_min=2, workers_max=2, cpu_milli=2000)])
    assert started(result) == ["job-1"]
