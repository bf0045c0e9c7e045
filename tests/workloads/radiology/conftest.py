from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from .made import write
from .orthanc import Orthanc, running


@pytest.fixture
def regular(tmp_path: Path) -> Path:
    """A folder with one regular series of eight slices."""
    write(tmp_path / "series")
    return tmp_path / "series"


@pytest.fixture(scope="session")
def orthanc(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    """One real Orthanc for all tests of the session; each test uses studies of its own."""
    with running(tmp_path_factory.mktemp("orthanc")) as server:
        yield server
