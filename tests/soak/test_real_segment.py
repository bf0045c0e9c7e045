"""The whole real region in tiles of 512 and in one piece: the same labels, valid polygons, each object once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from permed_compute.testing.context import run_map
from permed_compute.workloads.pathology import segment
from tests.workloads.pathology.test_segment import SHELL, level0, merged, polygons, spec

pytestmark = [pytest.mark.soak, pytest.mark.shared, pytest.mark.timeout(1800)]


@pytest.mark.parametrize("model", ["nuclei", pytest.param("lavlab-shell", marks=SHELL)])
def test_the_real_region_in_tiles_is_the_one_in_one_piece(shared_data: Path, tmp_path: Path, model: str) -> None:
    slide = shared_data / "pathology" / "CMU-1-Small-Region.svs"
    places = []
    for tile in (512, 4096):
        ended = run_map(segment.WORKLOAD, spec(slide, model=model, tile=tile), tmp_path / str(tile))
        pieces = sum(item.part.params["step"] == "tile" for item in ended.done)
        assert (pieces > 4) == (tile == 512) and (pieces == 1) == (tile == 4096)
        places.append(merged(ended))
    tiled, whole = (level0(place) for place in places)
    # Numbers of objects go by the order of tiles, classes do not.
    same = (tiled > 0) == (whole > 0) if model == "nuclei" else tiled == whole
    shapes = polygons(places[0])
    print(f"\n{model}: {same.mean():.6f} of {same.size} pixels, {len(shapes)} and {len(polygons(places[1]))} objects")
    assert (whole > 0).mean() > 0.01 and same.mean() >= 0.999
    assert all(shape.is_valid for shape in shapes)
    if model == "nuclei":
        assert len(shapes) == len(np.unique(tiled)) - 1  # as many as are in the label image: none twice
