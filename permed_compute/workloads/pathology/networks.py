"""Encoders at work: uint8 tiles in, float16 features out, on whatever device the worker has.

    encoder = load(recipe, device, threads)
    encoder.encode(batch, stain)                (n, h, w, 3) uint8 → (n, d) float16

Tiles go to the device as bytes; there they are cast, brought to the reference stain and normalised, in one place for
every kind of encoder.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from permed_compute.errors import WorkloadError
from permed_compute.workloads.pathology.encoders import Recipe

if TYPE_CHECKING:
    import torch

_BATCH = {"cpu": 32, "cuda": 256}
_LAYERS = ("mlp_layer", "act_layer", "norm_layer")
"""Arguments of timm that are classes; a recipe names them."""


class Noop:
    """Answers at once: what a job then takes is reading, handing over and writing."""

    def encode(self, batch: np.ndarray, stain: np.ndarray | None = None) -> np.ndarray:
        return np.zeros((len(batch), 1), np.float16)


class _Front:
    """uint8 tiles → what a network takes. CUDA: pinned, on a stream of its own, beside the batch that is computed."""

    def __init__(self, made: Recipe, device: str) -> None:
        import torch

        self.device = torch.device(device)
        std = torch.tensor(made.std)
        self.scale = (1 / (255 * std)).view(1, 3, 1, 1).to(self.device)
        self.shift = (-torch.tensor(made.mean) / std).view(1, 3, 1, 1).to(self.device)
        self.batch = made.batch or _BATCH.get(self.device.type, _BATCH["cpu"])
        stream: Any = torch.cuda.Stream
        self._stream = stream(self.device) if self.device.type == "cuda" else None

    def __call__(self, tiles: np.ndarray, stain: np.ndarray | None) -> torch.Tensor:
        """(n, h, w, 3) uint8 → (n, 3, h, w) float32 on the device. `stain`: (3, 3), `Stain.matrix()`."""
        return self.prepared(self.moved(tiles), stain)

    def moved(self, tiles: np.ndarray) -> torch.Tensor:
        """The bytes, on their way to the device."""
        import torch

        here = torch.from_numpy(tiles)
        if self._stream is None:
            return here.to(self.device)
        with torch.cuda.stream(self._stream):
            return here.pin_memory().to(self.device, non_blocking=True)

    def prepared(self, there: torch.Tensor, stain: np.ndarray | None) -> torch.Tensor:
        """What the network takes, of bytes that were `moved`."""
        import torch

        if self._stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._stream)
            there.record_stream(current)
        x = there.permute(0, 3, 1, 2).to(torch.float32)
        if stain is not None:
            matrix = torch.from_numpy(stain.astype(np.float32)).to(self.device)
            density = -torch.log((x + 1) / 240)
            x = (240 * torch.exp(-torch.einsum("nchw,cd->ndhw", density, matrix))).clamp_(0, 255)
        return x * self.scale + self.shift


class TorchEncoder:
    """A module on a device; bfloat16 on CUDA. Lack of memory halves the batch."""

    def __init__(self, module: torch.nn.Module, made: Recipe, device: str, threads: int) -> None:
        import torch

        self.front = _Front(made, device)
        if self.front.device.type == "cpu":
            torch.set_num_threads(max(1, threads))
        self.module = module.eval().to(self.front.device)
        self._pool, self._prefix = made.pool, made.prefix

    def encode(self, batch: np.ndarray, stain: np.ndarray | None = None) -> np.ndarray:
        import torch

        while True:
            step = self.front.batch
            try:
                with torch.inference_mode():
                    parts = list(self._parts([batch[k : k + step] for k in range(0, len(batch), step)], stain))
                    return np.asarray(torch.cat(parts).to(torch.float16).cpu().numpy())
            except torch.cuda.OutOfMemoryError:
                if step == 1:
                    raise
                self.front.batch = step // 2
                torch.cuda.empty_cache()

    def _parts(self, pieces: list[np.ndarray], stain: np.ndarray | None) -> Iterator[torch.Tensor]:
        """The next piece is on its way while one is computed."""
        ahead = self.front.moved(pieces[0])
        for following in [*pieces[1:], None]:
            made = self._some(self.front.prepared(ahead, stain))
            if following is not None:
                ahead = self.front.moved(following)
            yield made

    def _some(self, x: torch.Tensor) -> torch.Tensor:
        import torch

        kind = self.front.device.type
        with torch.autocast(kind, torch.bfloat16, enabled=kind == "cuda"):
            made: torch.Tensor = self.module(x.contiguous(memory_format=torch.channels_last))
        if self._pool == "token+mean":
            made = torch.cat([made[:, 0], made[:, self._prefix :].mean(1)], dim=1)
        if made.ndim != 2:
            raise WorkloadError(
                f"The encoder gives {made.ndim}-dimensional features, not one row per tile.",
                remedy="Set `pool: token+mean` and `prefix` for a transformer that gives all its tokens.",
            )
        return made.float()


class OnnxEncoder:
    """An ONNX graph (n, 3, h, w) float32 → (n, d) by onnxruntime, on CPU or CUDA. Memory is bound, not copied."""

    def __init__(self, made: Recipe, device: str, threads: int) -> None:
        self.front = _Front(made, device)
        self._session = onnx_session(made.weights, self.front.device.type, threads)
        told = self._session.get_inputs()[0]
        self._input, self._output = told.name, self._session.get_outputs()[0].name
        self._fixed = isinstance(told.shape[0], int)
        if self._fixed:
            self.front.batch = told.shape[0]

    def encode(self, batch: np.ndarray, stain: np.ndarray | None = None) -> np.ndarray:
        step = self.front.batch
        return np.concatenate([self._some(batch[k : k + step], stain) for k in range(0, len(batch), step)])

    def _some(self, tiles: np.ndarray, stain: np.ndarray | None) -> np.ndarray:
        count = len(tiles)
        if self._fixed and count < self.front.batch:  # a graph of one batch size gets white tiles beside the last ones
            tiles = np.concatenate([tiles, np.full((self.front.batch - count, *tiles.shape[1:]), 255, np.uint8)])
        x = self.front(tiles, stain).contiguous()
        binding = self._session.io_binding()
        device = self.front.device
        binding.bind_input(self._input, device.type, device.index or 0, np.float32, tuple(x.shape), x.data_ptr())
        binding.bind_output(self._output)
        if device.type == "cuda":
            import torch

            torch.cuda.current_stream(device).synchronize()
        self._session.run_with_iobinding(binding)
        made = binding.copy_outputs_to_cpu()[0]
        return np.asarray(made[:count].reshape(count, -1), np.float16)


def onnx_session(graph: Path | None, device: str, threads: int) -> Any:
    """An onnxruntime session on `cpu` or `cuda`. Raises `WorkloadError` where it cannot be."""
    try:
        import onnxruntime
    except ImportError as error:
        raise WorkloadError("onnxruntime is not installed here.", remedy="pip install onnxruntime") from error

    wanted = "CUDAExecutionProvider" if device == "cuda" else "CPUExecutionProvider"
    if wanted not in onnxruntime.get_available_providers():
        raise WorkloadError("onnxruntime cannot use this GPU.", remedy="pip install onnxruntime-gpu")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = max(1, threads)
    try:
        return onnxruntime.InferenceSession(str(graph), options, providers=[wanted])
    except Exception as error:  # onnxruntime raises classes of its own for files that are no graphs
        raise WorkloadError("onnxruntime cannot open the graph.", remedy="Export it again; see the log.") from error


def load(made: Recipe, device: str, threads: int) -> Any:
    """The encoder on its device. Raises `WorkloadError` where a library is missing or the weights do not fit."""
    if made.kind == "noop":
        return Noop()
    if made.kind == "onnx":
        return OnnxEncoder(made, device, threads)
    import torch

    if made.kind == "torchscript":
        read: Any = torch.jit.load
        return TorchEncoder(read(str(made.weights), map_location="cpu"), made, device, threads)
    if made.kind == "timm":
        module = _of_timm(made)
        from safetensors.torch import load_file

        weights = load_file(str(made.weights))
    else:
        module = _shipped(made)
        # The file is the one that its digest names, and nothing but tensors is unpickled.
        weights = torch.load(str(made.weights), map_location="cpu", weights_only=True)
    try:
        module.load_state_dict(weights)
    except RuntimeError as error:
        raise WorkloadError("The weights do not fit the architecture.", remedy="Check `arguments`.") from error
    return TorchEncoder(module, made, device, threads)


def _shipped(made: Recipe) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("permed_encoder", made.architecture)
    assert spec is not None and spec.loader is not None
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    module: torch.nn.Module = code.build()
    return module


def _of_timm(made: Recipe) -> torch.nn.Module:
    """The architecture without weights: nothing is fetched."""
    _allow_torchvision()
    try:
        import timm
    except ImportError as error:
        raise WorkloadError("timm is not installed here.", remedy="pip install 'permed-compute[encoders]'") from error
    try:
        module: torch.nn.Module = timm.create_model(made.architecture, pretrained=False, num_classes=0,
                                                    **_with_classes(made.arguments))  # fmt: skip
    except (RuntimeError, TypeError, AttributeError) as error:
        raise WorkloadError(f"timm cannot make {made.architecture!r} of these arguments.",
                            remedy="Check `timm` and `arguments`.") from error  # fmt: skip
    return module


def _with_classes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    import timm.layers
    import torch

    return {
        name: getattr(timm.layers, value, None) or getattr(torch.nn, value) if name in _LAYERS else value
        for name, value in arguments.items()
    }


def _allow_torchvision() -> None:
    """timm imports torchvision, whose wheels are built for CUDA: beside a torch for CPU its operators do not load, and
    its import fails because it describes two of them (of detection; no encoder has them). Declaring those is enough."""
    import torch

    if torch.version.cuda is not None or importlib.util.find_spec("torchvision") is None:
        return
    library: Any = torch.library.Library
    declared = library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(declared)


_DECLARED: list[Any] = []  # operators live as long as their library object
