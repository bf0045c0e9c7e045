"""`permed run` and `permed resume`: queue a job, work it off or wait for the controller, and say what came out."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from permed_compute.cli import jobfile, words
from permed_compute.cli.exits import Exit, of_states
from permed_compute.cli.jobs import JobsArgument
from permed_compute.cli.session import Session
from permed_compute.cli.signals import terminate_like_ctrl_c
from permed_compute.cli.site import AccountOption, FurtherOption, ImageOption, PartitionOption, QosOption
from permed_compute.cli.submit import at_site, checked
from permed_compute.errors import NotFoundError, PermedError, QueueError
from permed_compute.states import AWAITING_FILES, ENDED, JobState

if TYPE_CHECKING:
    from permed_compute.client import Client
    from permed_compute.paths import HomePaths
    from permed_compute.queue.port import Job
    from permed_compute.tracking.files import Drained

_REOPEN_S = 0.3


def add_to(app: typer.Typer) -> None:
    app.command("run")(run)
    app.command("resume")(resume)


def run(
    ctx: typer.Context,
    file: jobfile.FileArgument,
    sets: jobfile.SetOption = None,
    inputs: jobfile.InputOption = None,
    account: AccountOption = None,
    partition: PartitionOption = "",
    qos: QosOption = "",
    image: ImageOption = None,
    further: FurtherOption = None,
    detach: Annotated[bool, typer.Option("--detach", help="Queue it and return, as `permed submit` does.")] = False,
) -> None:
    """Run a job and wait for it. Ctrl-C holds it; `permed resume` finishes it.

    Example: permed run job.yaml --input scans/ --set params.threshold=0.5
    """
    session = Session.of(ctx)
    at_site(session, account, partition, qos, image, further)
    spec = checked(file, sets, inputs)
    _begin(session, lambda client: client.submit(spec), detach=detach)


def resume(
    ctx: typer.Context,
    jobs: JobsArgument,
    detach: Annotated[bool, typer.Option("--detach", help="Only queue them again.")] = False,
) -> None:
    """Go on with interrupted, held or failed jobs; finished parts are not computed again.

    Example: permed resume 01k9
    """
    session = Session.of(ctx)
    _begin(session, lambda client: [client.service.resume(job_id) for job_id in jobs], detach=detach)


def _begin(session: Session, begin: Callable[[Client], list[Job]], *, detach: bool) -> None:
    if detach:
        with session.client() as client:
            jobs = begin(client)
        session.answer(
            [words.job_row(job) for job in jobs],
            lambda console: words.job_lines(console, jobs),
        )
        return
    done = work_off(session, begin)
    session.answer(done.as_dict(session.settings.paths), lambda console: summary(console, session, done))
    if done.code:
        raise typer.Exit(done.code)


@dataclass(frozen=True, slots=True)
class Done:
    """How a run ended."""

    jobs: list[Job]
    code: Exit
    tracking: Drained | None = None

    def as_dict(self, home: HomePaths) -> dict[str, Any]:
        rows = [words.job_row(job) | {"results": str(home.job(job.id).results)} for job in self.jobs]
        return {"jobs": rows, "exit": int(self.code), "tracking": asdict(self.tracking) if self.tracking else None}


def work_off(session: Session, begin: Callable[[Client], list[Job]]) -> Done:
    """Queue what `begin` says and stay until it has ended, is held, or the user interrupts."""
    ids: list[str] = []
    while True:
        with session.client() as client:
            try:
                ids = ids or [job.id for job in begin(client)]
                return _stay(session, client, ids)
            except (QueueError, NotFoundError, OSError):
                # The process that led this home has ended, and the jobs are safe in the queue: lead it ourselves.
                if client.embedded or not ids or _answers(client):
                    raise
        time.sleep(_REOPEN_S)


def _answers(client: Client) -> bool:
    try:
        client.service.jobs(limit=1)
    except (PermedError, OSError):
        return False
    return True


def _stay(session: Session, client: Client, ids: list[str]) -> Done:
    from permed_compute.cli.progress import Display

    with terminate_like_ctrl_c():
        try:
            with Display(session, client) as display:
                jobs = client.wait(ids, display.look)
        except KeyboardInterrupt:
            return _interrupted(session, client, ids)
    tracking = None
    if (
        client.embedded
        and session.settings.tracking_uri != "none"
        and any(job.state is not JobState.HELD for job in jobs)
    ):
        session.note("sending records to tracking …")
        tracking = client.flush_tracking()
    return Done(jobs, of_states([job.state for job in jobs]), tracking)


def _interrupted(session: Session, client: Client, ids: list[str]) -> Done:
    """First press: stop where it can go on, and hold. Second press: stop at once, and hold.

    A job that was through before it could stop has ended as it has: there is nothing to go on with.
    """
    if client.embedded:
        session.note("stopping where it can go on; Ctrl-C again stops at once …")
        try:
            client.interrupt()
        except KeyboardInterrupt:
            client.interrupt(grace_s=0)
        for job in map(client.service.job, ids):
            if job.state is JobState.QUEUED:
                client.service.hold(job.id)
    jobs = [client.service.job(job_id) for job_id in ids]
    through = all(job.state in ENDED for job in jobs)
    return Done(jobs, of_states([job.state for job in jobs]) if through else Exit.INTERRUPTED)


# ------------------------------------------------------------------------------------------- the last word


def summary(console: Any, session: Session, done: Done) -> None:
    """What came out, where it is, and what to do next."""
    from rich.markup import escape

    home = session.settings.paths
    for job in done.jobs[:10]:
        used = job.detail.get("usage", {})
        took = f"{used['wall_s']:.1f} s" if "wall_s" in used else ""
        counts = words.counts(job.detail.get("counts", {}))
        # Of a success with parts, the counts say it all.
        sentence = "" if job.state is JobState.SUCCEEDED and counts else escape(str(job.detail.get("sentence", "")))
        said = " · ".join(word for word in (took, counts, sentence) if word)
        console.print(f"[bold]{words.state(job)}[/] {job.spec.name} ({job.id})" + (f": {said}" if said else ""))
        remedy = job.detail.get("remedy")
        if remedy:
            console.print(f"[green]→[/] {escape(str(remedy))}")
        results = home.job(job.id).results
        if job.state in (JobState.SUCCEEDED, JobState.PARTIAL) and results.is_dir():
            console.print(words.facts([("results", results), ("page", results / "index.html")]))
        elif job.state not in (JobState.SUCCEEDED, JobState.PARTIAL, JobState.HELD):
            console.print(words.facts([("log", f"permed logs {job.id}")]))
    if len(done.jobs) > 10:
        console.print(f"… and {len(done.jobs) - 10} more: permed jobs --all")
    if done.code is Exit.INTERRUPTED:
        awaiting = [job for job in done.jobs if job.state is JobState.HELD and job.reason == AWAITING_FILES]
        held = " ".join(job.id for job in done.jobs if job.state is JobState.HELD and job not in awaiting)
        goes_on = [job.id for job in done.jobs if job.state in (JobState.RUNNING, JobState.QUEUED, JobState.LAUNCHING)]
        if held:
            console.print(f"held; `permed resume {held}` finishes it")
        for job in awaiting:
            console.print(f"{job.id} starts when its files have come in; `permed why {job.id}` names them")
        if goes_on:
            console.print(f"the controller goes on with {' '.join(goes_on)}; `permed status` shows it")
    if done.tracking is not None and done.tracking.error:
        console.print(f"[yellow]tracking:[/] {escape(done.tracking.error)}")
    elif done.tracking is not None and done.tracking.found_at:
        console.print(words.facts([("MLflow", done.tracking.found_at[-1])]))
