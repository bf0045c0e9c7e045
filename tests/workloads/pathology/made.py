"""Slides made up for tests: white glass with blobs of stained, textured tissue, as tiled JPEG TIFF."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def pixels(width: int = 1100, height: int = 900, *, seed: int = 0, blobs: int = 3, blur: float = 1.2) -> np.ndarray:
    """(height, width, 3) uint8: haematoxylin-like nuclei on eosin-like ground in discs, 245-white elsewhere.

    blur: in pixels, as of an objective; 0 leaves edges and noise of single pixels, which no scanner gives.
    """
    random = np.random.default_rng(seed)
    image = np.full((height, width, 3), 245, np.float32)
    y, x = np.mgrid[:height, :width]
    for k in range(blobs):
        cx, cy = random.uniform(0.25, 0.75) * width, random.uniform(0.25, 0.75) * height
        radius = 0.22 * min(width, height) if k else 0.3 * min(width, height)
        inside = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
        coarse = random.normal(0, 1, (height // 6 + 1, width // 6 + 1)).repeat(6, 0).repeat(6, 1)[:height, :width]
        nuclei = inside & (coarse > 0.9)
        image[inside] = np.array([215, 130, 175]) + random.normal(0, 3, (int(inside.sum()), 3))
        image[nuclei] = np.array([95, 60, 140]) + random.normal(0, 3, (int(nuclei.sum()), 3))
    from scipy.ndimage import gaussian_filter

    image = gaussian_filter(image, (blur, blur, 0))
    return np.clip(image + random.normal(0, 1.5, image.shape), 0, 255).astype(np.uint8)


def write(
    path: Path, image: np.ndarray | None = None, *, mpp: float | tuple[float, float] | None = 0.5, tile: int = 256,
    compression: str = "jpeg", seed: int = 0, levels: int = 1,
) -> np.ndarray:  # fmt: skip
    """A tiled TIFF at `path`; returns the pixels that went in. levels > 1: each a quarter of the one before's area."""
    import tifffile

    image = pixels(seed=seed) if image is None else image
    x, y = (mpp, mpp) if isinstance(mpp, float) else mpp or (None, None)
    where = {"resolution": (10_000 / x, 10_000 / y), "resolutionunit": 3} if x and y else {}
    with tifffile.TiffWriter(path) as tiff:
        for level in range(levels):
            part = image[:: 2**level, :: 2**level]
            extra = {"subfiletype": 1} if level else where
            tiff.write(
                np.ascontiguousarray(part), tile=(tile, tile), photometric="rgb", compression=compression,
                compressionargs={"level": 90} if compression == "jpeg" else None, metadata=None, **extra,
            )  # fmt: skip
    return image


def digest(path: Path) -> str:
    import hashlib

    return hashlib.sha256(path.read_bytes()).hexdigest()


def thirty(folder: Path) -> list[str]:
    """Thirty small slides at 2 µm, of which six are bad; returns the codes that those are refused with."""
    folder.mkdir()
    for number in range(24):
        write(folder / f"s{number:02d}.tiff", pixels(520, 480, seed=number, blobs=1), mpp=2.0)
    (folder / "zero.svs").write_bytes(b"")
    (folder / "cut.tiff").write_bytes((folder / "s00.tiff").read_bytes()[:-10_000])
    (folder / "notes.tiff").write_text("this is no slide")
    write(folder / "glass.tiff", np.full((400, 400, 3), 245, np.uint8), mpp=2.0)
    write(folder / "nompp.tiff", pixels(300, 300), mpp=None)
    write(folder / "print.tiff", pixels(300, 300, seed=9), mpp=25_400 / 72)
    return ["EMPTY_FILE", "TRUNCATED", "NOT_A_SLIDE", "NO_TISSUE", "NO_MPP", "MPP_IMPLAUSIBLE"]


def slow_encoder(path: Path) -> Path:
    """A TorchScript module that takes its time, so that a kill finds it at work."""
    import torch

    class Slow(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x
            for _ in range(30):
                y = torch.nn.functional.avg_pool2d(y, 9, 1, 4)
            return y.mean(dim=(2, 3)) + 9.0

    torch.jit.script(Slow()).save(str(path))
    return path
