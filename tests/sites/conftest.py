"""What the tests of sites share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def sif(tmp_path: Path) -> object:
    """A maker of files that begin as SIF images do, for an architecture's code in SIF's header."""

    def make(code: bytes, name: str = "image.sif") -> Path:
        file = tmp_path / name
        file.write_bytes(b"#!/usr/bin/env run-singularity\n\0" + b"SIF_MAGIC\0" + b"01\0" + code + b"\0" + bytes(80))
        return file

    return make
