"""EfficientNet-Lite0 (Liu 2020, TensorFlow model zoo): the trunk, up to the 1280 pooled features. torch only."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

_STAGES = (
    # repeats, kernel, stride, expansion, channels in, channels out
    (1, 3, 1, 1, 32, 16), (2, 3, 2, 6, 16, 24), (2, 5, 2, 6, 24, 40), (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112), (4, 5, 2, 6, 112, 192), (1, 3, 1, 6, 192, 320),
)  # fmt: skip


class SameConv(nn.Conv2d):
    """Convolution with TensorFlow's SAME padding, which the weights were trained with."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pads: list[int] = []
        for axis in (-1, -2):
            size, kernel, stride = x.shape[axis], self.kernel_size[axis], self.stride[axis]
            pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            pads += [pad // 2, pad - pad // 2]
        return functional.conv2d(functional.pad(x, pads), self.weight, self.bias, self.stride, 0, 1, self.groups)


def _conv(into: int, out: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(into, out, kernel, stride, groups=groups, bias=False)


class Block(nn.Module):
    """Inverted residual without squeeze-and-excite, ReLU6."""

    def __init__(self, kernel: int, stride: int, expansion: int, into: int, out: int) -> None:
        super().__init__()
        wide = into * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and into == out
        if self.expands:
            self._expand_conv, self._bn0 = _conv(into, wide, 1), nn.BatchNorm2d(wide, 1e-3)
        self._depthwise_conv, self._bn1 = _conv(wide, wide, kernel, stride, wide), nn.BatchNorm2d(wide, 1e-3)
        self._project_conv, self._bn2 = _conv(wide, out, 1), nn.BatchNorm2d(out, 1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = functional.relu6(self._bn0(self._expand_conv(x))) if self.expands else x
        y = functional.relu6(self._bn1(self._depthwise_conv(y)))
        y = self._bn2(self._project_conv(y))
        return x + y if self.adds else y


class EfficientNetLite0(nn.Module):
    """(n, 3, h, w) → (n, 1280); `classify` gives ImageNet logits, to check that weights and preprocessing fit."""

    def __init__(self) -> None:
        super().__init__()
        self._conv_stem, self._bn0 = _conv(3, 32, 3, 2), nn.BatchNorm2d(32, 1e-3)
        self._blocks = nn.ModuleList(
            Block(kernel, 1 if k else stride, expansion, out if k else into, out)
            for repeats, kernel, stride, expansion, into, out in _STAGES
            for k in range(repeats)
        )
        self._conv_head, self._bn1 = _conv(320, 1280, 1), nn.BatchNorm2d(1280, 1e-3)
        self._fc = nn.Linear(1280, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu6(self._bn0(self._conv_stem(x)))
        for block in self._blocks:
            x = block(x)
        return functional.relu6(self._bn1(self._conv_head(x))).mean((2, 3))

    def classify(self, x: torch.Tensor) -> torch.Tensor:
        return self._fc(self.forward(x))


def build() -> nn.Module:
    """The network without weights."""
    return EfficientNetLite0()
