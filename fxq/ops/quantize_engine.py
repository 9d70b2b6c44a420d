"""quantize_fused and quantize_onednn: float32 to uint8 with the roundings of torch's engines (`fxq.engine`).

    quantize_fused    q = clamp(rne(fma(x, f32(1 / scale), zero_point)), 0, 255)
    quantize_onednn   q = clamp(rne(f32(f32(v * f32(1 / scale)) + zero_point)), 0, 255), v = f32(f32(x * factor) + bias)

x: float32 [..., N], any shape for `quantize_fused`; factor, bias: float32 [N]; a relu is max(v, 0). NumPy truth: the
functions of that name. Both stand at the edge of an imported model and have no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.qdq import expect_dtype


def _quantize_fused(x: Tensor, scale: float, zero_point: int) -> Tensor:
    expect_dtype("quantize_fused", "x", x, torch.float32)
    return torch.from_numpy(numerics.quantize_fused(x.detach().contiguous().numpy(), scale, zero_point))


def _quantize_onednn(x: Tensor, factor: Tensor, bias: Tensor, relu: bool, scale: float, zero_point: int) -> Tensor:
    for name, operand in (("x", x), ("factor", factor), ("bias", bias)):
        expect_dtype("quantize_onednn", name, operand, torch.float32)
    v = x.contiguous() * factor + bias
    v = torch.relu(v) if relu else v
    steps = v * (1 / torch.tensor(scale, dtype=torch.float32)) + zero_point
    return torch.clamp(torch.round(torch.nan_to_num(steps, 0)), 0, 255).to(torch.uint8)


quantize_fused = kernels.define(
    "quantize_fused(Tensor x, float scale, int zero_point) -> Tensor",
    _quantize_fused,
    lambda x, scale, zero_point: x.new_empty(x.shape, dtype=torch.uint8),
)
quantize_onednn = kernels.define(
    "quantize_onednn(Tensor x, Tensor factor, Tensor bias, bool relu, float scale, int zero_point) -> Tensor",
    _quantize_onednn,
    lambda x, factor, bias, relu, scale, zero_point: x.new_empty(x.shape, dtype=torch.uint8),
)
