"""The durable queue on a real PostgreSQL server."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from permed_compute.queue.port import Clock, Queue
from permed_compute.queue.sql import SqlQueue
from permed_compute.testing.queue import QueueConformance

pytestmark = pytest.mark.postgres


class TestPostgres(QueueConformance):
    @pytest.fixture
    def open_queue(self, postgres_url: sa.URL) -> Callable[[Clock], Queue]:
        return lambda clock: SqlQueue(postgres_url, clock)
