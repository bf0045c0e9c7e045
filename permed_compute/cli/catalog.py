"""`permed catalog`: what ships with the package."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.session import Session


def add_to(app: typer.Typer) -> None:
    app.command("catalog")(catalog)


def catalog(
    ctx: typer.Context,
    kind: Annotated[
        str | None, typer.Argument(metavar="[KIND]", help="jobs, models, presets, sites or workloads.")
    ] = None,
) -> None:
    """List jobs, models, presets, sites and workloads by the names that other commands take.

    Example: permed catalog jobs
    """
    from permed_compute.catalog import entries

    session = Session.of(ctx)
    found = entries(*([kind] if kind else []))

    def show(console: Any) -> None:
        from rich.markup import escape

        table = words.table("KIND", "NAME", "WHAT", "WHERE")
        for entry in found:
            table.add_row(entry.kind, entry.name, escape(entry.title), escape(entry.path))
        console.print(table if found else "Nothing of that kind ships yet.")

    session.answer([entry.as_dict() for entry in found], show)
