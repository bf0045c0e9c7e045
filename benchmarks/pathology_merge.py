"""From tiles' labels to a slide's objects: joined outlines, beside shapely's union of every tile's polygons."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

from benchmarks.harness import Case
from benchmarks.work.merge import write_tiles

TITLE = "Merging segmented tiles"
WHY = (
    "Merging is where whole-slide segmentation ends: hours after minutes of inference, or out of memory (MONAI#5989,"
    " TIAToolbox#988, hover_next#18). Three classes over tiles of 1024 that all have tissue, objects from cells to"
    " regions that cross many tiles; labels on disk to one GeoJSON. Both trace with the same code and write the same"
    " features; the peer makes shapely polygons of every tile and unions them by class. Each in a process of its own."
    " Goal: a third of the time and half the memory. The peer writes no label image; ours does, within its time."
)
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def cases(quick: bool) -> list[Case]:
    edge = 1 if quick else 4
    both = (("ours, outlines joined at the seams", "ours", False), ("shapely unary_union", "union", True))
    return [
        *(
            Case(f"{edge * edge} tiles, seconds", name, "s", "lower", lambda way=way: _ran(edge, way)["seconds"],
                 peer=peer, goal="" if peer else "≤ 1/3 of unary_union", ratio=None if peer else 1 / 3)
            for name, way, peer in both
        ),
        *(
            Case(f"{edge * edge} tiles, peak memory", name, "MiB", "lower", lambda way=way: _ran(edge, way)["peak_mib"],
                 repeats=1, peer=peer, goal="" if peer else "≤ 1/2 of unary_union", ratio=None if peer else 0.5)
            for name, way, peer in both
        ),
    ]  # fmt: skip


@cache
def _written(edge: int) -> Path:
    folder = tempfile.TemporaryDirectory(prefix="permed-bench-merge-")
    _KEPT.append(folder)
    write_tiles(Path(folder.name), edge)
    return Path(folder.name)


def _ran(edge: int, way: str) -> dict[str, float]:
    """What `way` took; both ways must give the same objects and area."""
    command = [sys.executable, "-m", "benchmarks.work.merge", way, str(_written(edge))]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    said: dict[str, float] = json.loads(done.stdout)
    known = _written(edge) / "known.json"
    if not known.exists():
        known.write_text(json.dumps([said["objects"], said["area"]]))
    if json.loads(known.read_text()) != [said["objects"], said["area"]]:
        raise ValueError("the two ways give different objects")
    return said
