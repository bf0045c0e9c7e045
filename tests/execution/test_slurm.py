"""Jobs through a real Slurm on this machine, as a user on a login node sends them: commands, and nothing between."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.admission.snapshot import Grant, Node
from permed_compute.errors import EngineError
from permed_compute.execution.allocation import place
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.slurm import SlurmExecutor, claim_file, ticket_file
from permed_compute.execution.slurmjobs import SlurmJob
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.settings import Settings
from permed_compute.testing.execution import Toys, wait_for
from permed_compute.testing.login import Login, job_file
from permed_compute.testing.slurm import SlurmCluster

pytestmark = pytest.mark.slurm
_numbers = itertools.count()


@pytest.fixture
def login(slurm: SlurmCluster, home: HomePaths) -> Iterator[Login]:
    slurm.start_controller_unless_up()
    yield Login(home, slurm.environment)
    slurm.run("scancel", "--user", str(os.getuid()))


@pytest.fixture
def executor(slurm: SlurmCluster, home: HomePaths) -> Iterator[SlurmExecutor]:
    with slurm.inside():
        yield SlurmExecutor(Settings(home=str(home.root), executor="slurm", site=str(slurm.site_file())), home)


@pytest.fixture
def toys(home: HomePaths, code: Path, tmp_path: Path) -> Toys:
    return Toys(home, code, tmp_path / "tally", scope=f"s{next(_numbers)}")  # one Slurm for all: by name they differ


def names(slurm: SlurmCluster) -> list[str]:
    """Jobs that Slurm runs or will run."""
    return slurm.run("squeue", "--noheader", "--format=%j").split()


def test_a_job_goes_through_slurm_and_comes_back(slurm: SlurmCluster, login: Login, code: Path, tmp_path: Path) -> None:
    (tmp_path / "tally").mkdir()
    file = job_file(tmp_path, code, params={"count": 6, "tally": str(tmp_path / "tally")})
    job = login("submit", str(file), "--site", str(slurm.site_file()))[0]
    assert job["state"] == "LAUNCHING"
    number = login.slurm_job(job["id"])
    assert number and f"permed-{job['id']}-0001" in names(slurm)
    assert login("why", job["id"])["code"] in ("slurm-pending", "slurm-configuring", "slurm-starting", "started")
    [allocation] = login("status")["site"]["allocations"]
    assert (allocation["job"], allocation["number"], allocation["partition"]) == (job["id"], number, "main")
    assert login.until(job["id"], lambda state: state == "SUCCEEDED") == "SUCCEEDED"
    assert login.result(job["id"])["values"] == {"total": 55}
    assert [len(list((tmp_path / "tally").glob(f"{n}-*"))) for n in range(6)] == [1] * 6
    manifest = json.loads((login.home.job(job["id"]).results / "manifest.json").read_text())
    assert (manifest["engine"]["engine"], manifest["engine"]["job"]) == ("slurm", number)
    wait_for(lambda: not names(slurm), "the allocation's end")
    assert slurm.strangers() == []  # no process of Ray or of ours is left


def test_what_is_submitted_while_slurm_is_down_is_kept_explained_and_sent_once(
    slurm: SlurmCluster, login: Login, code: Path, tmp_path: Path
) -> None:
    slurm.stop_controller()
    file = job_file(tmp_path, code)
    job = login("submit", str(file), "--site", str(slurm.site_file()))[0]
    said = login("why", job["id"])
    assert said["code"] == "slurm-away" and "not sent yet" in said["sentence"]
    assert "does not answer" in login("status")["site"]["says"]
    assert login.slurm_job(job["id"]) == ""
    slurm.start_controller()
    for _ in range(3):
        login("jobs")
    number = login.slurm_job(job["id"])
    assert number and names(slurm).count(f"permed-{job['id']}-0001") == 1
    assert login.until(job["id"], lambda state: state == "SUCCEEDED") == "SUCCEEDED"
    assert int(slurm.run("squeue", "--states=all", "--noheader", "--format=%A", f"--name=permed-{job['id']}-0001")) == (
        int(number)
    )


def test_the_bill_is_slurms(slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys) -> None:
    """NRIS's own example on a declared node: 40 cores and 172000 MiB at 0.2577031 per GiB are 43 units."""
    from permed_compute.sites import cost, request

    attempt = toys.attempt("squares", job="billed", cpus=40, memory=172_000, count=1)
    assert cost.of(executor.request(attempt.spec)).rate.units == 43
    executor.launch(attempt)
    number = (read_json(ticket_file(attempt.paths)) or {})["job"]
    assert "billing=43" in executor.slurm.shown(number)["TRES"]
    assert request.of_script(executor.script(attempt), executor.site).cpus == 40
    wait_for(lambda: executor.end(attempt), "the confirmed end")


def test_a_job_that_the_site_refuses_is_not_queued(
    slurm: SlurmCluster, login: Login, code: Path, tmp_path: Path
) -> None:
    file = job_file(tmp_path, code, resources={"cpus": 999, "memory": "1GiB"})
    said = login("submit", str(file), "--site", str(slurm.site_file()), code=5)
    assert "999 cores" in json.dumps(said)
    assert login("jobs", "--all") == []


def test_a_home_keeps_its_site(slurm: SlurmCluster, login: Login, tmp_path: Path) -> None:
    login("status", "--site", str(slurm.site_file()))
    assert login("status")["executor"] == "slurm"
    said = login("status", "--executor", "inprocess", code=2)
    assert "jobs go to" in json.dumps(said)


# ------------------------------------------------------------------------------------- once


def test_an_answer_that_was_lost_is_found_by_name(slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys) -> None:
    attempt = toys.attempt("squares", count=1)
    held(slurm, attempt)
    write_json(ticket_file(attempt.paths), {"job": "", "at": 0, "site": "loopback"})  # as sbatch was about to be called
    executor.launch(attempt)
    assert names(slurm) == [attempt.name]
    assert executor.liveness(attempt) is Liveness.ALIVE
    wait_for(lambda: executor.end(attempt), "the confirmed end")
    assert executor.liveness(attempt) is Liveness.GONE


def test_of_two_that_were_sent_one_stays(slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys) -> None:
    attempt = toys.attempt("squares", count=1)
    first = held(slurm, attempt)
    held(slurm, attempt)
    write_json(ticket_file(attempt.paths), {"job": "", "at": 0, "site": "loopback"})
    executor.launch(attempt)
    wait_for(lambda: len(names(slurm)) == 1, "one of them to go")
    assert (read_json(ticket_file(attempt.paths)) or {})["job"] == first
    wait_for(lambda: executor.end(attempt), "the confirmed end")


def test_a_second_allocation_leaves_the_attempt_alone(slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys) -> None:
    attempt = toys.attempt("squares", count=1)
    write_json(claim_file(attempt.paths), {"job": "1", "cluster": "elsewhere"})
    executor.launch(attempt)
    wait_for(lambda: executor.liveness(attempt) is Liveness.GONE, "its allocation to leave")
    assert toys.runs(0) == 0 and not attempt.paths.exit.exists()


def held(slurm: SlurmCluster, attempt: Attempt) -> str:
    """A job of the attempt's name, waiting in Slurm."""
    return slurm.run("sbatch", "--parsable", "--hold", f"--job-name={attempt.name}", "--output=/dev/null", "--wrap",
                     "true").strip()  # fmt: skip


def test_what_never_was_sent_is_gone(executor: SlurmExecutor, toys: Toys) -> None:
    attempt = toys.attempt("squares", job="never", count=1)
    assert executor.liveness(attempt) is Liveness.GONE
    assert executor.end(attempt)


def test_a_cancelled_jobs_end_is_told(slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys) -> None:
    attempt = toys.attempt("squares", count=1)
    write_json(ticket_file(attempt.paths), {"job": held(slurm, attempt), "at": 0, "site": "loopback"})
    slurm.run("scancel", (read_json(ticket_file(attempt.paths)) or {})["job"])
    wait_for(lambda: executor.liveness(attempt) is Liveness.GONE, "its end")
    assert executor.how_lost(attempt) == "cancelled-in-slurm"


def test_files_that_could_not_be_copied_out_are_told_of(
    executor: SlurmExecutor, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tests/sites/test_staging.py has real Slurm say it."""
    attempt = toys.attempt("squares", count=1)
    write_json(ticket_file(attempt.paths), {"job": "7", "at": 0, "site": "loopback"})
    stuck = SlurmJob("7", attempt.name, "STAGE_OUT", "burst_buffer/lua: slurm_bb_data_out: no room", 0, "main")
    monkeypatch.setattr(executor.slurm, "jobs", lambda: (stuck,))
    word = executor.says(attempt)
    assert word is not None and word.code == "slurm-stage-out-failed" and "no room" in word.sentence
    assert word.change.endswith("scontrol requeue 7 && scancel 7")


# ------------------------------------------------------------------------------------- arrays


@pytest.fixture
def shut(slurm: SlurmCluster) -> Iterator[None]:
    """A partition that takes jobs and starts none."""
    slurm.run("scontrol", "update", "partitionname=main", "state=down")
    yield
    slurm.run("scancel", "--user", str(os.getuid()))
    slurm.run("scontrol", "update", "partitionname=main", "state=up")


def elements(executor: SlurmExecutor, toys: Toys, count: int) -> list[Attempt]:
    made = [toys.attempt("squares", job=f"element{number}", count=1) for number in range(count)]
    executor.expect({"array": made})
    return made


def numbers(attempts: list[Attempt]) -> list[str]:
    return [(read_json(ticket_file(attempt.paths)) or {}).get("job", "") for attempt in attempts]


@pytest.mark.usefixtures("shut")
def test_an_array_goes_out_as_one(slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys) -> None:
    made = elements(executor, toys, 4)
    made[3].paths.job.fence.write_text("2")  # given up meanwhile
    for attempt in made[:3]:
        executor.launch(attempt)
    whole = numbers(made)[0].partition("_")[0]
    assert numbers(made) == [f"{whole}_0", f"{whole}_1", f"{whole}_2", ""]
    assert [executor.liveness(attempt) for attempt in made] == [*[Liveness.ALIVE] * 3, Liveness.GONE]
    assert [number for _, job in executor.allocations() for number in [job.number]] == numbers(made)[:3]
    wait_for(lambda: executor.end(made[1]), "the end of one of them")
    assert [executor.liveness(attempt) for attempt in made[:3]] == [Liveness.ALIVE, Liveness.GONE, Liveness.ALIVE]
    assert executor.how_lost(made[1]) == "cancelled-in-slurm"
    assert executor.sweep(made[:1]) == [made[2].name]
    executor.slurm.forget()
    assert [executor.liveness(attempt) for attempt in made[:3]] == [Liveness.ALIVE, Liveness.GONE, Liveness.GONE]


@pytest.mark.usefixtures("shut")
def test_an_arrays_lost_answer_is_found_element_by_element(
    slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys
) -> None:
    made = elements(executor, toys, 2)
    executor.launch(made[0])
    sent = numbers(made)
    for attempt in made:
        write_json(ticket_file(attempt.paths), {"job": "", "at": 0, "site": "loopback"})
    again = SlurmExecutor(Settings(home=str(made[0].home), executor="slurm", site=str(slurm.site_file())),
                          HomePaths(made[0].home))  # fmt: skip
    for attempt in made:
        again.launch(attempt)
    assert numbers(made) == sent and len(names(slurm)) == 1


@pytest.mark.usefixtures("shut")
def test_where_no_array_may_be_sent_its_elements_go_one_by_one(
    slurm: SlurmCluster, executor: SlurmExecutor, toys: Toys, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = elements(executor, toys, 2)
    monkeypatch.setattr("permed_compute.execution.slurm._ARRAY", "-array\n#SBATCH --nonsense")
    for attempt in made:
        executor.launch(attempt)
    assert all(number.isdigit() for number in numbers(made))


# ------------------------------------------------------------------------------------- places


def test_workers_share_the_nodes_in_order() -> None:
    grants = [Grant("saga", 2000, 4096, 0, "cpu")] * 3
    placed = place(grants, [Node("c1", 4000, 16_384), Node("c2", 4000, 16_384)])
    assert [grant.node for grant in placed] == ["c1", "c1", "c2"]


def test_an_allocation_that_is_too_small_says_so() -> None:
    with pytest.raises(EngineError, match="no room for worker 1"):
        place([Grant("saga", 2000, 4096, 0, "cpu")] * 2, [Node("c1", 4000, 6000)])


def test_shares_of_a_gpu_meet_on_one_device() -> None:
    from permed_compute.admission.snapshot import Gpu

    half = Grant("saga", 1000, 1024, 500, "a100", (7,))
    whole = Grant("saga", 1000, 1024, 1000, "a100", (3,))
    node = Node("g1", 8000, 65_536, (Gpu("a100", 0, 0), Gpu("a100", 1, 0)))
    assert [grant.devices for grant in place([half, half, whole], [node])] == [(0,), (0,), (1,)]
    with pytest.raises(EngineError, match="no room for worker 2"):
        place([half, whole, whole], [node])
