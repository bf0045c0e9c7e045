"""Tissue, quality control and the tile index: against the truth of made-up slides."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

from permed_compute.errors import SpecError
from permed_compute.spec import JobSpec
from permed_compute.testing.context import LocalContext, run_map
from permed_compute.workloads.pathology import stain, tiles, tissue
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide
from permed_compute.workloads.pathology.tissue import View

from .made import pixels, write


def disc(height=300, width=400, radius=80, colour=(205, 120, 170), ground=245):
    image = np.full((height, width, 3), ground, np.uint8)
    y, x = np.mgrid[:height, :width]
    inside = (x - width / 2) ** 2 + (y - height / 2) ** 2 < radius**2
    image[inside] = colour
    return image, inside


def view(image, mpp=8.0):
    return View(image, mpp, (mpp / 0.5, mpp / 0.5))


def spec(*paths, workload="pathology/tiles", **params):
    return JobSpec(name="t", workload=workload, inputs=tuple(str(path) for path in paths), params=params)


def overlap(one, other):
    return (one & other).sum() / (one | other).sum()


def test_tissue_is_found_and_glass_is_not():
    image, truth = disc()
    assert overlap(tissue.detect(view(image)).tissue, truth) > 0.95
    for grey in (255, 245, 225):
        assert not tissue.detect(view(np.full((200, 200, 3), grey, np.uint8))).tissue.any()


def test_specks_go_and_small_holes_close():
    image, truth = disc()
    image[10:14, 10:14] = (205, 120, 170)
    image[145:150, 195:200] = 245
    found = tissue.detect(view(image)).tissue
    assert not found[:30, :30].any() and found[147, 197]
    assert overlap(found, truth) > 0.95


@pytest.mark.parametrize("ink", [(20, 160, 60), (20, 60, 230), (230, 20, 20), (15, 15, 15)])
def test_pen_is_no_tissue(ink):
    image, truth = disc()
    image[20:60, 20:380] = ink
    found = tissue.detect(view(image))
    assert found.pen[30:50, 40:360].mean() > 0.95 and not found.tissue[20:60].any()
    assert overlap(found.tissue, truth) > 0.9


def test_stained_tissue_is_neither_pen_nor_fold():
    image = pixels(400, 300)
    found = tissue.detect(view(image))
    assert found.shares["pen_share"] < 0.002 and found.shares["fold_share"] < 0.02 and found.tissue.any()


def test_a_fold_shows():
    image, _ = disc(colour=(225, 170, 205))
    image[130:170, 150:250] = (70, 25, 80)
    found = tissue.detect(view(image))
    assert found.fold[135:165, 160:240].mean() > 0.9 and found.shares["fold_share"] < 0.4


def test_blur_lowers_sharpness_and_paleness_does_not():
    from scipy.ndimage import gaussian_filter

    sharp = np.stack([pixels(200, 200, seed=k) for k in range(3)])
    blurred = gaussian_filter(sharp.astype(float), (0, 2.5, 2.5, 0)).astype(np.uint8)
    pale = (255 - (255 - sharp.astype(float)) / 2).astype(np.uint8)
    one, two, three = (tissue.sharpness(batch) for batch in (sharp, blurred, pale))
    assert (two < one / 3).all() and (three > one / 2).all()


def test_contours_are_the_tissue_in_level_0_pixels(tmp_path):
    image, truth = disc(radius=100)
    image[110:190, 160:240] = 245
    found = tissue.detect(view(image))
    (polygon,) = tissue.contours(found)
    assert len(polygon.interiors) == 1
    assert polygon.area == pytest.approx(found.tissue.sum() * 16 * 16, rel=0.03)
    x0, y0, x1, y1 = polygon.bounds
    assert (x0 + x1) / 2 == pytest.approx(200 * 16, abs=32) and (y0 + y1) / 2 == pytest.approx(150 * 16, abs=32)
    tissue.write_geojson(tmp_path / "c.geojson", [polygon], "Tissue", {"area_mm2": 1.0})
    (feature,) = json.loads((tmp_path / "c.geojson").read_text())["features"]
    assert feature["geometry"]["type"] == "Polygon" and feature["properties"]["objectType"] == "annotation"
    assert truth.any()


def test_stain_vectors_are_found_and_normalised():
    random = np.random.default_rng(0)
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    amounts = random.gamma(2.0, 0.4, (20_000, 2))
    amounts[:8000, 1] = 0.02
    amounts[8000:16_000, 0] = 0.02
    seen = np.clip(240 * np.exp(-(amounts + 0.15) @ vectors), 0, 255).astype(np.uint8)
    fitted = stain.estimate(seen)
    cosines = np.abs(np.sum(fitted.vectors.T * vectors, axis=1))
    assert (cosines > 0.97).all()
    again = stain.estimate(stain.normalise(seen.reshape(1, 100, 200, 3), fitted).reshape(-1, 3))
    assert np.abs(np.sum(again.vectors * stain.REFERENCE, axis=0)).min() > 0.97
    assert stain.estimate(np.full((5000, 3), 250, np.uint8)) is None


def test_the_index_lists_tissue_tiles_at_the_exact_mpp(slide, store, tmp_path):
    outcome = run_map(tiles.WORKLOAD, spec(slide, size=64, target_mpp=1.0, min_tissue=0.5), tmp_path / "w")
    (item,) = outcome.done
    corners, facts = tiles.read_index(item.folder / tiles.INDEX)
    assert facts["target_mpp"] == 1.0 and facts["patch_size_level0"] == 128 and facts["level0_width"] == 1100
    assert (corners % 128 == 0).all() and len(np.unique(corners, axis=0)) == len(corners) == item.values["tiles"]
    with Reader(open_slide(store)) as reader:
        dark = reader.read_many(1.0, corners, 64).mean((1, 2, 3))
    assert (dark < 225).all()
    contours = json.loads((item.folder / tiles.CONTOURS).read_text())["features"]
    assert len(contours) == item.values["regions"] and (item.folder / tiles.OVERVIEW).is_file()
    assert item.values["stain"] is not None
    assert outcome.result.figures and (outcome.context.out / "slides.csv").is_file()


def test_a_store_gives_the_same_tiles_as_its_slide(slide, store, tmp_path):
    ends = [run_map(tiles.WORKLOAD, spec(path, size=64), tmp_path / f"w-{path.name}") for path in (slide, store)]
    one, two = ({tuple(row) for row in tiles.read_index(end.done[0].folder / tiles.INDEX)[0]} for end in ends)
    assert len(one ^ two) <= 0.02 * len(one)


def test_tiles_come_shard_by_shard(tmp_path):
    write(tmp_path / "s.tiff", tile=64)
    (item,) = run_map(tiles.WORKLOAD, spec(tmp_path / "s.tiff", size=64), tmp_path / "w").done
    corners, _ = tiles.read_index(item.folder / tiles.INDEX)
    shards = [tuple(row) for row in corners // 512]
    changes = sum(a != b for a, b in itertools.pairwise(shards))
    assert changes == len(set(shards)) - 1 > 0


def test_overlap_and_anisotropy_set_the_steps():
    params = tiles.params_of({"size": 256, "overlap": 64, "target_mpp": 0.5})
    grid = tiles.Grid.of(params, (0.25, 0.5))
    assert grid.step == (384.0, 192.0) and grid.span == (512.0, 256.0)
    assert tiles.Grid.of(params, (0.24999, 0.50001)).step == (384.0, 192.0)
    assert tiles.Grid.of(params, (0.2527, 0.2527)).span[0] == pytest.approx(506.5, abs=0.1)


def test_a_slide_without_tissue_is_refused_with_its_shares(tmp_path):
    write(tmp_path / "glass.tiff", np.full((700, 700, 3), 245, np.uint8))
    write(tmp_path / "good.tiff")
    outcome = run_map(tiles.WORKLOAD, spec(tmp_path / "glass.tiff", tmp_path / "good.tiff", size=64), tmp_path / "w")
    (error,) = outcome.failures.values()
    assert error.finding.code == "NO_TISSUE" and error.finding.about and len(outcome.done) == 1


def test_wrong_parameters_are_all_named(tmp_path):
    wrong = spec(tmp_path, sise=3, size=1, min_tissue=2, blur="yes")
    with pytest.raises(SpecError) as caught:
        list(tiles.WORKLOAD.plan(wrong, {}, LocalContext(tmp_path / "w", wrong)))
    assert {problem.where for problem in caught.value.problems} == {
        "params.sise", "params.size", "params.min_tissue", "params.blur",
    }  # fmt: skip


@pytest.mark.shared
def test_the_real_slide(shared_data, tmp_path):
    path = shared_data / "pathology" / "CMU-1-Small-Region.svs"
    (item,) = run_map(tiles.WORKLOAD, spec(path, size=128, target_mpp=1.0), tmp_path).done
    assert 0.5 < item.values["area_mm2"] < 0.8 and item.values["fold_share"] < 0.05 and not item.values["pen_share"]
    assert item.values["tiles"] > 30 and item.values["objective"] == 20.0
