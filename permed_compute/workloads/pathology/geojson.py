"""GeoJSON as QuPath reads it: objects in level-0 pixels, with type, class and measurements, written one by one.

    with writing(path) as write:
        write(feature(rings, "annotation", "Tumour", (200, 0, 0), {"Area µm²": 12.5}))

One feature a line, so that a file of millions is read and written without holding it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.paths import replacing

_DECIMALS = 2
"""Hundredths of a level-0 pixel."""


def feature(
    rings: Sequence[np.ndarray], kind: str, name: str, colour: Sequence[int], measurements: Mapping[str, float]
) -> dict[str, Any]:
    """A polygon. rings: outline, then holes, (n, 2) corners in level-0 pixels, open; kind: QuPath's object type."""
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [_closed(ring) for ring in rings]},
        "properties": {
            "objectType": kind,
            "classification": {"name": name, "color": list(colour)},
            "measurements": dict(measurements),
        },
    }


def _closed(ring: np.ndarray) -> list[list[float]]:
    rounded = np.round(np.concatenate([ring, ring[:1]]), _DECIMALS)
    whole = rounded.astype(np.int64)
    listed: list[list[float]] = (whole if np.array_equal(whole, rounded) else rounded).tolist()
    return listed


@contextmanager
def writing(path: Path) -> Iterator[Callable[[Mapping[str, Any] | str], None]]:
    """A function that adds a feature, or its JSON on one line, to the FeatureCollection, which becomes `path` when the
    block ends well."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.write('{"type": "FeatureCollection", "features": [')
        before = "\n"

        def write(item: Mapping[str, Any] | str) -> None:
            nonlocal before
            text = item if isinstance(item, str) else json.dumps(item, separators=(",", ":"), ensure_ascii=False)
            file.write(before + text)
            before = ",\n"

        yield write
        file.write("\n]}\n")


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The features of a file that `writing` wrote, one at a time."""
    with path.open(encoding="utf-8") as file:
        next(file)
        for line in file:
            if line.startswith("]"):
                return
            yield json.loads(line.rstrip().removesuffix(","))
