"""`permed verify`: is a slide store whole, and is it its source?"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session


def add_to(app: typer.Typer) -> None:
    app.command("verify")(verify)


def verify(
    ctx: typer.Context,
    store: Annotated[Path, typer.Argument(help="A store that `permed convert` made.")],
    source: Annotated[Path | None, typer.Option("--source", help="The slide: compare every copied tile.")] = None,
    every: Annotated[int, typer.Option(min=1, help="Look at every n-th tile only.")] = 1,
) -> None:
    """Decode the tiles of a slide store; with --source, compare bytes and pixels with the slide it was made of.

    Exit 1 where something is wrong. Example: permed verify stores/slide-0123456789abcdef.ome.zarr --source slide.svs
    """
    from contextlib import nullcontext

    from permed_compute.workloads.pathology import verify as engine
    from permed_compute.workloads.pathology.source import open_slide
    from permed_compute.workloads.pathology.store import StoreSlide

    session = Session.of(ctx)
    with StoreSlide(store) as made:
        mpp = made.about.mpp
    with open_slide(source, mpp=mpp) if source else nullcontext() as slide:
        verdict = engine.verify(store, slide, threads=os.cpu_count() or 1, every=every)

    def show(console: Any) -> None:
        for level, row, column, what in verdict.wrong[:20]:
            console.print(f"[red]✗[/] level {level}, row {row}, column {column}: {what}")
        equal = f", {verdict.exact} equal to the source's" if source else ""
        mark = "[red]✗[/]" if verdict.wrong else "[green]✓[/]"
        console.print(f"{mark} {verdict.tiles} tiles decode{equal}; {len(verdict.wrong)} wrong")

    session.answer(verdict.as_dict(), show)
    if verdict.wrong:
        raise typer.Exit(Exit.FAILED)
