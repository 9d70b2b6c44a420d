"""linears: several linears that read the same integers, as one call: q, k and v of an attention, gate and value.

    y_i = qlinear(x, weights[i], biases[i], multipliers[i], zero_points[i], lows[i], highs[i])        -> uint8, each

Operands as in `fxq.ops.linear`, in lists; each result has a scale and zero point of its own. Threads share the output
channels of all. `fxq.expansion.expand` takes it apart again. NumPy truth: `fxq.numerics.qlinear`.
"""

from __future__ import annotations

from torch import Tensor

from fxq import kernels


def _qlinears(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    multipliers: list[Tensor],
    zero_points: list[int],
    lows: list[int],
    highs: list[int],
) -> list[Tensor]:
    operands = weights, biases, multipliers, zero_points, lows, highs
    if len({len(values) for values in operands}) != 1:
        raise ValueError(f"fxq::qlinears: {len(weights)} weights, and not as many of each other operand")
    one = kernels.portable("qlinear")
    return [one(x, *each) for each in zip(*operands, strict=True)]


qlinears = kernels.define(
    "qlinears(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] multipliers, int[] zero_points, int[] lows, "
    "int[] highs) -> Tensor[]",
    _qlinears,
    lambda x, weights, biases, *rest: [x.new_empty(*x.shape[:-1], bias.shape[0]) for bias in biases],
)
