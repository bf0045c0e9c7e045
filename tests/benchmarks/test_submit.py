from __future__ import annotations

import sqlite3
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks/ is no installed package

from benchmarks import submit
from permed_compute.errors import AuditError
from permed_compute.queue.events import Anchor
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    """The file of a queue with three jobs."""
    queue = SqlQueue(sqlite_url(tmp_path / "queue.db"), anchor=Anchor(tmp_path / "anchor"))
    queue.submit([submit._spec(number) for number in range(3)], owner="bench")
    queue.close()
    return tmp_path / "queue.db"


def check(file: Path, jobs: int) -> None:
    submit._check(sqlite_url(file), file.parent / "anchor", jobs)


def test_jobs_that_are_not_stored_fail_the_measurement(stored: Path) -> None:
    check(stored, 3)
    with pytest.raises(RuntimeError, match="4 jobs were acknowledged, 3 are stored"):
        check(stored, 4)


def test_a_job_without_its_event_fails_the_measurement(stored: Path) -> None:
    with sqlite3.connect(stored) as database:
        database.execute("UPDATE queue_jobs SET id = 'another' WHERE seq = 2")
    with pytest.raises(RuntimeError, match="have an event"):
        check(stored, 3)


def test_a_broken_chain_fails_the_measurement(stored: Path) -> None:
    with sqlite3.connect(stored) as database:
        database.execute("UPDATE queue_events SET actor = 'somebody' WHERE seq = 2")
    with pytest.raises(AuditError):
        check(stored, 3)


@pytest.mark.parametrize("target", [submit._ours(submit._sqlite), submit._rows(submit._sqlite), submit._huey])
def test_every_side_stores_what_64_clients_submit(target: submit.Target) -> None:
    if target is submit._huey:
        pytest.importorskip("huey")
    assert submit._at_once(target, 2) > 0  # the targets themselves check what is stored


def test_a_client_that_fails_fails_the_measurement() -> None:
    def fails(specs: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        submit._from_threads([fails] * 3, 0, 1, lambda: None)


def test_the_controller_stores_what_came_through_its_socket() -> None:
    assert submit._array(submit._socket, 20) > 0
