"""Convolutional networks of the model benchmark, in their published sizes, with random weights.

Each is written as torchvision or its paper has it. Random weights of the usual variance, then a few batches in training
mode so that the batch norms have the statistics of their data, as in a trained network.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def settled(make: Callable[[], nn.Module], *shape: int) -> nn.Module:
    """The network in eval mode, its batch norms settled on normally distributed inputs of `shape`."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all batches
    model.train()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randn(shape))
    return model.eval()


class _Norm(nn.Sequential):
    """Convolution, batch norm, activation."""

    def __init__(
        self, n: int, m: int, kernel: int, stride: int = 1, groups: int = 1, act: type[nn.Module] | None = nn.ReLU
    ):
        layers = [nn.Conv2d(n, m, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(m)]
        super().__init__(*layers, *([act()] if act else []))


class _Basic(nn.Module):
    def __init__(self, n: int, m: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_Norm(n, m, 3, stride), _Norm(m, m, 3, act=None))
        self.skip = nn.Identity() if (n, stride) == (m, 1) else _Norm(n, m, 1, stride, act=None)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


def resnet18() -> nn.Module:
    """He et al., 2015: float32 [B, 3, H, W] to 1000 logits."""
    blocks = [_Basic(n, m, s) for a, m, stride in ((64, 64, 1), (64, 128, 2), (128, 256, 2), (256, 512, 2))
              for n, s in ((a, stride), (m, 1))]  # fmt: skip
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(_Norm(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1), *blocks, *head)


class _Gate(nn.Module):
    """Squeeze and excite."""

    def __init__(self, n: int, squeezed: int, act: type[nn.Module], gate: type[nn.Module]) -> None:
        super().__init__()
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(n, squeezed, 1), act(), nn.Conv2d(squeezed, n, 1), gate()
        )

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x * self.gate(x)
        return y


class _Inverted(nn.Module):
    """Expand, depthwise, gate, project; added to its input where the shapes allow."""

    def __init__(
        self, n: int, wide: int, m: int, kernel: int, stride: int, act: type[nn.Module], gate: nn.Module | None
    ) -> None:
        super().__init__()
        expand = [_Norm(n, wide, 1, act=act)] if wide != n else []
        gates = [gate] if gate is not None else []
        self.body = nn.Sequential(
            *expand, _Norm(wide, wide, kernel, stride, wide, act), *gates, _Norm(wide, m, 1, act=None)
        )
        self.adds = (n, stride) == (m, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def mobilenet_v3_small() -> nn.Module:
    """Howard et al., 2019: float32 [B, 3, H, W] to 1000 logits."""
    rows = (
        (3, 16, 16, 1, nn.ReLU, 2), (3, 72, 24, 0, nn.ReLU, 2), (3, 88, 24, 0, nn.ReLU, 1),
        (5, 96, 40, 1, nn.Hardswish, 2),
        (5, 240, 40, 1, nn.Hardswish, 1), (5, 240, 40, 1, nn.Hardswish, 1), (5, 120, 48, 1, nn.Hardswish, 1),
        (5, 144, 48, 1, nn.Hardswish, 1), (5, 288, 96, 1, nn.Hardswish, 2), (5, 576, 96, 1, nn.Hardswish, 1),
        (5, 576, 96, 1, nn.Hardswish, 1),
    )  # fmt: skip
    layers: list[nn.Module] = [_Norm(3, 16, 3, 2, act=nn.Hardswish)]
    n = 16
    for kernel, wide, m, gated, act, stride in rows:
        gate = _Gate(wide, max(8, (wide // 4 + 4) // 8 * 8), nn.ReLU, nn.Hardsigmoid) if gated else None
        layers.append(_Inverted(n, wide, m, kernel, stride, act, gate))
        n = m
    layers += [_Norm(96, 576, 1, act=nn.Hardswish), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(576, 1024), nn.Hardswish(), nn.Dropout(0.2), nn.Linear(1024, 1000))


def efficientnet_b0() -> nn.Module:
    """Tan and Le, 2019: float32 [B, 3, H, W] to 1000 logits."""
    rows = (
        (1, 16, 1, 3, 1), (6, 24, 2, 3, 2), (6, 40, 2, 5, 2), (6, 80, 3, 3, 2), (6, 112, 3, 5, 1), (6, 192, 4, 5, 2),
        (6, 320, 1, 3, 1),
    )  # fmt: skip
    layers: list[nn.Module] = [_Norm(3, 32, 3, 2, act=nn.SiLU)]
    n = 32
    for ratio, m, repeats, kernel, stride in rows:
        for i in range(repeats):
            gate = _Gate(n * ratio, max(1, n // 4), nn.SiLU, nn.Sigmoid)
            layers.append(_Inverted(n, n * ratio, m, kernel, stride if i == 0 else 1, nn.SiLU, gate))
            n = m
    layers += [_Norm(320, 1280, 1, act=nn.SiLU), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(1280, 1000))


class UNet(nn.Module):
    """Ronneberger et al., 2015, three levels, transposed convolutions: float32 [B, 3, H, W] to 2 logits per pixel."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = [3, width, 2 * width, 4 * width]
        self.down = nn.ModuleList(nn.Sequential(_Norm(n, m, 3), _Norm(m, m, 3)) for n, m in itertools.pairwise(sizes))
        self.bottom = nn.Sequential(_Norm(sizes[3], 8 * width, 3), _Norm(8 * width, 8 * width, 3))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * m, m, 2, 2) for m in sizes[:0:-1])
        self.merge = nn.ModuleList(nn.Sequential(_Norm(2 * m, m, 3), _Norm(m, m, 3)) for m in sizes[:0:-1])
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """H and W: multiples of 8."""
        kept = []
        for block in self.down:
            x = block(x)
            kept.append(x)
            x = F.max_pool2d(x, 2)
        x = self.bottom(x)
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([kept.pop(), up(x)], 1))
        y: Tensor = self.head(x)
        return y


class Crepe(nn.Module):
    """Kim et al., 2018, tiny: frames of 1024 samples, float32 [B, 1024], to 360 probabilities of pitch."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (n, m) in enumerate(itertools.pairwise((1, 128, 16, 16, 16, 32, 64))):
            kernel, stride, pads = (512, 4, (254, 254)) if i == 0 else (64, 1, (31, 32))
            conv = nn.Conv2d(n, m, (kernel, 1), (stride, 1))
            layers += [nn.ZeroPad2d((0, 0, *pads)), conv, nn.ReLU(), nn.BatchNorm2d(m), nn.MaxPool2d((2, 1), (2, 1))]
        self.body = nn.Sequential(*layers)
        self.classifier = nn.Linear(256, 360)

    def forward(self, x: Tensor) -> Tensor:
        """x: frames with mean 0 and standard deviation 1."""
        y = self.body(x[:, None, :, None]).permute(0, 2, 1, 3).flatten(1)
        return torch.sigmoid(self.classifier(y))


def tones(held_out: bool, shape: tuple[int, ...], count: int) -> list[tuple[Tensor, ...]]:
    """Frames of tones with eight harmonics, 60 to 1000 Hz at 16 kHz."""
    draw = torch.Generator().manual_seed(int(held_out))
    time = 2 * math.pi * torch.arange(shape[1]) / 16_000
    batches: list[tuple[Tensor, ...]] = []
    for _ in range(count):
        pitch = 60 * (1000 / 60) ** torch.rand(shape[0], 1, 1, generator=draw)
        loud = torch.rand(shape[0], 8, 1, generator=draw)
        x = (loud * torch.sin(pitch * torch.arange(1, 9)[:, None] * time)).sum(1)
        batches.append(((x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True),))
    return batches
