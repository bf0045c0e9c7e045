"""What a job was granted is what it gets on Ray, however it tries: cores, memory, processes, work outside its group."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from permed_compute.execution import processes, raylocal, watchdog
from permed_compute.execution.cores import cores_file
from permed_compute.execution.port import Attempt
from permed_compute.execution.processes import ProcessTable
from permed_compute.execution.ray import RayExecutor
from permed_compute.paths import read_json
from permed_compute.testing.execution import Toys, wait_for

pytestmark = pytest.mark.ray


def cores_of(attempt: Attempt) -> list[int]:
    return sorted(int(core) for core in read_json(cores_file(attempt.paths)) or ())


def value_of(toys: Toys, attempt: Attempt, name: str) -> object:
    return next(row for row in toys.result(attempt)["parts"])["values"][name]


def test_eight_busy_processes_get_no_more_than_the_job_was_granted(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("greedy", cpus=1)
    ray_executor.launch(attempt)
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert len(cores_of(attempt)) == 1
    assert value_of(ray_toys, attempt, "cores") == cores_of(attempt)
    used = value_of(ray_toys, attempt, "cpu_s") / value_of(ray_toys, attempt, "wall_s")
    assert used < 1.5  # unheld they take 2 of two cores; time and CPU time are not read at the same moment
    assert ray_executor.end(attempt)


def test_two_jobs_at_once_run_on_cores_of_their_own(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core only")
    first, second = (ray_toys.attempt("squares", job=job, cpus=1, count=20, gated=1) for job in ("a", "b"))
    ray_executor.launch(first)
    wait_for(lambda: ray_toys.rows(first, "started"), "the first attempt")
    ray_executor.launch(second)
    wait_for(lambda: ray_toys.rows(second, "part"), "the second attempt's first part")
    assert not set(cores_of(first)) & set(cores_of(second))
    for attempt in (first, second):
        found = [process for slot in processes.of_attempt(attempt.name).values() for process in slot]
        assert len(found) >= 2  # driver and member
        for process in found:
            wait_for(lambda p=process, a=attempt: held_to(p.pid, cores_of(a)), "every thread to be pinned")
        assert ray_executor.end(attempt)


def held_to(pid: int, cores: list[int]) -> bool:
    return all(sorted(os.sched_getaffinity(int(task.name))) == cores for task in Path(f"/proc/{pid}/task").iterdir())


def test_twice_the_memory_ends_the_worker_with_the_reason_and_the_others_go_on(
    ray_executor: RayExecutor, ray_toys: Toys
) -> None:
    attempt = ray_toys.attempt("squares", count=4, memory=512, hungry=[1], mib=1024, retries=0)
    ray_executor.launch(attempt)
    ending = ray_toys.ending(attempt)
    assert ending["outcome"] == "PARTIAL", ending
    assert ending["counts"] == {"DONE": 3, "FAILED": 1}
    failed = next(row for row in ray_toys.rows(attempt, "part") if row["state"] == "FAILED")
    assert (failed["name"], failed["code"]) == ("n-1", "over-memory")
    assert "granted 512 MiB" in failed["reason"]
    assert "resources.memory" in failed["remedy"]
    assert ray_executor.end(attempt)


def test_a_plan_that_takes_too_much_memory_fails_the_job_with_the_reason(
    ray_executor: RayExecutor, ray_toys: Toys
) -> None:
    attempt = ray_toys.attempt("glutton", memory=256, mib=1536)
    ray_executor.launch(attempt)
    ending = ray_toys.ending(attempt)
    assert (ending["outcome"], ending["reason"]) == ("FAILED", "over-memory")
    assert ray_executor.end(attempt)


def test_work_outside_the_group_is_held_to_the_jobs_cores(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("elsewhere")
    ray_executor.launch(attempt)
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert value_of(ray_toys, attempt, "mark") == f"{attempt.name}/0"
    assert value_of(ray_toys, attempt, "cores") == cores_of(attempt)
    assert ray_executor.end(attempt)


def test_memory_that_is_taken_outside_the_group_counts(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("elsewhere", memory=512, mib=1024, retries=0)
    ray_executor.launch(attempt)
    assert ray_toys.ending(attempt)["outcome"] == "FAILED"
    failed = next(row for row in ray_toys.rows(attempt, "part") if row["state"] == "FAILED")
    assert failed["code"] == "over-memory"
    assert ray_executor.end(attempt)


def test_what_a_job_leaves_behind_ends_with_it(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("detached")
    ray_executor.launch(attempt)
    wait_for(lambda: len(orphans(attempt)) == 2, "two processes that detached")
    ray_toys.go()
    assert ray_toys.ending(attempt)["outcome"] == "SUCCEEDED"
    assert ray_executor.end(attempt)
    assert orphans(attempt) == []


def orphans(attempt: Attempt) -> list[int]:
    """By their command line, which nobody has to mark."""
    found = []
    for pid in ProcessTable().look().processes:
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if "permed-orphan" in words and any(word.startswith(str(attempt.paths.root)) for word in words):
            found.append(pid)
    return found


def test_what_a_job_prints_is_in_its_log_and_its_use_in_the_manifest(ray_executor: RayExecutor, ray_toys: Toys) -> None:
    attempt = ray_toys.attempt("squares", count=2, say=True, seconds=0.6)
    ray_executor.launch(attempt)
    ending = ray_toys.ending(attempt)
    assert {"the number is 0", "the number is 1"} <= set(attempt.paths.log.read_text().splitlines())
    assert ending["usage"]["rss_peak_mib"] > 20
    assert ending["usage"]["cpu_s"] > 0
    assert ray_executor.end(attempt)


def test_parts_that_hold_ten_times_the_object_store_run_in_bounded_memory(
    ray_executor: RayExecutor, ray_toys: Toys
) -> None:
    """A worker loads the data of its own parts, one part ahead: never all of it at once, and none into the store."""
    store = raylocal._OBJECT_STORE // 2**20
    mib, granted = 96, 768
    attempt = ray_toys.attempt("bulky", workers=2, cpus=0.5, memory=granted, count=10 * store // mib + 1, mib=mib)
    assert attempt.spec.params["count"] * mib > 10 * store
    ray_executor.launch(attempt)
    ending = ray_toys.ending(attempt)
    assert ending["outcome"] == "SUCCEEDED", ending  # whoever held more than granted would have been ended
    assert not ray_toys.rows(attempt, "lost")
    assert ending["usage"]["rss_peak_mib"] < 2 * granted + watchdog.DRIVER_MEMORY
    assert not list(ray_executor._home.runtime.rglob("ray_spilled_objects*/*"))
    assert ray_executor.end(attempt)
