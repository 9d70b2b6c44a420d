"""Channels-last memory: what the integer ops on images, signals and volumes read and give.

A tensor is [B, C, *spatial] for its users; in memory the channels of a pixel lie side by side, so that the pixels of a
window are runs of bytes. `channels_last` makes it so; a tensor that lies so already is not copied.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.qdq import expect_dtype


def channels_last(x: Tensor) -> Tensor:
    """x: [B, C, *spatial], with the channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def from_numpy(x: numerics.Array) -> Tensor:
    """A result of `fxq.numerics` as a channels-last tensor."""
    return channels_last(torch.from_numpy(np.ascontiguousarray(x)))


def empty(like: Tensor, channels: int, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """A channels-last tensor [B, channels, *sizes] without content, B the first size of `like`."""
    return like.new_empty((like.shape[0], *sizes, channels), dtype=dtype).movedim(-1, 1)


def _quantize(x: Tensor, scale: float, zero_point: int) -> Tensor:
    expect_dtype("quantize_channels_last", "x", x, torch.float32)
    if x.dim() < 2:
        raise ValueError(f"fxq::quantize_channels_last: x has shape {list(x.shape)}, expected [B, C, *spatial]")
    return channels_last(kernels.portable("quantize")(x, scale, zero_point))


quantize_channels_last = kernels.define(
    "quantize_channels_last(Tensor x, float scale, int zero_point) -> Tensor",
    _quantize,
    lambda x, scale, zero_point: empty(x, x.shape[1], x.shape[2:], torch.uint8),
)
"""`quantize` of float32 [B, C, *spatial] in any memory order, into channels-last uint8."""
