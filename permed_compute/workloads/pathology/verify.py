"""Is a store what was written, and is it its source? Every tile is decoded; beside the source, with another decoder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.errors import RefusedInput
from permed_compute.storage.shards import Layout, shard_file, whole
from permed_compute.workloads.pathology.store import StoreSlide


@dataclass
class Verdict:
    """Counts, and what is wrong as (level, row, column, what). `exact`: copied tiles equal to the source's."""

    tiles: int = 0
    exact: int = 0
    wrong: list[tuple[int, int, int, str]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        rows = [{"level": level, "row": r, "column": c, "what": what} for level, r, c, what in self.wrong[:100]]
        return {"tiles": self.tiles, "exact": self.exact, "wrong": len(self.wrong), "first": rows}


def verify(store: Path, source: Any = None, *, threads: int = 1, every: int = 1) -> Verdict:
    """Decode every `every`-th tile of the store; with the `source` slide, compare copied levels byte by byte and
    their pixels with what imagecodecs decodes from the source."""
    verdict = Verdict()
    with StoreSlide(store) as slide, ThreadPoolExecutor(max(1, threads)) as pool:
        for number, (level, made) in enumerate(zip(slide.levels, slide.record["levels"], strict=True)):
            layout = level.layout
            for shard in layout.shards:
                file = shard_file(store / str(number), shard)
                if file.exists() and not whole(file):
                    verdict.wrong.append((number, *shard, "shard index damaged"))
            if any(row[0] == number for row in verdict.wrong):
                continue
            origin = _source_level(source, level) if source is not None and made["origin"] == "copied" else None
            places = [(r, c) for r in range(layout.rows) for c in range(layout.columns)]
            there = [place for place in places if slide.raw(number, *place) is not None]
            if len(there) != made["tiles"]:
                verdict.wrong.append((number, -1, -1, f"{len(there)} tiles of {made['tiles']}"))
            chosen = there[:: max(1, every)]
            for place, what in zip(
                chosen,
                pool.map(lambda place, n=number, o=origin: _wrong(slide, n, place, source, o), chosen),
                strict=True,
            ):
                verdict.tiles += 1
                if what:
                    verdict.wrong.append((number, *place, what))
                elif origin is not None:
                    verdict.exact += 1
    return verdict


def _source_level(source: Any, level: Any) -> int | None:
    return next((k for k, other in enumerate(source.levels) if other.copyable and other.layout == level.layout), None)


def _wrong(slide: StoreSlide, number: int, place: tuple[int, int], source: Any, origin: int | None) -> str:
    try:
        pixels = slide.tile(number, *place)
    except RefusedInput:
        return "does not decode"
    if origin is None:
        return ""
    stored, original = slide.raw(number, *place), source.raw(origin, *place)
    if original is None or bytes(stored or b"") != bytes(original):
        return "bytes differ from the source"
    same = pixels is not None and np.array_equal(pixels, _peer(original, slide.levels[number].layout))
    return "" if same else "pixels differ"


def _peer(stream: Any, layout: Layout) -> Any:
    import imagecodecs

    return imagecodecs.jpeg8_decode(
        bytes(stream), tables=layout.tables or None, colorspace="RGB" if layout.rgb else None, outcolorspace="RGB"
    )
