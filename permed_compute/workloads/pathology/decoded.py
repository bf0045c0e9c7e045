"""Slides whose tiles cannot be copied: everything else that OpenSlide reads (MRXS, NDPI, SCN …), and plain images."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from permed_compute.storage.shards import Layout
from permed_compute.workloads.pathology.source import About, Closing, Level, checked_mpp, halved, padded, refuse

TILE = 512


class OpenSlideSlide(Closing):
    """A slide through OpenSlide, in tiles of 512; transparent pixels become white."""

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None) -> None:
        import openslide

        try:
            self._slide = openslide.OpenSlide(path)
        except openslide.OpenSlideError:
            refuse("UNREADABLE", "OpenSlide cannot open the slide.", "Copy it again, with the files beside it.")
        said = self._slide.properties
        found = tuple(_float(said.get(f"openslide.mpp-{axis}")) for axis in "xy")
        self.about = About(
            f"openslide-{said.get('openslide.vendor', '')}", checked_mpp((found[0], found[1]), mpp),
            _float(said.get("openslide.objective-power")), self._icc(),
        )  # fmt: skip
        pairs = zip(self._slide.level_dimensions, self._slide.level_downsamples, strict=True)
        self.levels = [Level(Layout(w, h, TILE, TILE), scale) for (w, h), scale in pairs]

    def raw(self, level: int, row: int, column: int) -> None:
        return None

    def tile_bytes(self, level: int) -> int:
        return 0

    def tile(self, level: int, row: int, column: int, halvings: int = 0) -> np.ndarray | None:
        import openslide

        scale = self.levels[level].downsample
        place = round(column * TILE * scale), round(row * TILE * scale)
        try:
            seen = np.asarray(self._slide.read_region(place, level, (TILE, TILE)))
        except openslide.OpenSlideError:
            refuse("UNREADABLE", "OpenSlide cannot read a region.", "Copy the slide again.", level=level, row=row)
        opaque = seen[..., 3:] == 255
        if not opaque.any():
            return None
        return halved(np.where(opaque, seen[..., :3], np.uint8(255)), halvings)

    def close(self) -> None:
        self._slide.close()

    def _icc(self) -> bytes:
        profile = getattr(self._slide, "color_profile", None)
        return profile.tobytes() if profile is not None else b""


class ImageSlide(Closing):
    """A PNG, JPEG … that fits in memory. It never says its mpp: the option must."""

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None) -> None:
        from PIL import Image

        try:
            with Image.open(path) as image:
                self._pixels = np.asarray(image.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError):
            refuse("NOT_A_SLIDE", "The file is no slide and no image.", "Give SVS, tiled TIFF, DICOM, MRXS, NDPI …")
        height, width = self._pixels.shape[:2]
        self.about = About("image", checked_mpp((None, None), mpp))
        self.levels = [Level(Layout(width, height, TILE, TILE), 1.0)]

    def raw(self, level: int, row: int, column: int) -> None:
        return None

    def tile_bytes(self, level: int) -> int:
        return 0

    def tile(self, level: int, row: int, column: int, halvings: int = 0) -> np.ndarray | None:
        part = self._pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
        return halved(padded(part, TILE, TILE), halvings)


def _float(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
