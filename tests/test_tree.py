"""What may stand nowhere in the tree: a path of somebody's machine, a registry's host, an index to install from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = re.compile(
    r"(?<![\w.])/(?:root|work)/"
    r"|file:///"
    r"|--(?:extra-)?index" + r"-url"
    r"|https?://[\w.-]*(?:pypi|pythonhosted|registry\.npmjs|deb\.debian)[\w.-]*",
    re.IGNORECASE,
)


def test_no_machine_and_no_registry_is_named() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    found = []
    for name in listed.stdout.splitlines():
        path = ROOT / name
        if not path.is_file() or path == Path(__file__):
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if FORBIDDEN.search(line):
                found.append(f"{name}:{number}: {line.strip()[:80]}")
    assert not found
