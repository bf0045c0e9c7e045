"""MONAI's data sets over our reader, beside MONAI's own."""

from __future__ import annotations

import numpy as np
import pytest

from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide

monai_data = pytest.importorskip("monai.data", reason="MONAI is not installed (extra: radiology)")


def test_levels_are_what_monais_own_reader_gives(slide, store):
    from permed_compute.workloads.pathology.monai_reader import SlideReader

    peer = monai_data.WSIReader("openslide", level=0)
    theirs, _ = peer.get_data(peer.read(str(slide)), location=(120, 333), size=(100, 90))
    for path in (slide, store):
        ours = SlideReader(level=0)
        seen, about = ours.get_data(ours.read(str(path)), location=(120, 333), size=(100, 90))
        assert np.array_equal(seen, theirs) and about["path"] == str(path)


def test_any_mpp_is_exact(slide):
    from permed_compute.workloads.pathology.monai_reader import SlideReader

    reader = SlideReader(mpp=0.73)
    seen, _ = reader.get_data(reader.read(str(slide)), location=(200, 300), size=(64, 80))
    with Reader(open_slide(slide)) as plain:
        assert np.array_equal(seen, plain.read(0.73, 300, 200, (80, 64)).transpose(2, 0, 1))


def test_a_patch_data_set_takes_the_reader(slide):
    from permed_compute.workloads.pathology.monai_reader import SlideReader

    data = [{"image": str(slide), "location": [200, 300]}]
    made = monai_data.PatchWSIDataset(
        data, patch_size=(64, 80), patch_level=0, reader=SlideReader(), include_label=False, center_location=False
    )
    patch = made[0]["image"]
    with Reader(open_slide(slide)) as plain:
        assert np.array_equal(np.asarray(patch), plain.read(0.5, 300, 200, (80, 64)).transpose(2, 0, 1))
