"""Through a real Slurm, what takes minutes: the shared suite of executors; the main job, cancelled, killed and
preempted; time limits in a chain; an allocation of two nodes; accounting."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from permed_compute.errors import NotFoundError
from permed_compute.execution import records
from permed_compute.execution.port import Executor
from permed_compute.execution.slurm import SlurmExecutor
from permed_compute.paths import HomePaths, read_json
from permed_compute.settings import Settings
from permed_compute.testing.execution import ExecutorConformance, Toys, wait_for
from permed_compute.testing.login import Login, job_file
from permed_compute.testing.slurm import SlurmCluster, SlurmNode

pytestmark = [pytest.mark.slurm, pytest.mark.soak]

TOYS = Path(__file__).parents[1] / "execution" / "code"


def cluster(**how: Any) -> SlurmCluster:
    try:
        return SlurmCluster(**how)
    except NotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with cluster(nodes=(SlurmNode("n1", cpus=8, memory=32_000),), kill_wait_s=5) as made:
        yield made


@pytest.fixture
def login(slurm: SlurmCluster, home: HomePaths) -> Iterator[Login]:
    yield Login(home, slurm.environment)
    slurm.run("scancel", "--user", str(os.getuid()))


class TestConformance(ExecutorConformance):
    """Every attempt is an allocation of its own, which takes a moment to leave."""

    ends_at_once = False

    @pytest.fixture
    def code(self) -> Path:
        return TOYS

    @pytest.fixture
    def executor(self, slurm: SlurmCluster, home: HomePaths) -> Iterator[Executor]:
        with slurm.inside():
            executor = SlurmExecutor(Settings(home=str(home.root), executor="slurm", site=str(slurm.site_file())), home)
            yield executor
            executor.sweep(())
            wait_for(lambda: not slurm.run("squeue", "--noheader"), "an empty Slurm")


# ------------------------------------------------------------------------------------- the main job


@pytest.fixture
def head(shared_data: Path) -> Path:
    return shared_data / "radiology" / "t1-head-mr"


def extraction(login: Login, slurm: SlurmCluster, head: Path, partition: str = "main") -> list[str]:
    return ["submit", "radiology/brain-extraction", "--input", str(head), "--site", str(slurm.site_file(partition))]


def begun(login: Login, job_id: str) -> bool:
    """Whether the newest attempt's driver has planned its parts."""
    attempts = login.attempts(job_id)
    records = attempts[-1].records() if attempts else None
    return records is not None and records.exists() and '"kind":"plan"' in records.read_text()


def assert_one_result(login: Login, slurm: SlurmCluster, job_id: str) -> None:
    result = login.result(job_id)
    assert [part["state"] for part in result["parts"]] in (["DONE"], ["REUSED"])
    rows = [row for paths in login.attempts(job_id) for row in records.read(paths.records())[0]]
    first = [row for row in rows if row["kind"] == "part" and row.get("first")]
    assert len(first) == 1  # published once, whoever computed it
    wait_for(lambda: not slurm.run("squeue", "--noheader"), "an empty Slurm")
    assert slurm.strangers() == []


def test_the_main_job_comes_back_after_two_cancellations_and_a_killed_submitter(
    slurm: SlurmCluster, login: Login, head: Path
) -> None:
    job_id = login(*extraction(login, slurm, head))[0]["id"]
    for times in (1, 2):
        wait_for(lambda: begun(login, job_id), "the plan")
        slurm.run("scancel", login.slurm_job(job_id))
        while len(login.attempts(job_id)) == times:
            login.state(job_id)
    assert login.until(job_id, lambda state: state in ("SUCCEEDED", "FAILED")) == "SUCCEEDED", login.words(job_id)
    assert_one_result(login, slurm, job_id)


def test_the_main_job_outlives_who_submitted_it(slurm: SlurmCluster, login: Login, head: Path) -> None:
    submitting = login.start("run", *extraction(login, slurm, head)[1:])

    def known() -> list[Path]:
        return [path for path in login.home.jobs.glob("*/attempts/*/slurm.json") if (read_json(path) or {}).get("job")]

    wait_for(known, "a job in Slurm")
    submitting.send_signal(signal.SIGKILL)
    submitting.communicate()
    job_id = login.home.jobs.iterdir().__next__().name
    assert login.until(job_id, lambda state: state in ("SUCCEEDED", "FAILED")) == "SUCCEEDED", login.words(job_id)
    assert len(login.attempts(job_id)) == 1  # adopted, not begun again
    assert_one_result(login, slurm, job_id)


# ------------------------------------------------------------------------------------- paused, and on again


def test_a_preempted_job_goes_on_where_it_stopped(slurm: SlurmCluster, login: Login, tmp_path: Path) -> None:
    """SIGTERM and 30 s, as on `optimist`: whoever is preempted keeps what it has, under the same Slurm id."""
    tally = tmp_path / "tally"
    tally.mkdir()
    params = {"count": 30, "seconds": 0.5, "tally": str(tally)}
    file = job_file(tmp_path, TOYS, params=params, resources={"cpus": 8, "memory": "4GiB"})
    job_id = login("submit", str(file), "--site", str(slurm.site_file("optimist")))[0]["id"]
    number = login.slurm_job(job_id)
    wait_for(lambda: len(list(tally.iterdir())) > 2, "the first parts")
    slurm.run("sbatch", "--partition=main", "--cpus-per-task=8", "--output=/dev/null", "--wrap", "sleep 3")
    wait_for(lambda: restarts(slurm, number) == 1, "Slurm to put it back", 60)
    login.until(job_id, lambda state: state == "SUCCEEDED", 180)
    assert login.slurm_job(job_id) == number and len(login.attempts(job_id)) == 1
    assert all(len(list(tally.glob(f"{n}-*"))) == 1 for n in range(30))


def restarts(slurm: SlurmCluster, number: str) -> int:
    words = slurm.run("scontrol", "--oneliner", "show", "job", number).split()
    return int(next(word for word in words if word.startswith("Restarts=")).removeprefix("Restarts="))


@pytest.mark.parametrize(
    ("workload", "params"), [("train", {"steps": 130, "seconds": 1.0}), ("squares", {"count": 130, "seconds": 1.0})]
)
def test_what_is_longer_than_its_limit_is_a_chain(
    slurm: SlurmCluster, login: Login, tmp_path: Path, workload: str, params: dict[str, Any]
) -> None:
    """More seconds of work than its limit has: warned before that, it goes on from there without anybody looking."""
    file = job_file(tmp_path, TOYS, workload, time_limit="2m", continuations=20, params=params,
                    resources={"cpus": 1, "memory": "2GiB"})  # fmt: skip
    job_id = login("submit", str(file), "--site", str(slurm.site_file()))[0]["id"]
    number = login.slurm_job(job_id)
    results = login.home.job(job_id).results / "result.json"
    wait_for(results.exists, "its result", 900)  # no command in between
    assert restarts(slurm, number) >= 1
    assert login.until(job_id, lambda state: state == "SUCCEEDED") == "SUCCEEDED"
    result = login.result(job_id)
    assert len(result["values"]["losses"] if workload == "train" else result["parts"]) == 130
    assert len(login.attempts(job_id)) == 1 and login.slurm_job(job_id) == number


def test_a_job_without_continuations_times_out_with_its_parts_kept(
    slurm: SlurmCluster, login: Login, tmp_path: Path
) -> None:
    file = job_file(tmp_path, TOYS, time_limit="1m", params={"count": 200, "seconds": 1.0})
    job_id = login("submit", str(file), "--site", str(slurm.site_file()))[0]["id"]
    exit_record = login.attempts(job_id)[0].exit
    wait_for(exit_record.exists, "its end", 150)
    assert login.until(job_id, lambda state: state == "TIMED_OUT") == "TIMED_OUT"


def test_a_deaf_job_is_cancelled(slurm: SlurmCluster, login: Login, tmp_path: Path) -> None:
    file = job_file(tmp_path, TOYS, params={"count": 1, "seconds": 600})
    job_id = login("submit", str(file), "--site", str(slurm.site_file()))[0]["id"]
    wait_for(lambda: begun(login, job_id), "the plan")
    login("cancel", job_id)
    assert login.until(job_id, lambda state: state == "CANCELLED") == "CANCELLED"
    wait_for(lambda: not slurm.run("squeue", "--noheader"), "an empty Slurm")
    assert slurm.strangers() == []


# ------------------------------------------------------------------------------------- more than one


def test_an_array_runs_as_one_and_each_element_pauses_for_itself(
    slurm: SlurmCluster, login: Login, tmp_path: Path
) -> None:
    """Three elements of 4 cores where 8 are: two run, one is preempted, each ends with its own result."""
    array = [{"count": count, "seconds": 0.5} for count in (20, 21, 22)]
    file = job_file(tmp_path, TOYS, array=array, resources={"cpus": 4, "memory": "2GiB"})
    jobs = login("submit", str(file), "--site", str(slurm.site_file("optimist")))
    numbers = [login.slurm_job(job["id"]) for job in jobs]
    whole = numbers[0].partition("_")[0]
    assert numbers == [f"{whole}_{place}" for place in range(3)]
    wait_for(lambda: begun(login, jobs[0]["id"]), "the first element's plan", 240)
    slurm.run("sbatch", "--partition=main", "--cpus-per-task=8", "--output=/dev/null", "--wrap", "sleep 1")
    wait_for(lambda: restarts(slurm, numbers[0]) == 1, "Slurm to put it back", 120)
    for job, count in zip(jobs, (20, 21, 22), strict=True):
        assert login.until(job["id"], lambda state: state == "SUCCEEDED", 240) == "SUCCEEDED", login.words(job["id"])
        assert len(login.result(job["id"])["parts"]) == count and len(login.attempts(job["id"])) == 1
    wait_for(lambda: not slurm.run("squeue", "--noheader"), "an empty Slurm")
    assert slurm.strangers() == []


def test_one_ray_over_two_nodes(home: HomePaths, tmp_path: Path) -> None:
    nodes = (SlurmNode("n1", cpus=2, memory=8_000), SlurmNode("n2", cpus=2, memory=8_000))
    with cluster(nodes=nodes) as slurm:
        login = Login(home, slurm.environment)
        file = job_file(tmp_path, TOYS, resources={"workers": 2, "cpus": 2, "memory": "2GiB"},
                        params={"count": 6, "seconds": 0.5})  # fmt: skip
        job_id = login("submit", str(file), "--site", str(slurm.site_file()))[0]["id"]
        assert login.until(job_id, lambda state: state in ("SUCCEEDED", "FAILED")) == "SUCCEEDED", login.words(job_id)
        launch = read_json(login.attempts(job_id)[0].launch) or {}
        assert sorted(grant["node"] for grant in launch["grants"]) == ["n1", "n2"]
        slots = {row["slot"] for row in login.result(job_id)["parts"] if "slot" in row}
        assert slots in (set(), {0, 1})
        wait_for(lambda: not slurm.run("squeue", "--noheader"), "an empty Slurm")
        assert slurm.strangers() == []


def test_accounting_tells_how_a_forgotten_job_ended(home: HomePaths, tmp_path: Path) -> None:
    with cluster(accounting=True, kill_wait_s=2, lines=("MinJobAge=2",)) as slurm, slurm.inside():
        executor = SlurmExecutor(Settings(home=str(home.root), executor="slurm", site=str(slurm.site_file())), home)
        toys = Toys(home, TOYS, tmp_path / "tally")
        attempt = toys.attempt("squares", count=1)
        executor.launch(attempt)
        number = executor.slurm.jobs()[0].number
        slurm.run("scancel", number)
        wait_for(lambda: executor.slurm.recorded(number) == "CANCELLED", "the accounting", 60)
        time.sleep(1.5)
        slurm.run("scontrol", "reconfigure")
        assert executor.how_lost(attempt) == "cancelled-in-slurm"
