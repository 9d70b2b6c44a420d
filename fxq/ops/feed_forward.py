"""feed_forward: two linears with an activation between them, the second with a scale for each row, as one call.

    qfeed_forward    qlinear_dynamic(qlinear_act(x, weight, bias, multiplier, activation),
                                     weight_2, column_sums, scale, bias_2, addend)                 uint8 -> float32

Operands as in `fxq.ops.activation` and `fxq.ops.linear_dynamic`. What stands between is the widest value of a
transformer, in float32, as its rows must be known before they have scales: here a block of rows goes through both, and
never leaves the cache. `fxq.expansion.expand` takes it apart again. NumPy truth: `fxq.numerics.qlinear_act`,
`qlinear_dynamic`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxq import kernels


def _qfeed_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    activation: str,
    weight_2: Tensor,
    column_sums: Tensor,
    scale: Tensor,
    bias_2: Tensor | None = None,
    addend: Tensor | None = None,
) -> Tensor:
    wide = kernels.portable("qlinear_act")(x, weight, bias, multiplier, activation)
    y: Tensor = kernels.portable("qlinear_dynamic")(wide, weight_2, column_sums, scale, bias_2, addend)
    return y


def _empty(x: Tensor, scale: Tensor, addend: Tensor | None) -> Tensor:
    shape = torch.Size([*x.shape[:-1], len(scale)])
    if addend is not None:
        shape = torch.broadcast_shapes(shape, addend.shape)  # type: ignore[no-untyped-call]
    return x.new_empty(shape, dtype=torch.float32)


qfeed_forward = kernels.define(
    "qfeed_forward(Tensor x, Tensor weight, Tensor bias, Tensor multiplier, str activation, Tensor weight_2, "
    "Tensor column_sums, Tensor scale, Tensor? bias_2=None, Tensor? addend=None) -> Tensor",
    _qfeed_forward,
    lambda x, weight, bias, multiplier, activation, weight_2, column_sums, scale, bias_2=None, addend=None: _empty(
        x, scale, addend
    ),
)
