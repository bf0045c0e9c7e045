"""Which encoder a job means, by name or by file, and its digest. Weights come from a package or a path, never a hub.

    encoder: efficientnet-lite0                                  ships, models/pathology/<name>
    encoder: noop                                                one zero per tile: what is left is the pipeline
    encoder: {torchscript: /models/uni.pt, sha256: 56ef…}        a scripted module, (n, 3, h, w) float → (n, d)
    encoder: {onnx: /models/mine.onnx, sha256: …}                an ONNX graph of the same shapes
    encoder: {adapter: virchow2, weights: /models/virchow2/model.safetensors, sha256: …}
    encoder: {timm: vit_large_patch16_224, weights: /models/mine.safetensors, sha256: …, arguments: {…}}
    optional beside these: name, mean, std (RGB, 0–1), batch; of timm: pool (token+mean), prefix

An adapter (models/pathology/adapters.json) is what a published encoder's card says: architecture, arguments, mean and
deviation, which tokens become the feature. Its weights are the file that a user got under its own terms. Weights are
safetensors: a pickle can run code when it is opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from permed_compute.errors import WorkloadError

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_KINDS = ("torchscript", "onnx", "timm", "adapter")
_KEYS = {*_KINDS, "weights", "sha256", "arguments", "name", "mean", "std", "batch", "pool", "prefix"}
_POOLS = ("", "token+mean")


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
    pool: str = ""
    """What becomes of a network's tokens: '' (it gives a row per tile) or `token+mean` (class token, mean of rest)."""
    prefix: int = 1
    """Tokens before those that are meaned: the class token and registers."""


def recipe(given: str | Mapping[str, Any]) -> Recipe:
    """The encoder that a job names. Raises `WorkloadError` for an unknown name, key or file, or another digest."""
    if given == "noop":
        return Recipe("noop", "noop", "noop-1")
    if isinstance(given, str):
        return _shipped(given)
    wrong = set(given) - _KEYS
    kinds = [kind for kind in _KINDS if kind in given]
    if wrong or len(kinds) != 1 or given.get("pool", "") not in _POOLS:
        raise WorkloadError(
            f"The encoder is not understood ({', '.join(sorted(wrong)) or 'kind or pool'}).",
            remedy="See docs/pathology.md for the ways to name one.",
        )
    (kind,) = kinds
    if kind in ("torchscript", "onnx"):
        return _of_file(kind, given)
    return _of_architecture(_adapter(given["adapter"]) | dict(given) if kind == "adapter" else dict(given))


def _of_file(kind: str, given: Mapping[str, Any]) -> Recipe:
    file = Path(given[kind])
    digest = file_digest(file, str(given.get("sha256", "")))
    name = str(given.get("name") or f"{kind}-{digest[:8]}")
    return _recipe(name, kind, digest, file, given)


def _of_architecture(given: Mapping[str, Any]) -> Recipe:
    file = Path(given.get("weights", ""))
    if file.is_file() and file.suffix != ".safetensors":
        raise WorkloadError(
            "The weights are not safetensors; a pickle can run code when it is opened.",
            remedy="Where you trust the file: safetensors.torch.save_file(torch.load(FILE, weights_only=True), NEW).",
        )
    digest = file_digest(file, str(given.get("sha256", "")))
    name = str(given.get("name") or given.get("adapter") or given["timm"])
    return _recipe(name, "timm", digest, file, given)


def _recipe(name: str, kind: str, weights_digest: str, file: Path, given: Mapping[str, Any]) -> Recipe:
    arguments, architecture = dict(given.get("arguments", {})), str(given.get("timm", ""))
    mean, std = tuple(given.get("mean", _IMAGENET[0])), tuple(given.get("std", _IMAGENET[1]))
    pool, prefix = str(given.get("pool", "")), int(given.get("prefix", 1))
    body = json.dumps([weights_digest, kind, architecture, arguments, mean, std, pool, prefix], sort_keys=True)
    digest = hashlib.sha256(body.encode()).hexdigest()
    batch = int(given.get("batch", 0))
    return Recipe(name, kind, digest, file, architecture, arguments, mean, std, batch, pool, prefix)


def _adapter(name: str) -> dict[str, Any]:
    text = (Path(str(resources.files("permed_compute.models"))) / "pathology" / "adapters.json").read_text("utf-8")
    known: dict[str, dict[str, Any]] = json.loads(text)["adapters"]
    if name not in known:
        raise WorkloadError(
            f"There is no adapter {name!r}.",
            remedy=f"There are {', '.join(sorted(known))}; others: `timm` with `arguments`, or `torchscript`, `onnx`.",
        )
    return {key: value for key, value in known[name].items() if key != "card"}


def _shipped(name: str) -> Recipe:
    place, said = shipped("encoder", name, ["noop"])
    weights = installed(said) / said["file"]
    digest = file_digest(weights, said["sha256"])
    code = place / said["code"]
    body = digest + hashlib.sha256(code.read_bytes()).hexdigest()
    return Recipe(
        name, "code", hashlib.sha256(body.encode()).hexdigest(), weights, str(code), {}, tuple(said["mean"]),
        tuple(said["std"]),
    )  # fmt: skip


def shipped(kind: str, name: str, others: Sequence[str] = ()) -> tuple[Path, dict[str, Any]]:
    """Folder and description of a model of ours, by kind (the key in its metadata) and name. Raises `WorkloadError`."""
    base = Path(str(resources.files("permed_compute.models"))) / "pathology"
    known = {file.parent.parent.name: json.loads(file.read_text("utf-8")) for file in
             sorted(base.glob("*/configs/metadata.json"))}  # fmt: skip
    names = [each for each, said in known.items() if kind in said]
    if name not in names:
        ours = ", ".join([*names, *others])
        raise WorkloadError(f"There is no {kind} {name!r}.", remedy=f"Ours: {ours}; others by file: docs/pathology.md.")
    return base / name, known[name][kind]


def installed(said: Mapping[str, Any]) -> Path:
    """Folder of the package that ships a model's weights, without importing it. Raises `WorkloadError`."""
    found = importlib.util.find_spec(said["package"])
    if found is None or not found.submodule_search_locations:
        raise WorkloadError("The model's weights are not installed.", remedy=f"pip install {said['requirement']}")
    return Path(next(iter(found.submodule_search_locations)))


def file_digest(file: Path, wanted: str) -> str:
    """SHA-256 of a model's file. Raises `WorkloadError` where it is not there, or not the one that is `wanted`."""
    if not file.is_file():
        raise WorkloadError("The model's weights are not there.", remedy="Give the path of a file you have.")
    stat = file.stat()
    digest = _digest(file, stat.st_size, stat.st_mtime_ns)
    if wanted and wanted.lower() != digest:
        raise WorkloadError(
            f"The model's weights have digest {digest[:16]}…, not {wanted[:16]}…: another file.",
            remedy="Get the right file, or correct sha256.",
        )
    return digest


@cache
def _digest(file: Path, size: int, mtime: int) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
