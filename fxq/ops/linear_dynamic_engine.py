"""qlinear_dynamic_engine: a linear that quantizes its input as torch's engines do while the model runs (`fxq.engine`).

    q, s_x, z_x = the integers, scale and zero point of x as a whole              `numerics.quantize_engine`
    y[m, n]     = engine(f32(acc - z_x * column_sums[n]), s_x, scale[n], bias[n])  `numerics.engine_result`

x: float32 [..., K]; weight: int8, packed; column_sums: int32 [N], sum_k q_w[n, k]; scale, bias: float32 [N]; steps:
255, or 127 under torch's `reduce_range`. Every row sees the range of all. A tensor that holds NaN or infinity, where
torch raises or the engines disagree, becomes NaN. NumPy truth: `numerics.qlinear_dynamic_engine`. The sums are those of
`qlinear_float`; the rest stands at the edge of an imported model and has no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.qdq import expect_dtype


def _qlinear_dynamic_engine(
    x: Tensor, weight: Tensor, column_sums: Tensor, scale: Tensor, bias: Tensor | None, engine: str, steps: int
) -> Tensor:
    op = "qlinear_dynamic_engine"
    if engine not in numerics.ENGINES:
        raise ValueError(f"fxq::{op}: unknown engine {engine!r}; there are {', '.join(numerics.ENGINES)}")
    for name, operand in (("x", x), ("scale", scale), ("bias", bias)):
        if operand is not None:
            expect_dtype(op, name, operand, torch.float32)
    expect_dtype(op, "column_sums", column_sums, torch.int32)
    if bias is not None and bias.shape != scale.shape:
        raise ValueError(f"fxq::{op}: bias has shape {list(bias.shape)}, scale {list(scale.shape)}")
    q, s_x, z_x = numerics.quantize_engine(x.detach().contiguous().numpy(), engine, steps)
    operands = torch.from_numpy(q), weight, -z_x * column_sums, torch.ones_like(scale)
    sums = torch.ops.fxq.qlinear_float(*operands).numpy()
    added = None if bias is None else bias.detach().numpy()
    return torch.from_numpy(numerics.engine_result(sums, s_x, scale.numpy(), added, engine))


qlinear_dynamic_engine = kernels.define(
    "qlinear_dynamic_engine(Tensor x, Tensor weight, Tensor column_sums, Tensor scale, Tensor? bias, str engine, "
    "int steps) -> Tensor",
    _qlinear_dynamic_engine,
    lambda x, weight, column_sums, scale, bias, engine, steps: x.new_empty(*x.shape[:-1], len(scale)),
)
