"""Tiles at an exact mpp: against OpenSlide and Pillow, at native and other resolutions, at edges, both backends."""

from __future__ import annotations

import numpy as np
import openslide
import pytest
from PIL import Image

from permed_compute.errors import RefusedInput
from permed_compute.workloads.pathology.convert import convert
from permed_compute.workloads.pathology.reader import Reader, as_dask
from permed_compute.workloads.pathology.source import downsample, open_slide
from permed_compute.workloads.pathology.store import StoreSlide, psnr

from .made import pixels, write


def expected(path, own, mpp, x, y, size):
    """OpenSlide's level-0 region, on white, reduced by Pillow: area mean at whole factors, else triangle filter."""
    with openslide.OpenSlide(path) as slide:
        kx, ky = mpp / own[0], mpp / own[1]
        pad = int(2 * max(kx, ky)) + 2
        width, height = int(np.ceil(size * kx)) + 2 * pad, int(np.ceil(size * ky)) + 2 * pad
        seen = slide.read_region((x - pad, y - pad), 0, (width, height))
    flat = Image.new("RGB", seen.size, (255, 255, 255))
    flat.paste(seen, mask=seen.getchannel("A"))
    whole = abs(kx - round(kx)) < 1e-3 and abs(ky - round(ky)) < 1e-3
    box = (pad, pad, pad + size * kx, pad + size * ky)
    return np.asarray(flat.resize((size, size), Image.Resampling.BOX if whole else Image.Resampling.BILINEAR, box=box))


def offset(one, other):
    """Shift between two pictures in pixels, by phase correlation to a tenth."""
    from skimage.registration import phase_cross_correlation

    shift, _, _ = phase_cross_correlation(one.mean(2), other.mean(2), upsample_factor=10)
    return float(np.abs(shift).max())


def shows(picture):
    """Whether there is enough to tell a shift by: not a few pixels at the edge of white."""
    return (picture < 230).mean() > 0.1


MPPS = [0.25, 0.5, 0.52, 0.6, 1.0, 1.06, 1.3, 2.0, 2.1, 2.5, 3.0, 3.1, 4.0, 6.5, 15.5]
"""Upsampled, native, just beyond a level, between levels, whole multiples that no level has, far beyond the last."""


@pytest.mark.parametrize("place", [(256, 256), (301, 217), (-71, -41), (951, 763)])
def test_both_backends_agree_with_openslide(sharp, place):
    for path in sharp:
        with Reader(open_slide(path)) as reader:
            for mpp in MPPS:
                wanted = expected(sharp[0], (0.5, 0.5), mpp, *place, 128)
                seen = reader.read(mpp, *place, 128)
                assert psnr(seen, wanted) >= 35, (path.suffix, mpp)
                if shows(wanted):
                    assert offset(seen, wanted) < 0.5


@pytest.mark.shared
def test_the_real_slide_agrees_with_openslide(shared_data, tmp_path):
    path = shared_data / "pathology" / "CMU-1-Small-Region.svs"
    with open_slide(path) as slide:
        convert(slide, tmp_path / "out", digest="00", threads=2)
    for place in ((480, 480), (301, 517), (-101, -53), (2107, 2903), (963, 1201)):
        for mpp in (0.499 * ratio for ratio in (0.5, 1, 1.06, 1.4, 2, 2.06, 3, 3.1, 4, 5, 8, 9.3, 31)):
            wanted = expected(path, (0.499, 0.499), mpp, *place, 128)
            for source in (path, tmp_path / "out"):
                with Reader(open_slide(source)) as reader:
                    seen = reader.read(mpp, *place, 128)
                assert psnr(seen, wanted) >= 35, (source.suffix, mpp, place)
                if shows(wanted):
                    assert offset(seen, wanted) < 0.5


@pytest.mark.parametrize("mpp", [0.5, 0.8, 1.0])
def test_pixels_that_are_not_square_come_out_square(tmp_path, mpp):
    path = tmp_path / "a.tiff"
    write(path, mpp=(0.25, 0.5))
    wanted = expected(path, (0.25, 0.5), mpp, 300, 200, 160)
    with open_slide(path) as slide:
        assert slide.about.mpp == pytest.approx((0.25, 0.5))
        convert(slide, tmp_path / "out", digest="00")
    for source in (path, tmp_path / "out"):
        with Reader(open_slide(source)) as reader:
            seen = reader.read(mpp, 300, 200, 160)
        assert psnr(seen, wanted) >= 35 and offset(seen, wanted) < 0.5


def test_without_mpp_the_remedy_names_the_option(tmp_path):
    write(tmp_path / "a.tiff", mpp=None)
    with pytest.raises(RefusedInput, match="NO_MPP") as caught:
        open_slide(tmp_path / "a.tiff")
    assert "--mpp" in caught.value.remedy and "mpp:" in caught.value.remedy
    with open_slide(tmp_path / "a.tiff", mpp=0.3) as slide:
        assert slide.about.mpp == (0.3, 0.3)


def test_a_screen_resolution_is_no_mpp(tmp_path):
    write(tmp_path / "a.tiff", mpp=25_400 / 72)
    with pytest.raises(RefusedInput, match="MPP_IMPLAUSIBLE"):
        open_slide(tmp_path / "a.tiff")


def test_batches_are_the_single_tiles_whatever_the_threads(store):
    places = [(x, y) for y in range(-50, 900, 190) for x in range(-50, 1100, 170)]
    with Reader(open_slide(store)) as one, Reader(open_slide(store), threads=3, cache_mib=1) as many:
        for mpp in (0.5, 0.7):
            batch = many.read_many(mpp, places, 150)
            assert batch.dtype == np.uint8 and batch.shape == (len(places), 150, 150, 3)
            for k, place in enumerate(places):
                assert np.array_equal(batch[k], one.read(mpp, *place, 150))


def test_the_cache_stays_within_its_bound(store):
    with Reader(open_slide(store), cache_mib=1) as reader:
        reader.read_many(0.5, [(x, y) for x in range(0, 1000, 100) for y in range(0, 800, 100)], 130)
        assert reader._size <= 1 << 20 and reader._size == sum(t.nbytes for t in reader._kept.values())


def test_a_level_that_is_missing_is_decoded_small(slide):
    with Reader(open_slide(slide)) as reader:
        assert (
            reader._ways(1.0)[0].halvings == 1
            and reader._ways(2.0)[0].halvings == 1
            and reader._ways(4.0)[0].halvings == 2
            and reader._ways(0.9)[0].halvings == 0
        )


def test_dask_views_are_the_level(store):
    with StoreSlide(store) as slide:
        for level in (0, 2):
            layout = slide.levels[level].layout
            view = as_dask(slide, level)
            assert view.shape == (layout.height, layout.width, 3) and view.dtype == np.uint8
            with Reader(slide) as reader:
                region = reader.read(0.5 * 2**level, 0, 0, (layout.width, layout.height))
            assert np.array_equal(view.compute(), region)


def test_truncated_level_sizes_do_not_stretch_the_slide():
    assert downsample(1001, 901, 250, 225) == 4.0
    assert downsample(1000, 900, 333, 300) == 3.0
    assert downsample(1000, 1000, 370, 370) == pytest.approx(2.7027, abs=1e-3)
    assert pixels().shape == (900, 1100, 3)
