"""JPEG tiles of slides: abbreviated streams made whole, decoded at full or DCT-reduced size, and new ones encoded.

libjpeg-turbo (simplejpeg) with the accurate DCT and smooth upsampling: the same pixels as OpenSlide and tifffile give.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

QUALITY = 90
MADE = 95
"""Of levels that are computed from others: Q90 upon a Q30 source leaves 32–36 dB, and features are read from them."""
_SOI = b"\xff\xd8"
_ADOBE_RGB = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00\x00"
"""APP14 with transform 0: the three components are RGB. Without it decoders take them for YCbCr."""


@dataclass(frozen=True)
class Stream:
    """How the tiles of one level become whole JPEG streams."""

    tables: bytes = b""
    rgb: bool = False
    _head: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        body = self.tables[2:-2] if self.tables else b""
        head = _SOI + (_ADOBE_RGB if self.rgb else b"") + body
        object.__setattr__(self, "_head", b"" if head == _SOI else head)

    def whole(self, tile: bytes | memoryview) -> bytes | memoryview:
        """A stream that any decoder shows right."""
        return b"".join((self._head, tile[2:])) if self._head else tile

    def decode(self, tile: bytes | memoryview, halvings: int = 0, out: np.ndarray | None = None) -> np.ndarray:
        """(y, x, 3) uint8 RGB, each side divided by 2**halvings (0–3) inside the DCT. Raises `ValueError`.

        `out`: a contiguous array of just that shape, written in place.
        """
        import simplejpeg

        stream = self.whole(tile)
        if halvings:
            height, width, _, _ = simplejpeg.decode_jpeg_header(stream)
            pixels: np.ndarray = simplejpeg.decode_jpeg(
                stream, "RGB", min_height=-(-height // 2**halvings), min_width=-(-width // 2**halvings),
                min_factor=2**halvings, buffer=out,
            )  # fmt: skip
            return pixels
        whole: np.ndarray = simplejpeg.decode_jpeg(stream, "RGB", buffer=out)
        return whole

    def size(self, tile: bytes | memoryview) -> tuple[int, int]:
        """(height, width) that the stream declares."""
        import simplejpeg

        height, width, _, _ = simplejpeg.decode_jpeg_header(self.whole(tile))
        return height, width


def encode(pixels: np.ndarray, quality: int = QUALITY) -> bytes:
    """(y, x, 3) uint8 → JPEG 4:4:4: halving the colour of a stain would cost more than it saves."""
    import simplejpeg

    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), quality, "RGB", "444"))


def encode_as(pixels: np.ndarray, *, rgb: bool) -> bytes:
    """A near-lossless tile for a level whose other tiles are copied: RGB inside the stream where theirs is."""
    if not rgb:
        return encode(pixels, 95)
    import imagecodecs

    return bytes(
        imagecodecs.jpeg8_encode(np.ascontiguousarray(pixels), level=95, colorspace="RGB", outcolorspace="RGB")
    )
