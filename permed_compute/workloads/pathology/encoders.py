"""Encoders by name or by file: uint8 tiles in, float16 features out. Weights come from a package or a path, by digest.

    encoder: efficientnet-lite0                                  ships, models/pathology/<name>
    encoder: noop                                                one zero per tile: what is left is the pipeline
    encoder: {torchscript: /models/uni.pt, sha256: 56ef…}        a scripted module, (n, 3, h, w) float → (n, d)
    encoder: {timm: vit_large_patch16_224, weights: /models/uni/pytorch_model.bin, sha256: …, arguments: {…}}
    optional beside these: name, mean, std (RGB, 0–1), batch

Nothing is ever fetched: a hub's name is not an encoder. UNI, Virchow, CONCH and the like are loaded from the file that
a user got under its own terms.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import WorkloadError

if TYPE_CHECKING:
    import torch

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_KEYS = {"torchscript", "timm", "weights", "sha256", "arguments", "name", "mean", "std", "batch"}
_BATCH = {"cpu": 32, "cuda": 256}


@dataclass(frozen=True)
class Recipe:
    """What an encoder is, before it is loaded. `digest`: of weights and architecture, part of every part's key."""

    name: str
    kind: str
    digest: str
    weights: Path | None = None
    architecture: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] = _IMAGENET[0]
    std: tuple[float, ...] = _IMAGENET[1]
    batch: int = 0


def recipe(given: str | Mapping[str, Any]) -> Recipe:
    """The encoder that a job names. Raises `WorkloadError` for an unknown name, key or file, or another digest."""
    if given == "noop":
        return Recipe("noop", "noop", "noop-1")
    if isinstance(given, str):
        return _shipped(given)
    wrong = set(given) - _KEYS
    kinds = [kind for kind in ("torchscript", "timm") if kind in given]
    if wrong or len(kinds) != 1:
        raise WorkloadError(
            f"The encoder is not understood ({', '.join(sorted(wrong)) or 'torchscript or timm is missing'}).",
            remedy="See docs/pathology.md for the ways to name one.",
        )
    (kind,) = kinds
    file = Path(given["torchscript"] if kind == "torchscript" else given.get("weights", ""))
    digest = _file_digest(file, str(given.get("sha256", "")))
    architecture = str(given.get("timm", ""))
    arguments = dict(given.get("arguments", {}))
    body = json.dumps([digest, kind, architecture, arguments, given.get("mean"), given.get("std")], sort_keys=True)
    return Recipe(
        str(given.get("name") or architecture or f"torchscript-{digest[:8]}"), kind,
        hashlib.sha256(body.encode()).hexdigest(), file, architecture, arguments,
        tuple(given.get("mean", _IMAGENET[0])), tuple(given.get("std", _IMAGENET[1])), int(given.get("batch", 0)),
    )  # fmt: skip


def _shipped(name: str) -> Recipe:
    base = Path(str(resources.files("permed_compute.models"))) / "pathology"
    place = base / name
    file = place / "configs" / "metadata.json"
    if "/" in name or not file.is_file():
        names = sorted(p.parent.parent.name for p in base.glob("*/configs/metadata.json"))
        raise WorkloadError(
            f"There is no encoder {name!r}.",
            remedy=f"Ours: {', '.join([*names, 'noop'])}; others by file: docs/pathology.md.",
        )
    said = json.loads(file.read_text(encoding="utf-8"))["encoder"]
    found = importlib.util.find_spec(said["package"])
    if found is None or not found.submodule_search_locations:
        raise WorkloadError(f"The weights of {name} are not installed.", remedy=f"pip install {said['requirement']}")
    weights = Path(next(iter(found.submodule_search_locations))) / said["file"]
    digest = _file_digest(weights, said["sha256"])
    code = place / said["code"]
    body = digest + hashlib.sha256(code.read_bytes()).hexdigest()
    return Recipe(
        name, "code", hashlib.sha256(body.encode()).hexdigest(), weights, str(code), {}, tuple(said["mean"]),
        tuple(said["std"]),
    )  # fmt: skip


def _file_digest(file: Path, wanted: str) -> str:
    if not file.is_file():
        raise WorkloadError("The encoder's weights are not there.", remedy="Give the path of a file you have.")
    stat = file.stat()
    digest = _digest(file, stat.st_size, stat.st_mtime_ns)
    if wanted and wanted.lower() != digest:
        raise WorkloadError(
            f"The encoder's weights have digest {digest[:16]}…, not {wanted[:16]}…: another file.",
            remedy="Get the right file, or correct sha256.",
        )
    return digest


@cache
def _digest(file: Path, size: int, mtime: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


class Noop:
    """Answers at once: what a job then takes is reading, handing over and writing."""

    dim = 1

    def encode(self, batch: np.ndarray, stain: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((len(batch), 1), np.float16)


class TorchEncoder:
    """A module on a device. CUDA: pinned uint8 is copied while the batch before runs in bfloat16."""

    def __init__(self, module: torch.nn.Module, made: Recipe, device: str, threads: int) -> None:
        import torch

        self._device = torch.device(device)
        if self._device.type == "cpu":
            torch.set_num_threads(max(1, threads))
        self._module = module.eval().to(self._device)
        scale = 1 / (255 * torch.tensor(made.std))
        self._scale = scale.view(1, 3, 1, 1).to(self._device)
        self._shift = (-torch.tensor(made.mean) / torch.tensor(made.std)).view(1, 3, 1, 1).to(self._device)
        self._batch = made.batch or _BATCH[self._device.type]

    def encode(self, batch: np.ndarray, stain: np.ndarray | None = None) -> np.ndarray:
        """(n, h, w, 3) uint8 → (n, d) float16. `stain`: (3, 3), `Stain.matrix()`. Lack of memory halves the batch."""
        import torch

        while True:
            try:
                with torch.inference_mode():
                    parts = [self._some(batch[k : k + self._batch], stain) for k in range(0, len(batch), self._batch)]
                    return np.asarray(torch.cat(parts).to(torch.float16).cpu().numpy())
            except torch.cuda.OutOfMemoryError:
                if self._batch == 1:
                    raise
                self._batch //= 2
                torch.cuda.empty_cache()

    def _some(self, tiles: np.ndarray, stain: np.ndarray | None) -> torch.Tensor:
        import torch

        there = torch.from_numpy(tiles)
        if self._device.type == "cuda":
            there = there.pin_memory().to(self._device, non_blocking=True)
        x = there.permute(0, 3, 1, 2).to(torch.float32)
        if stain is not None:
            matrix = torch.from_numpy(stain.astype(np.float32)).to(self._device)
            density = -torch.log((x + 1) / 240)
            x = (240 * torch.exp(-torch.einsum("nchw,cd->ndhw", density, matrix))).clamp_(0, 255)
        x = x * self._scale + self._shift
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            made: torch.Tensor = self._module(x.contiguous(memory_format=torch.channels_last))
            return made.float()


def load(made: Recipe, device: str, threads: int) -> Any:
    """The encoder on its device. Raises `WorkloadError` where a library is missing or the weights do not fit."""
    if made.kind == "noop":
        return Noop()
    import torch

    if made.kind == "torchscript":
        read: Any = torch.jit.load
        return TorchEncoder(read(str(made.weights), map_location="cpu"), made, device, threads)
    if made.kind == "timm":
        try:
            import timm
        except ImportError as error:
            raise WorkloadError("timm is not installed here.", remedy="pip install timm torchvision") from error
        module = timm.create_model(made.architecture, pretrained=False, num_classes=0, **made.arguments)
    else:
        spec = importlib.util.spec_from_file_location("permed_encoder", made.architecture)
        assert spec is not None and spec.loader is not None
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        module = code.build()
    try:
        module.load_state_dict(torch.load(str(made.weights), map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise WorkloadError("The weights do not fit the architecture.", remedy="Check `arguments`.") from error
    return TorchEncoder(module, made, device, threads)
