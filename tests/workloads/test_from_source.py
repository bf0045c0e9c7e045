from __future__ import annotations

import importlib
import importlib.util
import os
import py_compile
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.workloads.from_source import compile_anew


@pytest.fixture(autouse=True)
def leave_no_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    yield
    sys.modules.pop("planted", None)


def plant(folder: Path) -> Path:
    """A module that says "source", whose compiled file says "cached": for Python the one is the other's."""
    folder.mkdir()
    module = folder / "planted.py"
    module.write_text("SAYS = 'cached'\n")
    os.utime(module, (1_700_000_000, 1_700_000_000))
    py_compile.compile(str(module), doraise=True)
    module.write_text("SAYS = 'source'\n")
    os.utime(module, (1_700_000_000, 1_700_000_000))
    return module


def says(folder: Path) -> str:
    sys.modules.pop("planted", None)
    sys.path[:] = [str(folder), *(place for place in sys.path if "test_from_source" not in place)]
    importlib.invalidate_caches()
    return str(importlib.import_module("planted").SAYS)


def test_what_lies_in_pycache_does_not_stand_in_for_the_source(tmp_path: Path) -> None:
    module = plant(tmp_path / "code")
    assert says(tmp_path / "code") == "cached"  # what Python does
    compile_anew(tmp_path / "code")
    assert says(tmp_path / "code") == "source"
    found = importlib.util.spec_from_file_location("planted", module)
    assert found is not None and found.loader is not None
    by_path = importlib.util.module_from_spec(found)
    found.loader.exec_module(by_path)
    assert by_path.SAYS == "source"


def test_a_link_to_the_folder_is_the_folder(tmp_path: Path) -> None:
    plant(tmp_path / "code")
    (tmp_path / "link").symlink_to(tmp_path / "code")
    compile_anew(tmp_path / "link")
    assert says(tmp_path / "code") == says(tmp_path / "link") == "source"


def test_other_folders_keep_their_compiled_files(tmp_path: Path) -> None:
    plant(tmp_path / "code")
    plant(tmp_path / "code-of-others")
    compile_anew(tmp_path / "code")
    assert says(tmp_path / "code-of-others") == "cached"


def test_nothing_is_written_beside_the_source(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "planted.py").write_text("SAYS = 'source'\n")
    compile_anew(tmp_path / "code")
    assert says(tmp_path / "code") == "source"
    assert [path.name for path in (tmp_path / "code").iterdir()] == ["planted.py"]
