"""gate: squeeze and excite, an image times a gate that two products make of its means, as one call.

    mean   = qadaptive_avg_pool(x, 1, ...)
    hidden = qconv(mean, weight, ...), or qconv_act_quantize with `activation`                          windows of 1x1
    qgate  = qmul(x, qconv_act_quantize(hidden, weight_2, ..., gate, ...), ...)                               -> uint8

x: uint8 [B, C, *spatial]; operands as in `fxq.ops.pool`, `fxq.ops.conv` and `fxq.ops.mul`; activation: "" where the
first product has none, scale then means nothing. Bit for bit what the four ops give one by one; all but the last work
on a few bytes, and cost mostly their calls. `fxq.expansion.expand` takes it apart again. NumPy truth:
`fxq.numerics.qadaptive_avg_pool`, `qconv`, `qconv_act_quantize`, `qmul`. Results are channels-last in memory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels
from fxq.layout import channels_last, empty


def _qgate(
    x: Tensor,
    z_x: int,
    mean: float,
    z_mean: int,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    activation: str,
    scale: float,
    z_hidden: int,
    low_hidden: int,
    high_hidden: int,
    weight_2: Tensor,
    bias_2: Tensor,
    multiplier_2: Tensor,
    gate: str,
    scale_2: float,
    z_gate: int,
    m: float,
    zero_point: int,
    low: int,
    high: int,
) -> Tensor:
    rank = x.dim() - 2
    window = "x".join("1" * rank)
    hidden = kernels.portable("qadaptive_avg_pool")(x, (1,) * rank, z_x, mean, z_mean, 0, 255)
    operands = (weight, bias, multiplier, window, z_mean)
    if activation:
        hidden = kernels.portable("qconv_act_quantize")(hidden, *operands, activation, scale, z_hidden)
    else:
        hidden = kernels.portable("qconv")(hidden, *operands, z_hidden, low_hidden, high_hidden)
    operands = (weight_2, bias_2, multiplier_2, window, z_hidden)
    gates = kernels.portable("qconv_act_quantize")(hidden, *operands, gate, scale_2, z_gate)
    if gates.shape[1] != x.shape[1]:
        raise ValueError(f"fxq::qgate: {gates.shape[1]} gates for x {list(x.shape)}")
    y: Tensor = kernels.portable("qmul")(x, gates, m, z_x, z_gate, zero_point, low, high)
    return channels_last(y)


qgate = kernels.define(
    "qgate(Tensor x, int z_x, float mean, int z_mean, Tensor weight, Tensor bias, Tensor multiplier, str activation, "
    "float scale, int z_hidden, int low_hidden, int high_hidden, Tensor weight_2, Tensor bias_2, Tensor multiplier_2, "
    "str gate, float scale_2, int z_gate, float m, int zero_point, int low, int high) -> Tensor",
    _qgate,
    lambda x, *rest: empty(x, x.shape[1], list(x.shape[2:]), torch.uint8),
)
