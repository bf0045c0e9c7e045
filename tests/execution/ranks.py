"""Ranks in processes of their own that are kept: importing torch and MONAI costs more than the trainings do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from permed_compute.execution.port import Attempt
from permed_compute.storage import checkpoints

Row = dict[str, Any]


class Ranks:
    """Up to `most` ranks. `run(attempt)` is one launch: every rank starts from what lies in the job's folder."""

    def __init__(self, most: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self._ends, self._processes = [], []
        for _ in range(most):
            ours, theirs = spawn.Pipe()
            process = spawn.Process(target=_serve, args=(theirs,))
            process.start()
            self._ends.append(ours)
            self._processes.append(process)
        self._threads = ThreadPoolExecutor(most)

    def run(self, attempt: Attempt) -> Row:
        """Rank 0's answer, once all have ended alike."""
        out = attempt.paths.root / "results.new"
        out.mkdir(parents=True)
        row = {"world": len(attempt.grants), "out": str(out), "known": checkpoints.names(attempt.paths.job.state)}
        answers = list(self._threads.map(lambda slot: self._ask(slot, attempt, row), range(len(attempt.grants))))
        assert len({answer["stopped"] for answer in answers}) == 1, answers
        return answers[0]

    def _ask(self, slot: int, attempt: Attempt, row: Row) -> Row:
        self._ends[slot].send((str(attempt.paths.root), slot, row))
        assert self._ends[slot].poll(120), f"rank {slot} does not answer"
        answer: Row = self._ends[slot].recv()
        return answer

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._threads.shutdown()


def _serve(requests: Connection) -> None:
    from permed_compute.execution.worker import Member

    while True:
        root, slot, row = requests.recv()
        try:
            requests.send(Member(root, slot, isolated=True).rank(row))
        except Exception as error:
            requests.send({"stopped": repr(error)})


def segments(steps: Sequence[int]) -> list[int]:
    """Steps to be interrupted after → how many steps each attempt does."""
    return [after - before for before, after in zip([0, *steps], steps, strict=False)]
