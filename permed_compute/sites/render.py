"""The exact file that a site's scheduler is given for a request; the same request gives the same bytes."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import PurePath

from permed_compute.errors import Problem, SpecError
from permed_compute.sites.request import Request

_OPTION = re.compile(r"--[a-z][a-z0-9-]*(=[^\s\"'`$;&|<>\\]+)?")
_OURS = frozenset({
    "account", "job-name", "partition", "qos", "time", "nodes", "ntasks-per-node", "cpus-per-task", "gpus-per-node",
    "output", "error", "signal", "requeue", "no-requeue", "array", "dependency", "open-mode", "export",
})  # fmt: skip


def sbatch(
    request: Request,
    command: Sequence[str],
    *,
    job_name: str = "",
    output: PurePath | str = "",
    signal: str = "USR1",
    signal_s: int = 120,
    requeue: bool = True,
    array: str = "",
    dependency: str = "",
    environment: Mapping[str, str] | None = None,
    stage_in: Sequence[tuple[str, str]] = (),
    stage_out: Sequence[tuple[str, str]] = (),
) -> str:
    """The script for `sbatch`. Judge the request first (`check.require`).

    command: what runs, once, on the first node, as the batch shell's successor (`exec`), so that signals reach it.
    Further nodes are reached by the site's launcher from there; `in_container` puts any command into the image.
    signal: what comes `signal_s` seconds before the time limit (`--signal=B:`); preemption sends SIGTERM in any case.
    output: the log, with Slurm's `%` patterns. array, dependency: Slurm's own words for them.
    stage_in, stage_out: (from, to), where the site's scheduler copies files. Raises `SpecError`.
    """
    facts = request.room
    if request.site.scheduler.kind != "slurm":
        raise SpecError("site", [Problem(request.site.name, "has no Slurm", remedy="Use `permed run` on the machine.")])
    lines = [f"--job-name={job_name or request.name}", f"--account={request.account}"]
    lines += [f"--partition={request.partition}"] if request.partition else []
    lines += [f"--qos={request.qos}"] if request.qos else []
    lines += [f"--time={slurm_time(request.seconds)}", f"--nodes={request.nodes}", "--ntasks-per-node=1",
              f"--cpus-per-task={request.cpus}"]  # fmt: skip
    if request.memory_option == "mem-per-cpu":
        lines.append(f"--mem-per-cpu={request.memory_per_cpu}M")
    elif request.memory_option:
        lines.append(f"--mem={request.memory}M")
    lines += [f"--gpus-per-node={request.gpus}"] if request.gpus else []
    lines += ["--exclusive"] if facts is not None and facts.whole_node else []
    lines += [f"--signal=B:{signal}@{signal_s}"] if signal_s else []
    lines += ["--requeue" if requeue else "--no-requeue", "--open-mode=append"]
    lines += [f"--output={output}"] if output else []
    lines += [f"--array={array}"] if array else []
    lines += [f"--dependency={dependency}"] if dependency else []
    lines += [_further(option) for option in request.options]
    body = [f"export {name}={shlex.quote(value)}" for name, value in sorted((environment or {}).items())]
    script = request.site.script
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {line}" for line in lines),
            *_staging(request, stage_in, stage_out),
            "",
            *(script.lines if script is not None else ()),
            *body,
            f"exec {shlex.join(in_container(request, command))}",
            "",
        ]
    )


def in_container(request: Request, command: Sequence[str]) -> list[str]:
    """`command` inside the request's image, with the site's own runtime and GPUs; as it is where there is no image."""
    if not request.image:
        return list(command)
    facts = request.site.containers
    runtime = facts.kinds[0] if facts is not None and facts.kinds else "apptainer"
    passes = {"nvidia": ["--nv"], "amd": ["--rocm"]}.get(request.site.machine.gpu_vendor, []) if request.gpus else []
    return [runtime, "exec", *passes, request.image, *command]


def slurm_time(seconds: int) -> str:
    """90061 → `'1-01:01:01'`."""
    minutes, second = divmod(seconds, 60)
    hours, minute = divmod(minutes, 60)
    day, hour = divmod(hours, 24)
    return f"{day}-{hour:02d}:{minute:02d}:{second:02d}"


def _further(option: str) -> str:
    name = option.removeprefix("--").split("=")[0]
    if _OPTION.fullmatch(option) is None:
        raise SpecError("options", [Problem(option, "is not written --name=value", remedy="One option each.")])
    if name in _OURS:
        raise SpecError("options", [Problem(f"--{name}", "is set from the job and the site's profile")])
    return option


def _staging(request: Request, into: Sequence[tuple[str, str]], out: Sequence[tuple[str, str]]) -> list[str]:
    pairs = [("IN", pair) for pair in into] + [("OUT", pair) for pair in out]
    if not pairs:
        return []
    if request.site.staging is None:
        raise SpecError("staging", [Problem(request.site.name, "its scheduler copies no files",
                                            remedy="Bring them with `permed send`.")])  # fmt: skip
    for _, pair in pairs:
        for path in pair:
            if not path.startswith("/") or re.search(r"[*?\[\s]", path):
                raise SpecError("staging", [Problem(
                    path, "must be absolute, without wildcards and spaces",
                    remedy=request.site.cited(request.site.staging))])  # fmt: skip
    return [f"{request.site.staging.directive} {way} {source} {to}" for way, (source, to) in pairs]
