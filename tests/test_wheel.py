"""The wheel alone, outside the checkout, has everything that jobs need: definitions, models, presets, templates."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True, check=False)
    if files.returncode:
        pytest.skip("this is not a git checkout: which files belong to it is unknown")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(folder)]
    subprocess.run(build, cwd=folder / "source", check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    folder = wheel.parent / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def permed(installed: Path, home: Path, *words: str) -> str:
    """`permed` of the wheel, from a folder that is no checkout."""
    environment = os.environ | {"PYTHONPATH": str(installed), "PERMED_HOME": str(home), "PERMED_EXECUTOR": "inprocess"}
    command = [sys.executable, "-m", "permed_compute.cli", *words]
    done = subprocess.run(command, cwd=installed.parent, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def test_the_wheel_brings_jobs_models_and_presets(installed: Path, tmp_path: Path) -> None:
    rows = json.loads(permed(installed, tmp_path / "home", "catalog", "--json"))
    assert {row["kind"] for row in rows} >= {"jobs", "models", "presets", "workloads"}
    assert all(row["path"].startswith(str(installed)) for row in rows if row["path"])


def test_its_jobs_are_valid(installed: Path, tmp_path: Path) -> None:
    assert json.loads(permed(installed, tmp_path / "home", "validate", "radiology/brain-extraction", "--json"))[0]["ok"]


def test_it_carries_templates_migrations_and_the_licence(installed: Path) -> None:
    assert list((installed / "permed_compute" / "reports" / "templates").glob("*.j2"))
    assert list((installed / "permed_compute" / "queue" / "migrations" / "versions").glob("v*.py"))
    licence = next(installed.glob("*.dist-info/licenses/LICENSE")).read_text()
    assert "Apache License" in licence and "END OF TERMS AND CONDITIONS" in licence


def test_it_leaves_tests_and_benchmarks_out(installed: Path) -> None:
    assert not (installed / "tests").exists()
    assert not (installed / "benchmarks").exists()
