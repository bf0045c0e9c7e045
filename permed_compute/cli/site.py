"""`permed site`: what is known of the compute sites, and a job as they would see it, before it is submitted."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import jobfile, words
from permed_compute.cli.session import Session

if TYPE_CHECKING:
    from permed_compute.settings import Settings
    from permed_compute.sites.profile import Profile
    from permed_compute.sites.request import Request

_TO_COME = "JOB"
"""In place of the id that submission gives."""

app = typer.Typer(
    no_args_is_help=True, help="Compute sites: what is known of them, and what they would say to a job (--site NAME)."
)
SiteArgument = Annotated[
    str | None, typer.Argument(metavar="[SITE]", help="A name of `permed site list`, or a profile's own file.")
]
JobArgument = Annotated[
    str, typer.Argument(metavar="JOB", help="A job file, a shipped job's name, or a script with #SBATCH lines.")
]
AccountOption = Annotated[
    str | None, typer.Option("--account", help="Who pays there; default: setting site_account, or the job's own.")
]
PartitionOption = Annotated[str, typer.Option("--partition", help="Default: the first that has what the job needs.")]
QosOption = Annotated[str, typer.Option("--qos", help="Quality of service, e.g. devel.")]
ImageOption = Annotated[
    str | None, typer.Option("--image", help="Container image at the site; default: setting site_image.")
]
FurtherOption = Annotated[
    list[str] | None, typer.Option("--option", help="A further option of the scheduler, --name=value. Repeatable.")
]


@app.command("list")
def list_sites(ctx: typer.Context) -> None:
    """List the sites: scheduler, architecture, the most sensitive data, the way out, and how sure that is.

    Example: permed site list
    """
    from permed_compute.sites import profile

    rows = [_row(profile.load(name)) for name in profile.shipped()]

    def show(console: Any) -> None:
        table = words.table("SITE", "SCHEDULER", "NODES", "GPUS", "DATA", "WAY OUT", "FILES BY", "VERIFIED", "READ")
        for row in rows:
            sure = f"{row['verified']} of {row['facts']}"
            table.add_row(row["name"], row["scheduler"], row["arch"], row["gpus"] or "–", row["max_data_class"],
                          row["egress"], row["transfer"] or "–", sure, row["checked"])  # fmt: skip
        console.print(table)

    Session.of(ctx).answer(rows, show)


def _row(site: Profile) -> dict[str, Any]:
    blocks = [block for _, block in site.blocks()]
    arches = {facts.arch or site.machine.arch: None for facts in site.partitions.values()} or {site.machine.arch: None}
    kinds = [kind.gpu for facts in site.partitions.values() for kind in facts.gpu_nodes]
    return {
        "name": site.name, "operator": site.operator, "scheduler": site.scheduler.kind, "arch": ", ".join(arches),
        "gpus": ", ".join(kinds or (site.machines.gpu_kinds if site.machines is not None else ())),
        "max_data_class": site.data.max_class.value, "egress": site.egress.kind,
        "transfer": site.transfer.tool if site.transfer is not None else "",
        "verified": sum(map(site.is_verified, blocks)), "facts": len(blocks),
        "checked": max(source.checked for source in site.sources.values()).isoformat(),
    }  # fmt: skip


@app.command("show")
def show_site(ctx: typer.Context, site: SiteArgument = None) -> None:
    """Show every fact of a site with the page it was read from, the day, and whether it is verified.

    Example: permed site show olivia
    """
    session = Session.of(ctx)
    found = _site(session, site)
    rows: list[dict[str, Any]] = [
        {"fact": name, "value": block.model_dump(mode="json", exclude={"source", "verified", "charge"},
                                                 exclude_defaults=True),
         "source": found.cited(block), "verified": found.is_verified(block)}
        for name, block in found.blocks()
    ]  # fmt: skip

    def show(console: Any) -> None:
        from rich.markup import escape

        console.print(f"{escape(found.name)}: {escape(found.operator)}")
        table = words.table("FACT", "VALUE", "", "SOURCE")
        for row in rows:
            said = "; ".join(f"{key} {_plain(value)}" for key, value in row["value"].items())
            mark = "[green]✓[/]" if row["verified"] else "[yellow]?[/]"
            table.add_row(row["fact"], escape(said), mark, escape(row["source"]))
        console.print(table)

    session.answer({"name": found.name, "operator": found.operator, "facts": rows}, show)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    return " | ".join(map(_plain, value)) if isinstance(value, list) else str(value)


@app.command("check")
def check(
    ctx: typer.Context,
    job: JobArgument,
    account: AccountOption = None,
    partition: PartitionOption = "",
    qos: QosOption = "",
    image: ImageOption = None,
    further: FurtherOption = None,
    sets: jobfile.SetOption = None,
    inputs: jobfile.InputOption = None,
) -> None:
    """Say what the site would refuse, and the page of each rule, before anything is submitted. Exit 5 where it would.

    Example: permed site check job.yaml --site saga --account nn9999k
    """
    from permed_compute.sites import check as rules

    session = Session.of(ctx)
    request, _ = _request(session, job, account, partition, qos, image, further, sets, inputs)
    rules.require(request)
    notes = rules.doubts(request)
    session.answer(
        {**_shape(request), "refusals": [], "doubts": notes},
        lambda console: _said(console, request, notes),
    )


def _said(console: Any, request: Request, notes: list[str]) -> None:
    where = f", partition {request.partition}" if request.partition else ""
    console.print(f"[green]✓[/] {request.name} may be submitted at {request.site.name}{where}: "
                  f"{request.nodes} × {request.cpus} cores, {words.size(request.memory * 2**20)}"
                  + (f", {request.gpus} GPUs" if request.gpus else ""))  # fmt: skip
    for note in notes:
        console.print(f"[yellow]?[/] {note}", markup=True)


@app.command("render")
def render(
    ctx: typer.Context,
    job: JobArgument,
    account: AccountOption = None,
    partition: PartitionOption = "",
    qos: QosOption = "",
    image: ImageOption = None,
    further: FurtherOption = None,
    sets: jobfile.SetOption = None,
    inputs: jobfile.InputOption = None,
) -> None:
    """Print the exact file that the site's scheduler is given: a script for sbatch, or manifests for KubeRay.

    JOB stands in it for the id that a job gets when it is submitted.

    Example: permed site render job.yaml --site olivia --account nn9999k --image permed.sif
    """
    import sys

    from permed_compute.execution.port import Attempt
    from permed_compute.execution.slurm import SlurmExecutor
    from permed_compute.sites import check as rules
    from permed_compute.sites import kuberay

    session = Session.of(ctx)
    if is_script(Path(job)):
        raise typer.BadParameter("a script is there already: `permed site check` reads it", param_hint="JOB")
    request, settings = _request(session, job, account, partition, qos, image, further, sets, inputs)
    rules.require(request)
    spec, validated = jobfile.load(job, sets, inputs), ""
    if request.site.scheduler.kind == "kuberay":
        made = kuberay.render(spec, request)
        text, validated = made.text, made.validated
    else:
        executor = SlurmExecutor(settings, settings.paths)
        paths = settings.paths.job(_TO_COME).attempt(1)
        text = executor.script(Attempt(_TO_COME, 1, spec, (), "", settings.paths.root, paths))
    if session.as_json:
        session.answer({**_shape(request), "text": text, "validated": validated})
    else:
        sys.stdout.write(text)


@app.command("cost")
def cost(
    ctx: typer.Context,
    job: JobArgument,
    account: AccountOption = None,
    partition: PartitionOption = "",
    qos: QosOption = "",
    image: ImageOption = None,
    used: Annotated[str, typer.Option("--used", help="Also: what stays charged when it has run so long.")] = "",
    left: Annotated[
        float | None, typer.Option("--left", help="What is left, in hours of the pool; default: ask Slurm, if here.")
    ] = None,
    sets: jobfile.SetOption = None,
    inputs: jobfile.InputOption = None,
) -> None:
    """Say what a job costs before it is submitted: per hour, reserved at its start, and against what is left.

    Example: permed site cost job.yaml --site saga --account nn9999k --left 5000
    """
    import time

    from permed_compute.admission.billing import period_of
    from permed_compute.sites import cost as costs

    session = Session.of(ctx)
    request, _ = _request(session, job, account, partition, qos, image, None, sets, inputs)
    found = costs.of(request)
    have = left if left is not None else costs.left(request)
    period = period_of(request.site.name, int(time.time() * 1000)) if request.site.billing is not None else None
    ends = period.end if period is not None and period.start else 0
    row = {
        **_shape(request), "pool": found.pool, "billing_units": float(found.rate.units),
        "gpu_hours_per_hour": float(found.rate.gpu_hours), "per_hour": float(found.per_hour),
        "reserved": float(found.reserved), "left": have, "fits": have is None or found.reserved <= have,
        "period_ends": ends, "source": found.source,
    }  # fmt: skip
    if used:
        row["charged"] = float(found.charged(words.duration(used)))

    def show(console: Any) -> None:
        pool = f"{found.pool}s"
        console.print(words.facts([
            ("job", f"{request.name}: {request.nodes} × {request.cpus} cores, "
                    f"{words.size(request.memory * 2**20)}, {request.gpus} GPUs, partition {request.partition}"),
            ("billing units", f"{found.rate.units}"),
            ("per hour", f"{float(found.per_hour):g} {pool}"),
            ("at its start", f"{float(found.reserved):g} {pool} are reserved for {_hours(request.seconds)}"),
            ("after " + used if used else "", f"{row['charged']:g} {pool} stay charged, the rest comes back"
             if used else ""),
            ("left", f"{have:g} {pool}" if have is not None else "not known: give --left (the site's own command: "
             f"{request.site.billing.tool})" if request.site.billing is not None and request.site.billing.tool
             else "not known: give --left"),
            ("verdict", "" if have is None else "it fits" if row["fits"] else "it does not fit: it would wait"
             + (f" ({request.site.billing.exhausted_reason})" if request.site.billing is not None
                and request.site.billing.exhausted_reason else "")),
            ("period ends", words.moment(ends)),
            ("source", found.source),
        ]))  # fmt: skip

    session.answer(row, show)


def _hours(seconds: int) -> str:
    from permed_compute.spec import format_duration

    return format_duration(seconds)


# --------------------------------------------------------------------------------------------- what commands share


def _site(session: Session, named: str | None = None) -> Profile:
    from permed_compute.sites import profile

    name = named or session.settings.site
    if not name:
        raise typer.BadParameter("name the site: --site saga (`permed site list`)")
    return profile.load(name)


def _request(
    session: Session, job: str, account: str | None, partition: str, qos: str, image: str | None,
    further: list[str] | None, sets: list[str] | None, inputs: list[str] | None,
) -> tuple[Request, Settings]:  # fmt: skip
    """What the job asks of the site, as the Slurm engine would ask; and the settings with what the user said."""
    from permed_compute.cli.submit import at_site
    from permed_compute.execution.slurm import Asked
    from permed_compute.sites import request

    at_site(session, account, partition, qos, image, further)
    settings, site = session.settings, _site(session)
    if is_script(Path(job)):
        return request.of_script(Path(job).read_text(encoding="utf-8"), site, job), settings
    return request.of(jobfile.load(job, sets, inputs), site, Asked.of(settings).choice), settings


def is_script(file: Path) -> bool:
    """A script for sbatch, and no job file."""
    return file.is_file() and file.suffix not in (".yaml", ".yml", ".json") and file.read_bytes()[:2] == b"#!"


def _shape(request: Request) -> dict[str, Any]:
    return {
        "site": request.site.name, "name": request.name, "account": request.account, "partition": request.partition,
        "qos": request.qos, "nodes": request.nodes, "cpus": request.cpus, "memory": request.memory,
        "gpus": request.gpus, "seconds": request.seconds, "image": request.image,
    }  # fmt: skip
