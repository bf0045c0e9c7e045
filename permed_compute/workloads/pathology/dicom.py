"""DICOM WSI (PS3.3 A.32.8): TILED_FULL JPEG frames by their offsets in the file. Only VOLUME instances are opened."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np

from permed_compute.storage.shards import Layout
from permed_compute.workloads.pathology.jpeg import Stream
from permed_compute.workloads.pathology.source import About, Closing, Level, checked_mpp, downsample, padded, refuse

_WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"
_JPEG_BASELINE = "1.2.840.10008.1.2.4.50"
_ITEM, _END = b"\xfe\xff\x00\xe0", b"\xfe\xff\xdd\xe0"
_WHOLE_SLIDE = 0xFFFFFFFF


class DicomSlide(Closing):
    """The VOLUME instances of one series, or one of them."""

    def __init__(self, files: list[Path], mpp: tuple[float, float] | None = None) -> None:
        found = [item for file in files if (item := _Instance.of(file)) is not None]
        if not found:
            refuse("NOT_A_SLIDE", "No file is a VOLUME of a whole-slide image.", "Labels and overviews are not read.")
        if len({item.series for item in found}) > 1:
            refuse("SERIES_MIXED", "The folder holds several slides.", "Give one folder per series.")
        found.sort(key=lambda item: -item.layout.width)
        if len({item.layout.width for item in found}) < len(found):
            refuse("CONCATENATION", "A level is split over several instances.", "Join them first.", files=len(found))
        self._instances = found
        first = found[0].layout
        self.levels = [
            Level(
                item.layout,
                downsample(first.width, first.height, item.layout.width, item.layout.height),
                True,
            )
            for item in found
        ]
        self._streams = [Stream(b"", level.layout.rgb) for level in self.levels]
        self.file = found[0].file  # of level 0
        self.about = About("dicom-wsi", checked_mpp(found[0].mpp, mpp), found[0].objective, found[0].icc)

    def raw(self, level: int, row: int, column: int) -> memoryview | None:
        return self._instances[level].frame(row * self.levels[level].layout.columns + column)

    def tile_bytes(self, level: int) -> int:
        return sum(length for _, length in self._instances[level].frames)

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
            cut = row == layout.rows - 1 or column == layout.columns - 1  # by some writers
            pixels = self._streams[level].decode(stored, halvings, None if cut else out)
        except ValueError as error:
            refuse("UNREADABLE", f"A frame cannot be decoded ({type(error).__name__}).", "Copy the slide again.",
                   level=level, row=row, column=column)  # fmt: skip
        return padded(pixels, layout.tile_h >> halvings, layout.tile_w >> halvings)


class _Instance:
    """One file: geometry from its header, frames by their offsets."""

    def __init__(self, file: Path, ds: Any, at: int) -> None:
        if ds.file_meta.TransferSyntaxUID != _JPEG_BASELINE or ds.get("DimensionOrganizationType") != "TILED_FULL":
            refuse("UNREADABLE", "The slide is not JPEG baseline in full tiling.", "Other DICOM slides: not read yet.")
        if ds.SamplesPerPixel != 3 or ds.BitsAllocated != 8:
            refuse("COLOUR_UNSUPPORTED", "The slide is not 8-bit RGB.", "Only brightfield slides are read.")
        self.file, self.series = file, str(ds.get("SeriesInstanceUID", ""))
        rgb = ds.PhotometricInterpretation == "RGB"
        self.layout = Layout(
            int(ds.TotalPixelMatrixColumns),
            int(ds.TotalPixelMatrixRows),
            int(ds.Columns),
            int(ds.Rows),
            "jpeg",
            b"",
            rgb,
        )
        shared = ds.SharedFunctionalGroupsSequence[0] if ds.get("SharedFunctionalGroupsSequence") else {}
        measures = shared.get("PixelMeasuresSequence")
        spacing = measures[0].get("PixelSpacing") if measures else None  # (row, column) in mm
        self.mpp = (float(spacing[1]) * 1000, float(spacing[0]) * 1000) if spacing else (None, None)
        optics = ds.OpticalPathSequence[0] if ds.get("OpticalPathSequence") else {}
        power = optics.get("ObjectiveLensPower")
        self.objective = float(power) if power else None
        self.icc = bytes(optics.get("ICCProfile") or b"")
        with file.open("rb") as opened:
            self._map = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
        self.frames = self._items(at)
        tiles = self.layout.rows * self.layout.columns
        if len(self.frames) != tiles:
            refuse("TRUNCATED", "The file has fewer frames than tiles.", "Copy it again.",
                   frames=len(self.frames), tiles=tiles)  # fmt: skip

    @classmethod
    def of(cls, file: Path) -> _Instance | None:
        """The instance, or None where the file is no VOLUME of a slide."""
        import pydicom
        from pydicom.errors import InvalidDicomError

        try:
            with file.open("rb") as opened:
                ds = pydicom.dcmread(opened, stop_before_pixels=True)
                at = opened.tell()
        except (InvalidDicomError, OSError, ValueError, EOFError, AttributeError):
            return None
        if ds.get("SOPClassUID") != _WSI or "VOLUME" not in ds.get("ImageType", []):
            return None
        try:
            return cls(file, ds, at)
        except AttributeError as error:
            refuse("UNREADABLE", "The header lacks what a slide must say.", "Ask for a complete export.",
                   missing=str(error).rpartition(" ")[2].strip("'"))  # fmt: skip

    def frame(self, k: int) -> memoryview | None:
        offset, length = self.frames[k]
        return self._map[offset : offset + length] if length else None

    def _items(self, at: int) -> list[tuple[int, int]]:
        """(offset, length) of every frame: one item each, after the offset table (PS3.5 A.4)."""
        data = self._map
        if bytes(data[at : at + 4]) != b"\xe0\x7f\x10\x00":
            return []
        at += 12
        frames: list[tuple[int, int]] = []
        first = True
        while bytes(data[at : at + 4]) == _ITEM:
            (length,) = struct.unpack_from("<I", data, at + 4)
            if at + 8 + length > len(data):
                return frames
            if not first:
                frames.append((at + 8, length))
            first, at = False, at + 8 + length
        return frames
