"""A site as data: `cluster/sites/<name>.yaml`, typed, every block with the source that it was read from.

Nothing of a site is written in code: partitions, limits, factors, options and rules are facts with a source and the day
they were read. `verified: false` (of a source, or of one block) marks what no public page confirms.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from datetime import date
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from permed_compute.errors import NotFoundError, SettingsError
from permed_compute.spec import DataClass

Arch = Literal["x86_64", "aarch64"]
OURS = "ours"
"""The source of what is a default of ours, which an operator has to confirm."""


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Source(_Facts):
    """Where facts were read, and when. verified: False where the page is no authority, or where there is none."""

    page: str = Field(min_length=1)
    checked: date
    verified: bool = True


class Block(_Facts):
    """A group of facts from one source. verified: None takes the source's word."""

    source: str
    verified: bool | None = None
    note: str = ""


class Scheduler(Block):
    """kind: who starts jobs. required: options that a job must give. launcher: what starts a process on each node.
    memory_option: how jobs ask for memory; `none`: they need not, `forbidden`: they must not."""

    kind: Literal["slurm", "kuberay", "none"]
    launcher: str = ""
    required: tuple[str, ...] = ()
    memory_option: Literal["mem-per-cpu", "mem", "none", "forbidden"] = "mem"


class Machine(Block):
    """arch: of the nodes; login: of the nodes that users log in to, where it differs."""

    kind: Literal["cluster", "vm", "kubernetes"] = "cluster"
    arch: Arch
    login: Arch | None = None
    gpu_vendor: Literal["nvidia", "amd", "none"] = "nvidia"


class Place(Block):
    country: str = Field(pattern=r"^[A-Z]{2}$")
    eea: bool


class DataRule(Block):
    """max_class: the most sensitive class of data that may be brought here."""

    max_class: DataClass


class Account(Block):
    """pattern: what the account that pays looks like, as a regular expression."""

    pattern: str
    example: str


class Egress(Block):
    """kind: what of the network the compute nodes reach."""

    kind: Literal["none", "proxy", "open"]
    proxy: str = ""


class Containers(Block):
    """kinds: what runs them. native_pip: whether packages may be installed outside of one."""

    kinds: tuple[Literal["apptainer", "singularity", "docker", "oci"], ...] = ()
    built_outside: bool = False
    native_pip: Literal["allowed", "forbidden"] = "allowed"


class Names(Block):
    """What names of jobs must not say."""

    rule: str


class Transfer(Block):
    """tool: what brings files in and out (`permed send`). direction: `both`, or `one way` (in only)."""

    tool: Literal["posix", "sftp", "kista_sftp", "tacl", "filsluse"]
    direction: Literal["both", "one way"] = "both"


class Staging(Block):
    """directive: what a line begins with that has the scheduler copy files before and after."""

    directive: str


class Places(Block):
    """Folders by their use; `{p}` stands for the project."""

    folders: Mapping[str, str]


class Periods(_Facts):
    starts: tuple[str, ...] = ()
    carry_over: bool = False


class Billing(Block):
    """unit: what is counted per hour. floor: whole units. reserve: what is taken at the start of a job."""

    unit: str
    floor: bool = False
    reserve: Literal["requested_walltime"] = "requested_walltime"
    exhausted_reason: str = ""
    periods: Periods = Periods()
    tool: str = ""
    """The site's own command that shows what is left."""


class Priority(Block):
    model: str
    start: Mapping[str, int]
    ceiling: Mapping[str, int] = Field(default_factory=dict)
    per_minute: int
    ageing_jobs_per_user_and_project: int
    reserve_at: int


class NodeKind(_Facts):
    """Nodes that are alike. memory_gib: what jobs may use of it. gpu: `<flavor>-<memory>gb`."""

    count: int = 0
    cpus: int
    memory_gib: float | None = None
    gpus: int = 0
    gpu: str = ""

    @property
    def flavor(self) -> str:
        """The flavor that a job asks for: `a100-80gb` → `a100`."""
        return self.gpu.split("-", 1)[0]

    @property
    def gpu_memory(self) -> int:
        """MiB of one GPU by its name (`a100-80gb` → 81920); 0 where the name does not say."""
        last = self.gpu.rsplit("-", 1)[-1]
        return int(last.removesuffix("gb")) * 1024 if last.endswith("gb") and last[:-2].isdigit() else 0


class Per(_Facts):
    """`units` for every started `per`."""

    units: float = 1
    per: float = Field(gt=0)


class Charge(Block):
    """factors: units per CPU, GiB, GPU or node, of which the largest counts, `times` so much. pool: what it is taken
    from, where that is not the site's unit (`gpu hour`: a quota of GPU-hours)."""

    factors: Mapping[Literal["cpu", "memory_gib", "gpu", "node"], float | Per]
    times: float = 1
    pool: str = ""


class Partition(Block):
    """charge: None where no page says how it is billed. None of a limit: none is known."""

    default: bool = False
    arch: Arch | None = None
    nodes: tuple[NodeKind, ...] = ()
    whole_node: bool = False
    memory_option: Literal["mem-per-cpu", "mem", "none", "forbidden"] | None = None
    qos: str = ""
    """The quality of service that jobs of this partition must name."""
    max_hours: float | None = None
    max_units: int | None = None
    max_gpus: int | None = None
    nodes_min: int = 1
    nodes_max: int | None = None
    max_nodes_per_user: int | None = None
    max_nodes_per_project: int | None = None
    max_running: int | None = None
    charge: Charge | None = None

    @property
    def gpu_nodes(self) -> tuple[NodeKind, ...]:
        return tuple(kind for kind in self.nodes if kind.gpus)


class Preempt(_Facts):
    signal: str
    grace_s: int
    requeue: bool


class Qos(Block):
    """Limits laid over the partition's; `None` is no limit of its own. unlimited_time: no longest time at all."""

    max_hours: float | None = None
    unlimited_time: bool = False
    max_units: int | None = None
    max_gpus: int | None = None
    max_nodes: int | None = None
    nodes_min: int | None = None
    max_running: int | None = None
    preempt: Preempt | None = None
    must_checkpoint: bool = False


class Room(_Facts):
    gib: int | None = None
    files: int | None = None


class Storage(Block):
    home: Room | None = None
    project: Room | None = None
    userwork_deleted_days: tuple[int, int] | None = None


class Script(Block):
    """Lines that a job's script begins with, before anything of ours."""

    lines: tuple[str, ...]


class Vm(Block):
    """Machines that can be had where there is no scheduler."""

    vcpus: tuple[int, ...] = ()
    gib_per_vcpu: tuple[int, ...] = ()
    gpus: tuple[int, ...] = ()
    gpu_kinds: tuple[str, ...] = ()


class Prices(Block):
    kinds: tuple[str, ...]
    spot_share: float
    gpus: str


class Access(Block):
    rule: str


class Kubernetes(Block):
    """Where RayJobs go. claim: the volume claim with PERMED_HOME. queue: Kueue's local queue, if there is one."""

    namespace: str
    claim: str
    queue: str = ""
    gpu_resource: str = "nvidia.com/gpu"
    ray_version: str


class Profile(_Facts):
    """One site. `sources` names the pages; every block says which of them it was read from."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    operator: str
    sources: Mapping[str, Source]
    scheduler: Scheduler
    machine: Machine
    place: Place
    data: DataRule
    egress: Egress
    account: Account | None = None
    containers: Containers | None = None
    job_names: Names | None = None
    transfer: Transfer | None = None
    staging: Staging | None = None
    paths: Places | None = None
    billing: Billing | None = None
    priority: Priority | None = None
    partitions: Mapping[str, Partition] = Field(default_factory=dict)
    qos: Mapping[str, Qos] = Field(default_factory=dict)
    storage: Storage | None = None
    script: Script | None = None
    machines: Vm | None = None
    prices: Prices | None = None
    access: Access | None = None
    kubernetes: Kubernetes | None = None
    settings: Mapping[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _sourced(self) -> Self:
        unknown = {block.source for _, block in self.blocks() if block.source not in self.sources}
        if unknown:
            raise ValueError(f"sources has no {', '.join(sorted(unknown))}")
        if sum(partition.default for partition in self.partitions.values()) > 1:
            raise ValueError("more than one partition is the default")
        return self

    def blocks(self) -> Iterator[tuple[str, Block]]:
        """(dotted name, facts) of every block."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Block):
                yield name, value
        for key, partition in self.partitions.items():
            yield f"partitions.{key}", partition
            if partition.charge is not None:
                yield f"partitions.{key}.charge", partition.charge
        yield from ((f"qos.{key}", qos) for key, qos in self.qos.items())

    def is_verified(self, block: Block) -> bool:
        """Whether a public page of authority says so."""
        return self.sources[block.source].verified if block.verified is None else block.verified

    def cited(self, block: Block) -> str:
        """The block's source with its date, for people: `jobs/job_types/saga_job_types.md, read 2026-07-02`."""
        source = self.sources[block.source]
        doubt = "" if self.is_verified(block) else ", not verified"
        return f"{source.page}, read {source.checked.isoformat()}{doubt}"

    def default_partition(self) -> str:
        """Its name, '' where none is known."""
        return next((name for name, partition in self.partitions.items() if partition.default), "")


def load(site: str) -> Profile:
    """The profile of a site that ships, by name, or of an operator's own file, by path (`./mine.yaml`).

    Raises `NotFoundError`; `SettingsError` with every fact that is wrong.
    """
    if "/" in site or site.endswith(".yaml"):
        return read(Path(site))
    names = shipped()
    if site not in names:
        near = difflib.get_close_matches(site, names, n=1, cutoff=0.6)
        hint = f"Did you mean {near[0]}?" if near else "`permed catalog sites` lists them."
        raise NotFoundError(f"There is no site {site!r}.", remedy=hint)
    return _shipped(site)


def shipped() -> tuple[str, ...]:
    """Names of the sites that ship."""
    folder = resources.files("permed_compute.cluster") / "sites"
    return tuple(sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".yaml")))


@lru_cache(maxsize=32)
def _shipped(site: str) -> Profile:
    file = resources.files("permed_compute.cluster") / "sites" / f"{site}.yaml"
    return parse(file.read_text(encoding="utf-8"), f"site {site}")


def read(path: Path) -> Profile:
    """A profile from a file. Raises `NotFoundError`, `SettingsError`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise NotFoundError(f"{path} cannot be read ({error.__class__.__name__}).") from None
    return parse(text, str(path))


def parse(text: str, where: str = "<text>") -> Profile:
    """A profile from YAML. Raises `SettingsError`."""
    import yaml

    try:
        return Profile.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise SettingsError(f"{where}{line} is not YAML.") from None
    except ValidationError as error:
        said = "; ".join(
            f"{'.'.join(str(step) for step in row['loc']) or 'file'}: {str(row['msg']).removeprefix('Value error, ')}"
            for row in error.errors()
        )
        raise SettingsError(
            f"{where}: {said}.", remedy="The profiles in cluster/sites show how it is written."
        ) from None
