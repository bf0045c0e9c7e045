"""Aperio SVS and tiled TIFF: levels from tiled pages, JPEG tiles by their offsets, others decoded by imagecodecs."""

from __future__ import annotations

import mmap
import re
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.storage.shards import Layout
from permed_compute.workloads.pathology.jpeg import Stream
from permed_compute.workloads.pathology.source import (
    About,
    Closing,
    Level,
    checked_mpp,
    downsample,
    halved,
    padded,
    refuse,
)

_JPEG, _YCBCR, _RGB, _ICC = 7, 6, 2, 34675
_UM_PER_UNIT = {2: 25_400.0, 3: 10_000.0}  # ResolutionUnit: inch, centimetre


class TiffSlide(Closing):
    """A tiled TIFF. JPEG levels are copyable; JPEG 2000, WebP, deflate … are decoded."""

    def __init__(self, path: Path, mpp: tuple[float, float] | None = None) -> None:
        import tifffile

        try:
            self._tiff = tifffile.TiffFile(path)
        except (tifffile.TiffFileError, ValueError, IndexError, KeyError, TypeError) as error:
            refuse("UNREADABLE", f"The TIFF structure cannot be read ({type(error).__name__}).", "Copy it again.")
        try:
            self._pages = _pyramid(self._tiff)
            self._read(path, mpp)
        except (ValueError, IndexError, KeyError, TypeError, AttributeError) as error:
            refuse("UNREADABLE", f"The TIFF structure cannot be read ({type(error).__name__}).", "Copy it again.")
        finally:
            self._tiff.close()

    def _read(self, path: Path, mpp: tuple[float, float] | None) -> None:
        with path.open("rb") as file:
            self._map = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        for page in self._pages:
            end = max((o + n for o, n in zip(page.dataoffsets, page.databytecounts, strict=True) if n), default=0)
            if end > len(self._map):
                refuse("TRUNCATED", "The file ends before its last tile.", "Copy it again from the scanner.",
                       bytes=len(self._map), needed=int(end))  # fmt: skip
        first = self._pages[0]
        self.levels = [
            Level(
                Layout(p.imagewidth, p.imagelength, p.tilewidth, p.tilelength, "jpeg", p.jpegtables or b"",
                       p.photometric == _RGB),
                downsample(first.imagewidth, first.imagelength, p.imagewidth, p.imagelength),
                p.compression == _JPEG and p.photometric in (_RGB, _YCBCR),
            )
            for p in self._pages
        ]  # fmt: skip
        self._streams = [Stream(level.layout.tables, level.layout.rgb) for level in self.levels]
        for page, level in zip(self._pages, self.levels, strict=True):
            if not level.copyable:
                _ = page.decode  # built from the file while it is open; tiles come from the map
        words = first.description or ""
        kind = "aperio-svs" if words.startswith("Aperio") else "tiled-tiff"
        icc = first.tags.get(_ICC)
        self.about = About(
            kind, checked_mpp(_mpp(first, words), mpp), _number(r"AppMag\s*=\s*([\d.]+)", words),
            bytes(icc.value) if icc else b"",
        )  # fmt: skip

    def raw(self, level: int, row: int, column: int) -> memoryview | None:
        page = self._pages[level]
        k = row * self.levels[level].layout.columns + column
        offset, length = page.dataoffsets[k], page.databytecounts[k]
        return self._map[offset : offset + length] if length else None

    def tile_bytes(self, level: int) -> int:
        return sum(self._pages[level].databytecounts)

    def tile_into(self, out: np.ndarray, level: int, row: int, column: int, halvings: int) -> np.ndarray | None:
        """`tile`, decoded in place where that can be: `out` is contiguous and of the tile's shape."""
        return self.tile(level, row, column, halvings, out)

    def tile(
        self, level: int, row: int, column: int, halvings: int = 0, out: np.ndarray | None = None
    ) -> np.ndarray | None:
        layout, stored = self.levels[level].layout, self.raw(level, row, column)
        if stored is None:
            return None
        try:
            if self.levels[level].copyable:
                cut = row == layout.rows - 1 or column == layout.columns - 1  # by some writers
                pixels = self._streams[level].decode(stored, halvings, None if cut else out)
                return padded(pixels, layout.tile_h >> halvings, layout.tile_w >> halvings)
            k = row * layout.columns + column
            decoded, _, _ = self._pages[level].decode(bytes(stored), k)
        except (ValueError, RuntimeError) as error:
            refuse("UNREADABLE", f"A tile cannot be decoded ({type(error).__name__}).", "Copy the slide again.",
                   level=level, row=row, column=column)  # fmt: skip
        return halved(padded(decoded.reshape(decoded.shape[-3:]), layout.tile_h, layout.tile_w), halvings)


def _pyramid(tiff: Any) -> list[Any]:
    """Tiled pages of the first one's shape, largest first: never strips (thumbnail, label, macro)."""
    pages = [page for page in (*tiff.pages, *(tiff.pages[0].pages or ())) if page.is_tiled]
    if not pages or pages[0].index != tiff.pages[0].index:
        refuse("NOT_A_SLIDE", "The TIFF is not tiled.", "Plain images can be given as PNG or JPEG, with their mpp.")
    first = pages[0]
    if first.samplesperpixel != 3 or first.bitspersample != 8 or first.planarconfig != 1:
        refuse("COLOUR_UNSUPPORTED", "The slide is not 8-bit RGB.", "Only brightfield slides are read.",
               samples=int(first.samplesperpixel), bits=int(first.bitspersample))  # fmt: skip
    shape = first.imagewidth / first.imagelength
    kept = [first]
    for page in pages[1:]:
        near = abs(page.imagewidth / page.imagelength / shape - 1) <= 2 / min(page.imagewidth, page.imagelength) + 1e-3
        words = (page.description or "").lower()
        if near and page.imagewidth < kept[-1].imagewidth and "label" not in words and "macro" not in words:
            kept.append(page)
    return [page.aspage() if hasattr(page, "aspage") else page for page in kept]


def _mpp(page: Any, words: str) -> tuple[float | None, float | None]:
    stated = _number(r"MPP\s*=\s*([\d.]+)", words)
    if stated:
        return stated, stated
    tags = page.tags
    unit = _UM_PER_UNIT.get(int(tags["ResolutionUnit"].value)) if "ResolutionUnit" in tags else None
    if unit is None or "XResolution" not in tags or "YResolution" not in tags:
        return None, None
    (nx, dx), (ny, dy) = tags["XResolution"].value, tags["YResolution"].value
    return (unit * dx / nx, unit * dy / ny) if nx and ny else (None, None)


def _number(pattern: str, words: str) -> float | None:
    match = re.search(pattern, words)
    return float(match[1]) if match else None
