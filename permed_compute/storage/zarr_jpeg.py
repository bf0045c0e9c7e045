"""The Zarr v3 codec `imagecodecs_jpeg`, for an imagecodecs that does not bring it (before 2026.5, Python < 3.12).

Same name and configuration as imagecodecs' own, so that a store opens with either. `register()` before opening:

    from permed_compute.storage import zarr_jpeg; zarr_jpeg.register()
"""

from __future__ import annotations

import asyncio
import base64
from dataclasses import dataclass
from typing import Any, Self

from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

NAME = "imagecodecs_jpeg"


@dataclass(frozen=True)
class Jpeg(ArrayBytesCodec):
    """(y, x, 3) uint8 ↔ one JPEG stream. `tables`: abbreviated tables shared by all tiles (TIFF's JPEGTables)."""

    is_fixed_size = False

    colorspace_data: str | None = None
    colorspace_jpeg: str | None = None
    tables: bytes | None = None
    level: int | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        given = dict(data.get("configuration", {}))
        if given.get("tables"):
            given["tables"] = base64.b64decode(given["tables"])
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        given: dict[str, Any] = {
            name: value
            for name in ("colorspace_data", "colorspace_jpeg", "level")
            if (value := getattr(self, name)) is not None
        }
        if self.tables:
            given["tables"] = base64.b64encode(self.tables).decode()
        return {"name": NAME, "configuration": given}

    def _decode(self, data: Any, shape: tuple[int, ...]) -> Any:
        import imagecodecs

        pixels = imagecodecs.jpeg8_decode(
            data, tables=self.tables, colorspace=self.colorspace_jpeg, outcolorspace=self.colorspace_data
        )
        return pixels.reshape(shape)

    async def _decode_single(self, chunk_data: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        pixels = await asyncio.to_thread(self._decode, chunk_data.as_numpy_array(), chunk_spec.shape)
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels)

    async def _encode_single(self, chunk_data: NDBuffer, chunk_spec: ArraySpec) -> Buffer | None:
        import imagecodecs

        stream = await asyncio.to_thread(
            imagecodecs.jpeg8_encode, chunk_data.as_numpy_array(), level=self.level or 90,
            colorspace=self.colorspace_data, outcolorspace=self.colorspace_jpeg,
        )  # fmt: skip
        return chunk_spec.prototype.buffer.from_bytes(stream)

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        raise NotImplementedError


def register() -> None:
    """Make zarr know the codec, unless imagecodecs has brought it."""
    from zarr.registry import get_codec_class, register_codec

    try:
        get_codec_class(NAME)
    except KeyError:
        register_codec(NAME, Jpeg)
