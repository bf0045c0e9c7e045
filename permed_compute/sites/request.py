"""What a job asks of a site: the allocation, in the scheduler's own terms. From a job's spec, or from a script.

One allocation holds the whole job: on every node one task, which has all of the node's share, and Ray inside. What is
rendered, checked and billed is this one value, so that the three never differ.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from permed_compute.errors import Problem, SpecError
from permed_compute.sites.profile import NodeKind, Partition, Profile, Qos
from permed_compute.spec import DataClass, JobSpec

_MIB_OF = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024**2}


@dataclass(frozen=True, slots=True)
class Choice:
    """What the user says about the site, beside the job. Everything may be left out.

    account: who pays there; '' is the last part of the job's own. image: a container image at the site. options:
    further options of the scheduler (`--reservation=course`), taken as they are if nothing forbids them.
    """

    account: str = ""
    partition: str = ""
    qos: str = ""
    image: str = ""
    options: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """An allocation. cpus, memory (MiB) and gpus are per node; seconds is its time limit.

    memory_option: how memory is asked for; '' not at all. `workers` of the job share the nodes, `workers_per_node` on
    each. arch: what the program that runs was built for; '' where nobody can tell. data_class: None of a script.
    """

    site: Profile
    name: str
    account: str
    partition: str
    qos: str
    seconds: int
    nodes: int
    cpus: int
    memory: int
    gpus: int
    memory_option: str
    workers: int = 1
    workers_per_node: int = 1
    image: str = ""
    arch: str = ""
    data_class: DataClass | None = None
    paths: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    gpu_wanted: str = ""
    """The flavor that the job names, '' for any."""

    @property
    def room(self) -> Partition | None:
        """The partition's facts, None where the site has none of that name."""
        return self.site.partitions.get(self.partition)

    @property
    def service(self) -> Qos | None:
        return self.site.qos.get(self.qos)

    @property
    def memory_per_cpu(self) -> int:
        """MiB, rounded up: the scheduler gives memory in steps of the cores."""
        return math.ceil(self.memory / self.cpus)


def of(spec: JobSpec, site: Profile, choice: Choice | None = None) -> Request:
    """The allocation that `spec` needs there. An elastic job asks for its most workers, and one that may do without a
    GPU does so where the site has none of its kinds.

    Nothing is judged here: `check.require` says what the site would refuse.
    """
    choice, spec = choice or Choice(), _on_cores(spec, site)
    need = spec.resources
    partition = choice.partition or _partition(spec, site)
    facts = site.partitions.get(partition)
    node = _node(spec, facts)
    fits = 1 if site.scheduler.kind == "kuberay" else _fits(spec, node)  # a pod holds one worker
    workers = need.workers.max
    nodes = math.ceil(workers / fits)
    each = math.ceil(workers / nodes)
    whole = facts is not None and facts.whole_node and node is not None
    option = (facts.memory_option if facts is not None else None) or site.scheduler.memory_option
    memory = node.memory_gib if whole and node is not None else None
    request = Request(
        site, spec.name, choice.account or spec.account.rsplit("/", 1)[-1], partition,
        choice.qos or (facts.qos if facts is not None else ""), spec.time_limit, nodes,
        node.cpus if whole and node is not None else math.ceil(need.cpus * each),
        math.floor(memory * 1024) if memory else need.memory * each,
        node.gpus if whole and node is not None else math.ceil(need.gpus * each),
        "" if option in ("none", "forbidden") else option, workers, each, choice.image, _arch(site, choice.image),
        spec.data_class, tuple(filter(None, (*(ref.path for ref in spec.inputs), spec.code, choice.image))),
        choice.options,
        next((flavor for flavor in need.order if flavor not in ("cpu", "gpu")), ""),
    )  # fmt: skip
    if request.memory_option == "mem-per-cpu":
        return replace(request, memory=request.memory_per_cpu * request.cpus)
    return request


def _on_cores(spec: JobSpec, site: Profile) -> JobSpec:
    need = spec.resources
    there = {kind.flavor for facts in site.partitions.values() for kind in facts.gpu_nodes}
    wanted = {flavor for flavor in need.order if flavor != "cpu"}
    if not need.gpus or "cpu" not in need.order or wanted & there or (there and "gpu" in wanted):
        return spec
    cores = need.model_copy(update={"gpus": 0, "gpu_memory": 0, "flavors": ("cpu",)})
    return spec.model_copy(update={"resources": cores})


def _partition(spec: JobSpec, site: Profile) -> str:
    """The default one, or the first whose GPUs, or else whose nodes, are what the job asks for; else the default."""
    fallback = site.default_partition()
    for flavor in spec.resources.order:
        for name in sorted(site.partitions, key=lambda name: name != fallback):
            facts = site.partitions[name]
            if flavor == "cpu":
                if any(not kind.gpus and _fits(spec, kind) for kind in facts.nodes if _holds(spec, kind)):
                    return name
            elif any(flavor in ("gpu", kind.flavor) and _holds(spec, kind) for kind in facts.gpu_nodes):
                return name
    if spec.resources.gpus:
        return next((name for name, facts in site.partitions.items() if facts.gpu_nodes or not facts.nodes), fallback)
    return fallback


def _node(spec: JobSpec, facts: Partition | None) -> NodeKind | None:
    """The first kind of node that holds a worker; the first of all where none does."""
    kinds = facts.nodes if facts is not None else ()
    return next((kind for kind in kinds if _holds(spec, kind)), kinds[0] if kinds else None)


def _holds(spec: JobSpec, node: NodeKind) -> bool:
    need = spec.resources
    return (
        need.cpus <= node.cpus and need.gpus <= node.gpus and need.gpu_memory <= (node.gpu_memory or need.gpu_memory)
        and (node.memory_gib is None or need.memory <= node.memory_gib * 1024)
    )  # fmt: skip


def _fits(spec: JobSpec, node: NodeKind | None) -> int:
    """So many workers share one node; 1 where a node is too small, and all where nothing is known of it."""
    need = spec.resources
    if node is None:
        return need.workers.max
    most = [node.cpus / need.cpus]
    if node.memory_gib is not None:
        most.append(node.memory_gib * 1024 / need.memory)
    if need.gpus:
        most.append(node.gpus / need.gpus)
    return max(1, math.floor(min(most)))


def _arch(site: Profile, image: str) -> str:
    """Of the image, else of the login nodes: an environment is built where its user sits."""
    return image_arch(Path(image)) if image else (site.machine.login or site.machine.arch)


# From SIF's specification: 32 bytes of launch script, then magic, version and architecture, each ended by a zero.
_SIF_ARCH = {b"01": "i386", b"02": "x86_64", b"03": "arm", b"04": "aarch64", b"06": "ppc64le"}


def image_arch(image: Path) -> str:
    """The architecture that a SIF image was built for, from its header; '' where it is not there or is no SIF."""
    try:
        with image.open("rb") as file:
            head = file.read(48)
    except OSError:
        return ""
    return _SIF_ARCH.get(head[45:47], "") if head[32:41] == b"SIF_MAGIC" else ""


# --------------------------------------------------------------------------------------------- from a script

_SHORT = {"-A": "account", "-p": "partition", "-q": "qos", "-t": "time", "-N": "nodes", "-n": "ntasks",
          "-c": "cpus-per-task", "-J": "job-name", "-o": "output", "-e": "error", "-G": "gpus",
          "-D": "chdir"}  # fmt: skip
_SHAPE = ("account", "partition", "qos", "time", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "job-name",
          "gpus", "gpus-per-node", "gres", "mem", "mem-per-cpu", "mem-per-gpu")  # fmt: skip
_PATHS = ("output", "error", "chdir")


def of_script(text: str, site: Profile, source: str = "<script>") -> Request:
    """The allocation that a script's `#SBATCH` lines ask for. Raises `SpecError` for a value that is none."""
    given = dict(_options(text))
    whole = site.partitions.get(given.get("partition", site.default_partition()))
    problems: list[Problem] = []

    def number(name: str, otherwise: int) -> int:
        found = re.fullmatch(r"(?:[\w-]+:)*(\d+)(?:-\d+)?", given.get(name, str(otherwise)))
        if found is None:
            problems.append(Problem(f"--{name}", f"{given[name]!r} is no number"))
        return int(found[1]) if found else otherwise

    tasks = number("ntasks-per-node", 0) or max(1, math.ceil(number("ntasks", 1) / max(1, number("nodes", 1))))
    cpus, nodes = tasks * number("cpus-per-task", 1), number("nodes", 1)
    if whole is not None and whole.whole_node and whole.nodes:
        cpus = whole.nodes[0].cpus
    gpus = number("gpus-per-node", 0) or math.ceil(number("gpus", 0) / nodes)
    if not gpus and given.get("gres", "").startswith("gpu"):
        gpus = number("gres", 0)
    option = next((name for name in ("mem", "mem-per-cpu", "mem-per-gpu") if name in given), "")
    times = {"mem": 1, "mem-per-cpu": cpus, "mem-per-gpu": gpus}
    try:
        memory = math.ceil(_mebibytes(given[option]) * times[option]) if option else 0
        seconds = _seconds(given["time"]) if "time" in given else 0
    except ValueError as error:
        problems.append(Problem("#SBATCH", str(error)))
    if problems:
        raise SpecError(source, problems)
    return Request(
        site, given.get("job-name", ""), given.get("account", ""), given.get("partition", site.default_partition()),
        given.get("qos", ""), seconds, nodes, cpus, memory, gpus, option,
        paths=tuple(given[name] for name in _PATHS if name in given),
        options=tuple(f"--{k}={v}" if v else f"--{k}" for k, v in given.items() if k not in (*_SHAPE, *_PATHS)),
    )  # fmt: skip


def _options(text: str) -> list[tuple[str, str]]:
    """(long name, value) of every option in the `#SBATCH` lines, which end at the first command."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        words = shlex.split(line.removeprefix("#SBATCH"), comments=True)
        while words:
            word = words.pop(0)
            name, equals, value = word.partition("=")
            if name[:2] in _SHORT and not name.startswith("--"):
                value, name = word[2:].removeprefix("=") or (words.pop(0) if words else ""), _SHORT[name[:2]]
            elif not equals and words and not words[0].startswith("-"):
                value = words.pop(0)
            found.append((name.removeprefix("--"), value))
    return found


def _mebibytes(text: str) -> float:
    match = re.fullmatch(r"(\d+)([KMGT]?)B?", text.upper())
    if match is None:
        raise ValueError(f"{text!r} is not an amount of memory")
    return int(match[1]) * _MIB_OF[match[2] or "M"]


def _seconds(text: str) -> int:
    """Slurm's forms: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, dash, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in (*parts, days or "0")) or len(parts) > 3:
        raise ValueError(f"{text!r} is not a time limit")
    numbers = [int(part) for part in parts]
    if dash:
        hours, minutes, seconds = (*numbers, 0, 0)[:3]
    elif len(numbers) == 3:
        hours, minutes, seconds = numbers
    else:
        hours, (minutes, seconds) = 0, (*numbers, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
