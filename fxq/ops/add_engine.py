"""qadd_engine: the sum of two tensors as torch's engines round it (`fxq.engine`).

    fbgemm, onednn   q_y = clamp(rne(f32(f32(a + b) * f32(1 / s_y))) + z_y, low, 255),
                     a = fma(q_a, s_a, -f32(s_a * z_a)), b likewise
    qnnpack          q_y = clamp(round(((q_a - z_a) * m_a + (q_b - z_b) * m_b) / 2**shift) + z_y, low, 255), in integers

q_a, q_b: uint8, broadcastable; a relu is max(a + b, 0), or low = z_y. NumPy truth: `numerics.qadd_engine`. It serves
imported models and has no native kernel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.layout import empty_pair, laid_like
from fxq.qdq import expect_dtype


def _qadd_engine(
    a: Tensor, b: Tensor, s_a: float, z_a: int, s_b: float, z_b: int, s_y: float, z_y: int, relu: bool, engine: str
) -> Tensor:
    op = "qadd_engine"
    expect_dtype(op, "a", a, torch.uint8)
    expect_dtype(op, "b", b, torch.uint8)
    if engine not in numerics.ENGINES:
        raise ValueError(f"fxq::{op}: unknown engine {engine!r}; there are {', '.join(numerics.ENGINES)}")
    y = numerics.qadd_engine(a.numpy(), b.numpy(), s_a, z_a, s_b, z_b, s_y, z_y, relu, engine)
    return laid_like(torch.from_numpy(y), a, b)


qadd_engine = kernels.define(
    "qadd_engine(Tensor a, Tensor b, float s_a, int z_a, float s_b, int z_b, float s_y, int z_y, bool relu, "
    "str engine) -> Tensor",
    _qadd_engine,
    lambda a, b, *rest: empty_pair(a, b),
)
