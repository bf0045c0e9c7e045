"""What cannot be copied comes through OpenSlide: made-up NDPI, SCN and MRXS (no package carries a scanner's own)."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from permed_compute.errors import RefusedInput
from permed_compute.workloads.pathology.convert import convert
from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide
from permed_compute.workloads.pathology.store import digest_of, find_slides, psnr
from permed_compute.workloads.pathology.verify import verify

from .made import digest, pixels
from .vendors import write_mrxs, write_ndpi, write_scn


@pytest.mark.parametrize("write", [write_ndpi, write_scn, write_mrxs])
def test_a_makers_slide_is_decoded_once_and_said(tmp_path, write):
    path, image = tmp_path / f"a.{write.__name__.removeprefix('write_')}", pixels(1100, 900)
    write(path, image, 0.5)
    assert find_slides(tmp_path) == [path]
    with open_slide(path) as slide:
        assert slide.about.kind.startswith("openslide-") and slide.about.mpp == pytest.approx((0.5, 0.5))
        assert slide.about.objective == 20.0
        record = convert(slide, tmp_path / "out", digest="00")
        assert not verify(tmp_path / "out", slide).wrong
    first = record["levels"][0]
    assert first["origin"] == "decoded" and first["psnr_db"] > 38
    for source in (path, tmp_path / "out"):
        with Reader(open_slide(source)) as reader:
            seen = reader.read(0.5, 301, 217, 256)
            half = reader.read(1.0, 301, 217, 128)
        wanted = image[217:473, 301:557]
        assert psnr(seen, wanted) > 35, source.suffix
        assert psnr(half, wanted.reshape(128, 2, 128, 2, 3).mean((1, 3)).astype(np.uint8)) > 35


def test_what_was_never_scanned_is_white_and_absent(tmp_path):
    write_scn(tmp_path / "a.scn", pixels(1100, 900), 0.5)
    with open_slide(tmp_path / "a.scn") as slide:
        assert slide.levels[0].layout.width == 2200 and slide.tile(0, 3, 4) is None
        convert(slide, tmp_path / "out", digest="00")
    with Reader(open_slide(tmp_path / "out")) as reader:
        assert (reader.read(0.5, 1900, 1500, 200) == 255).all()


def test_an_mrxs_is_its_folder_too(tmp_path):
    write_mrxs(tmp_path / "a.mrxs", pixels(600, 600), 0.5)
    before = digest_of(tmp_path / "a.mrxs", digest)
    (tmp_path / "a" / "Data0000.dat").write_bytes(b"other")
    assert digest_of(tmp_path / "a.mrxs", digest) != before
    shutil.rmtree(tmp_path / "a")
    with pytest.raises(RefusedInput):
        open_slide(tmp_path / "a.mrxs", mpp=0.5)
