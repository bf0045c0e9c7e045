"""The brain extraction bundle under `models/`, loaded once per worker: a checked `Volume` to a mask in its geometry."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from permed_compute.errors import Finding, NotFoundError, RefusedInput, WorkloadError
from permed_compute.workloads.radiology.read import Volume


@dataclass(frozen=True)
class Bundle:
    """A MONAI bundle's folder: `configs/`, `scripts/`, `docs/`. Read by us: importing MONAI takes 8 s."""

    root: Path

    @cached_property
    def config(self) -> dict[str, Any]:
        """`configs/inference.json` as it stands, expressions unresolved. Raises `NotFoundError`."""
        try:
            text = (self.root / "configs" / "inference.json").read_text(encoding="utf-8")
            read: dict[str, Any] = json.loads(text)
        except (OSError, ValueError) as error:
            raise NotFoundError(
                f"The bundle's inference.json cannot be read ({error.__class__.__name__}).",
                remedy="Install permed-compute again.",
            ) from None
        return read

    def digest(self) -> str:
        """SHA-256 of what decides the output: the pinned digests of the weights and the code around them."""
        weights = self.config["weights"]
        parts = [weights[which]["sha256"] for which in ("locator", "segmenter")]
        parts.append(hashlib.sha256(self._script.read_bytes()).hexdigest())
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def code(self) -> ModuleType:
        """The bundle's own module. Its folder's name is no package's, so it is loaded by file."""
        spec = importlib.util.spec_from_file_location("permed_bundle_brain_extraction", self._script)
        if spec is None or spec.loader is None:
            raise WorkloadError("The bundle's script cannot be loaded.", remedy="Install permed-compute again.")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    @property
    def _script(self) -> Path:
        return self.root / "scripts" / "brain_extraction.py"


def bundle(name: str = "radiology/brain-extraction") -> Bundle:
    """The bundle of that name as it is installed."""
    return Bundle(Path(str(resources.files("permed_compute.models"))) / name)


class BrainModel:
    """Both networks, resident. `segment` is deterministic for one device type and thread count."""

    name = "deepbet"

    def __init__(self, source: Bundle, *, device: str = "cpu", threads: int = 1) -> None:
        """Verify and load the weights. Raises `NotFoundError` (not installed), `WorkloadError` (not those pinned)."""
        weights = source.config["weights"]
        install = f"Run: pip install {weights['package']}=={weights['version']} (it is in permed-compute[demo])."
        try:
            import torch

            self._code = source.code()
        except ModuleNotFoundError as error:
            raise NotFoundError(
                f"{error.name} is not installed.", remedy="Run: pip install 'permed-compute[radiology]'."
            ) from None
        torch.set_num_threads(max(1, threads))
        # TF32 moves borders by a voxel here and there against float32; autotuning picks algorithms by the clock.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True
        try:
            self._network = self._code.load(weights, device)
        except FileNotFoundError as error:
            raise NotFoundError(f"The weights are not there: {error}.", remedy=install) from None
        except ValueError as error:
            raise WorkloadError(f"The weights are not those that the bundle pins: {error}.", remedy=install) from None
        self.device = device
        self.version = str(weights["version"])
        self.digest = source.digest()

    def segment(self, volume: Volume, threshold: float = 0.5) -> np.ndarray:
        """Brain mask, bool, same shape and axes as `volume.array`.

        Raises `RefusedInput` NO_BRAIN_FOUND: not a T1 head, or nothing above the threshold.
        """
        import torch

        canonical = np.ascontiguousarray(volume.to_ras(volume.array), dtype=np.float32)
        try:
            mask = self._network.mask(torch.from_numpy(canonical), threshold)
        except self._code.NoBrainError as error:
            sentence = f"No brain was found ({error}); the network knows T1-weighted heads only."
            shape = [int(length) for length in volume.array.shape]
            raise RefusedInput(
                Finding("NO_BRAIN_FOUND", sentence, "refused", volume.series, {"shape": shape, "threshold": threshold}),
                remedy="Check that the series is a T1-weighted head MRI.",
            ) from None
        return volume.from_ras(np.asarray(mask, dtype=bool))
