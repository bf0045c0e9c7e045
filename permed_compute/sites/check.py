"""What a site would refuse, found before it is asked; each refusal names the rule, and the page the rule stands on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from permed_compute.errors import SiteRefusalError
from permed_compute.sites import cost
from permed_compute.sites.profile import Block, NodeKind
from permed_compute.sites.request import Request
from permed_compute.spec import DataClass, format_duration

_CLASSES = tuple(DataClass)


@dataclass(frozen=True, slots=True)
class Refusal:
    """One rule that the request breaks. source: the page, and the day it was read. verified: whether it says so."""

    rule: str
    sentence: str
    remedy: str
    source: str
    verified: bool = True

    def as_dict(self) -> dict[str, object]:
        return {
            "rule": self.rule, "sentence": self.sentence, "remedy": self.remedy, "source": self.source,
            "verified": self.verified,
        }  # fmt: skip


def require(request: Request) -> None:
    """Raises `SiteRefusalError` naming every rule that the request breaks."""
    broken = refusals(request)
    if broken:
        raise SiteRefusalError(request.site.name, [refusal.as_dict() for refusal in broken])


def refusals(request: Request) -> list[Refusal]:
    """Every rule of the site that the request breaks, in the order of `RULES`."""
    return [refusal for rule in RULES for refusal in rule(request)]


def doubts(request: Request) -> list[str]:
    """What the judgement rests on that no page confirms, and what could not be judged."""
    site = request.site
    said = []
    if site.scheduler.kind == "none":
        said.append("No scheduler takes jobs there: `permed run` on the machine itself.")
    if request.data_class is None:
        said.append("The script does not say what class its data are: not judged.")
    if request.image and not request.arch:
        said.append("The image is not on this machine, or is no SIF: its architecture is not judged.")
    used: list[tuple[str, Block | None]] = [
        ("data", site.data), ("account", site.account), (f"partition {request.partition}", request.room),
        (f"qos {request.qos}", request.service), ("scheduler", site.scheduler),
    ]  # fmt: skip
    for name, block in used:
        if block is not None and not site.is_verified(block):
            said.append(f"Not verified, {name}: {site.sources[block.source].page}.")
    return said


def _refuse(request: Request, rule: str, block: Block, sentence: str, remedy: str) -> Refusal:
    site = request.site
    return Refusal(rule, f"{site.name}: {sentence}", remedy, site.cited(block), site.is_verified(block))


def account(request: Request) -> Iterator[Refusal]:
    facts = request.site.account
    if facts is not None and not re.fullmatch(facts.pattern, request.account):
        said = f"{request.account!r} is not an account's form" if request.account else "no account is named"
        yield _refuse(request, "ACCOUNT", facts, f"{said}.", f"Write --account as in {facts.example}.")


def partition(request: Request) -> Iterator[Refusal]:
    site = request.site
    if site.partitions and request.partition and request.room is None:
        yield _refuse(request, "PARTITION", site.scheduler, f"there is no partition {request.partition!r}.",
                      f"Its partitions: {', '.join(site.partitions)}.")  # fmt: skip
    if site.qos and request.qos and request.service is None and request.qos not in _own_services(request):
        yield _refuse(request, "QOS", site.scheduler, f"there is no quality of service {request.qos!r}.",
                      f"It has: {', '.join(site.qos)}.")  # fmt: skip


def _own_services(request: Request) -> set[str]:
    """What partitions ask for by name, and the account's own, which NRIS has for every project."""
    return {facts.qos for facts in request.site.partitions.values()} | {request.account}


def memory_option(request: Request) -> Iterator[Refusal]:
    facts = request.room
    option = (facts.memory_option if facts is not None else None) or request.site.scheduler.memory_option
    block = facts if facts is not None and facts.memory_option else request.site.scheduler
    asked = [word.split("=")[0] for word in request.options if word.startswith("--mem")]
    asked += [f"--{request.memory_option}"] if request.memory_option else []
    if option == "forbidden" and asked:
        yield _refuse(request, "MEMORY_OPTION", block, f"in {request.partition}, {asked[0]} is not allowed.",
                      "Leave the option out: the job has the whole node's memory.")  # fmt: skip
    elif option not in ("none", "forbidden") and not asked and "mem" in request.site.scheduler.required:
        yield _refuse(request, "MEMORY_OPTION", request.site.scheduler, "a job must say how much memory it needs.",
                      f"Write --{option}.")  # fmt: skip


def time_limit(request: Request) -> Iterator[Refusal]:
    facts, service = request.room, request.service
    if not request.seconds and "time" in request.site.scheduler.required:
        yield _refuse(request, "TIME", request.site.scheduler, "a job must give its time limit.", "Write --time.")
    if service is not None and service.unlimited_time:
        return
    for name, block in ((request.qos, service), (request.partition, facts)):
        if block is not None and block.max_hours is not None and request.seconds > block.max_hours * 3600:
            most = format_duration(round(block.max_hours * 3600))
            yield _refuse(
                request, "TIME", block, f"{format_duration(request.seconds)} is above the {most} of {name}.",
                f"Write time_limit: {most} and continuations: the job goes on from its checkpoint.",
            )  # fmt: skip
            return


def units(request: Request) -> Iterator[Refusal]:
    if request.room is None or request.room.charge is None:
        return
    asked = cost.of(request).rate.units
    for name, block in ((request.qos, request.service), (request.partition, request.room)):
        if block is not None and block.max_units is not None and asked > block.max_units:
            yield _refuse(request, "UNITS", block, f"{asked} billing units are above the {block.max_units} of {name}.",
                          "Ask for fewer workers, or for less memory or fewer cores each.")  # fmt: skip
            return


def nodes(request: Request) -> Iterator[Refusal]:
    facts, service = request.room, request.service
    least, most, block = 1, None, request.site.scheduler  # type: int, int | None, Block
    if facts is not None:
        limits = (facts.nodes_max, facts.max_nodes_per_user, facts.max_nodes_per_project)
        least, most, block = facts.nodes_min, min(filter(None, limits), default=None), facts
    if service is not None and (service.max_nodes is not None or service.nodes_min is not None):
        least, most, block = service.nodes_min or 1, service.max_nodes or most, service
    if request.nodes < least:
        yield _refuse(request, "NODES", block, f"{request.nodes} node(s) are fewer than the {least} of "
                      f"{request.qos or request.partition}.", _elsewhere(request))  # fmt: skip
    if most is not None and request.nodes > most:
        yield _refuse(request, "NODES", block, f"{request.nodes} nodes are more than the {most} of "
                      f"{request.qos or request.partition}.", "Ask for fewer workers.")  # fmt: skip


def _elsewhere(request: Request) -> str:
    others = ", ".join(name for name in request.site.partitions if name != request.partition)
    return f"Other partitions: {others}." if others else "Ask for more workers."


def gpus(request: Request) -> Iterator[Refusal]:
    facts = request.room
    if request.gpus and facts is not None and facts.nodes and not facts.gpu_nodes:
        yield _refuse(request, "GPUS", facts, f"{request.partition} has no GPUs.", _elsewhere(request))
    elif not request.gpus and facts is not None and facts.nodes and all(kind.gpus for kind in facts.nodes):
        yield _refuse(request, "GPUS", facts, f"{request.partition} is for jobs that use GPUs.", _elsewhere(request))
    elif request.gpu_wanted and facts is not None and facts.nodes:
        kinds = {kind.flavor for kind in facts.gpu_nodes}
        if request.gpu_wanted not in kinds:
            yield _refuse(request, "GPUS", facts, f"{request.partition} has {', '.join(sorted(kinds)) or 'no GPUs'}, "
                          f"not {request.gpu_wanted}.", "Name a flavor that it has, or gpu for any.")  # fmt: skip
    total = request.gpus * request.nodes
    for name, block in ((request.qos, request.service), (request.partition, facts)):
        if block is not None and block.max_gpus is not None and total > block.max_gpus:
            yield _refuse(request, "GPUS", block, f"{total} GPUs are above the {block.max_gpus} of {name}.",
                          "Ask for fewer workers.")  # fmt: skip
            return


def node_size(request: Request) -> Iterator[Refusal]:
    facts = request.room
    if facts is not None and facts.nodes and not any(_holds(request, kind) for kind in facts.nodes):
        sizes = "; ".join(f"{kind.cpus} cores, {kind.memory_gib or '?'} GiB, {kind.gpus} GPUs" for kind in facts.nodes)
        yield _refuse(
            request, "NODE_SIZE", facts, f"no node of {request.partition} has {request.cpus} cores, "
            f"{request.memory / 1024:g} GiB and {request.gpus} GPUs.", f"Its nodes: {sizes}.",
        )  # fmt: skip


def _holds(request: Request, kind: NodeKind) -> bool:
    memory = kind.memory_gib is None or request.memory <= kind.memory_gib * 1024
    return request.cpus <= kind.cpus and request.gpus <= kind.gpus and memory


def arch(request: Request) -> Iterator[Refusal]:
    facts, machine = request.room, request.site.machine
    there = (facts.arch if facts is not None else None) or machine.arch
    block = facts if facts is not None and facts.arch else machine
    if request.arch and request.arch != there:
        what = "the image is" if request.image else "what the login nodes install is"
        yield _refuse(request, "ARCH", block, f"{what} {request.arch}, the nodes of {request.partition} are {there}.",
                      f"Give --image a container that was built for {there}.")  # fmt: skip


def container(request: Request) -> Iterator[Refusal]:
    facts = request.site.containers
    if facts is not None and facts.native_pip == "forbidden" and request.arch and not request.image:
        yield _refuse(request, "CONTAINER", facts, "Python packages may be installed in containers only.",
                      "Give --image; cluster/containers/ has the recipe.")  # fmt: skip


def data_class(request: Request) -> Iterator[Refusal]:
    most = request.site.data.max_class
    if request.data_class is not None and _CLASSES.index(request.data_class) > _CLASSES.index(most):
        yield _refuse(
            request, "DATA_CLASS", request.site.data, f"data of class {request.data_class.value} may not be brought "
            f"there: {most.value} at most.", "Choose a site for it (`permed site list`), or anonymised data.",
        )  # fmt: skip


def identifiers(request: Request) -> Iterator[Refusal]:
    """Names and paths are seen by everybody who may list jobs."""
    facts = request.site.job_names or request.site.data
    if _identifies(request.name):
        yield _refuse(request, "IDENTIFIER", facts, "the job's name holds what looks like a person's identifier.",
                      "Rename it: names are shown to all users and logged.")  # fmt: skip
    bad = [number for number, path in enumerate(request.paths, 1) if _identifies(path)]
    if bad:
        yield _refuse(
            request, "IDENTIFIER", facts, f"{len(bad)} of {len(request.paths)} paths hold what looks like a person's "
            f"identifier (the first is number {bad[0]}).", "Rename the folder or file: paths stand in logs.",
        )  # fmt: skip


def _identifies(text: str) -> bool:
    """A Norwegian identity number (also D-, H- and synthetic ones), or a DICOM person name (`Family^Given`)."""
    return "^" in text or any(_is_identity_number(found[1] + found[2]) for found in _ELEVEN.finditer(text))


_ELEVEN = re.compile(r"(?<!\d)(\d{6})[ _-]?(\d{5})(?!\d)")
_WEIGHTS = ((3, 7, 6, 1, 8, 9, 4, 5, 2, 1), (5, 4, 3, 2, 7, 6, 5, 4, 3, 2, 1))


def _is_identity_number(digits: str) -> bool:
    """By its day and month and both control digits (Skatteetaten: D +40 days; H +40, synthetic +65/+80 months)."""
    day, month = int(digits[:2]), int(digits[2:4])
    if not any(1 <= day - shift <= 31 for shift in (0, 40)) or not any(
        1 <= month - shift <= 12 for shift in (0, 40, 65, 80)
    ):
        return False
    return all(sum(w * int(d) for w, d in zip(weights, digits, strict=False)) % 11 == 0 for weights in _WEIGHTS)


RULES: tuple[Callable[[Request], Iterator[Refusal]], ...] = (
    account, partition, arch, container, memory_option, time_limit, units, nodes, gpus, node_size,
    data_class, identifiers,
)  # fmt: skip
