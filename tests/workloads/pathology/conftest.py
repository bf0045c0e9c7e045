from __future__ import annotations

from pathlib import Path

import pytest

from permed_compute.workloads.pathology.convert import convert
from permed_compute.workloads.pathology.source import open_slide

from .made import digest, write


@pytest.fixture
def slide(tmp_path: Path) -> Path:
    """One made-up slide of 1100 × 900 at 0.5 µm."""
    path = tmp_path / "slide.tiff"
    write(path)
    return path


@pytest.fixture
def store(slide: Path, tmp_path: Path) -> Path:
    """Its store."""
    path = tmp_path / "slide.ome.zarr"
    with open_slide(slide) as source:
        convert(source, path, digest=digest(slide), threads=2)
    return path
