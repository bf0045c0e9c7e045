"""Outlines of label maps: against shapely's union of pixels, in one piece and tile by tile."""

from __future__ import annotations

import math
import tempfile

import numpy as np
import pytest
import shapely
from skimage.measure import label

from permed_compute.workloads.pathology import outlines

TILE = 8


def streamed(labels: np.ndarray) -> list[outlines.Region]:
    """Regions of a map whose edges are multiples of `TILE`, without the tiles that hold nothing."""
    padded = np.pad(labels, 1)
    rows, columns = (length // TILE for length in labels.shape)
    there = {
        (row, column)
        for row in range(rows)
        for column in range(columns)
        if labels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE].any()
    }
    found: list[outlines.Region] = []
    with tempfile.TemporaryFile() as spool:
        regions = outlines.Regions(spool, TILE)
        for row in range(rows):
            regions.begin(row)
            for column in range(columns):
                if (row, column) in there:
                    piece = padded[row * TILE : (row + 1) * TILE + 2, column * TILE : (column + 1) * TILE + 2]
                    regions.add(row, column, piece)
            found += regions.closed({column for column in range(columns) if (row + 1, column) in there})
        assert not regions._found and not regions._parents and not regions._starts and not regions._ends
    return found


@pytest.mark.parametrize("seed", range(12))
def test_regions_over_tiles_are_shapelys_union_of_their_pixels(seed: int) -> None:
    random = np.random.default_rng(seed)
    labels = random.choice([0, 1, 2], (32, 40), p=[0.4, 0.4, 0.2] if seed % 2 else [0.3, 0.7, 0.0]).astype(np.uint8)
    labels[:, 16:24] *= seed % 3 != 0  # tiles that are not there
    found = streamed(labels)
    assert len(found) == label(labels, connectivity=1, background=0).max()
    for value in (1, 2):
        ys, xs = np.nonzero(labels == value)
        union = shapely.unary_union(shapely.box(xs, ys, xs + 1, ys + 1))
        wanted = [part.normalize() for part in shapely.get_parts(union)]
        ours = [shapely.Polygon(item.rings[0], item.rings[1:]) for item in found if item.label == value]
        assert all(part.is_valid for part in ours)
        assert sorted(part.area for part in ours) == sorted(item.pixels for item in found if item.label == value)
        simple = sorted(part.simplify(0).normalize().wkt for part in ours)
        assert simple == sorted(part.simplify(0).normalize().wkt for part in wanted)


def test_one_piece_gives_the_same_rings_as_tiles() -> None:
    labels = (np.random.default_rng(1).random((24, 24)) < 0.6).astype(np.uint8)
    numbered = label(labels, connectivity=1)
    whole = outlines.rings(numbered)
    tiled = streamed(labels)
    assert sorted(sum(map(outlines.area, rings)) for rings in whole.values()) == sorted(item.pixels for item in tiled)
    assert sorted(len(rings) for rings in whole.values()) == sorted(len(item.rings) for item in tiled)


def test_a_ring_that_touches_itself_in_a_corner_is_a_valid_polygon() -> None:
    labels = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]])
    (rings,) = outlines.rings(labels).values()
    polygon = shapely.Polygon(rings[0], rings[1:])
    assert len(rings) == 2 and polygon.is_valid and polygon.area == 7
    assert [outlines.area(ring) > 0 for ring in rings] == [True, False]


def test_the_perimeter_is_a_lines_length_not_a_staircases() -> None:
    y, x = np.mgrid[-100:101, -100:101]
    (disc,) = outlines.rings((np.hypot(x, y) < 90).astype(int)).values()
    assert outlines.perimeter(disc) == pytest.approx(2 * math.pi * 90, rel=0.06)
    (square,) = outlines.rings(np.ones((50, 50), int)).values()
    assert outlines.perimeter(square) == pytest.approx(200, rel=0.01)
    (diamond,) = outlines.rings((abs(x) + abs(y) < 50).astype(int)).values()
    assert outlines.perimeter(diamond) == pytest.approx(4 * 49.5 * math.sqrt(2), rel=0.01)  # half way to 50


def test_nothing_has_no_outline() -> None:
    assert outlines.rings(np.zeros((4, 4), int)) == {} and streamed(np.zeros((8, 16), np.uint8)) == []
