from __future__ import annotations

from pathlib import Path

import pytest

from .made import write


@pytest.fixture
def regular(tmp_path: Path) -> Path:
    """A folder with one regular series of eight slices."""
    write(tmp_path / "series")
    return tmp_path / "series"
