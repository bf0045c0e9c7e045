"""`permed submit`: queue a job and return; or say what would be decided about it now."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import jobfile, via, words
from permed_compute.cli.session import Session
from permed_compute.cli.site import AccountOption, FurtherOption, ImageOption, PartitionOption, QosOption
from permed_compute.cli.validate import notes, workload_problem
from permed_compute.errors import SpecError
from permed_compute.states import AWAITING_FILES

if TYPE_CHECKING:
    from permed_compute.client import Client
    from permed_compute.queue.port import Job
    from permed_compute.spec import DataRef, JobSpec

StageOption = Annotated[
    list[str] | None,
    typer.Option("--stage-in", metavar="FROM:TO", help="The site's scheduler copies it in. Repeatable."),
]
StageOutOption = Annotated[
    list[str] | None, typer.Option("--stage-out", metavar="FROM:TO", help="… and out, afterwards. Repeatable.")
]
_FILES_COUNTED = 100_000


def add_to(app: typer.Typer) -> None:
    app.command("submit")(submit)


def submit(
    ctx: typer.Context,
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Job files, or names of shipped jobs.")],
    sets: jobfile.SetOption = None,
    inputs: jobfile.InputOption = None,
    hold: Annotated[bool, typer.Option("--hold", help="Queue it held; `permed release` lets it go.")] = False,
    account: AccountOption = None,
    partition: PartitionOption = "",
    qos: QosOption = "",
    image: ImageOption = None,
    further: FurtherOption = None,
    stage_in: StageOption = None,
    stage_out: StageOutOption = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Queue nothing; say what would be decided now, and why.")
    ] = False,
) -> None:
    """Queue jobs and return at once; a controller, or the next `permed run`, works them off.

    At a site run by Slurm (--site) it is sent at once, or as soon as Slurm answers again, and what the site would
    refuse is not queued at all.

    Example: permed submit job.yaml --input scans/ --set resources.cpus=2
    """
    session = Session.of(ctx)
    at_site(session, account, partition, qos, image, further, stage_in, stage_out)
    specs = [checked(file, sets, inputs) for file in files]
    if session.via:
        if dry_run:
            raise typer.BadParameter("--dry-run does not go through --via: nothing is carried to look at it.")
        via.submit(session, specs, held=hold)
        return
    with session.client() as client:
        if dry_run:
            rows = [preview(client, spec) for spec in specs]
            session.answer(rows, *(_shown(row) for row in rows))
            return
        jobs = client.service.submit(specs, held=hold)
        if client.delegated:  # some may have been sent by now
            jobs = [client.service.job(job.id) for job in jobs]
        session.answer([words.job_row(job) for job in jobs], lambda console: _list(console, jobs))
        if jobs[0].reason == AWAITING_FILES or (client.delegated and not hold):
            session.note(client.service.why(jobs[0].id).sentence)
        elif client.embedded and not hold:
            session.note("No controller runs here: `permed controller`, or the next `permed run`, works it off.")


def at_site(
    session: Session, account: str | None, partition: str, qos: str, image: str | None, further: list[str] | None,
    stage_in: list[str] | None = None, stage_out: list[str] | None = None,
) -> None:  # fmt: skip
    """Lay what the command says about the site over the settings."""
    said = {
        "site_account": account, "site_partition": partition, "site_qos": qos, "site_image": image,
        "site_options": " ".join(further or ()), "site_stage_in": " ".join(stage_in or ()),
        "site_stage_out": " ".join(stage_out or ()),
    }  # fmt: skip
    session.flags = {**session.flags, **{name: value for name, value in said.items() if value}}


def checked(file: str, sets: list[str] | None, inputs: list[str] | None) -> JobSpec:
    """The spec, or `SpecError`: a workload that does not exist is better refused now than at its start."""
    spec = jobfile.load(file, sets, inputs)
    problem = workload_problem(spec)
    if problem is not None:
        raise SpecError(file, [problem])
    return spec


def _list(console: Any, jobs: list[Job]) -> None:
    words.job_lines(console, jobs[:20])
    if len(jobs) > 20:
        console.print(f"… and {len(jobs) - 20} more, {jobs[0].array_id and f'array {jobs[0].array_id}'}")


# ------------------------------------------------------------------------------------------- dry run


def preview(client: Client, spec: JobSpec) -> dict[str, Any]:
    """What would be decided now, by the policy in force, and what stands in the inputs."""
    return {
        "name": spec.name, "workload": spec.workload, "digest": spec.digest(), "elements": max(1, len(spec.array)),
        **client.service.preview(spec), "inputs": [_input_row(ref, client.home.transfers) for ref in spec.inputs],
        "notes": notes(spec), "scope": list(spec.scope()),
    }  # fmt: skip


def _input_row(ref: DataRef, received: Path) -> dict[str, Any]:
    from permed_compute.transfer import receipts

    there = receipts.named(received, ref.transfer) if ref.transfer else None
    path = ref.within(Path(there.folder)) if there else Path(ref.path)
    count, total = 0, 0
    files = path.rglob("*") if path.is_dir() else [path]
    for file in files:
        if file.is_file():
            count, total = count + 1, total + file.stat().st_size
        if count >= _FILES_COUNTED:
            break
    return {"name": ref.name, "path": str(path), "exists": path.exists(), "files": count, "bytes": total}


def _shown(row: dict[str, Any]) -> Any:
    from rich.text import Text

    each = row["grants"][0] if row["grants"] else None
    workers = f"{len(row['grants'])} × {_worker(each)}" if each else ""
    verdict = Text("would start now", "green") if row["starts_now"] else Text("would wait", "yellow")
    inputs = [
        (f"input {i['name']}", f"{i['path']}: " + (f"{i['files']} files, {words.size(i['bytes'])}" if i["exists"]
                                                   else "not received yet" if i["path"].startswith("transfer:")
                                                   else "not on this machine"))
        for i in row["inputs"]
    ]  # fmt: skip
    return words.facts([
        ("job", f"{row['name']} ({row['digest'][:12]})"), ("workload", row["workload"]),
        ("elements", row["elements"] if row["elements"] > 1 else ""), ("decision", verdict), ("workers", workers),
        ("why", row["why"]), ("to change it", row["change"]), *inputs, ("scope", " · ".join(row["scope"])),
    ])  # fmt: skip


def _worker(grant: Mapping[str, Any]) -> str:
    return f"{grant['cpu_milli'] / 1000:g} CPU, {grant['memory']} MiB, on {grant['flavor']}"
