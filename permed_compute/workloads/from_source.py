"""Code that a digest names runs from the source that the digest is of, never from compiled files beside it."""

from __future__ import annotations

import os
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

_folders: set[str] = set()
_stats = SourceFileLoader.path_stats


def compile_anew(folder: Path) -> None:
    """From now on, in this process: modules below `folder` neither read nor write `__pycache__`.

    What lies there is in no digest, and Python trusts it where length and second of the source agree: an edit within
    one second would run as the code before it. Other folders' compiled files, those of the packages, stay in use.
    """
    _folders.add(_real(str(folder)))
    SourceFileLoader.path_stats = _path_stats  # type: ignore[method-assign]


def _path_stats(self: SourceFileLoader, path: str) -> Any:
    if _real(os.path.dirname(path)).startswith(tuple(_folders)):  # noqa: PTH120 - for every module of torch
        raise OSError  # importlib's word for "there is nothing to compare a compiled file with"
    return _stats(self, path)


@cache
def _real(folder: str) -> str:
    return f"{os.path.realpath(folder)}{os.sep}"
