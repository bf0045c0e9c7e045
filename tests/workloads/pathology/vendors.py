"""Slides in scanner makers' formats, made up after what OpenSlide reads of them: NDPI, SCN, MRXS."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np

_SHORT, _LONG, _RATIONAL, _SLONG, _FLOAT = 3, 4, 5, 9, 11
_SCN = (
    '<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">'
    '<collection sizeX="{all_x}" sizeY="{all_y}"><image name="i" uuid="u">'
    "<creationDate>2020-01-01T00:00:00Z</creationDate>"
    '<device model="made"/><pixels sizeX="{w}" sizeY="{h}"><dimension sizeX="{w}" sizeY="{h}" r="0" ifd="0"/></pixels>'
    '<view sizeX="{x}" sizeY="{y}" offsetX="0" offsetY="0" spacingZ="0"/><scanSettings><objectiveSettings>'
    "<objective>20</objective></objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>"
    "<illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image></collection></scn>"
)
_SLIDEDAT = """[GENERAL]
SLIDE_VERSION = 02.02
SLIDE_ID = MADE
IMAGENUMBER_X = {across}
IMAGENUMBER_Y = {down}
OBJECTIVE_MAGNIFICATION = 20
CameraImageDivisionsPerSide = 1
[HIERARCHICAL]
HIER_COUNT = 1
NONHIER_COUNT = 0
INDEXFILE = Index.dat
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = 1
HIER_0_SECTION = ZOOM
HIER_0_VAL_0 = ZoomLevel_0
HIER_0_VAL_0_SECTION = LEVEL_0
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
[LEVEL_0]
OVERLAP_X = 0
OVERLAP_Y = 0
MICROMETER_PER_PIXEL_X = {mpp}
MICROMETER_PER_PIXEL_Y = {mpp}
IMAGE_FORMAT = JPEG
IMAGE_FILL_COLOR_BGR = 16777215
DIGITIZER_WIDTH = 256
DIGITIZER_HEIGHT = 256
IMAGE_CONCAT_FACTOR = 0
"""


def _jpeg(pixels: np.ndarray) -> bytes:
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), 95, "RGB", "444"))


def write_ndpi(path: Path, image: np.ndarray, mpp: float) -> None:
    """Hamamatsu: a TIFF of whole-level JPEG strips with 8-byte offsets to its directories."""
    out, link = bytearray(b"II*\0" + bytes(8)), 4
    for step, lens in ((1, 20.0), (4, 5.0)):
        part = image[::step, ::step]
        stream, strip = _jpeg(part), len(out)
        out += stream + bytes(-len(stream) % 4)
        bits, resolution = len(out), len(out) + 8
        out += struct.pack("<4H2I", 8, 8, 8, 0, round(1e7 / (mpp * step)), 1000)
        rows = [
            (256, _LONG, 1, part.shape[1]), (257, _LONG, 1, part.shape[0]), (258, _SHORT, 3, bits), (259, _SHORT, 1, 7),
            (262, _SHORT, 1, 6), (273, _LONG, 1, strip), (277, _SHORT, 1, 3), (278, _LONG, 1, part.shape[0]),
            (279, _LONG, 1, len(stream)), (282, _RATIONAL, 1, resolution), (283, _RATIONAL, 1, resolution),
            (296, _SHORT, 1, 3), (65420, _LONG, 1, 1), (65421, _FLOAT, 1, lens), (65424, _SLONG, 1, 0),
        ]  # fmt: skip
        struct.pack_into("<Q", out, link, len(out))
        out += struct.pack("<H", len(rows))
        for tag, kind, count, value in rows:
            out += struct.pack("<HHI" + ("f" if kind == _FLOAT else "I"), tag, kind, count, value)
        link = len(out)
        out += bytes(8 + 4 * len(rows))
    path.write_bytes(out)


def write_scn(path: Path, image: np.ndarray, mpp: float) -> None:
    """Leica: a BigTIFF whose XML places the scan on a canvas twice as wide and high."""
    import tifffile

    h, w = image.shape[:2]
    x, y = round(w * mpp * 1000), round(h * mpp * 1000)  # nm
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        tiff.write(
            image, tile=(512, 512), photometric="rgb", compression="jpeg", compressionargs={"level": 95}, metadata=None,
            description=_SCN.format(w=w, h=h, x=x, y=y, all_x=2 * x, all_y=2 * y),
            resolution=(10_000 / mpp, 10_000 / mpp), resolutionunit=3,
        )  # fmt: skip


def write_mrxs(path: Path, image: np.ndarray, mpp: float, tile: int = 256) -> None:
    """3DHISTECH: an index, tiles' JPEGs behind one another, and a text file, in a folder beside the .mrxs."""
    folder = path.with_suffix("")
    folder.mkdir()
    path.write_bytes(b"made")
    across, down = image.shape[1] // tile, image.shape[0] // tile
    data, rows = bytearray(), b""
    for k in range(across * down):
        stream = _jpeg(image[k // across * tile :, k % across * tile :][:tile, :tile])
        rows += struct.pack("<4i", k, len(data), len(stream), 0)
        data += stream
    head = b"01.02MADE"
    at = len(head) + 8
    pointers = struct.pack("<7i", at, 0, at + 4, 0, at + 12, across * down, 0)
    (folder / "Index.dat").write_bytes(head + pointers + rows)
    (folder / "Data0000.dat").write_bytes(data)
    (folder / "Slidedat.ini").write_text(_SLIDEDAT.format(across=across, down=down, mpp=mpp))
