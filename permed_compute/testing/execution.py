"""The behaviour that every executor must show. An adapter's test subclasses `ExecutorConformance` and provides two
fixtures:

    class TestMine(ExecutorConformance):
        isolates = True          # members have processes of their own
        @pytest.fixture
        def executor(self, ...) -> Executor: ...
        @pytest.fixture
        def code(self) -> Path: ...      # a folder with `toys.py` (the one under tests/execution/code)
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from permed_compute.admission.snapshot import Grant
from permed_compute.execution import records
from permed_compute.execution.context import raise_fence
from permed_compute.execution.port import Attempt, Executor, Liveness
from permed_compute.paths import HomePaths, read_json, write_json
from permed_compute.spec import JobSpec
from permed_compute.storage import checkpoints

_PATIENCE_S = 150.0


class Toys:
    """Makes attempts of the toy workloads, as the controller would, and watches them through their files."""

    def __init__(self, home: HomePaths, code: Path, tally: Path, scope: str = "local") -> None:
        """`scope` keeps tests that share a home apart: it begins the jobs' ids, and is the account of the ledger."""
        self.home, self.code, self.tally, self.scope = home, code, tally, scope
        tally.mkdir(exist_ok=True)

    def attempt(
        self, workload: str, *, job: str = "job", number: int = 1, workers: int = 1, cpus: float = 0.5,
        memory: int = 1024, retries: int = 1, seed: int = 0, node: str = "local", **params: Any,
    ) -> Attempt:  # fmt: skip
        """The launch intent of an attempt, written, with the fence raised for it."""
        resources = {"workers": workers, "cpus": cpus, "memory": f"{memory}MiB"}
        spec = JobSpec(
            name=job, workload=f"toys:{workload}", code=str(self.code), retries=retries, seed=seed, resources=resources,
            account=self.scope, params={"tally": str(self.tally), **params},
        )  # fmt: skip
        grants = tuple(Grant(node, round(cpus * 1000), memory, 0, "cpu") for _ in range(workers))
        job_id = f"{self.scope}-{job}"
        paths = self.home.job(job_id).attempt(number)
        attempt = Attempt(job_id, number, spec, grants, "the suite asked for it", self.home.root, paths)
        attempt.write()
        raise_fence(paths)
        return attempt

    def again(self, attempt: Attempt) -> Attempt:
        """The next attempt of the same job."""
        paths = attempt.paths.job.attempt(attempt.number + 1)
        after = replace(attempt, number=attempt.number + 1, paths=paths)
        after.write()
        raise_fence(paths)
        return after

    def go(self) -> None:
        """The word that parts of `gated` toys wait for."""
        (self.tally / "go").touch()

    def runs(self, number: int) -> int:
        """How often the part of that number was begun."""
        return len(list(self.tally.glob(f"{number}-*")))

    @staticmethod
    def ending(attempt: Attempt) -> dict[str, Any]:
        """The exit record, waited for."""
        wait_for(attempt.paths.exit.exists, f"an exit record of {attempt.name}")
        return dict(read_json(attempt.paths.exit) or {})

    @staticmethod
    def rows(attempt: Attempt, kind: str) -> list[dict[str, Any]]:
        """The driver's records of one kind."""
        return [dict(row) for row in records.read(attempt.paths.records())[0] if row["kind"] == kind]

    @staticmethod
    def result(attempt: Attempt) -> dict[str, Any]:
        """The published result."""
        text = (attempt.paths.job.results / "result.json").read_text(encoding="utf-8")
        value: dict[str, Any] = json.loads(text)
        return value


def wait_for(true: Callable[[], Any], what: str, patience_s: float = _PATIENCE_S) -> None:
    """Fail unless it becomes true."""
    deadline = time.monotonic() + patience_s
    while not true():
        if time.monotonic() > deadline:
            pytest.fail(f"waited {patience_s:g} s in vain for {what}")
        time.sleep(0.02)


class ExecutorConformance:
    """Subclass it, provide `executor` and `code`, and pytest runs it all."""

    isolates = True
    """Members have processes of their own, so that one may die and the others go on."""
    ends_at_once = True
    """Whether the end of what has ended by itself is confirmed when first asked for; else soon after."""

    @pytest.fixture
    def toys(self, home: HomePaths, code: Path, tmp_path: Path) -> Toys:
        return Toys(home, code, tmp_path / "tally")

    def ended(self, executor: Executor, attempt: Attempt) -> None:
        """Fail unless the attempt's end is confirmed."""
        if self.ends_at_once and attempt.paths.exit.exists():
            assert executor.end(attempt)
        wait_for(lambda: executor.end(attempt), "the confirmed end")

    # ------------------------------------------------------------------------------------- map

    def test_map_runs_every_part_once_and_publishes_results(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", workers=2, count=6)
        executor.launch(attempt)
        ending = toys.ending(attempt)
        assert ending["outcome"] == "SUCCEEDED", ending
        assert ending["counts"] == {"DONE": 6}
        assert [toys.runs(n) for n in range(6)] == [1] * 6
        results = attempt.paths.job.results
        assert toys.result(attempt)["values"] == {"total": 55}
        assert (results / "total.txt").read_text() == "55"
        assert [(results / "parts" / f"n-{n}" / "square.txt").read_text() for n in range(6)] == [
            str(n * n) for n in range(6)
        ]
        manifest = json.loads((results / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["engine"]["engine"] == executor.name
        assert manifest["job"]["attempt"] == 1
        assert manifest["stages"]["square"] >= 0
        assert len(toys.result(attempt)["series"]["square"]) == 6
        self.ended(executor, attempt)

    def test_a_part_is_written_while_the_next_one_runs(self, executor: Executor, toys: Toys) -> None:
        """The first to be written waits for another to be begun; two in `run` at a time fail."""
        attempt = toys.attempt("stages", count=3, retries=0)
        executor.launch(attempt)
        assert toys.ending(attempt)["outcome"] == "SUCCEEDED", toys.ending(attempt)
        rows = [row["values"] for row in toys.result(attempt)["parts"]]
        assert {row["model"] for row in rows} == {"the model"} and min(row["others"] for row in rows) >= 2
        executor.end(attempt)

    def test_rounds_carry_their_state(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("rounds", rounds=3)
        executor.launch(attempt)
        assert toys.ending(attempt)["outcome"] == "SUCCEEDED"
        assert toys.result(attempt)["values"] == {"sum": 3, "rounds": 3}
        executor.end(attempt)

    def test_dask_graphs_run_within_the_grant(self, executor: Executor, toys: Toys) -> None:
        pytest.importorskip("dask", reason="dask is not installed")
        attempt = toys.attempt("graph", cpus=0.5)
        executor.launch(attempt)
        assert toys.ending(attempt)["outcome"] == "SUCCEEDED", toys.ending(attempt)
        assert toys.result(attempt)["parts"][0]["values"]["total"] == sum(n * n for n in range(8))
        executor.end(attempt)

    def test_a_bad_part_is_named_and_the_others_are_published(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=4, bad=[2], retries=1)
        executor.launch(attempt)
        ending = toys.ending(attempt)
        assert ending["outcome"] == "PARTIAL"
        assert ending["counts"] == {"DONE": 3, "FAILED": 1}
        assert "n-2" in ending["sentence"]
        assert toys.runs(2) == 2  # once, and its one retry
        assert toys.result(attempt)["values"]["total"] == 0 + 1 + 9
        failed = [row for row in toys.rows(attempt, "part") if row["state"] == "FAILED"]
        assert [(row["name"], bool(row["reason"])) for row in failed] == [("n-2", True)]
        executor.end(attempt)

    def test_a_part_that_fails_once_is_tried_again(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=3, flaky=[1])
        executor.launch(attempt)
        assert toys.ending(attempt)["outcome"] == "SUCCEEDED"
        assert [toys.runs(n) for n in range(3)] == [1, 2, 1]
        executor.end(attempt)

    def test_a_poisoned_part_is_recorded_and_the_others_go_on(self, executor: Executor, toys: Toys) -> None:
        if not self.isolates:
            pytest.skip("members of this executor share its process")
        attempt = toys.attempt("squares", workers=2, count=5, poison=[1], retries=1)
        executor.launch(attempt)
        ending = toys.ending(attempt)
        assert ending["outcome"] == "PARTIAL", ending
        assert ending["counts"] == {"DONE": 4, "FAILED": 1}
        failed = next(row for row in toys.rows(attempt, "part") if row["state"] == "FAILED")
        assert (failed["name"], failed["code"]) == ("n-1", "worker-lost")
        executor.end(attempt)

    def test_a_refused_input_is_remembered(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=3, refused=[1])
        executor.launch(attempt)
        assert toys.ending(attempt)["counts"] == {"DONE": 2, "REFUSED": 1}
        executor.end(attempt)
        after = toys.again(attempt)
        executor.launch(after)
        assert toys.ending(after)["counts"] == {"REUSED": 2, "REFUSED": 1}
        assert toys.runs(1) == 1
        finding = next(row for row in toys.result(after)["parts"] if row["name"] == "n-1")["findings"][0]
        assert (finding["code"], finding["numbers"]) == ("ODD", {"n": 1})
        executor.end(after)

    def test_what_is_done_is_never_done_again(self, executor: Executor, toys: Toys) -> None:
        first = toys.attempt("squares", job="first", count=4)
        executor.launch(first)
        assert toys.ending(first)["outcome"] == "SUCCEEDED"
        executor.end(first)
        second = toys.attempt("squares", job="second", count=5)
        executor.launch(second)
        assert toys.ending(second)["counts"] == {"DONE": 1, "REUSED": 4}
        assert [toys.runs(n) for n in range(5)] == [1] * 5
        executor.end(second)

    # ------------------------------------------------------------------------------------- lives

    def test_launching_twice_is_launching_once(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=3, gated=0)
        executor.launch(attempt)
        executor.launch(attempt)
        assert executor.liveness(attempt) is Liveness.ALIVE
        toys.go()
        assert toys.ending(attempt)["outcome"] == "SUCCEEDED"
        executor.launch(attempt)  # it has ended: nothing starts
        self.ended(executor, attempt)
        assert executor.liveness(attempt) is Liveness.GONE
        assert [toys.runs(n) for n in range(3)] == [1] * 3
        assert len(toys.rows(attempt, "started")) == 1

    def test_a_stop_request_is_heeded_between_parts_and_the_rest_is_done_later(
        self, executor: Executor, toys: Toys
    ) -> None:
        attempt = toys.attempt("squares", count=30, gated=1)
        executor.launch(attempt)
        wait_for(lambda: toys.rows(attempt, "part"), "the first part")
        write_json(attempt.paths.stop, {"reason": "test"})
        assert toys.ending(attempt)["outcome"] == "STOPPED"
        done = len(toys.rows(attempt, "part"))
        assert 0 < done < 30
        self.ended(executor, attempt)
        toys.go()
        after = toys.again(attempt)
        executor.launch(after)
        assert toys.ending(after)["counts"] == {"DONE": 30 - done, "REUSED": done}
        executor.end(after)

    def test_a_part_that_is_asked_to_stop_has_not_failed_and_the_one_behind_it_does_not_begin(
        self, executor: Executor, toys: Toys
    ) -> None:
        attempt = toys.attempt("patient", count=2, retries=0)
        executor.launch(attempt)
        wait_for(lambda: toys.runs(0) or toys.runs(1), "a part to begin")
        write_json(attempt.paths.stop, {"reason": "test"})
        assert toys.ending(attempt)["outcome"] == "STOPPED"
        assert toys.rows(attempt, "part") == [] and toys.runs(0) + toys.runs(1) == 1
        self.ended(executor, attempt)
        toys.go()
        after = toys.again(attempt)
        executor.launch(after)
        assert toys.ending(after)["counts"] == {"DONE": 2}
        executor.end(after)

    def test_code_that_ends_its_process_has_failed_and_the_others_go_on(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=3, quits=[1], retries=0)
        executor.launch(attempt)
        assert toys.ending(attempt)["counts"] == {"DONE": 2, "FAILED": 1}
        [row] = [row for row in toys.rows(attempt, "part") if row["state"] == "FAILED"]
        assert row["code"] == "code-error" and "SystemExit" in row["reason"]
        executor.end(attempt)

    def test_a_training_that_ends_its_process_has_failed(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("quitter", retries=0)
        executor.launch(attempt)
        ending = toys.ending(attempt)
        assert ending["outcome"] == "FAILED" and "SystemExit" in ending["sentence"], ending
        executor.end(attempt)

    def test_a_part_that_gives_up_unasked_has_failed(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("patient", count=1, retries=0, unasked=True)
        executor.launch(attempt)
        assert toys.ending(attempt)["counts"] == {"FAILED": 1}
        executor.end(attempt)

    def test_end_is_confirmed(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=50, gated=1)
        executor.launch(attempt)
        wait_for(lambda: toys.rows(attempt, "part"), "the first part")
        assert executor.liveness(attempt) is Liveness.ALIVE
        wait_for(lambda: executor.end(attempt), "the confirmed end")
        assert executor.liveness(attempt) is Liveness.GONE
        begun = len(list(toys.tally.iterdir()))
        time.sleep(0.6)
        assert len(list(toys.tally.iterdir())) == begun
        assert executor.end(attempt)  # ending what has ended is no error

    def test_an_attempt_that_never_was_is_gone(self, executor: Executor, toys: Toys) -> None:
        assert executor.liveness(toys.attempt("squares", job="never", count=1)) is Liveness.GONE

    def test_a_superseded_attempt_cannot_publish(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=8, gated=1)
        executor.launch(attempt)
        wait_for(lambda: toys.rows(attempt, "part"), "the first part")
        raise_fence(attempt.paths.job.attempt(2))
        toys.go()
        assert toys.ending(attempt)["outcome"] == "SUPERSEDED"
        assert not attempt.paths.job.results.exists()
        executor.end(attempt)

    def test_an_attempt_that_was_given_up_does_not_begin(self, executor: Executor, toys: Toys) -> None:
        attempt = toys.attempt("squares", count=2)
        raise_fence(attempt.paths.job.attempt(2))
        executor.launch(attempt)  # of a controller that stood still while another one gave it up
        wait_for(lambda: attempt.paths.exit.exists() or executor.liveness(attempt) is Liveness.GONE, "its end")
        wait_for(lambda: executor.end(attempt), "the confirmed end")
        assert executor.liveness(attempt) is Liveness.GONE and [toys.runs(n) for n in range(2)] == [0, 0]

    # ------------------------------------------------------------------------------------- gang

    def test_a_gang_trains_together_and_resumes_identically(self, executor: Executor, toys: Toys) -> None:
        whole = toys.attempt("train", job="whole", workers=2, steps=12, seed=5)
        executor.launch(whole)
        assert toys.ending(whole)["outcome"] == "SUCCEEDED", toys.ending(whole)
        self.ended(executor, whole)
        expected = toys.result(whole)["values"]
        assert expected["world"] == 2
        assert expected["losses"][-1] < expected["losses"][0]

        broken = toys.attempt("train", job="broken", workers=2, steps=12, seed=5, every=3, hold=5)
        executor.launch(broken)
        wait_for(lambda: checkpoints.newest(broken.paths.job.state), "the first checkpoint")
        write_json(broken.paths.stop, {"reason": "test"})
        assert toys.ending(broken)["outcome"] == "STOPPED"
        self.ended(executor, broken)
        after = toys.again(broken)
        executor.launch(after)
        assert toys.ending(after)["outcome"] == "SUCCEEDED"
        executor.end(after)
        assert toys.result(after)["values"] == expected  # bit-identical: same ranks, threads and machine

    def test_a_gang_that_loses_a_rank_is_lost_as_a_whole(self, executor: Executor, toys: Toys) -> None:
        if not self.isolates:
            pytest.skip("members of this executor share its process")
        attempt = toys.attempt("lonely", workers=2)
        executor.launch(attempt)
        ending = toys.ending(attempt)
        assert (ending["outcome"], ending["reason"]) == ("LOST", "worker-lost")
        self.ended(executor, attempt)
