"""`permed results`: what a job left, where, and what each file is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli import via, words
from permed_compute.cli.jobs import JobArgument
from permed_compute.cli.outputs import outputs
from permed_compute.cli.session import Session
from permed_compute.errors import NotFoundError

_SHOWN = 40


def add_to(app: typer.Typer) -> None:
    app.command("results")(results)


def results(
    ctx: typer.Context,
    job: JobArgument,
    open_page: Annotated[bool, typer.Option("--open", help="Open the job's page in the browser.")] = False,
    to: Annotated[Path | None, typer.Option("--to", help="With --via: new folder to bring the results to.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every file, not only the first 40.")] = False,
) -> None:
    """List a job's results with absolute paths, and what each file is.

    Example: permed results 01k9 --open
    """
    session = Session.of(ctx)
    if session.via:
        via.results(session, job, to)
        return
    with session.client() as client:
        found = client.service.job(job)
    folder = session.settings.paths.job(found.id).results
    if not folder.is_dir():
        raise NotFoundError(
            f"Job {found.id} has no results: it is {found.state}.", remedy=f"permed why {found.id}"
        )  # fmt: skip
    files = outputs(folder)

    def show(console: Any) -> None:
        from rich.markup import escape

        console.print(f"{words.state(found)} {found.spec.name}: {escape(str(folder))}")
        for file in files if everything else files[:_SHOWN]:
            console.print(f"{escape(str(file.path))}\n    [dim]{file.what}, {words.size(file.size)}[/]")
        if len(files) > _SHOWN and not everything:
            console.print(f"… and {len(files) - _SHOWN} more: --all")

    session.answer(
        {"job": found.id, "state": found.state.value, "folder": str(folder), "files": [f.as_dict() for f in files]},
        show,
    )
    if open_page:
        typer.launch(str(folder / "index.html"))
