"""`permed jobs`, `why`, `cancel`, `hold`, `release`: jobs in the queue."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session
from permed_compute.states import ENDED, JobState

JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Job id; its first characters will do.")]
JobsArgument = Annotated[list[str], typer.Argument(metavar="JOB...", help="Job ids; first characters will do.")]


def add_to(app: typer.Typer) -> None:
    app.command("jobs")(jobs)
    app.command("why")(why)
    app.command("cancel")(cancel)
    app.command("hold")(hold)
    app.command("release")(release)


def jobs(
    ctx: typer.Context,
    state: Annotated[list[JobState] | None, typer.Option(help="Only jobs in this state. Repeatable.",
                                                         case_sensitive=False)] = None,
    everything: Annotated[bool, typer.Option("--all", help="Also jobs that have ended.")] = False,
    mine: Annotated[bool, typer.Option("--mine", help="Only my own.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="The newest that many.")] = 50,
) -> None:  # fmt: skip
    """List jobs: what waits and what runs; with --all, also what has ended.

    Example: permed jobs --state queued --mine
    """
    import getpass

    session = Session.of(ctx)
    states = set(state) if state else None if everything else set(JobState) - ENDED
    with session.client() as client:
        found = client.service.jobs(states=states, owner=getpass.getuser() if mine else None, limit=limit)

    def show(console: Any) -> None:
        if not found:
            console.print(
                "No jobs." if everything or state else "Nothing waits or runs; `permed jobs --all` has the past."
            )
            return
        table = words.table("JOB", "NAME", "STATE", "REASON", "ACCOUNT", "OWNER", "SUBMITTED", "PARTS")
        for job in found:
            parts = words.counts(job.detail.get("counts", {}))
            name = job.spec.name + (f"[dim]\\[{job.array_index}][/]" if job.array_id else "")
            table.add_row(job.id, name, words.state(job), job.reason, job.spec.account, job.owner,
                          words.ago(job.submitted_at) + " ago", parts)  # fmt: skip
        console.print(table)

    session.answer([words.job_row(job) for job in found], show)


def why(ctx: typer.Context, job: JobArgument) -> None:
    """Say why a job is where it is: one leading reason, and what would have to change.

    Example: permed why 01k9
    """
    session = Session.of(ctx)
    with session.client() as client:
        said = client.service.why(client.service.job(job).id)

    def show(console: Any) -> None:
        from rich.markup import escape

        console.print(f"[bold]{said.state}[/] ({said.code}): {escape(said.sentence)}")
        if said.change:
            console.print(f"[green]→[/] {escape(said.change)}")
        if said.estimate:
            basis = f" ({said.basis})" if said.basis else ""
            console.print(f"  at the latest {words.moment(said.estimate)}{basis}")

    session.answer(said.as_dict(), show)


def cancel(ctx: typer.Context, jobs: JobsArgument) -> None:
    """End jobs for good: signalled, given their grace, stopped. Finished parts are kept.

    Example: permed cancel 01k9
    """
    _each(ctx, jobs, "cancel")


def hold(ctx: typer.Context, jobs: JobsArgument) -> None:
    """Keep waiting jobs from starting.

    Example: permed hold 01k9
    """
    _each(ctx, jobs, "hold")


def release(ctx: typer.Context, jobs: JobsArgument) -> None:
    """Let held jobs wait for their turn again.

    Example: permed release 01k9
    """
    _each(ctx, jobs, "release")


def _each(ctx: typer.Context, ids: list[str], verb: str) -> None:
    session = Session.of(ctx)
    with session.client() as client:
        found = [client.service.job(job_id).id for job_id in ids]  # all or none: a wrong id changes nothing
        moved = [getattr(client.service, verb)(job_id) for job_id in found]
    session.answer(
        [words.job_row(job) for job in moved],
        lambda console: words.job_lines(console, moved),
    )
