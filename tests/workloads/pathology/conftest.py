from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from permed_compute.workloads.pathology.convert import convert
from permed_compute.workloads.pathology.source import open_slide

from .made import digest, pixels, write


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slide and its store, made once; tests get copies, because some damage them."""
    folder = tmp_path_factory.mktemp("made")
    write(folder / "slide.tiff")
    with open_slide(folder / "slide.tiff") as source:
        convert(source, folder / "slide.ome.zarr", digest=digest(folder / "slide.tiff"), threads=2)
    return folder


@pytest.fixture
def slide(_made: Path, tmp_path: Path) -> Path:
    """One made-up slide of 1100 × 900 at 0.5 µm."""
    return Path(shutil.copy(_made / "slide.tiff", tmp_path / "slide.tiff"))


@pytest.fixture
def store(_made: Path, tmp_path: Path) -> Path:
    """Its store."""
    return Path(shutil.copytree(_made / "slide.ome.zarr", tmp_path / "slide.ome.zarr"))


@pytest.fixture(scope="session")
def sharp(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A slide with edges and noise of single pixels, and its store: to be read, not changed."""
    folder = tmp_path_factory.mktemp("sharp")
    write(folder / "slide.tiff", pixels(blur=0))
    with open_slide(folder / "slide.tiff") as source:
        convert(source, folder / "slide.ome.zarr", digest=digest(folder / "slide.tiff"), threads=2)
    return folder / "slide.tiff", folder / "slide.ome.zarr"
