"""deepbet's brain extraction as one module: find the head's box at 128³, segment the box at 256³, tidy the mask.

Algorithm and weights: L. Fisch et al., deepbet: Fast brain extraction of T1-weighted MRI using Convolutional Neural
Networks, Computers in Biology and Medicine 2024 (github.com/wwu-mmll/deepbet, MIT). The same steps in the same order
as `deepbet.BrainExtraction` 1.0.2, so that the masks are the same; only torch, cc3d and fill_voids are imported.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import cc3d
import fill_voids
import numpy as np
import torch
import torch.nn.functional as nn

SMALL = (128, 128, 128)
LARGE = (256, 256, 256)
MARGIN = 0.1
"""Of the box's size, added on each side."""
FOREGROUND = 0.02
"""A plane belongs to the box where more than this share of it is brain."""


class NoBrainError(ValueError):
    """The network finds no brain in this image."""


class BrainExtractor(torch.nn.Module):
    """Both networks, loaded. Input: one T1 head in RAS orientation, any spacing."""

    def __init__(self, locator: torch.nn.Module, segmenter: torch.nn.Module) -> None:
        super().__init__()
        self.locator = locator
        self.segmenter = segmenter

    @property
    def device(self) -> torch.device:
        return next(self.segmenter.parameters()).device

    @torch.inference_mode()
    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, tuple[slice, slice, slice]]:
        """(X, Y, Z) float → (X, Y, Z) probability of brain in [0, 1], 0 outside the box; and the box.

        Raises `NoBrainError`.
        """
        # The profiling executor rewrites the graph after the first calls: off, so that every part is computed alike.
        with torch.jit.optimized_execution(False):
            image = torch.nan_to_num(image.to(self.device, torch.float32))
            small = nn.interpolate(image[None, None], SMALL, mode="nearest-exact")[0, 0]
            low, high = small.quantile(0.005), small.quantile(0.995)
            if not high > low:
                raise NoBrainError("the image has one grey value only")
            coarse = self.locator(normalised(small, low, high)[None, None])[0, 1] > 0.5
            box = box_with_margin(largest_component(coarse.cpu().numpy()), image.shape)
            large = nn.interpolate(image[box][None, None], LARGE, mode="nearest-exact")[0, 0]
            fine = self.segmenter(normalised(large, low, high)[None, None])[0, 1]
            probability = torch.zeros_like(image)
            inside = nn.interpolate(fine[None, None], probability[box].shape, mode="nearest-exact")
            probability[box] = inside[0, 0]
        return probability, box

    def mask(self, image: torch.Tensor, threshold: float = 0.5) -> np.ndarray:
        """(X, Y, Z) image → (X, Y, Z) bool: the largest piece above the threshold, its holes filled."""
        probability, box = self(image)
        mask = (probability > threshold).cpu().numpy()
        mask[box] = fill_voids.fill(largest_component(mask[box]))
        return mask


def normalised(x: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Grey values as the networks were trained on: clipped to [low, high], then mean 0.449 and deviation 0.226."""
    x = ((x - low) / (high - low)).clamp(min=0, max=1)
    x = (x - x.mean()) / x.std()
    return 0.226 * x + 0.449


def largest_component(mask: np.ndarray) -> np.ndarray:
    """The largest 26-connected piece. Raises `NoBrainError` where there is none."""
    labels = cc3d.connected_components(mask)
    sizes = np.bincount(labels[labels != 0])
    if not sizes.size:
        raise NoBrainError("no voxel is above the threshold")
    return mask & (labels == sizes.argmax())


def box_with_margin(mask: np.ndarray, shape: tuple[int, ...]) -> tuple[slice, slice, slice]:
    """The box of a coarse mask in an image of `shape`, with a margin, cut at the borders."""
    share = torch.from_numpy(mask).float()
    planes = [torch.where(share.mean(axes) > FOREGROUND)[0] for axes in ((1, 2), (0, 2), (0, 1))]
    if any(plane.numel() == 0 for plane in planes):
        raise NoBrainError("too little is above the threshold to find the head")
    scale = torch.tensor(shape) / torch.tensor(mask.shape)
    centre = (scale * torch.tensor([(p.max() + 1 + p.min()) / 2 for p in planes])).round()
    size = ((1 + 2 * MARGIN * torch.ones(3)) * (scale * torch.tensor([p.max() + 1 - p.min() for p in planes]))).round()
    edges = [(int(c - s / 2), int(c + s / 2)) for c, s in zip(centre, size, strict=True)]
    x, y, z = (slice(max(0, start), min(length, end)) for (start, end), length in zip(edges, shape, strict=True))
    return x, y, z


# ---------------------------------------------------------------------------------------------- weights


def load(weights: Mapping[str, Any], device: str | torch.device = "cpu") -> BrainExtractor:
    """Both networks on `device`, in evaluation mode.

    weights: {"package", "version", "locator": {"file", "sha256"}, "segmenter": …}: files of an installed package.
    Loading TorchScript runs what the archive says, as loading a pickle does: the pinned digest is the guard, and the
    very bytes that were hashed are loaded. Raises `FileNotFoundError` or `ValueError` naming what differs.
    """
    return BrainExtractor(*(_network(weights, which, device) for which in ("locator", "segmenter"))).eval()


def weights_file(weights: Mapping[str, Any], which: str) -> Path:
    """Where the installed package keeps this file. Raises `FileNotFoundError`."""
    try:
        path = Path(str(metadata.distribution(weights["package"]).locate_file(weights[which]["file"])))
    except metadata.PackageNotFoundError:
        raise FileNotFoundError(f"the package {weights['package']} is not installed") from None
    if not path.is_file():
        raise FileNotFoundError(f"the package {weights['package']} has no file {weights[which]['file']}")
    return path


def _network(weights: Mapping[str, Any], which: str, device: str | torch.device) -> torch.nn.Module:
    data = weights_file(weights, which).read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != weights[which]["sha256"]:
        raise ValueError(f"the {which} weights have SHA-256 {found}, not {weights[which]['sha256']}")
    return torch.jit.load(io.BytesIO(data), map_location=device).eval()
