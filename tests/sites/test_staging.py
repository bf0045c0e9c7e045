"""`#STAGE`, as Olivia has it: what we write is read by real Slurm's burst buffer plug-in, and so is what goes wrong."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from permed_compute.execution.slurmjobs import in_words
from permed_compute.sites import profile, render, request
from permed_compute.spec import JobSpec
from permed_compute.testing.execution import wait_for
from permed_compute.testing.slurm import SlurmCluster, SlurmNode, possible

pytestmark = pytest.mark.skipif(not possible(), reason="Slurm is not on this machine (make real-parts)")


@pytest.fixture(scope="module")
def slurm() -> Iterator[SlurmCluster]:
    with SlurmCluster((SlurmNode("n1", cpus=2, memory=4_000),), staging=True) as made:
        yield made


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that everybody may write: root may not stage, so that its job is somebody else's."""
    made = Path(tempfile.mkdtemp(prefix="permed-staging-"))
    made.chmod(0o777)
    (made / "archive").mkdir()
    (made / "archive" / "scan").write_text("a scan")
    yield made
    shutil.rmtree(made, ignore_errors=True)


def submitted(slurm: SlurmCluster, folder: Path, stage_in: tuple[Path, Path], stage_out: tuple[Path, Path]) -> str:
    """A job that copies `near/scan` to `made/result`."""
    site = profile.load(str(slurm.site_file()))
    asked = request.of(JobSpec(name="staged", workload="a:b", account="x"), site, request.Choice(account="x"))
    near, made = folder / "near", folder / "made"
    script = folder / "job.sh"
    script.write_text(render.sbatch(
        asked, ["sh", "-c", f"mkdir -p {made} && cp {near}/scan {made}/result"], output=folder / "log",
        stage_in=[(str(stage_in[0]), str(stage_in[1]))], stage_out=[(str(stage_out[0]), str(stage_out[1]))],
    ))  # fmt: skip
    who = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []
    return slurm.run(*who, "sbatch", "--parsable", str(script)).strip()


def standing(slurm: SlurmCluster, number: str) -> tuple[str, str]:
    """(state, reason), as `permed` reads them."""
    state, _, reason = slurm.run("squeue", "--states=all", "--noheader", "--format=%T|%r", "--jobs", number).partition(
        "|"
    )
    return state, reason.strip()


def test_files_are_there_when_the_job_starts_and_come_back(slurm: SlurmCluster, folder: Path) -> None:
    number = submitted(slurm, folder, (folder / "archive", folder / "near"), (folder / "made", folder / "back"))
    wait_for(lambda: standing(slurm, number)[0] == "COMPLETED", "its end")
    assert (folder / "back" / "result").read_text() == "a scan"


@pytest.mark.soak
def test_what_cannot_be_copied_holds_the_job_and_says_so(slurm: SlurmCluster, folder: Path) -> None:
    nowhere = folder / "nowhere"
    number = submitted(slurm, folder, (nowhere, folder / "near"), (folder / "made", folder / "back"))
    wait_for(lambda: standing(slurm, number)[1].startswith("burst_buffer/"), "the refusal")
    assert in_words(standing(slurm, number)[1])[0].startswith("the site's scheduler could not copy its files in")
    slurm.run("scancel", number)

    number = submitted(slurm, folder, (folder / "archive", folder / "near"), (nowhere, folder / "back"))
    wait_for(lambda: standing(slurm, number)[0] == "STAGE_OUT", "its end")
    wait_for(lambda: standing(slurm, number)[1].startswith("burst_buffer/"), "the failure")
    slurm.run("scancel", number)  # is heard and changes nothing
    assert standing(slurm, number)[0] == "STAGE_OUT"
    slurm.run("scontrol", "requeue", number)
    slurm.run("scancel", number)
    wait_for(lambda: standing(slurm, number)[0] == "CANCELLED", "its end", 60)
