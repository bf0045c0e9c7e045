"""A wrong job of each kind is refused before it is submitted, with the rule and the page it stands on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from permed_compute.errors import SiteRefusalError
from permed_compute.sites import check, profile
from permed_compute.sites.request import Choice, Request, image_arch, of, of_script
from tests.sites.cases import job

# An identity number that no person has: month + 80 (Skatteetaten's synthetic series), control digits as they should be.
SYNTHETIC = "21883600077"


def wrong(site: str, resources: dict[str, Any] | None = None, choice: Choice | None = None, **more: Any) -> Request:
    return of(job(resources or {"cpus": 4, "memory": "8GiB"}, **more), profile.load(site), choice)


KINDS: list[tuple[str, Callable[[], Request], str, str]] = [
    # rule, request, a word of what is said, a word of the page
    ("ACCOUNT", lambda: wrong("saga", account="helse/sor-ost/ous"), "ous", "projects_accounting"),
    ("ACCOUNT", lambda: wrong("saga", choice=Choice(account="nn9999")), "nn9999", "projects_accounting"),
    ("ACCOUNT", lambda: wrong("lumi"), "nn9999k", "batch-job"),
    ("ACCOUNT", lambda: wrong("tsd"), "nn9999k", "TSD"),
    ("PARTITION", lambda: wrong("saga", choice=Choice(partition="gpu")), "gpu", "saga_job_scripts"),
    ("QOS", lambda: wrong("saga", choice=Choice(qos="express")), "express", "saga_job_scripts"),
    ("ARCH", lambda: wrong("olivia", {"cpus": 4, "gpus": 1}), "aarch64", "olivia_job_types"),
    ("CONTAINER", lambda: wrong("olivia"), "containers only", "software_stack"),
    ("MEMORY_OPTION", lambda: wrong("olivia", {"cpus": 256}, Choice(
        partition="large", image="/p/permed.sif", options=("--mem=100G",))), "--mem", "olivia_job_scripts"),
    ("TIME", lambda: wrong("saga", time_limit="8d"), "7d of normal", "saga_job_types"),
    ("TIME", lambda: wrong("saga", time_limit="3h", choice=Choice(qos="devel")), "2h of devel", "saga_job_types"),
    ("TIME", lambda: wrong("lumi", {"cpus": 4, "gpus": 1}, Choice(account="project_1"), time_limit="4d"), "3d",
     "partitions.md"),
    ("UNITS", lambda: wrong("saga", {"cpus": 40, "workers": 7}), "280", "saga_job_types"),
    ("UNITS", lambda: wrong("saga", {"cpus": 20, "workers": 7}, Choice(qos="devel"), time_limit="1h"), "160 ",
     "saga_job_types"),
    ("NODES", lambda: wrong("betzy", {"cpus": 128, "workers": 3}), "fewer than the 4", "betzy_job_types"),
    ("NODES", lambda: wrong("betzy", {"cpus": 128, "workers": 513}), "512", "betzy_job_types"),
    ("NODES", lambda: wrong("olivia", {"cpus": 200, "workers": 2}, Choice(image="/p/x.sif")), "1 of small",
     "olivia_job_types"),
    ("NODES", lambda: wrong("saga", {"cpus": 1, "gpus": 4, "workers": 8, "flavors": ["a100"]}), "7 of a100",
     "saga_job_types"),
    ("GPUS", lambda: wrong("olivia", {"cpus": 8, "gpus": 4, "workers": 9}, Choice(image="/p/x.sif")), "36 GPUs",
     "olivia_job_types"),
    ("GPUS", lambda: wrong("saga", {"cpus": 4, "gpus": 1}, Choice(partition="normal")), "no GPUs", "saga_job_types"),
    ("GPUS", lambda: wrong("saga", {"cpus": 4}, Choice(partition="a100")), "use GPUs", "saga_job_types"),
    ("GPUS", lambda: wrong("saga", {"cpus": 4, "gpus": 1, "flavors": ["h100"]}), "not h100", "saga_job_types"),
    ("NODE_SIZE", lambda: wrong("saga", {"cpus": 100}), "100 cores", "saga_job_types"),
    ("NODE_SIZE", lambda: wrong("saga", {"cpus": 4, "memory": "7000GiB"}), "7000 GiB", "saga_job_types"),
    ("DATA_CLASS", lambda: wrong("saga", data_class="red"), "green at most", "default of permed_compute"),
    ("DATA_CLASS", lambda: wrong("huntcloud", data_class="black"), "red at most", "default of permed_compute"),
    ("IDENTIFIER", lambda: wrong("tsd", choice=Choice(account="p33"), name="Hansen-210883-x",
                                 inputs=[f"/data/{SYNTHETIC}/t1.nii.gz"]), "1 of", "TSD"),
    ("IDENTIFIER", lambda: wrong("saga", inputs=["/data/HANSEN^KARI/t1"]), "1 of", "default of permed_compute"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "made", "said", "page"), KINDS, ids=[f"{n}-{k[0]}" for n, k in enumerate(KINDS)])
def test_a_wrong_job_is_refused_with_the_rules_source(
    rule: str, made: Callable[[], Request], said: str, page: str
) -> None:
    found = {refusal.rule: refusal for refusal in check.refusals(made())}
    assert rule in found, found
    assert said in found[rule].sentence and page in found[rule].source and "read 20" in found[rule].source
    assert found[rule].remedy


def test_there_is_a_wrong_job_for_every_rule() -> None:
    assert {rule for rule, *_ in KINDS} == {
        "ACCOUNT", "PARTITION", "QOS", "ARCH", "CONTAINER", "MEMORY_OPTION", "TIME", "UNITS", "NODES", "GPUS",
        "NODE_SIZE", "DATA_CLASS", "IDENTIFIER",
    }  # fmt: skip


def test_all_broken_rules_are_named_at_once() -> None:
    with pytest.raises(SiteRefusalError) as caught:
        check.require(wrong("saga", account="local", data_class="red", time_limit="30d"))
    rules = [refusal["rule"] for refusal in caught.value.refusals]
    assert rules == ["ACCOUNT", "TIME", "DATA_CLASS"]
    assert all(refusal["source"] in caught.value.message for refusal in caught.value.refusals)
    assert caught.value.as_dict()["site"] == "saga"


WRONG_SCRIPTS = {
    "MEMORY_OPTION": "#SBATCH --account=nn9999k --time=1:00:00 --partition=large --nodes=2 --mem=200G",
    "ACCOUNT": "#SBATCH --time=1:00:00 --mem-per-cpu=1G",
    "TIME": "#SBATCH --account=nn9999k --mem-per-cpu=1G --time=9-0",
    "NODES": "#SBATCH --account=nn9999k --mem-per-cpu=1G --time=1:00:00 --nodes=2",
    "UNITS": "#SBATCH --account=nn9999k --mem-per-cpu=10G --time=1:00:00 --ntasks=100",
    "GPUS": "#SBATCH --account=nn9999k --mem-per-cpu=1G --time=1:00:00 --partition=accel --gpus=33",
    "PARTITION": "#SBATCH --account=nn9999k --mem-per-cpu=1G --time=1:00:00 -p gpu",
    "IDENTIFIER": f"#SBATCH --account=nn9999k --mem-per-cpu=1G --time=1:00:00 -o /logs/{SYNTHETIC}.log",
}


@pytest.mark.parametrize(("rule", "line"), WRONG_SCRIPTS.items(), ids=WRONG_SCRIPTS)
def test_a_wrong_script_is_refused_like_a_wrong_job(rule: str, line: str) -> None:
    found = check.refusals(of_script(f"#!/bin/bash\n{line}\nsrun hostname\n", profile.load("olivia")))
    assert found[0].rule == rule and {refusal.rule for refusal in found} <= {rule, "NODE_SIZE"}
    assert "documentation.sigma2.no" in found[0].source or rule == "IDENTIFIER"


def test_a_job_without_memory_is_refused_where_it_must_say() -> None:
    script = "#!/bin/bash\n#SBATCH --account=nn9999k --time=1:00:00\n"
    assert [r.rule for r in check.refusals(of_script(script, profile.load("saga")))] == ["MEMORY_OPTION"]


def test_optimist_has_no_longest_time() -> None:
    assert check.refusals(wrong("saga", choice=Choice(qos="optimist"), time_limit="30d")) == []


# ------------------------------------------------------------------------------------------- architecture


@pytest.mark.parametrize(("code", "arch"), [(b"02", "x86_64"), (b"04", "aarch64"), (b"99", "")])
def test_an_images_architecture_stands_in_its_header(sif: Any, code: bytes, arch: str) -> None:
    assert image_arch(sif(code)) == arch


def test_what_is_no_image_has_no_architecture(tmp_path: Path) -> None:
    (tmp_path / "x.sif").write_bytes(b"short")
    assert image_arch(tmp_path / "x.sif") == image_arch(tmp_path / "none.sif") == ""


def test_an_image_for_the_wrong_nodes_is_refused_and_one_for_the_right_is_not(sif: Any) -> None:
    gpu = {"cpus": 4, "gpus": 1}
    amd64, arm64 = str(sif(b"02", "amd64.sif")), str(sif(b"04", "arm64.sif"))
    assert [r.rule for r in check.refusals(wrong("olivia", gpu, Choice(image=amd64)))] == ["ARCH"]
    assert check.refusals(wrong("olivia", gpu, Choice(image=arm64))) == []
    assert check.refusals(wrong("olivia", choice=Choice(image=amd64))) == []
    assert [r.rule for r in check.refusals(wrong("olivia", choice=Choice(image=arm64)))] == ["ARCH"]


def test_an_image_that_cannot_be_read_is_a_doubt_not_a_refusal() -> None:
    asked = wrong("olivia", {"cpus": 4, "gpus": 1}, Choice(image="/elsewhere/permed.sif"))
    assert check.refusals(asked) == [] and any("architecture is not judged" in doubt for doubt in check.doubts(asked))


# ------------------------------------------------------------------------------------------- identifiers


@pytest.mark.parametrize("path", [f"/d/{SYNTHETIC}", f"/d/x_{SYNTHETIC[:6]}-{SYNTHETIC[6:]}_y", "/d/NORMANN^OLA"])
def test_identifiers_are_refused_and_never_repeated(path: str) -> None:
    found = [r for r in check.refusals(wrong("saga", inputs=[path])) if r.rule == "IDENTIFIER"]
    assert found and SYNTHETIC not in str(found[0].as_dict()) and "NORMANN" not in str(found[0].as_dict())


@pytest.mark.parametrize("path", [
    "/data/20261122051601",  # a moment
    "/data/1.2.840.113619.2.55.3.2831206148",  # a UID
    "/data/21883600078",  # control digits wrong
    "/data/99883600077",  # no day
    "/data/sub-0001/anat",
])  # fmt: skip
def test_other_numbers_are_none(path: str) -> None:
    assert "IDENTIFIER" not in {r.rule for r in check.refusals(wrong("saga", inputs=[path]))}


def test_what_no_page_confirms_is_said() -> None:
    doubts = check.doubts(wrong("tsd", {"cpus": 4, "gpus": 1}, Choice(account="p33")))
    assert any("partition accel" in doubt and "no public page" in doubt for doubt in doubts)
