"""The durable queue on SQLite: the conformance suite, and what only a file can show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from permed_compute.queue.port import Clock, Queue
from permed_compute.queue.schema import sqlite_url
from permed_compute.queue.sql import SqlQueue
from permed_compute.testing.queue import QueueConformance


class TestSqlite(QueueConformance):
    @pytest.fixture
    def open_queue(self, tmp_path: Path) -> Callable[[Clock], Queue]:
        return lambda clock: SqlQueue(sqlite_url(tmp_path / "queue.db"), clock)
