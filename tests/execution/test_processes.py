"""Finding and ending processes by the mark that they inherited."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.execution import processes
from permed_compute.execution.processes import ATTEMPT_MARK, STARTING_MARK, ProcessTable
from permed_compute.testing.execution import wait_for

NAME = f"permed-test-{os.getpid()}-0001"
SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
FORK_AND_GO = "import os, time; os.fork() and os._exit(0); os.setsid(); os.fork() and os._exit(0); time.sleep(600)"
PARENT_OF_UNMARKED = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'], env={})"


@pytest.fixture
def marked() -> Iterator[dict[str, str]]:
    yield {**os.environ, ATTEMPT_MARK: f"{NAME}/3"}
    assert processes.kill_attempt(NAME)


def pids() -> list[int]:
    return [process.pid for process in processes.of_attempt(NAME).get("3", [])]


def test_a_marked_process_is_found_and_ended(marked: dict[str, str]) -> None:
    child = subprocess.Popen(SLEEP, env=marked)
    wait_for(lambda: pids() == [child.pid], "the marked process")
    assert processes.kill_attempt(NAME)
    assert pids() == []
    assert child.wait() == -9


def test_one_that_detached_is_found(marked: dict[str, str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", FORK_AND_GO], env=marked)
    child.wait()
    wait_for(lambda: len(pids()) == 1, "the detached process")
    assert pids() != [child.pid]


def test_one_without_environment_is_found_below_its_parent(marked: dict[str, str]) -> None:
    child = subprocess.Popen([sys.executable, "-c", PARENT_OF_UNMARKED], env=marked, stdin=subprocess.PIPE)
    wait_for(lambda: len(pids()) == 2, "parent and child")
    assert processes.kill_attempt(NAME)
    child.communicate()


def test_one_that_stands_at_the_gate_is_none_of_the_attempts_yet_and_is_ended() -> None:
    words = "--serialized-runtime-env-context=" + json.dumps({"env_vars": {ATTEMPT_MARK: f"{NAME}/3"}})
    torn = subprocess.Popen([*SLEEP, words[:-3]])
    child = subprocess.Popen([*SLEEP, words])
    table = ProcessTable()
    wait_for(lambda: processes.of_attempt(NAME, table.look(), STARTING_MARK).get("3"), "the starting process")
    assert processes.of_attempt(NAME, table) == {}
    assert processes.kill_attempt(NAME)
    assert child.wait() == -9
    assert torn.poll() is None
    torn.kill()
    torn.wait()


def test_other_attempts_are_not_touched(marked: dict[str, str]) -> None:
    other = subprocess.Popen(SLEEP, env={**os.environ, ATTEMPT_MARK: f"{NAME}9/3"})
    mine = subprocess.Popen(SLEEP, env=marked)
    wait_for(lambda: pids() == [mine.pid], "the marked process")
    assert processes.kill_attempt(NAME)
    assert other.poll() is None
    other.kill()
    other.wait()
    mine.wait()


def test_a_number_that_was_given_again_is_not_killed() -> None:
    child = subprocess.Popen(SLEEP)
    looked = processes.read(child.pid)
    assert looked is not None
    older = processes.Process(child.pid, looked.parent, looked.session, looked.started - 1, 0.0, 0.0, 0)
    processes.kill([older])
    assert processes.alive(child.pid, looked.started)
    processes.kill([looked])
    child.wait()
    assert not processes.alive(child.pid, looked.started)


def test_every_thread_is_pinned() -> None:
    code = "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=(600,)).start()\n"
    child = subprocess.Popen([sys.executable, "-c", code])
    tasks = Path(f"/proc/{child.pid}/task")
    wait_for(lambda: len(list(tasks.iterdir())) == 4, "the threads")
    core = min(os.sched_getaffinity(0))
    processes.pin(child.pid, {core})
    assert {frozenset(os.sched_getaffinity(int(task.name))) for task in tasks.iterdir()} == {frozenset({core})}
    child.kill()
    child.wait()


def test_held_memory_counts_shared_pages_once_and_leaves_file_pages_out(tmp_path: Path) -> None:
    file = tmp_path / "big"
    file.write_bytes(b"x" * (64 * 2**20))
    code = (
        "import mmap, os, sys, time\n"
        f"f = open({str(file)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); sum(m[::4096])\n"
        "b = bytearray(100 * 2**20)\n"
        "b[::4096] = b'x' * len(b[::4096])\n"
        "p = [os.fork() for _ in range(2)]\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, ATTEMPT_MARK: f"{NAME}/3"}
    )
    wait_for(lambda: len(processes.of_attempt(NAME).get("3", [])) >= 4, "four processes")
    assert child.stdout is not None
    child.stdout.readline()
    found = processes.of_attempt(NAME)["3"]
    assert 100 <= processes.held_mib(found) < 160
    assert processes.resident_mib(found) > 300
    assert processes.kill_attempt(NAME)
    child.communicate()


def test_kernel_threads_are_not_listed() -> None:
    table = ProcessTable().look()
    assert os.getpid() in table.processes
    assert all(process.parent != 2 for process in table.processes.values())
