"""Fixtures that every test may use. What a machine lacks is skipped with the reason in words; CI prints it (`-ra`)."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest

from permed_compute.paths import HomePaths

# A shell that starts us in the background has SIGINT ignored, and so would every process whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real inputs that lie beside the checkout (their README has sources and licences)."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the real inputs (../shared/data) are not beside this checkout")
    return folder


@pytest.fixture
def home(tmp_path: Path) -> HomePaths:
    """A fresh PERMED_HOME; its short runtime folder goes with it."""
    paths = HomePaths(tmp_path / "home").create()
    yield paths
    shutil.rmtree(paths.runtime, ignore_errors=True)
