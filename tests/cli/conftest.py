"""`permed` as a function: what it answers, what it says beside it, and its exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from permed_compute.cli import main
from permed_compute.paths import HomePaths

COUNT = '''
import time
from pathlib import Path


def begins(mark):
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def run(part, ctx):
    """Bytes of a file; `tenths` makes it take its time, `fail` names a content that raises, and all but the part that
    begins first wait for the file `until`."""
    for _ in range(int(part.params.get("tenths", 0))):
        time.sleep(0.1)
    text = Path(part.sources[0]).read_text() if part.sources else ""
    if "until" in part.params and not begins(Path(part.params["until"] + "-first")):
        while not Path(part.params["until"]).exists() and not ctx.should_stop():
            time.sleep(0.02)
    if text and text == part.params.get("fail"):
        raise ValueError("as asked")
    ctx.log(f"counted {len(text)} characters")
    return {"bytes": len(text)}
'''


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Permed = Callable[..., Answer]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HomePaths]:
    """A home of its own, in-process and without tracking, named by the environment."""
    paths = HomePaths(tmp_path / "home")
    for name, value in {
        "HOME": paths.root, "EXECUTOR": "inprocess", "TRACKING_URI": "none", "ANCHOR": tmp_path / "anchor", "CPUS": "2",
        "GRACE": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"PERMED_{name}", str(value))
    yield paths
    shutil.rmtree(paths.runtime, ignore_errors=True)


@pytest.fixture
def permed(home: HomePaths, capsys: pytest.CaptureFixture[str]) -> Permed:
    def call(*words: object) -> Answer:
        capsys.readouterr()
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return Answer(int(code), captured.out, captured.err)

    return call


@pytest.fixture
def job_file(tmp_path: Path) -> Path:
    """A researcher's own function over five files."""
    folder = tmp_path / "study"
    (folder / "code").mkdir(parents=True)
    (folder / "code" / "counting.py").write_text(COUNT)
    (folder / "files").mkdir()
    for number in range(5):
        (folder / "files" / f"{number}.txt").write_text("x" * (number + 1))
    file = folder / "job.yaml"
    file.write_text("name: count\nworkload: counting:run\ncode: code\ninputs: [files]\nretries: 0\ntime_limit: 5m\n")
    return file
