"""upsample: a larger image from a smaller one, by copies of the nearest pixel or by bilinear means.

    qupsample_nearest   q_y[..., o] = q_x[..., min(floor(f32(o * step)), size - 1)]
    qupsample_bilinear  q_y = rne(f32(f32(t * u0) + f32(b * u1))), t = f32(f32(q00 * v0) + f32(q01 * v1)), b likewise

x: uint8 [B, C, *spatial], four dimensions for bilinear; scales: the factors that were asked for, 0 where only the size
was; step: source pixels per output pixel. Scale and zero point stay those of x: the weights of a mean add up to 1.
Results are channels-last in memory. NumPy truth: the functions of the same names in `fxq.numerics`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.layout import empty, from_numpy
from fxq.qdq import expect_dtype


def _portable(name: str) -> Any:
    """NumPy itself, whose float32 steps are those of the contract."""
    function = getattr(numerics, name)

    def run(x: Tensor, size: list[int], scales: list[float], *rest: Any) -> Tensor:
        expect_dtype(name, "x", x, torch.uint8)
        if x.dim() != 2 + len(size) or len(size) != len(scales) or min(x.shape[2:], default=0) < 1:
            raise ValueError(f"fxq::{name}: x has shape {list(x.shape)}, size is {size}, scales {scales}")
        return from_numpy(function(x.numpy(), size, scales, *rest))

    return run


qupsample_nearest = kernels.define(
    "qupsample_nearest(Tensor x, int[] size, float[] scales) -> Tensor",
    _portable("qupsample_nearest"),
    lambda x, size, scales: empty(x, x.shape[1], size, x.dtype),
)
qupsample_bilinear = kernels.define(
    "qupsample_bilinear(Tensor x, int[] size, float[] scales, bool align_corners) -> Tensor",
    _portable("qupsample_bilinear"),
    lambda x, size, scales, align_corners: empty(x, x.shape[1], size, x.dtype),
)
