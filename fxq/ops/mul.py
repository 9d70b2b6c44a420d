"""mul: y = a * b of two tensors, in integers (a gate, as in squeeze-and-excite).

    q_y = clamp(rne(f32((q_a - z_a) * (q_b - z_b) * m)) + z_y, low, high),  m = f32(s_a * s_b / s_y)

q_a, q_b: uint8, broadcastable; the product of the integers is exact, so there is one rounding before the last. NumPy
truth: `fxq.numerics.qmul`. A relu behind it is low = z_y.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels
from fxq.qdq import expect_dtype, round_clamp


def _qmul(a: Tensor, b: Tensor, m: float, z_a: int, z_b: int, zero_point: int, low: int, high: int) -> Tensor:
    expect_dtype("qmul", "a", a, torch.uint8)
    expect_dtype("qmul", "b", b, torch.uint8)
    product = (a.to(torch.int32) - z_a) * (b.to(torch.int32) - z_b)
    steps = product.to(torch.float32) * torch.tensor(m, dtype=torch.float32)
    return round_clamp(steps, zero_point, low, high).contiguous()


def _broadcast(a: torch.Size, b: torch.Size) -> torch.Size:
    shape: torch.Size = torch.broadcast_shapes(a, b)  # type: ignore[no-untyped-call]
    return shape


qmul = kernels.define(
    "qmul(Tensor a, Tensor b, float m, int z_a, int z_b, int zero_point, int low, int high) -> Tensor",
    _qmul,
    lambda a, b, m, z_a, z_b, zero_point, low, high: a.new_empty(_broadcast(a.shape, b.shape)),
)
