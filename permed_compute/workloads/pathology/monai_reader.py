"""A MONAI `BaseWSIReader` over our reader: slides and stores alike, any mpp exactly (MONAI's own want a level near it).

PatchWSIDataset(data, patch_size=(224, 224), reader=SlideReader(mpp=0.5))
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from monai.data.utils import is_supported_format
from monai.data.wsi_reader import BaseWSIReader

from permed_compute.workloads.pathology.reader import Reader
from permed_compute.workloads.pathology.source import open_slide


class SlideReader(BaseWSIReader):
    """`read(path)` gives a `Reader`; `get_data` a (3, h, w) patch. MONAI's (row, column) order, level-0 locations."""

    supported_suffixes = ["svs", "tif", "tiff", "dcm", "mrxs", "ndpi", "scn", "zarr", "png", "jpg"]  # noqa: RUF012 - MONAI's own way
    backend = "permed"

    def __init__(self, *, slide_mpp: float | None = None, **kwargs: Any) -> None:
        """slide_mpp: µm per pixel at level 0 where a slide does not say; the rest as `BaseWSIReader`."""
        super().__init__(**kwargs)
        self._slide_mpp = slide_mpp

    def read(self, data: Any, **kwargs: Any) -> Any:
        paths = [data] if isinstance(data, str | Path) else list(data)
        readers = []
        for path in paths:
            reader = Reader(open_slide(Path(path), mpp=self._slide_mpp))
            reader.path = str(path)  # type: ignore[attr-defined]
            readers.append(reader)
        return readers if len(readers) > 1 else readers[0]

    def verify_suffix(self, filename: Any) -> bool:
        return bool(is_supported_format(filename, self.supported_suffixes))

    def get_data(
        self, wsi: Any, location: tuple[int, int] = (0, 0), size: tuple[int, int] | None = None,
        level: int | None = None, mpp: Any = None, power: int | None = None, mode: str | None = None,
    ) -> tuple[Any, dict[str, Any]]:  # fmt: skip
        """As MONAI's; with `mpp` (here or at construction) the patch has exactly that resolution."""
        wanted = mpp if mpp is not None else self.mpp
        if wanted is None or level is not None or power is not None or isinstance(wsi, Sequence):
            data: tuple[Any, dict[str, Any]] = super().get_data(wsi, location, size, level, mpp, power, mode)
            return data
        exact = float(wanted[0] if isinstance(wanted, Sequence) else wanted)
        if size is None:
            width, height = wsi.dimensions
            size = round(height * wsi.mpp[1] / exact), round(width * wsi.mpp[0] / exact)
        pixels = wsi.read(exact, location[1], location[0], (size[1], size[0]))
        patch = np.moveaxis(pixels, -1, self.channel_dim).astype(self.dtype)
        about: dict[str, Any] = self._get_metadata(wsi, patch, location, size, wsi.level_of(exact))
        return patch, about

    def get_level_count(self, wsi: Reader) -> int:
        return len(wsi.slide.levels)

    def get_size(self, wsi: Reader, level: int) -> tuple[int, int]:
        layout = wsi.slide.levels[level].layout
        return layout.height, layout.width

    def get_downsample_ratio(self, wsi: Reader, level: int) -> float:
        return float(wsi.slide.levels[level].downsample)

    def get_file_path(self, wsi: Any) -> str:
        return str(wsi.path)

    def get_mpp(self, wsi: Reader, level: int) -> tuple[float, float]:
        scale = self.get_downsample_ratio(wsi, level)
        return wsi.mpp[1] * scale, wsi.mpp[0] * scale

    def get_power(self, wsi: Reader, level: int) -> float:
        power = wsi.slide.about.objective
        if power is None:
            raise ValueError("The slide does not say its objective power; use mpp.")
        return float(power) / self.get_downsample_ratio(wsi, level)

    def _get_patch(
        self, wsi: Reader, location: tuple[int, int], size: tuple[int, int], level: int, dtype: Any, mode: str
    ) -> np.ndarray:
        mpp = wsi.mpp[0] * self.get_downsample_ratio(wsi, level)
        pixels = wsi.read(mpp, location[1], location[0], (size[1], size[0]))
        return np.asarray(np.moveaxis(pixels, -1, self.channel_dim).astype(dtype))
