"""Slide → store: JPEG tiles are copied byte by byte, others are encoded once, missing 2× levels are made.

    plan_levels(slide) -> plan              what each level comes from
    estimate(slide, plan) -> Estimate       files and bytes, before anything is written
    convert(slide, store, …) -> record      by shard, in parallel; what is there already is kept

Origins of a level: `copied` (bit-exact), `decoded` (JPEG Q90 4:4:4 with its PSNR, or lossless zstd), `made` (means over
2 × 2 pixels of the level before, JPEG Q95 4:4:4; lossless where the decoded levels are).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from permed_compute import __version__
from permed_compute.errors import WorkloadError
from permed_compute.paths import read_json, write_json
from permed_compute.storage.shards import FILL, Layout, shard_file, stored_tiles, whole, write_shard
from permed_compute.workloads.pathology import jpeg
from permed_compute.workloads.pathology.source import Level, halved
from permed_compute.workloads.pathology.store import StoredLevel, StoreSlide, group_metadata, psnr

Origin = Literal["copied", "decoded", "made"]
SMALLEST = 512
"""Levels are made until the longer side is no larger than this."""
_UNDER_WAY = ".converting.json"
_SAMPLE = 32  # tiles per level whose PSNR is measured
_BYTES_PER_PIXEL = {"jpeg": 0.6, "zstd": 2.2}  # of an encoded level, for the estimate: H&E, the upper end


@dataclass(frozen=True, slots=True)
class Planned:
    """One level of the store. `source`: the slide's level that it is copied or decoded from."""

    level: Level
    origin: Origin
    source: int = -1


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a store will take, at most: files (inodes) and bytes."""

    files: int
    bytes: int
    source_bytes: int


def plan_levels(slide: Any, coding: Literal["jpeg", "zstd"] = "jpeg") -> list[Planned]:
    """Levels at 1, 2, 4 …, from the slide where it has them. `coding`: of what cannot be copied."""
    have = {round(level.downsample): k for k, level in enumerate(slide.levels) if _is_power(level.downsample)}
    base: Layout = slide.levels[0].layout
    lossless = coding == "zstd" and not slide.levels[0].copyable
    plan: list[Planned] = []
    scale, width, height = 1, base.width, base.height
    while True:
        if scale in have:
            source = slide.levels[have[scale]]
            layout: Layout = source.layout
            if not source.copyable:
                layout = replace(layout, coding=coding, tables=b"", rgb=False)
            origin: Origin = "copied" if source.copyable else "decoded"
            plan.append(Planned(Level(layout, float(scale), source.copyable), origin, have[scale]))
            width, height = layout.width, layout.height
        else:
            before = plan[-1].level.layout
            made = Layout(width, height, before.tile_w, before.tile_h, "zstd" if lossless else "jpeg")
            plan.append(Planned(Level(made, float(scale)), "made"))
        if max(width, height) <= SMALLEST:
            return plan
        scale, width, height = scale * 2, max(1, width // 2), max(1, height // 2)


def _is_power(scale: float) -> bool:
    near = 2 ** round(np.log2(scale))
    return bool(abs(scale / near - 1) < 0.01)


def estimate(slide: Any, plan: list[Planned]) -> Estimate:
    """Files and bytes at most; copied levels to within their shard indexes."""
    files, size, copied = 1, 4096.0, 0
    for item in plan:
        layout = item.level.layout
        files += 1 + len(layout.shards) + layout.shard_rows
        size += len(layout.shards) * 1028 + 4096
        if item.origin == "copied":
            here = slide.tile_bytes(item.source)
            copied += here
            size += here
        else:
            pixels = layout.rows * layout.columns * layout.tile_w * layout.tile_h
            size += pixels * _BYTES_PER_PIXEL[layout.coding]
    return Estimate(files, int(size), copied)


def check_room(folder: Path, needed: Estimate) -> None:
    """Raise `WorkloadError` where the file system lacks the bytes or inodes."""
    while not folder.exists():
        folder = folder.parent
    room = os.statvfs(folder)
    free = room.f_bavail * room.f_frsize
    remedy = "Free space, or give another folder."
    if free < needed.bytes:
        raise WorkloadError(f"The store may need {needed.bytes:,} bytes; {free:,} are free.", remedy=remedy)
    if room.f_files and room.f_favail < needed.files:
        raise WorkloadError(f"The store may need {needed.files:,} files; {room.f_favail:,} are free.", remedy=remedy)


def convert(
    slide: Any,
    store: Path,
    *,
    digest: str,
    coding: Literal["jpeg", "zstd"] = "jpeg",
    threads: int = 1,
    stopping: Callable[[], bool] = lambda: False,
) -> dict[str, Any] | None:
    """Write the store, or finish one that was begun from the same bytes. Returns its record; None = stopped early.

    digest: of the source, kept in the store. Raises `WorkloadError` where `store` is of another slide or room lacks,
    `RefusedInput` where a tile cannot be read.
    """  # fmt: skip
    plan = plan_levels(slide, coding)
    intent = {"source": digest, "coding": coding, "mpp": list(slide.about.mpp)}
    done = _begun(store, intent)
    if done is not None:
        return done
    needed = estimate(slide, plan)
    check_room(store, needed)
    write_json(store / _UNDER_WAY, intent)
    rows = []
    with ThreadPoolExecutor(threads) if threads > 1 else nullcontext() as pool:
        each: Callable[..., Iterable[bool]] = map if pool is None else pool.map
        for number, item in enumerate(plan):
            folder = store / str(number)
            write_json(folder / "zarr.json", item.level.layout.as_zarr())
            maker = _Maker(slide, store, plan, number)
            if not all(each(lambda shard, make=maker: not stopping() and make.shard(shard), item.level.layout.shards)):
                return None
            rows.append(maker.summary())
    record = {
        "source": digest, "coding": coding, "levels": rows, "source_tile_bytes": needed.source_bytes,
        "converter": f"permed_compute {__version__}",
    }  # fmt: skip
    write_json(store / "zarr.json", group_metadata(slide.about, [item.level for item in plan], record))
    (store / _UNDER_WAY).unlink()
    return record


def _begun(store: Path, intent: dict[str, Any]) -> dict[str, Any] | None:
    """The record of a finished store of this slide; None where there is work left."""
    other = WorkloadError("The folder holds another slide's store, or one made with other options.",
                          remedy="Remove it, or give another folder.")  # fmt: skip
    if (store / "zarr.json").is_file():
        with StoreSlide(store) as there:
            record: dict[str, Any] = dict(there.record)
        if {name: record[name] for name in intent} != intent:
            raise other
        return record
    begun = read_json(store / _UNDER_WAY)
    if begun is not None and begun != intent:
        raise other
    if begun is None and store.is_dir() and any(store.iterdir()):
        raise other
    return None


class _Maker:
    """Makes the shards of one level."""

    def __init__(self, slide: Any, store: Path, plan: list[Planned], number: int) -> None:
        self.slide, self.folder, self.item = slide, store / str(number), plan[number]
        self.layout = self.item.level.layout
        self.before = plan[number - 1] if number else None
        self._stored = StoredLevel(store / str(number - 1), self.before.level.layout) if self.before else None

    def shard(self, shard: tuple[int, int]) -> bool:
        path = shard_file(self.folder, shard)
        if not whole(path):
            tile = self._copied if self.item.origin == "copied" else self._encoded
            write_shard(path, [None if place is None else tile(*place) for place in self.layout.tiles_of(shard)])
        return True

    def _copied(self, row: int, column: int) -> bytes | memoryview | None:
        stored: memoryview | None = self.slide.raw(self.item.source, row, column)
        if stored is None or (row < self.layout.rows - 1 and column < self.layout.columns - 1):
            return stored
        # Some writers cut the last tiles. Such a one is encoded anew, because all chunks of a Zarr array have one size.
        if jpeg.Stream(self.layout.tables, self.layout.rgb).size(stored) == (self.layout.tile_h, self.layout.tile_w):
            return stored
        return jpeg.encode_as(self.slide.tile(self.item.source, row, column), rgb=self.layout.rgb)

    def _encoded(self, row: int, column: int) -> bytes | None:
        decoded = self.item.origin == "decoded"
        pixels = self.slide.tile(self.item.source, row, column) if decoded else self._mean(row, column)
        if pixels is None:
            return None
        if self.layout.coding == "zstd":
            from numcodecs.zstd import compress

            return bytes(compress(np.ascontiguousarray(pixels), 1))
        return jpeg.encode(pixels, jpeg.QUALITY if decoded else jpeg.MADE)

    def _mean(self, row: int, column: int) -> np.ndarray | None:
        """A tile of twice the pixel size, from (up to) four of the level before."""
        assert self.before is not None
        layout = self.before.level.layout
        tile_h, tile_w = layout.tile_h, layout.tile_w
        big = np.full((2 * tile_h, 2 * tile_w, 3), FILL, np.uint8)
        found = False
        for k in range(4):
            r, c = 2 * row + k // 2, 2 * column + k % 2
            if r < layout.rows and c < layout.columns and (part := self._under(r, c)) is not None:
                big[k // 2 * tile_h :, k % 2 * tile_w :][:tile_h, :tile_w] = part
                found = True
        return halved(big, 1) if found else None

    def _under(self, row: int, column: int) -> np.ndarray | None:
        assert self.before is not None and self._stored is not None
        if self.before.origin == "copied":
            found: np.ndarray | None = self.slide.tile(self.before.source, row, column)
            return found
        return self._stored.tile(row, column)

    def summary(self) -> dict[str, Any]:
        """Origin, tiles and bytes of the finished level; PSNR where it was encoded from other pixels."""
        layout, there = self.layout, stored_tiles(self.folder, self.layout)
        size = sum(path.stat().st_size for path in (self.folder / "c").rglob("*") if path.is_file())
        row: dict[str, Any] = {"origin": self.item.origin, "tiles": len(there), "bytes": size, "width": layout.width,
               "height": layout.height}  # fmt: skip
        if self.item.origin == "decoded" and layout.coding == "jpeg" and there:
            errors, stored = [], StoredLevel(self.folder, layout)
            for place in there[:: max(1, len(there) // _SAMPLE)]:
                kept, original = stored.tile(*place), self.slide.tile(self.item.source, *place)
                assert kept is not None
                errors.append(10 ** (-psnr(kept, original) / 10))
            row["psnr_db"], row["psnr_db_least"] = (
                round(min(99.0, -10 * float(np.log10(max(error, 1e-12)))), 2)
                for error in (np.mean(errors), max(errors))
            )
        return row


def remove_unfinished(store: Path) -> bool:
    """Remove a store whose conversion was begun and not finished; True where there was one."""
    if (store / _UNDER_WAY).is_file() and not (store / "zarr.json").is_file():
        shutil.rmtree(store)
        return True
    return False
