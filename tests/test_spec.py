from __future__ import annotations

import pickle
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permed_compute import spec
from permed_compute.errors import Finding, RefusedInput, SpecError

GOOD = """
name: brain
workload: radiology/brain-extraction
inputs: [scans]
params: {threshold: 0.5}
resources:
  workers: 1..4
  cpus: 2
  memory: 4GiB
  gpus: 1
  gpu_memory: 16GiB
  flavors: [h100, a100, cpu]
time_limit: 1h30m
deadline: 2026-11-21T06:00:00+01:00
"""


def problems(text: str) -> list[tuple[int, str, str]]:
    with pytest.raises(SpecError) as caught:
        spec.loads(text)
    return [(p.line, p.where, f"{p.what} {p.remedy}") for p in caught.value.problems]


def test_a_job_file_survives_the_queue(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(GOOD)
    job = spec.load(tmp_path / "job.yaml")
    assert spec.from_json(job.canonical()) == job
    assert spec.from_json(job.canonical()).digest() == job.digest()
    assert (job.resources.memory, job.time_limit, job.resources.workers.max) == (4096, 5400, 4)
    assert job.inputs[0].path == str(tmp_path / "scans")


@pytest.mark.parametrize(
    ("text", "line", "where", "words"),
    [
        ("name: a\nworkload: x/y\nresorces: {}", 3, "resorces", "Did you mean resources?"),
        ("name: a\nworkload: x/y\nresources:\n  memry: 4GiB", 4, "resources.memry", "Did you mean memory?"),
        ("name: a\nworkload: x/y\nresources:\n  memory: 4", 4, "resources.memory", "with a unit"),
        ("name: a\nworkload: x/y\nresources:\n  memory: 4GB", 4, "resources.memory", "GiB"),
        ("name: a\nworkload: x/y\ntime_limit: 90", 3, "time_limit", "with units"),
        ("name: a\nworkload: x/y\nresources: {workers: 4..2}", 3, "resources.workers", "smaller number"),
        ("name: a\nworkload: x/y\nresources: {flavors: [h100]}", 3, "resources", "gpus is 0"),
        ("name: a\nworkload: x/y\nresources: {gpus: 1, flavors: [cpu]}", 3, "resources", "only flavor is cpu"),
        ("name: a\nworkload: x/y\nresources: {gpus: 1.5}", 3, "resources", "whole GPUs"),
        ("name: a\nworkload: x/y\nurgency: acute", 3, "urgency", "not for acute cases"),
        ("name: a\nworkload: x/y\nband: urgent", 3, "band", "clinical"),
        ("name: a\nworkload: x/y\ndeadline: 2026-01-01T00:00:00", 3, "deadline", "time zone"),
        ("name: a\nname: b\nworkload: x/y", 2, "name", "written twice"),
        ("name: p-01017012345\nworkload: x/y", 1, "name", "national identity number"),
        ("name: a\nworkload: nonsense", 2, "workload", ""),
        ("name: a\nworkload: x/y\ninputs:\n  - pth: x", 4, "inputs.0.pth", "Did you mean path?"),
        ("- a", 1, "file", "mapping"),
        ("name: [", 1, "file", "not YAML"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(text: str, line: int, where: str, words: str) -> None:
    found = problems(text)
    assert any(p[0] == line and p[1] == where and words in p[2] for p in found), found


def test_all_problems_at_once() -> None:
    assert len(problems("name: a\nworkload: x/y\ntime_limit: 5\nurgency: acute\nbnd: research")) == 3


def test_an_array_is_its_elements() -> None:
    job = spec.loads("name: a\nworkload: x/y\nparams: {a: 1, b: 1}\narray: [{b: 2}, {c: 3}]")
    assert dict(job.element(0).params) == {"a": 1, "b": 2} and dict(job.element(1).params) == {"a": 1, "b": 1, "c": 3}
    assert len(spec.loads("name: a\nworkload: x/y\narray: 7").array) == 7


def test_overrides_reach_below(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text("name: a\nworkload: x/y")
    job = spec.load(tmp_path / "job.yaml", {"resources.cpus": 3, "params.deep": 1})
    assert job.resources.cpus == 3 and job.params["deep"] == 1


@given(st.integers(0, 2**40))
def test_memory_text_loses_nothing(mib: int) -> None:
    assert spec.parse_memory(spec.format_memory(mib)) == mib


@given(st.integers(0, 10**9))
def test_duration_text_loses_nothing(seconds: int) -> None:
    assert spec.parse_duration(spec.format_duration(seconds)) == seconds


def test_errors_cross_processes() -> None:
    error = RefusedInput(Finding("GANTRY_TILT", "tilted", "refused", numbers={"degrees": 12.5}), remedy="correct it")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is RefusedInput and again.finding.numbers == {"degrees": 12.5} and str(again) == str(error)
