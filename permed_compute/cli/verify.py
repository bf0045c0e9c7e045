"""`permed verify`: is a store whole, and is a slide's its source?"""

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
    """Decode a slide store's tiles, with --source comparing them with the slide; or a volume store, by its checksum.

    Exit 1 where something is wrong. Example: permed verify stores/slide-0123456789abcdef.ome.zarr --source slide.svs
    """
    from contextlib import nullcontext

    from permed_compute.paths import read_json
    from permed_compute.workloads.pathology import verify as engine
    from permed_compute.workloads.pathology.source import open_slide
    from permed_compute.workloads.pathology.store import StoreSlide

    session = Session.of(ctx)
    if (read_json(store / "zarr.json") or {}).get("node_type") == "array":
        _volume(session, store)
        return
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


def _volume(session: Session, store: Path) -> None:
    from permed_compute.errors import RefusedInput
    from permed_compute.workloads.radiology.volume_store import VolumeStore

    made = VolumeStore(store)
    try:
        wrong = "" if made.checksum() == made.about["voxels"] else "the voxels are not those that were written"
    except RefusedInput as error:
        wrong = str(error)
    voxels = made.shape[0] * made.shape[1] * made.shape[2]

    def show(console: Any) -> None:
        console.print(f"[red]✗[/] {wrong}" if wrong else f"[green]✓[/] {voxels:,} voxels decode, as they were written")

    session.answer({"voxels": voxels, "wrong": wrong}, show)
    if wrong:
        raise typer.Exit(Exit.FAILED)
