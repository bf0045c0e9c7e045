"""A queue and an engine in this process, for workloads that are shown as jobs."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.client import Client, open_client
from permed_compute.paths import HomePaths


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    home = HomePaths(tmp_path / "home")
    for name, value in {
        "HOME": home.root, "EXECUTOR": "inprocess", "TRACKING_URI": "none", "ANCHOR": tmp_path / "anchor", "CPUS": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PERMED_{name}", str(value))
    with open_client() as opened:
        yield opened
    shutil.rmtree(home.runtime, ignore_errors=True)
