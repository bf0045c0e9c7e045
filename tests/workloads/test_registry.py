from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from permed_compute.errors import WorkloadError
from permed_compute.spec import JobSpec
from permed_compute.workloads import registry
from permed_compute.workloads.port import Gang, Map

RUN = "def run(part, ctx):\n    return {'from': %r}\n"


@pytest.fixture(autouse=True)
def leave_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    yield
    sys.modules.pop("namesake", None)


def spec(folder: Path, workload: str = "namesake:run") -> JobSpec:
    return JobSpec(name="a", workload=workload, code=str(folder))


def answer(found: registry.Found) -> str:
    assert isinstance(found.workload, Map)
    return found.workload.run(None, None, None).values["from"]


def test_a_namesake_in_another_folder_does_not_stand_in(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "namesake.py").write_text(RUN % name)
    assert answer(registry.find(spec(tmp_path / "one"))) == "one"
    assert answer(registry.find(spec(tmp_path / "two"))) == "two"
    assert answer(registry.find(spec(tmp_path / "one"))) == "one"


def test_changed_code_is_run_and_is_another_version(tmp_path: Path) -> None:
    (tmp_path / "namesake.py").write_text(RUN % "before")
    os.utime(tmp_path / "namesake.py", (1_700_000_000, 1_700_000_000))
    before = registry.find(spec(tmp_path))
    assert answer(before) == "before"
    (tmp_path / "namesake.py").write_text(RUN % "behind")  # as long, and within the same second
    os.utime(tmp_path / "namesake.py", (1_700_000_000, 1_700_000_000))
    after = registry.find(spec(tmp_path))
    assert answer(after) == "behind" and after.version != before.version


def test_a_part_returns_a_dict_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "namesake.py").write_text("def run(part, ctx): return part\n")
    found = registry.find(spec(tmp_path)).workload
    assert isinstance(found, Map)
    assert found.run(None, None, None).values == {} and found.run({"a": 1}, None, None).values == {"a": 1}
    with pytest.raises(WorkloadError, match="returned a list"):
        found.run([1, 2], None, None)


def test_the_shape_is_read_from_the_parameters(tmp_path: Path) -> None:
    (tmp_path / "namesake.py").write_text("def train(spec, ctx): ...\ndef neither(x): ...\n")
    assert isinstance(registry.find(spec(tmp_path, "namesake:train")).workload, Gang)
    with pytest.raises(WorkloadError, match="neither of the two shapes"):
        registry.find(spec(tmp_path, "namesake:neither"))
    with pytest.raises(WorkloadError, match="has no 'absent'"):
        registry.find(spec(tmp_path, "namesake:absent"))
    (tmp_path / "namesake.py").write_text("import sys\nsys.exit('usage: …')\n")
    with pytest.raises(WorkloadError, match="ends the process"):
        registry.find(spec(tmp_path, "namesake:train"))
    with pytest.raises(WorkloadError, match="no workload"):
        registry.find(JobSpec(name="a", workload="radiology/absent"))


def test_everything_in_the_catalogue_is_there() -> None:
    for name in registry.CATALOG:
        registry.find(JobSpec(name="a", workload=name))
