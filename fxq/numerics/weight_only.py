"""The product of float activations with int8 weights, summed in float32 in one fixed order."""

from __future__ import annotations

import numpy as np

from fxq.numerics.affine import F32, I8, fused_multiply_add

BLOCK = 512
"""Products that are summed one after the other before they join the sum of the blocks before them."""


def linear_weight_only(x: F32, q_w: I8, s_w: F32, bias: F32 | None = None) -> F32:
    """y = f32(f32(sum_k x[m, k] * q_w[n, k]) * s_w[n]), then f32(y + bias[n]) where one is given.

    x: float32 [..., K] (bfloat16 and float16 are widened to it, which is exact, and the result is rounded back); q_w:
    int8 [N, K]; s_w, bias: float32 [N]. Blocks of `BLOCK` products are summed in the order of k, beginning with 0, each
    by a fused multiply-add, s = f32(s + x * q_w) with one rounding, and then the blocks in their order.
    """
    x = np.asarray(x, np.float32)
    total = np.zeros((*x.shape[:-1], len(q_w)), np.float32)
    w = q_w.astype(np.float32).T
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, x.shape[-1], BLOCK):
            part = np.zeros_like(total)
            for k in range(start, min(start + BLOCK, x.shape[-1])):
                part = fused_multiply_add(x[..., k : k + 1], w[k], part)
            total += part
        y: F32 = total * s_w
        return y if bias is None else y + bias
