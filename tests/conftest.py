"""Fixtures that every test may use. What a machine lacks is skipped with the reason in words; CI prints it (`-ra`)."""

from __future__ import annotations

import random
import shutil
import signal
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from permed_compute.paths import HomePaths

# A shell that starts us in the background has SIGINT ignored, and so would every process whose Ctrl-C is tested.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run, however slow the machine; `--hypothesis-profile search` looks for others.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", settings.get_profile("search"), derandomize=True)
settings.load_profile("same")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Global streams of randomness begin where the test's name says: the same in every run, another in each test."""
    seed = zlib.crc32(item.nodeid.encode())
    random.seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


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
