"""`permed convert`: slides and volumes to Zarr stores, here and now.

As jobs: `pathology/convert` and `radiology/ingest`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
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


class Pet(StrEnum):
    SUV = "suv"
    STORED = "stored"


class Tilt(StrEnum):
    REFUSE = "refuse"
    CORRECT = "correct"


def add_to(app: typer.Typer) -> None:
    app.command("convert")(convert)


def convert(
    ctx: typer.Context,
    inputs: Annotated[list[Path], typer.Argument(help="Slides, DICOM, NIfTI, data sets, or folders of them.")],
    to: Annotated[Path, typer.Option("--to", help="Folder for the stores, named by their sources' digests.")],
    mpp: Annotated[float | None, typer.Option(help="µm per pixel at level 0, where a slide does not say.")] = None,
    coding: Annotated[Coding, typer.Option(help="Of tiles that cannot be copied: Q90 or lossless.")] = Coding.JPEG,
    pet: Annotated[Pet, typer.Option(help="Of PET: SUV by body weight, or activity as it is.")] = Pet.SUV,
    tilt: Annotated[Tilt, typer.Option(help="A tilted gantry and uneven gaps: refuse, or resample.")] = Tilt.REFUSE,
    threads: Annotated[int, typer.Option(help="Shards or slices at a time; 0: one per core.")] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say how many files and bytes it would take.")
    ] = False,
) -> None:
    """Slides to OME-Zarr 0.5 by copying their JPEG tiles; DICOM series and NIfTI to volumes in Zarr, geometry checked.

    A second call goes on where the first one was stopped. A bad one is named by its digest, the others are converted.
    Example: permed convert scans --to stores
    """
    from permed_compute.workloads.radiology.ingest import is_radiology

    session = Session.of(ctx)
    workers = threads or os.cpu_count() or 1
    volumes = [path for path in inputs if is_radiology(path)]
    slides = [path for path in inputs if path not in volumes]
    rows: list[dict[str, Any]] = []
    if volumes:
        rows += _volumes(session, volumes, to, {"pet": pet.value, "tilt": tilt.value}, workers, dry_run)
    if slides:
        rows += _slides(slides, to, mpp, coding, workers, dry_run)

    def show(console: Any) -> None:
        for row in rows:
            _show(console, row, dry_run)

    session.answer(rows, show)
    bad = sum("error" in row for row in rows)
    if bad:
        raise typer.Exit(Exit.REFUSED if bad == len(rows) else Exit.PARTIAL)


def _slides(
    slides: list[Path], to: Path, mpp: float | None, coding: Coding, workers: int, dry_run: bool
) -> list[dict[str, Any]]:  # fmt: skip
    from permed_compute.errors import RefusedInput, WorkloadError
    from permed_compute.storage.digests import DigestCache
    from permed_compute.workloads.pathology import convert as engine
    from permed_compute.workloads.pathology.source import open_slide
    from permed_compute.workloads.pathology.store import SUFFIX, digest_of, find_slides

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
                    record = engine.convert(
                        slide, to / row["store"], digest=digest, coding=coding.value, threads=workers
                    )
                    row["levels"] = record["levels"] if record else []
        except (RefusedInput, WorkloadError) as error:
            row |= {"error": error.as_dict()}
        rows.append(row)
    if not dry_run:
        digests.save()

    return rows


def _volumes(
    session: Session, volumes: list[Path], to: Path, how: dict[str, str], workers: int, dry_run: bool
) -> list[dict[str, Any]]:  # fmt: skip
    from permed_compute.errors import Finding
    from permed_compute.execution.context import pseudonym_key, pseudonym_of
    from permed_compute.storage.digests import DigestCache
    from permed_compute.workloads.radiology import ingest

    digests, key = DigestCache(to / ".digests"), pseudonym_key(session.settings.paths)
    here = _Here(workers, to, digests.digest, lambda identifier: pseudonym_of(key, identifier))
    params = ingest.Params.of({"to": str(to), "site": session.settings.site, **how})
    rows: list[dict[str, Any]] = []
    for item in ingest.convert(volumes, params, here, dry_run=dry_run):
        if isinstance(item, Finding):
            session.err.print(f"[yellow]•[/] {item.about[:16] or 'a file'}  {item.code}: {item.sentence}")
            continue
        row: dict[str, Any] = {"volume": item.name, "files_most": item.files_most, "bytes_most": item.bytes_most}
        rows.append({**row, **(item.values or {}), **({"error": item.error.as_dict()} if item.error else {})})
    if not dry_run:
        digests.save()
    return rows


@dataclass(frozen=True)
class _Here:
    """`ingest.Here` of this process."""

    threads: int
    out: Path
    digest: Callable[[Path], str]
    pseudonym: Callable[[str], str]

    def stage(self, name: str) -> Any:
        return nullcontext()


def _show(console: Any, row: dict[str, Any], dry_run: bool) -> None:
    from rich.markup import escape

    name = row.get("slide") or row["volume"]
    if "error" in row:
        console.print(f"[red]✗[/] {name}  {escape(row['error']['message'])}")
        console.print(f"    [green]→[/] {escape(row['error']['remedy'])}")
    elif dry_run:
        console.print(f"{name}  at most {row['files_most']} files, {words.size(row['bytes_most'])}")
    elif "volume" in row:
        shape = " × ".join(str(n) for n in row["shape"])
        spacing = " × ".join(f"{mm:g}" for mm in row["spacing_mm"])
        findings = f"; {', '.join(row['findings'])}" if row["findings"] else ""
        unit = f" {row['unit']}" if row["unit"] else ""
        console.print(
            f"[green]✓[/] {row['store']}  {row['modality']}{unit}, {shape} voxels of {spacing} mm,"
            f" {words.size(row['bytes'])} in {row['files']} files{findings}"
        )
    else:
        levels = row["levels"]
        made = words.size(sum(level["bytes"] for level in levels[1:]))
        quality = f", PSNR {levels[0]['psnr_db']} dB" if "psnr_db" in levels[0] else ""
        console.print(
            f"[green]✓[/] {row['store']}  level 0 {levels[0]['origin']}, {words.size(levels[0]['bytes'])}"
            f"{quality}; {len(levels) - 1} more, {made}"
        )
