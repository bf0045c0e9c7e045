"""The files that schedulers are given: golden, read back as what was asked for, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from permed_compute.errors import SpecError
from permed_compute.sites import check, profile, render
from permed_compute.sites.request import Choice, of, of_script
from tests.sites.cases import CASES, COMMAND, Case, job

SLURM = tuple(name for name in profile.shipped() if profile.load(name).scheduler.kind == "slurm")


def test_every_slurm_site_has_golden_files() -> None:
    assert {case.site for case in CASES} == set(SLURM)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_golden_files(case: Case) -> None:
    assert case.text() == case.path.read_text(encoding="utf-8")
    assert check.refusals(case.request) == []


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_a_file_reads_back_as_what_was_asked_for(case: Case) -> None:
    asked = case.request
    read = of_script(case.text(), asked.site)
    for name in ("name", "account", "qos", "partition", "seconds", "nodes", "cpus", "gpus", "memory_option"):
        assert getattr(read, name) == getattr(asked, name), name
    if asked.memory_option:
        assert read.memory == asked.memory
    assert check.refusals(read) == []


@given(
    cpus=st.integers(1, 40), memory=st.integers(512, 150_000), workers=st.integers(1, 30),
    site=st.sampled_from(["saga", "olivia", "tsd", "lumi"]), seconds=st.integers(60, 86_400),
)  # fmt: skip
def test_workers_always_fit_the_nodes_they_are_given(
    cpus: int, memory: int, workers: int, site: str, seconds: int
) -> None:
    asked = of(
        job({"cpus": cpus, "memory": f"{memory}MiB", "workers": workers}, time_limit=f"{seconds}s"), profile.load(site)
    )
    assert asked.nodes * asked.workers_per_node >= workers
    assert asked.cpus >= cpus * asked.workers_per_node and asked.memory >= memory * asked.workers_per_node
    # no node is asked for in vain, and rounding up to the cores' steps costs less than a MiB each
    assert (asked.nodes - 1) * asked.workers_per_node < workers
    assert asked.memory - memory * asked.workers_per_node < asked.cpus
    assert "NODE_SIZE" not in {refusal.rule for refusal in check.refusals(asked)}
    assert of_script(render.sbatch(asked, COMMAND), asked.site).seconds == seconds


def test_gpus_are_found_by_flavor_in_the_jobs_order() -> None:
    saga = profile.load("saga")
    assert of(job({"gpus": 1, "flavors": ["a100"]}), saga).partition == "a100"
    assert of(job({"gpus": 1, "flavors": ["p100", "a100"]}), saga).partition == "accel"
    assert of(job({"gpus": 1, "flavors": ["h100", "a100"]}), saga).partition == "a100"
    assert of(job({"gpus": 1, "gpu_memory": "40GiB"}), saga).partition == "a100"
    assert of(job({"cpus": 4, "memory": "300GiB"}), saga).partition == "bigmem"
    assert of(job({"cpus": 4, "memory": "4000GiB"}), saga).partition == "hugemem"


def test_a_job_that_may_do_without_a_gpu_does_where_there_is_none_of_its_kind() -> None:
    asked = of(job({"gpus": 1, "flavors": ["h100", "cpu"]}), profile.load("saga"))
    assert (asked.partition, asked.gpus) == ("normal", 0) and check.refusals(asked) == []
    assert of(job({"gpus": 1, "flavors": ["a100", "cpu"]}), profile.load("saga")).partition == "a100"


def test_commands_in_a_container_see_the_sites_gpus() -> None:
    asked = replace(CASES[1].request, image="/p/permed.sif")
    assert render.in_container(asked, ["hostname"]) == ["apptainer", "exec", "--nv", "/p/permed.sif", "hostname"]
    assert render.in_container(replace(asked, gpus=0), ["hostname"])[:3] == ["apptainer", "exec", "/p/permed.sif"]
    assert render.in_container(replace(asked, image=""), ["hostname"]) == ["hostname"]


def test_nothing_of_the_job_becomes_shell() -> None:
    asked = replace(CASES[0].request, image="/p/a b;rm.sif")
    last = render.sbatch(asked, ["echo", "$HOME; rm -rf x"], environment={"X": "$(id)"}).splitlines()
    assert last[-1] == "exec apptainer exec '/p/a b;rm.sif' echo '$HOME; rm -rf x'" and "export X='$(id)'" in last


@pytest.mark.parametrize("option", ["--account=x", "--time=1", "-N 4", "--comment=$(id)", "--reservation=a b", "rm"])
def test_options_that_are_ours_or_none_are_refused(option: str) -> None:
    with pytest.raises(SpecError):
        render.sbatch(replace(CASES[0].request, options=(option,)), COMMAND)


def test_further_options_stand_as_given() -> None:
    asked = replace(CASES[0].request, options=("--reservation=course", "--nice"))
    text = render.sbatch(asked, COMMAND)
    assert "#SBATCH --reservation=course\n" in text and "#SBATCH --nice\n" in text


@pytest.mark.parametrize(("site", "pair"), [("saga", ("/a", "/b")), ("olivia", ("a", "/b")), ("olivia", ("/a*", "/b"))])
def test_staging_only_where_the_site_has_it_and_as_it_takes_it(site: str, pair: tuple[str, str]) -> None:
    asked = of(job({"cpus": 4}), profile.load(site), Choice(image="/p/permed.sif"))
    with pytest.raises(SpecError):
        render.sbatch(asked, COMMAND, stage_in=[pair])


def test_a_site_without_slurm_gets_no_script() -> None:
    with pytest.raises(SpecError, match="permed run"):
        render.sbatch(of(job({"cpus": 4}), profile.load("local")), COMMAND)


@pytest.mark.parametrize(("text", "seconds"), [("90", 5400), ("1:30", 90), ("02:00:00", 7200), ("1-12", 129600),
                                               ("1-0:0:0", 86400), ("2-01:30", 178200)])  # fmt: skip
def test_slurms_forms_of_a_time(text: str, seconds: int) -> None:
    script = f"#!/bin/bash\n#SBATCH -A nn9999k --mem-per-cpu 4G -t {text}\n"
    assert of_script(script, profile.load("saga")).seconds == seconds


def test_a_script_of_the_sites_own_pages_is_read() -> None:
    """NRIS, saga_job_scripts.md: 2 tasks and 2 A100 on one node."""
    script = """#!/bin/bash
#SBATCH --account=nn9999k --job-name=MyJob
#SBATCH --partition=a100
#SBATCH --time=1-0:0:0
#SBATCH --ntasks-per-node=2 --gpus-per-node=2 --nodes=1   # a remark
#SBATCH --mem-per-cpu=8G

srun hostname
#SBATCH --account=never-read
"""
    asked = of_script(script, profile.load("saga"))
    assert (asked.account, asked.partition, asked.nodes, asked.cpus, asked.gpus) == ("nn9999k", "a100", 1, 2, 2)
    assert (asked.memory, asked.memory_option, asked.seconds) == (16 * 1024, "mem-per-cpu", 86400)
    assert check.refusals(asked) == []


@pytest.mark.parametrize("line", ["--time=soon", "--mem=much", "--nodes=few"])
def test_a_value_that_is_none_is_named(line: str) -> None:
    with pytest.raises(SpecError):
        of_script(f"#!/bin/bash\n#SBATCH {line}\n", profile.load("saga"))
