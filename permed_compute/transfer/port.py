"""The port of channels: what `send` and `receive` ask of a folder, an SFTP account, TSD's file API.

A channel moves volumes: byte ranges of a bundle (`transfer.bundle`), under names that say nothing
(`permed-<16 hex>.tar`). It knows neither manifests nor signatures: whatever it delivers is checked by who
receives it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, Self

CHUNK = 1 << 20
"""Bytes that are read and written at a time."""

Moved = Callable[[int], None]
"""Told how many bytes of the volume are there by now."""

Progress = Callable[[int, int], None]
"""Told (bytes by now, bytes in all)."""


@dataclass(frozen=True, slots=True)
class Volume:
    """What a channel puts: `read(offset)` gives the bytes from there to the end, again and again the same."""

    name: str
    size: int
    read: Callable[[int], Iterator[bytes]]


class Channel(Protocol):
    """A place beyond this home, opened by `with`. Every method raises `TransferError`, and its kinds, in our words."""

    @property
    def largest(self) -> int:
        """Bytes of the largest volume it takes; 0: any."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...

    def put(self, volume: Volume, moved: Moved) -> None:
        """Make the volume's name there hold its bytes, readable by its owner only. Goes on where an earlier call was
        cut; the name appears when all bytes are there, and one that is there in full size is left alone."""

    def forget(self, name: str) -> None:
        """Remove the volume and what is there of it. Nothing there: nothing done."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes of each whole volume that can be fetched, by name."""

    def read(self, name: str, offset: int) -> Iterator[bytes]:
        """The volume's bytes from `offset` on."""
