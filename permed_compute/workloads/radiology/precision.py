"""How a network is run: eager float32, or a faster variant that has shown here that it gives the same labels.

What is faster differs by network and machine: freezing TorchScript ran MONAI's UNet 2.5 times as fast here and
SegResNet 0.9 times; bfloat16 is 11 times slower on a CPU without it. So it is measured, once per model and type of
machine, and the default is not to.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from permed_compute.errors import WorkloadError

if TYPE_CHECKING:
    from torch import Tensor

Predict = Callable[["Tensor"], "Tensor"]

EAGER = "eager"
VARIANTS = (EAGER, "jit", "compile", "bf16")
TOLERANCE = 1e-4
"""Share of voxels whose label may differ from eager float32's on the probe."""
_GAIN = 0.9
"""A variant is worth its risk where it takes at most this share of eager's time."""
_REPEATS = 3


def apply(network: Any, variant: str, device: str) -> Predict:
    """The network as `variant`, logits in float32. jit and compile are built at the first call of each shape."""
    import torch

    predict: Predict
    if variant == EAGER:
        predict = network
        return predict
    if variant == "jit":
        return _Frozen(network)
    if variant == "compile":
        predict = torch.compile(network)
        return predict
    if variant == "bf16":
        kind = torch.device(device).type

        def lower(x: Tensor) -> Tensor:
            with torch.autocast(kind, torch.bfloat16):
                out: Tensor = network(x)
                return out.float()

        return lower
    raise WorkloadError(f"There is no precision variant {variant!r}.", remedy=f"Write one of {', '.join(VARIANTS)}.")


class _Frozen:
    """TorchScript by tracing, one per shape: what a network decides by its input's size is fixed in a trace."""

    def __init__(self, network: Any) -> None:
        self.network, self.traced = network, dict[tuple[int, ...], Any]()

    def __call__(self, x: Tensor) -> Tensor:
        import torch

        shape = tuple(x.shape)
        if shape not in self.traced:
            traced: Any = torch.jit.trace(self.network, x, check_trace=False)  # type: ignore[no-untyped-call]
            self.traced[shape] = torch.jit.optimize_for_inference(torch.jit.freeze(traced.eval()))
        out: Tensor = self.traced[shape](x)
        return out


class Clock:
    """A predictor that adds up its own wall seconds: what share of a batch is the network's."""

    def __init__(self, predict: Predict, device: Any) -> None:
        self.predict, self.cuda, self.seconds = predict, device.type == "cuda", 0.0

    def __call__(self, x: Tensor) -> Tensor:
        began = time.perf_counter()
        out = self.predict(x)
        if self.cuda:
            import torch

            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - began
        return out


def machine(device: str, threads: int) -> str:
    """The type of machine that a choice holds for."""
    import torch

    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    return f"{_processor()}, {threads} threads, torch {torch.__version__}"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - a pseudo-file, read line by line
            rows = dict(line.split(":", 1) for line in file.read().split("\n\n")[0].splitlines() if ":" in line)
    except OSError:
        return platform.machine()
    model = {key.strip(): value.strip() for key, value in rows.items()}
    return (
        " ".join(model.get(key, "") for key in ("model name", "cpu family", "model") if key in model) or os.uname()[4]
    )


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen and why. seconds: per probe, variants that run here; differing: share of other labels."""

    variant: str
    machine: str
    tolerance: float
    seconds: Mapping[str, float]
    differing: Mapping[str, float]

    def as_dict(self) -> dict[str, Any]:
        return {
            "variant": self.variant, "machine": self.machine, "tolerance": self.tolerance,
            "seconds": dict(self.seconds), "differing": dict(self.differing),
        }  # fmt: skip


def probe(channels: int, roi: Sequence[int], device: str) -> Tensor:
    """(1, channels, *roi): smooth noise of unit deviation, the same everywhere."""
    import torch
    from torch.nn.functional import interpolate

    coarse = torch.randn((1, channels, *(max(2, n // 8) for n in roi)), generator=torch.Generator().manual_seed(0))
    smooth = interpolate(coarse, size=tuple(roi), mode="trilinear")
    return (smooth / smooth.std()).to(device)


def choose(
    variants: Mapping[str, Predict], x: Tensor, *, tolerance: float, machine: str, clock: Callable[[], float]
) -> Choice:
    """The fastest of `variants` (eager among them) whose labels on `x` differ in at most `tolerance` of the voxels.

    A variant that cannot run here (no compiler, an operation that cannot be traced) is out, and not in `seconds`.
    """
    import torch

    seconds: dict[str, float] = {}
    differing: dict[str, float] = {}
    with torch.inference_mode():
        right = _labels(variants[EAGER](x))
        for name, predict in variants.items():
            try:
                differing[name] = float((_labels(predict(x)) != right).float().mean())
                seconds[name] = statistics.median(_timed(predict, x, clock) for _ in range(_REPEATS))
            except Exception:  # noqa: BLE001 - back-ends raise whatever they like where they are not to be had
                differing.pop(name, None)
    fit = {name: took for name, took in seconds.items() if differing[name] <= tolerance}
    best = min(fit, key=lambda name: fit[name])
    chosen = best if fit[best] <= _GAIN * fit[EAGER] else EAGER
    return Choice(chosen, machine, tolerance, seconds, differing)


def deviation(variant: Predict, eager: Predict, x: Tensor) -> float:
    """Share of the labels on `x` that differ from eager's."""
    import torch

    with torch.inference_mode():
        return float((_labels(variant(x)) != _labels(eager(x))).float().mean())


def _labels(logits: Tensor) -> Tensor:
    return logits.argmax(1) if logits.shape[1] > 1 else logits > 0


def _timed(predict: Predict, x: Tensor, clock: Callable[[], float]) -> float:
    import torch

    began = clock()
    predict(x)
    if x.device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - began
