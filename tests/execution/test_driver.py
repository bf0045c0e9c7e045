"""What becomes of a map's parts when a worker's node is gone: nothing is their fault, and nothing is done twice."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest

from permed_compute.execution import inprocess
from permed_compute.execution.driver import drive
from permed_compute.execution.port import Attempt
from permed_compute.execution.worker import Row, WorkerLost
from permed_compute.paths import HomePaths
from permed_compute.testing.execution import Toys


class LosesANode:
    """A crew of threads whose second member's node dies under its first part."""

    def __init__(self, attempt: Attempt) -> None:
        self._crew = inprocess._crew(attempt)
        self.size, self.facts, self.use, self.close = (
            self._crew.size, self._crew.facts, self._crew.use, self._crew.close,
        )  # fmt: skip

    def start(self, slot: int, call: str, row: Row) -> Future[Row]:
        if slot == 0:
            return self._crew.start(slot, call, row)
        gone: Future[Row] = Future()
        gone.set_exception(WorkerLost("The node of worker 1 is gone.", code="node-lost"))
        return gone

    def restart(self, slot: int) -> None:
        raise AssertionError("there is no node to start it on")


def test_what_runs_elsewhere_is_finished_and_the_rest_left_to_the_next_attempt(
    home: HomePaths, code: Path, tmp_path: Path
) -> None:
    toys = Toys(home, code, tmp_path / "tally")
    first = toys.attempt("squares", workers=2, count=6, seconds=0.1, retries=0)
    drive(first.paths, LosesANode, {})
    ending = toys.ending(first)
    assert (ending["outcome"], ending["reason"]) == ("LOST", "node-lost")
    done = len(toys.rows(first, "part"))
    assert 0 < done < 6
    after = toys.again(first)
    drive(after.paths, inprocess._crew, {})
    assert toys.ending(after)["counts"] == {"DONE": 6 - done, "REUSED": done}
    assert [toys.runs(n) for n in range(6)] == [1] * 6


@pytest.mark.parametrize("workload", ["numbers", "trained"])
def test_numbers_of_numpy_reach_the_results(home: HomePaths, code: Path, tmp_path: Path, workload: str) -> None:
    toys = Toys(home, code, tmp_path / "tally")
    attempt = toys.attempt(workload, count=2)
    drive(attempt.paths, inprocess._crew, {})
    assert toys.ending(attempt)["outcome"] == "SUCCEEDED", toys.ending(attempt)
    result = toys.result(attempt)
    assert result["values"]["half"] == 0.5 and result["metrics"]["loss"] == 0.25
    if workload == "numbers":
        assert result["values"]["before"] == 2 and result["values"]["squares"] == [0, 1, 4]
