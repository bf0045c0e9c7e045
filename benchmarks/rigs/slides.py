"""A large slide for measurements: real texture where the shared inputs are there, made-up texture elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

TILE = 256
MPP = 0.25
_KEPT: list[TemporaryDirectory[str]] = []


def texture(edge: int) -> np.ndarray:
    """(edge, edge, 3) uint8: stained tissue, from CMU-1-Small-Region where it lies beside the checkout."""
    real = Path(__file__).resolve().parents[3] / "shared/data/pathology/CMU-1-Small-Region.svs"
    if real.is_file():
        import tifffile

        source = tifffile.imread(real, key=0)[700:2700, 200:2200]
    else:
        random = np.random.default_rng(0)
        ground = random.normal(0, 1, (125, 125, 3)).repeat(16, 0).repeat(16, 1)
        source = np.clip([200, 130, 180] + 30 * ground + random.normal(0, 6, ground.shape), 0, 255).astype(np.uint8)
    tiles = -(-edge // len(source))
    return np.tile(source, (tiles, tiles, 1))[:edge, :edge]


@cache
def slide(edge: int) -> Path:
    """A tiled JPEG TIFF (tile 256, Q80, 4:2:0) of edge × edge pixels at 0.25 µm with 1/4 and 1/16 levels."""
    import tifffile

    folder = TemporaryDirectory(prefix="permed-bench-slide-")
    _KEPT.append(folder)
    path, image = Path(folder.name) / "slide.tiff", texture(edge)
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for step in (1, 4, 16):
            part = image[::step, ::step]
            tiff.write(
                _tiles(part), shape=part.shape, dtype=np.uint8, tile=(TILE, TILE), photometric="rgb", metadata=None,
                compression="jpeg", compressionargs={"level": 80}, subsampling=(2, 2), subfiletype=int(step > 1),
                resolution=(10_000 / MPP, 10_000 / MPP), resolutionunit=3,
            )  # fmt: skip
    return path


def _tiles(image: np.ndarray) -> Iterator[np.ndarray]:
    for y in range(0, image.shape[0], TILE):
        for x in range(0, image.shape[1], TILE):
            yield np.ascontiguousarray(image[y : y + TILE, x : x + TILE])


@cache
def store(edge: int) -> Path:
    """The slide's store."""
    from permed_compute.workloads.pathology.convert import convert
    from permed_compute.workloads.pathology.source import open_slide

    path = slide(edge).with_name("slide.ome.zarr")
    with open_slide(slide(edge)) as source:
        convert(source, path, digest="bench", threads=2)
    return path


@cache
def zstd(edge: int) -> Path:
    """Level 0 as people store it today: (y, x, c), zstd 1, chunks of 256 in shards of 2048, by zarr-python."""
    import tifffile

    path = slide(edge).with_name("zstd.zarr")
    write_zstd(path, tifffile.imread(slide(edge), key=0), 1)
    return path


def write_zstd(path: Path, image: np.ndarray, level: int) -> None:
    import zarr
    from zarr.codecs import ZstdCodec

    array = zarr.create_array(
        path, shape=image.shape, dtype=image.dtype, chunks=(TILE, TILE, 3), shards=(8 * TILE, 8 * TILE, 3),
        compressors=ZstdCodec(level=level), overwrite=True,
    )  # fmt: skip
    array[:] = image


def rate(work: Callable[[], int]) -> float:
    """What `work` counts, per CPU-second of this process (all threads)."""
    began = time.process_time()
    count = work()
    return count / (time.process_time() - began)
