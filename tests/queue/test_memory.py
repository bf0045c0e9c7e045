"""The queue in memory keeps the rules of every queue."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from permed_compute.errors import QueueError
from permed_compute.queue.memory import MemoryQueue
from permed_compute.queue.port import Clock, Queue
from permed_compute.testing.queue import QueueConformance


class TestMemory(QueueConformance):
    @pytest.fixture
    def open_queue(self) -> Callable[[Clock], Queue]:
        return MemoryQueue


def test_there_is_nothing_to_back_up(tmp_path: Path) -> None:
    with pytest.raises(QueueError):
        MemoryQueue().backup(str(tmp_path / "copy"))
