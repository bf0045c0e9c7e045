"""`permed convert`: slides to lossless OME-Zarr stores, here and now; `pathology/convert` is the same as a job."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from permed_compute.cli import words
from permed_compute.cli.exits import Exit
from permed_compute.cli.session import Session


class Coding(StrEnum):
    JPEG = "jpeg"
    ZSTD = "zstd"


def add_to(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    ctx: typer.Context,
    slides: Annotated[list[Path], typer.Argument(help="Slides, DICOM folders, or folders of slides.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the stores, named by the slides' digests.")],
    mpp: Annotated[float | None, typer.Option(help="µm per pixel at level 0, where a slide does not say.")] = None,
    coding: Annotated[Coding, typer.Option(help="Of tiles that cannot be copied: Q90 or lossless.")] = Coding.JPEG,
    threads: Annotated[int, typer.Option(help="Shards at a time; 0: one per core.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many files and bytes it would take.")
    ] = False,
) -> None:
    """Copy the JPEG tiles of slides into OME-Zarr 0.5, bit by bit; encode what cannot be copied; add missing levels.

    A second call goes on where the first one was stopped. A bad slide is named by its digest, the others are converted.
    Example: permed convert scans --to stores
    """
    from permed_compute.errors import RefusedInput, WorkloadError
    from permed_compute.storage.digests import DigestCache
    from permed_compute.workloads.pathology import convert as engine
    from permed_compute.workloads.pathology.source import open_slide
    from permed_compute.workloads.pathology.store import SUFFIX, digest_of, find_slides

    session = Session.of(ctx)
    digests = DigestCache(to / ".digests")
    rows: list[dict[str, Any]] = []
    for path in (found for given in slides for found in find_slides(given)):
        digest = digest_of(path, digests.digest)
        row: dict[str, Any] = {"slide": digest[:16], "store": f"slide-{digest[:16]}{SUFFIX}"}
        try:
            with open_slide(path, mpp=mpp) as slide:
                needed = engine.estimate(slide, engine.plan_levels(slide, coding.value))
                row |= {"files_most": needed.files, "bytes_most": needed.bytes, "source_bytes": needed.source_bytes}
                if not dry_run:
                    workers = threads or os.cpu_count() or 1
                    record = engine.convert(
                        slide, to / row["store"], digest=digest, coding=coding.value, threads=workers
                    )
                    row["levels"] = record["levels"] if record else []
        except (RefusedInput, WorkloadError) as error:
            row |= {"error": error.as_dict()}
        rows.append(row)
    if not dry_run:
        digests.save()

    def show(console: Any) -> None:
        from rich.markup import escape

        for row in rows:
            if "error" in row:
                console.print(f"[red]✗[/] {row['slide']}  {escape(row['error']['message'])}")
                console.print(f"    [green]→[/] {escape(row['error']['remedy'])}")
                continue
            if dry_run:
                console.print(f"{row['slide']}  at most {row['files_most']} files, {words.size(row['bytes_most'])}")
                continue
            levels = row["levels"]
            made = words.size(sum(level["bytes"] for level in levels[1:]))
            quality = f", PSNR {levels[0]['psnr_db']} dB" if "psnr_db" in levels[0] else ""
            console.print(
                f"[green]✓[/] {row['store']}  level 0 {levels[0]['origin']}, {words.size(levels[0]['bytes'])}"
                f"{quality}; {len(levels) - 1} more, {made}"
            )

    session.answer(rows, show)
    bad = sum("error" in row for row in rows)
    if bad:
        raise typer.Exit(Exit.REFUSED if bad == len(rows) else Exit.PARTIAL)
