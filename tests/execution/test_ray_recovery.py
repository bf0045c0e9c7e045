"""The local Ray: closed to others, found again after a crash, replaced when dead, and gone when it is not needed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from permed_compute.admission.snapshot import Node
from permed_compute.errors import EngineError
from permed_compute.execution import processes, raykeeper
from permed_compute.execution.context import raise_fence
from permed_compute.execution.port import Attempt, Liveness
from permed_compute.execution.processes import ProcessTable
from permed_compute.execution.ray import RayExecutor
from permed_compute.execution.raylocal import LocalRay, Session
from permed_compute.paths import HomePaths
from permed_compute.settings import Settings
from permed_compute.testing.execution import Toys, wait_for

pytestmark = pytest.mark.ray

PARTS = 20


@pytest.fixture
def another(ray_home: HomePaths) -> Iterator[RayExecutor]:
    """The executor of the next controller of the same home."""
    executor = RayExecutor(Settings(home=str(ray_home.root)), ray_home)
    yield executor
    executor._disconnect()


def local(executor: RayExecutor) -> LocalRay:
    assert executor._local is not None
    return executor._local


def living(executor: RayExecutor) -> Session:
    session = local(executor).find()
    assert session is not None
    return session


def running(executor: RayExecutor, toys: Toys, **params: object) -> Attempt:
    """An attempt that has finished its first part; the others wait for `toys.go`."""
    attempt = toys.attempt("squares", workers=2, count=PARTS, gated=1, **params)
    executor.launch(attempt)
    wait_for(lambda: toys.rows(attempt, "part"), "the first part")
    return attempt


def driver_of(attempt: Attempt) -> int:
    return processes.of_attempt(attempt.name)["driver"][0].pid


# ------------------------------------------------------------------------------------------- closed to others


def test_nothing_listens_beyond_loopback(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = running(ray_executor, ray_toys)
    sockets = [
        (process.pid, socket)
        for process in local(ray_executor).processes()
        for socket in psutil.Process(process.pid).net_connections("inet")
        if socket.status == psutil.CONN_LISTEN or not socket.raddr
    ]
    assert len({pid for pid, _ in sockets}) >= 3  # the head, the node's daemon, the workers
    outside = [socket for _, socket in sockets if socket.laddr.ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")]
    assert outside == []
    assert ray_executor.end(attempt)


def test_nobody_enters_without_the_token(ray_executor: RayExecutor) -> None:
    ray_executor.start()
    token = local(ray_executor).token
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    address = living(ray_executor).address
    code = (
        "from ray._raylet import GcsClient\n"  # what every way in begins with; it says no at once
        f"print(GcsClient(address={address!r}).internal_kv_keys(b'', namespace=None, timeout=20), 'entered')"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    clean["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    ways = {
        "with": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)},
        "with a wrong one": {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
        "without": {"RAY_AUTH_MODE": "disabled"},
    }
    for way, environment in ways.items():
        done = subprocess.run(
            [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120
        )
        assert ("entered" in done.stdout) is (way == "with"), (way, done.stderr[-500:])


def test_no_secret_of_the_controller_reaches_a_job(ray_executor: RayExecutor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PERMED_QUEUE_URL", "postgresql://user:password@host/queue")
    assert "PERMED_QUEUE_URL" not in local(ray_executor).environment()


# ------------------------------------------------------------------------------------------- lazy, and gone


def test_looking_starts_no_ray(home: HomePaths, code: Path, tmp_path: Path) -> None:
    executor = RayExecutor(Settings(home=str(home.root)), home)
    attempt = Toys(home, code, tmp_path / "tally").attempt("squares", count=1)
    assert executor.nodes()[0].cpu_milli > 0
    assert executor.facts()["version"]
    assert executor.liveness(attempt) is Liveness.GONE
    assert executor.sweep(()) == []
    assert executor.end(attempt)
    executor.close()
    assert local(executor).processes() == []
    assert not (home.runtime / "session").exists()


def test_close_leaves_ray_to_an_attempt_that_lives_and_ends_it_otherwise(
    ray_executor: RayExecutor, ray_toys: Toys
) -> None:
    attempt = running(ray_executor, ray_toys)
    ray_executor.close()
    assert living(ray_executor).lives()
    assert ray_executor.liveness(attempt) is Liveness.ALIVE
    assert ray_executor.end(attempt)
    ray_executor.close()
    assert local(ray_executor).find() is None
    assert local(ray_executor).processes() == []


def test_a_runtime_folder_that_others_can_enter_is_refused(home: HomePaths) -> None:
    home.runtime.chmod(0o755)
    executor = RayExecutor(Settings(home=str(home.root)), home)
    with pytest.raises(EngineError, match="not private"):
        executor.start()


# ------------------------------------------------------------------------------------------- nobody comes back


@pytest.fixture
def lonely(home: HomePaths) -> Iterator[LocalRay]:
    """A Ray whose keeper waits no longer than from one look to the next."""
    ray = LocalRay(home.runtime, Node("local", 1000, 2048), lonely_s=0.1)
    yield ray
    assert ray.stop()


def test_ray_ends_once_its_controller_is_dead_and_nobody_comes(home: HomePaths, lonely: LocalRay) -> None:
    here = raykeeper.say_here(home.runtime)
    session = lonely.start()
    time.sleep(2 * raykeeper._TICK_S + 0.5)
    assert session.lives()
    assert len(lonely.processes()) >= 4
    os.close(here)  # as the system does for a process that was killed
    wait_for(lambda: lonely.processes() == [], "Ray to end by itself")


def test_ray_ends_when_its_folder_is_removed(home: HomePaths, lonely: LocalRay) -> None:
    here = raykeeper.say_here(home.runtime)
    lonely.start()
    shutil.rmtree(home.runtime)
    wait_for(lambda: lonely.processes() == [], "Ray to end by itself")
    os.close(here)


# ------------------------------------------------------------------------------------------- adopted


def test_the_next_controller_finds_ray_and_the_attempt(
    ray_executor: RayExecutor, another: RayExecutor, ray_toys: Toys
) -> None:
    attempt = running(ray_executor, ray_toys)
    before = living(ray_executor)
    assert ray_executor._bridge is not None
    os.kill(ray_executor._bridge._process.pid, signal.SIGKILL)  # what a dead controller leaves: nothing
    assert another.liveness(attempt) is Liveness.ALIVE
    another.launch(attempt)
    assert living(another) == before
    ray_toys.go()
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert another.end(attempt)
    assert [ray_toys.runs(n) for n in range(PARTS)] == [1] * PARTS
    assert ray_executor.liveness(attempt) is Liveness.GONE  # with a new connection


def test_members_are_replaced_after_the_controller_has_died(
    ray_executor: RayExecutor, another: RayExecutor, ray_toys: Toys
) -> None:
    attempt = running(ray_executor, ray_toys)
    assert ray_executor._bridge is not None
    os.kill(ray_executor._bridge._process.pid, signal.SIGKILL)
    processes.kill(processes.of_attempt(attempt.name)["1"])
    wait_for(lambda: ray_toys.rows(attempt, "lost"), "the loss to be seen")
    ray_toys.go()
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert ray_toys.rows(attempt, "lost")
    assert another.end(attempt)


def test_a_launch_that_was_cut_in_two_is_mended(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("squares", count=2)
    ray_executor.start()
    code = (
        f"import ray; ray.init(address={living(ray_executor).address!r}, namespace={ray_executor._namespace!r})\n"
        f"from ray.util.placement_group import placement_group\n"
        f"placement_group([{{'CPU': 0.5}}], name={attempt.name!r}, lifetime='detached')\n"
    )
    environment = {**local(ray_executor).environment(), "PERMED_RAY": ""}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, timeout=60)
    ray_executor.launch(attempt)
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert ray_executor.end(attempt)


def test_sweep_ends_what_nobody_wants(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    wanted = ray_toys.attempt("squares", job="wanted", count=40, gated=1)
    other = ray_toys.attempt("squares", job="other", count=40, gated=1)
    for attempt in (wanted, other):
        ray_executor.launch(attempt)
    assert ray_executor.sweep([wanted]) == [other.name]
    assert ray_executor.liveness(other) is Liveness.GONE
    assert ray_executor.liveness(wanted) is Liveness.ALIVE
    assert ray_executor.end(wanted)


# ------------------------------------------------------------------------------------------- started late


def environment_agent(executor: RayExecutor) -> list[int]:
    names = {process.pid: psutil.Process(process.pid).cmdline()[:1] for process in local(executor).processes()}
    return [pid for pid, name in names.items() if name == ["ray::RuntimeEnvAgent"]]


def test_a_worker_that_ray_starts_after_the_attempt_has_ended_ends_at_the_gate(
    ray_executor: RayExecutor, ray_toys: Toys
) -> None:
    """A raylet asks its agent for each worker's environment, and starts the worker with the answer, whoever has given
    it up meanwhile."""
    ray_executor.start()
    wait_for(lambda: environment_agent(ray_executor), "the node's agent")
    [agent] = environment_agent(ray_executor)
    for pause_s in (1.0, 5.0, 20.0):  # the raylet must have asked its agent by then
        attempt = ray_toys.attempt("squares", job=f"after-{pause_s:g}", workers=2, count=PARTS)
        os.kill(agent, signal.SIGSTOP)
        try:
            ray_executor.launch(attempt)
            time.sleep(pause_s)
            raise_fence(attempt.paths.job.attempt(attempt.number + 1))
            wait_for(lambda a=attempt: ray_executor.end(a), "the confirmed end")
        finally:
            os.kill(agent, signal.SIGCONT)
        if came_to_the_gate_only(attempt):
            return
    pytest.fail("no worker was started late")


def came_to_the_gate_only(attempt: Attempt) -> bool:
    """Whether processes of it stood at the gate. Fails where one came in."""
    table, came, until = ProcessTable(), False, time.monotonic() + 8
    while time.monotonic() < until:
        assert processes.of_attempt(attempt.name, table.look()) == {}
        if processes.of_attempt(attempt.name, table, processes.STARTING_MARK):
            came, until = True, time.monotonic() + 2
        time.sleep(0.002)
    return came


# ------------------------------------------------------------------------------------------- kill -9


def test_a_dead_driver_is_gone_with_everything_of_it(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = running(ray_executor, ray_toys)
    os.kill(driver_of(attempt), signal.SIGKILL)
    wait_for(lambda: ray_executor.liveness(attempt) is Liveness.GONE, "the death to be known")
    assert processes.of_attempt(attempt.name) == {}
    assert not attempt.paths.exit.exists()
    ray_toys.go()
    after = ray_toys.again(attempt)
    ray_executor.launch(after)
    assert ray_toys.ending(after)["outcome"] == "SUCCEEDED"
    assert ray_executor.end(after)


def test_what_ends_by_itself_leaves_the_log_to_the_job(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("squares", workers=2, count=2, say=True)
    ray_executor.launch(attempt)
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    wait_for(lambda: processes.of_attempt(attempt.name) == {}, "the driver to end without being asked")
    said = attempt.paths.log.read_text(encoding="utf-8").splitlines()
    assert sorted(said) == ["the number is 0", "the number is 1"]
    assert ray_executor.end(attempt)


@pytest.mark.parametrize("program", ["gcs", "raylet"])
def test_a_dead_ray_is_cleared_away_and_the_next_launch_starts_another(
    ray_executor: RayExecutor, ray_toys: Toys, program: str
) -> None:
    attempt = running(ray_executor, ray_toys)
    before = living(ray_executor)
    os.kill(getattr(before, program)[0], signal.SIGKILL)
    wait_for(lambda: ray_executor.liveness(attempt) is Liveness.GONE, "the death to be known", 60.0)
    assert local(ray_executor).processes() == []
    assert processes.of_attempt(attempt.name) == {}
    ray_toys.go()
    after = ray_toys.again(attempt)
    ray_executor.launch(after)
    assert living(ray_executor) != before
    ending = ray_toys.ending(after)
    assert ending["outcome"] == "SUCCEEDED"
    assert ending["counts"]["REUSED"] >= 1  # what was published before is not computed again
    assert sum(ending["counts"].values()) == PARTS
    assert ray_executor.end(after)


def test_a_ray_that_does_not_answer_is_unknown_until_it_does(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = running(ray_executor, ray_toys)
    gcs = living(ray_executor).gcs[0]
    os.kill(gcs, signal.SIGSTOP)
    try:
        assert ray_executor.liveness(attempt) is Liveness.UNKNOWN
        assert not ray_executor.end(ray_toys.attempt("squares", job="other", count=1))
    finally:
        os.kill(gcs, signal.SIGCONT)
    wait_for(lambda: ray_executor.liveness(attempt) is not Liveness.UNKNOWN, "an answer")
    assert ray_executor.end(attempt)


# ------------------------------------------------------------------------------------------- a Ray that is given


def test_a_ray_that_is_given_by_address(
    ray_executor: RayExecutor, ray_home: HomePaths, code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_executor.start()
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", local(ray_executor).token.read_text())
    home = HomePaths(tmp_path / "home").create()
    executor = RayExecutor(Settings(home=str(home.root), ray_address=living(ray_executor).address), home)
    node = executor.nodes()[0]
    assert (node.name, node.cpu_milli) == ("127.0.0.1", ray_executor.nodes()[0].cpu_milli)
    attempt = Toys(home, code, tmp_path / "tally").attempt("squares", count=2, node=node.name)
    executor.launch(attempt)
    assert Toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert executor.end(attempt)
    executor.close()
    assert living(ray_executor).lives()  # it is not ours to stop


ORPHAN = """
import sys, threading, time
from pathlib import Path
from permed_compute.execution import raycrew
raycrew._BEAT_S, raycrew._ORPHANED_S = 0.05, 2.0
threading.Thread(target=raycrew._end_when_orphaned, args=(Path(sys.argv[1]),), daemon=True).start()
for _ in range(int(sys.argv[2])):
    time.sleep(0.1)
    (Path(sys.argv[1]) / "records-driver.jsonl").touch()
time.sleep(50 if sys.argv[2] == "0" else 0)
"""


@pytest.mark.parametrize(("beats", "code"), [(30, 0), (0, 1)])
def test_a_member_ends_itself_when_nobody_drives_it_any_more(tmp_path: Path, beats: int, code: int) -> None:
    ended = subprocess.run([sys.executable, "-c", ORPHAN, str(tmp_path), str(beats)], check=False, timeout=60)
    assert ended.returncode == code
