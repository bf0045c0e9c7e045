"""Where tiles come from: one interface over TIFF, DICOM, everything OpenSlide reads, plain images, and our own store.

    with open_slide(path, mpp=None) as slide:
        slide.levels[0].layout          pixels and tile size
        slide.raw(0, row, column)       the tile's JPEG bytes as they lie in the file, where `levels[0].copyable`
        slide.tile(0, row, column)      (y, x, 3) uint8 RGB

Slides that must not be computed on raise `RefusedInput`: EMPTY_FILE, NOT_A_SLIDE, TRUNCATED, UNREADABLE, NO_MPP,
MPP_IMPLAUSIBLE, COLOUR_UNSUPPORTED. Label and macro images are never opened, and no header text leaves.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, Protocol, Self

import numpy as np

from permed_compute.errors import Finding, NotFoundError, RefusedInput
from permed_compute.storage.shards import FILL, Layout

PLAUSIBLE_MPP = (0.05, 20.0)
"""µm per pixel at level 0: from 100× oil to a flat-bed scan. Printing resolutions (72 dpi = 353 µm) fall outside."""


@dataclass(frozen=True, slots=True)
class Level:
    """One pyramid level: its layout, how many level-0 pixels one of its pixels spans, whether tiles can be copied."""

    layout: Layout
    downsample: float
    copyable: bool = False


@dataclass(frozen=True, slots=True)
class About:
    """What a slide says of itself and a store keeps. mpp: (x, y) in µm at level 0."""

    kind: str
    mpp: tuple[float, float]
    objective: float | None = None
    icc: bytes = b""


class Slide(Protocol):
    """Tiles by level, row and column. Threads may share it."""

    about: About
    levels: list[Level]

    def raw(self, level: int, row: int, column: int) -> bytes | memoryview | None:
        """The tile as stored, or None where the file has none there."""
        ...

    def tile_bytes(self, level: int) -> int:
        """Of all `raw` tiles of the level together; 0 where none can be copied."""
        ...

    def tile(self, level: int, row: int, column: int, halvings: int = 0) -> np.ndarray | None:
        """Whole tile, also beyond the image's edge: (tile_h, tile_w, 3) >> halvings, uint8 RGB; None where absent."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class Closing:
    """`with slide:`"""

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_slide(path: Path, *, mpp: float | tuple[float, float] | None = None) -> Any:
    """The slide at `path` (file, folder of one DICOM series, or store) as a `Slide`; `mpp` replaces what it says."""
    if not path.exists():
        raise NotFoundError("There is no such slide.", remedy="Give a slide file, a DICOM folder or a store.")
    if (path / "zarr.json").is_file():
        from permed_compute.workloads.pathology.store import StoreSlide

        return StoreSlide(path)
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if path.is_file() and path.stat().st_size == 0:
        refuse("EMPTY_FILE", "The file has no bytes.", "Copy it again from the scanner.")
    with (files[0] if files else path).open("rb") as file:
        head = file.read(132)
    given = (float(mpp), float(mpp)) if isinstance(mpp, int | float) else mpp
    if head[128:132] == b"DICM":
        from permed_compute.workloads.pathology.dicom import DicomSlide

        return DicomSlide(files, given)
    if head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+") and _vendor(path) in ("aperio", "generic-tiff", ""):
        from permed_compute.workloads.pathology.tiff import TiffSlide

        return TiffSlide(path, given)
    from permed_compute.workloads.pathology.decoded import ImageSlide, OpenSlideSlide

    return OpenSlideSlide(path, given) if _vendor(path) else ImageSlide(path, given)


def _vendor(path: Path) -> str:
    import openslide

    try:
        return str(openslide.OpenSlide.detect_format(path) or "")
    except openslide.OpenSlideError:
        return ""


def refuse(code: str, sentence: str, remedy: str = "", **numbers: Any) -> NoReturn:
    """Raise `RefusedInput` with this finding."""
    raise RefusedInput(Finding(code, sentence, "refused", "", numbers), remedy=remedy)


def checked_mpp(found: tuple[float | None, float | None], given: tuple[float, float] | None) -> tuple[float, float]:
    """µm per pixel, from the option or the file. Raises `RefusedInput` (NO_MPP, MPP_IMPLAUSIBLE)."""
    remedy = "Give it: `--mpp 0.25` on the command line, `params: {mpp: 0.25}` in a job (µm per pixel at level 0)."
    values = given or found
    if values[0] is None or values[1] is None:
        refuse("NO_MPP", "The slide does not say how large a pixel is.", remedy)
    x, y = float(values[0]), float(values[1])
    low, high = PLAUSIBLE_MPP
    if not all(math.isfinite(value) and low <= value <= high for value in (x, y)):
        refuse("MPP_IMPLAUSIBLE", f"A pixel of {x:.4g} × {y:.4g} µm is no slide's.", remedy, mpp_x=x, mpp_y=y)
    return x, y


def downsample(width0: int, height0: int, width: int, height: int) -> float:
    """Level-0 pixels per pixel: the whole number where truncation explains the rest, else the mean of both ratios."""
    ratio = (width0 / width + height0 / height) / 2
    whole = round(ratio)
    close = abs(width0 / whole - width) < 1.5 and abs(height0 / whole - height) < 1.5
    return float(whole) if close else ratio


def padded(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """`pixels` as the upper left of a white tile of this size."""
    if pixels.shape[:2] == (height, width):
        return pixels
    tile = np.full((height, width, 3), FILL, np.uint8)
    tile[: pixels.shape[0], : pixels.shape[1]] = pixels[:height, :width]
    return tile


def halved(pixels: np.ndarray, halvings: int) -> np.ndarray:
    """Mean over 2**halvings squares, for sources that cannot decode at a reduced size."""
    for _ in range(halvings):
        wide = pixels[: pixels.shape[0] & ~1, : pixels.shape[1] & ~1].astype(np.uint16)
        pixels = ((wide[::2, ::2] + wide[1::2, ::2] + wide[::2, 1::2] + wide[1::2, 1::2] + 2) >> 2).astype(np.uint8)
    return pixels
