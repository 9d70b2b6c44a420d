"""One convolution, uint8 in and uint8 out, with a relu: fxq against torch's own int8 convolutions and the core's peak.

    python -m benchmarks.convs [--batch 1]

Layers of ResNet-18, MobileNetV3, EfficientNet-B0 and a U-Net, all channels-last. Before a contestant is timed, its
output is held against exact arithmetic: one that is off by more than a single step takes no part.
"""

from __future__ import annotations

import argparse
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.peak import Probes
from benchmarks.timing import Call, interleave, median_us, ratio
from fxq import kernels, numerics
from fxq.layout import channels_last
from fxq.ops.conv import qconv


@dataclass(frozen=True)
class Layer:
    """channels x size x size -> out channels, one square kernel."""

    model: str
    channels: int
    size: int
    out: int
    kernel: int
    stride: int = 1
    groups: int = 1

    @property
    def padding(self) -> int:
        return self.kernel // 2

    def __str__(self) -> str:
        kind = "depthwise" if self.groups == self.channels > 1 else f"{self.groups} groups" if self.groups > 1 else ""
        stride = f"stride {self.stride}" if self.stride > 1 else ""
        text = f"{self.channels} x {self.size} -> {self.out}, {self.kernel} x {self.kernel}"
        return ", ".join(filter(None, (text, stride, kind)))


LAYERS = (
    Layer("ResNet-18", 3, 224, 64, 7, 2),
    Layer("ResNet-18", 64, 56, 64, 3),
    Layer("ResNet-18", 64, 56, 128, 3, 2),
    Layer("ResNet-18", 64, 56, 128, 1, 2),
    Layer("ResNet-18", 128, 28, 128, 3),
    Layer("ResNet-18", 256, 14, 256, 3),
    Layer("ResNet-18", 512, 7, 512, 3),
    Layer("MobileNetV3", 3, 224, 16, 3, 2),
    Layer("MobileNetV3", 16, 112, 16, 3, 2, 16),
    Layer("MobileNetV3", 96, 14, 96, 5, 1, 96),
    Layer("MobileNetV3", 96, 14, 576, 1),
    Layer("EfficientNet-B0", 96, 112, 96, 3, 2, 96),
    Layer("EfficientNet-B0", 144, 56, 144, 3, 1, 144),
    Layer("EfficientNet-B0", 672, 14, 672, 5, 1, 672),
    Layer("EfficientNet-B0", 192, 7, 1152, 1),
    Layer("ResNeXt-50", 128, 56, 128, 3, 1, 32),
    Layer("U-Net", 32, 128, 32, 3),
)


@dataclass(frozen=True)
class Operands:
    """One layer's numbers, the same for every contestant."""

    layer: Layer
    x: Tensor
    w: Tensor
    bias: Tensor
    s_w: Tensor
    s_y: float
    s_x: float = 0.02
    z_x: int = 117

    @staticmethod
    def of(layer: Layer, batch: int) -> Operands:
        """Random ones, whose results fill the range."""
        shape = (layer.out, layer.channels // layer.groups, layer.kernel, layer.kernel)
        deviation = math.sqrt(math.prod(shape[1:])) * 74 * 74 * 0.02 * 0.006
        return Operands(
            layer,
            channels_last(torch.randint(0, 256, (batch, layer.channels, layer.size, layer.size), dtype=torch.uint8)),
            torch.randint(-127, 128, shape, dtype=torch.int8),
            torch.randn(layer.out),
            torch.rand(layer.out) * 0.01 + 0.001,
            deviation * 3 / 255,
        )

    def arguments(self) -> tuple[object, ...]:
        """Those of `qconv`."""
        layer, w, s_w = self.layer, self.w.numpy(), self.s_w.numpy()
        bias = numerics.fold_bias(self.bias.numpy(), w.reshape(len(w), -1), self.s_x, self.z_x, s_w).astype("int32")
        multiplier = numerics.requantize_multiplier(self.s_x, s_w, self.s_y)
        packed = numerics.pack_conv(w, (1, 1), layer.groups)
        square = (layer.kernel,) * 2, (layer.stride,) * 2, (layer.padding,) * 4, (1, 1), layer.groups
        window = str(numerics.Window(*square))
        return (self.x, *map(torch.from_numpy, (packed, bias, multiplier)), window, self.z_x, 0, 0, 255)


def fxq_call(operands: Operands) -> Callable[[], Tensor]:
    """The op that lowered models call."""
    arguments = operands.arguments()
    return lambda: qconv(*arguments)


def engine_call(engine: str, operands: Operands) -> Callable[[], Tensor]:
    """`torch.ops.quantized.conv2d_relu` of one engine; a quantized channels-last tensor goes in and comes out."""
    torch.backends.quantized.engine = engine
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
    layer, zeros = operands.layer, torch.zeros(operands.layer.out, dtype=torch.int64)
    w = torch._make_per_channel_quantized_tensor(operands.w, operands.s_w.double(), zeros, 0)
    x = torch._make_per_tensor_quantized_tensor(operands.x, operands.s_x, operands.z_x)
    x = x.contiguous(memory_format=torch.channels_last)
    square = [layer.stride] * 2, [layer.padding] * 2, [1, 1], layer.groups
    packed = torch.ops.quantized.conv2d_prepack(w, operands.bias, *square)
    return lambda: torch.ops.quantized.conv2d_relu(x, packed, operands.s_y, 0)


CONTESTANTS: dict[str, Callable[[Operands], Callable[[], Tensor]]] = {
    "fxq": fxq_call,
    **{f"torch {engine}": partial(engine_call, engine) for engine in ("x86", "fbgemm", "onednn")},
}


def check(name: str, y: Tensor, operands: Operands) -> None:
    """Raises `ArithmeticError` beyond one step from exact arithmetic, beyond none for fxq."""
    q = y.int_repr() if y.is_quantized else y
    expected = kernels.portable("qconv")(*operands.arguments())
    off = int((q.int() - expected.int()).abs().max())
    if off > (0 if name == "fxq" else 1):
        raise ArithmeticError(f"off by up to {off} steps")


def run(layer: Layer, batch: int, seconds: float, probes: Probes | None) -> str:
    """One row: medians in microseconds by threads, the fastest of torch's over fxq's, the share of the peak."""
    operands = Operands.of(layer, batch)
    calls: dict[tuple[str, int], Call] = {}
    torch.set_num_threads(2)
    for name, make in CONTESTANTS.items():
        try:
            call = make(operands)
            check(name, call(), operands)
        except (RuntimeError, ArithmeticError) as error:
            print(f"{layer}: {name} takes no part: {str(error).splitlines()[0]}")
            continue
        calls |= dict.fromkeys([(name, threads) for threads in (1, 2)], call)
    if probes:
        calls["peak", 1] = probes.dot
    times = interleave(calls, seconds, before=lambda key: torch.set_num_threads(key[1]))
    cells = [layer.model, str(layer)]
    for threads in (1, 2):
        own = times["fxq", threads]
        best = min(ratio(v, own) for (name, t), v in times.items() if t == threads and name not in ("fxq", "peak"))
        cells += [f"{median_us(own):.4g}", f"{best:.2f}x"]
    out = -(-layer.size // layer.stride)
    operations = 2 * batch * layer.out * out * out * math.prod(operands.w.shape[1:])
    share = ratio(times["peak", 1], times["fxq", 1]) * operations / probes.dot_operations if probes else math.nan
    return f"| {' | '.join([*cells, f'{share:.0%}'])} |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each layer")
    options = parser.parse_args()
    torch.manual_seed(0)
    try:
        probes = Probes(exact_avx2=False)
    except OSError as error:
        probes = None
        print(f"without the core's peak: {error}")
    print("| model | layer | us, 1 thread | torch's best | us, 2 threads | torch's best | of the peak |")
    print("|---|---|---|---|---|---|---|")
    for layer in LAYERS:
        print(run(layer, options.batch, options.seconds, probes), flush=True)


if __name__ == "__main__":
    main()
