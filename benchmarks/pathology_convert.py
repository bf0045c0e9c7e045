"""Storing a JPEG slide: copying its tiles, beside storing or encoding its pixels; MB of pixels per CPU-second."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import Case
from benchmarks.rigs import slides

TITLE = "Converting slides"
WHY = (
    "A study of 1,000 slides is a terabyte: storing it must cost no more than copying it. 20,480 × 20,480 pixels, the"
    " texture of CMU-1. Level 0 alone, because the peers write no others; the whole pyramid stands beside it. Goals: 20"
    " times zarr-python's zstd and 20 times encoding anew with the fastest codec there is. Every case begins at the"
    " slide's file and ends with its tiles on the disk; only ours waits until they are (fsync)."
)


def cases(quick: bool) -> list[Case]:
    edge = 2048 if quick else 20_480
    group = "level 0, MB of pixels per CPU-s"
    goal = "≥ 20 × encoding anew"  # the faster of the peers: the goal against zstd follows
    return [
        Case(group, "ours, tiles copied", "MB/s", "higher", timed(edge, copied), ratio=20.0, goal=goal),
        Case(group, "decode and encode JPEG 90", "MB/s", "higher", timed(edge, encoded), peer=True),
        Case(group, "zarr-python, zstd 5", "MB/s", "higher", timed(edge, zstd), peer=True),
        Case("all levels, MB of pixels per CPU-s", "ours", "MB/s", "higher", timed(edge, whole)),
    ]


def timed(edge: int, work: Callable[[int, Path], None]) -> Callable[[], float]:
    def measure() -> float:
        slides.slide(edge)
        folder = Path(tempfile.mkdtemp(prefix="permed-bench-convert-"))
        try:
            return slides.rate(lambda: work(edge, folder / "out") or 3 * edge * edge) / 1e6
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return measure


def copied(edge: int, out: Path) -> None:
    from permed_compute.workloads.pathology import convert

    before = convert.SMALLEST
    convert.SMALLEST = edge  # no further level
    try:
        whole(edge, out)
    finally:
        convert.SMALLEST = before


def whole(edge: int, out: Path) -> None:
    from permed_compute.workloads.pathology.convert import convert
    from permed_compute.workloads.pathology.source import open_slide

    with open_slide(slides.slide(edge)) as slide:
        convert(slide, out, digest="bench")


def zstd(edge: int, out: Path) -> None:
    import tifffile

    slides.write_zstd(out, tifffile.imread(slides.slide(edge), key=0, maxworkers=1), 5)


def encoded(edge: int, out: Path) -> None:
    from permed_compute.storage.shards import shard_file, write_shard
    from permed_compute.workloads.pathology import jpeg
    from permed_compute.workloads.pathology.source import open_slide

    with open_slide(slides.slide(edge)) as slide:
        layout = slide.levels[0].layout
        for shard in layout.shards:
            tiles = [None if p is None else jpeg.encode(slide.tile(0, *p)) for p in layout.tiles_of(shard)]
            write_shard(shard_file(out, shard), tiles)
