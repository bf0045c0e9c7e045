"""Jobs at every Slurm site whose files are golden: what they ask for, and how they are submitted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from permed_compute.sites import profile, render
from permed_compute.sites.request import Choice, Request, of
from permed_compute.spec import JobSpec, loads

GOLDEN = Path(__file__).parent / "golden"
COMMAND = ("python", "-m", "permed_compute.execution.worker", "a b")


def job(resources: dict[str, Any], **more: Any) -> JobSpec:
    """A job on open data that nobody's rules forbid."""
    return loads(
        json.dumps(
            {"name": "brain", "workload": "radiology/brain-extraction", "data_class": "green", "account": "nn9999k",
             "time_limit": "1d", "resources": resources, **more}
        )
    )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One golden file. billing: units per hour that the site's page gives; gpu_hours likewise."""

    site: str
    name: str
    resources: dict[str, Any]
    choice: Choice | None = None
    billing: float | None = None
    gpu_hours: float = 0
    more: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)

    @property
    def id(self) -> str:
        return f"{self.site}-{self.name}"

    @property
    def spec(self) -> JobSpec:
        return job(self.resources, **self.more)

    @property
    def request(self) -> Request:
        return of(self.spec, profile.load(self.site), self.choice)

    @property
    def path(self) -> Path:
        return GOLDEN / f"{self.id}.sbatch"

    def text(self) -> str:
        return render.sbatch(self.request, COMMAND, output="%x-%j.log", **self.files)


_ARM = Choice(image="/cluster/projects/nn9999k/permed-arm64.sif")
_AMD64 = "/cluster/projects/nn9999k/permed.sif"
_LUMI = "project_465000001"
_STAGE = {
    "stage_in": [("/nird/datalake/NS9999K/in", "/cluster/projects/nn9999k/in")],
    "stage_out": [("/cluster/projects/nn9999k/out", "/nird/datapeak/NS9999K/out")],
}

# Billing as in the design's table of golden cases, which the sites' pages and (the first) real Slurm give.
CASES = (
    Case("saga", "normal", {"cpus": 40, "memory": "172000MiB"}, billing=43),
    Case("saga", "a100", {"cpus": 16, "memory": "64GiB", "gpus": 2, "flavors": ["a100"]}, billing=16),
    Case("saga", "a100-memory", {"cpus": 4, "memory": "500GiB", "gpus": 1, "flavors": ["a100"]}, billing=16),
    Case("saga", "accel", {"cpus": 8, "memory": "40GiB", "gpus": 4, "flavors": ["p100"]}, billing=24),
    Case("saga", "bigmem", {"cpus": 8, "memory": "300GiB"}, billing=33),
    Case("saga", "optimist", {"cpus": 10, "memory": "20GiB"}, Choice(qos="optimist"), billing=10),
    Case("saga", "workers", {"workers": "1..12", "cpus": 8, "memory": "16GiB"}, billing=96),
    Case("betzy", "normal", {"workers": 4, "cpus": 128, "memory": "200GiB"}, billing=512),
    Case("betzy", "accel", {"cpus": 8, "memory": "64GiB", "gpus": 1}, billing=16),
    Case("betzy", "preproc", {"cpus": 4, "memory": "8GiB"}, Choice(partition="preproc"), billing=4),
    Case("betzy", "devel", {"cpus": 100, "memory": "100GiB"}, Choice(qos="devel"), billing=128,
         more={"time_limit": "30m"}),
    Case("olivia", "small", {"cpus": 64, "memory": "100GiB"}, Choice(image=_AMD64), billing=64),
    Case("olivia", "large", {"workers": 2, "cpus": 256, "memory": "600GiB"},
         Choice(image=_AMD64, partition="large"), billing=512),
    Case("olivia", "accel", {"cpus": 72, "memory": "110GiB", "gpus": 4}, _ARM, billing=0, gpu_hours=4),
    Case("olivia", "accel-staged", {"workers": 2, "cpus": 72, "memory": "110GiB", "gpus": 4}, _ARM, billing=0,
         gpu_hours=8, files=_STAGE),
    Case("tsd", "cpu", {"cpus": 8, "memory": "32GiB"}, Choice(account="p33_tsd"), more={"data_class": "red"}),
    Case("tsd", "accel", {"cpus": 8, "memory": "32GiB", "gpus": 1}, Choice(account="p33"),
         more={"data_class": "black"}),
    Case("lumi", "small", {"cpus": 4, "memory": "9GiB"}, Choice(account=_LUMI), billing=5),
    Case("lumi", "standard", {"workers": 2, "cpus": 128, "memory": "100GiB"},
         Choice(account=_LUMI, partition="standard"), billing=256),
    Case("lumi", "small-g", {"cpus": 9, "memory": "64GiB", "gpus": 1},
         Choice(account=_LUMI, image="/scratch/project_465000001/permed.sif"), billing=0, gpu_hours=1),
    Case("lumi", "standard-g", {"workers": 3, "cpus": 56, "memory": "400GiB", "gpus": 8},
         Choice(account=_LUMI, partition="standard-g"), billing=0, gpu_hours=12),
)  # fmt: skip
