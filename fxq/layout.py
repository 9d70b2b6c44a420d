"""Channels-last memory: what the integer ops on images, signals and volumes read and give.

A tensor is [B, C, *spatial] for its users; in memory the channels of a pixel lie side by side, so that the pixels of a
window are runs of bytes. `channels_last` makes it so; a tensor that lies so already is not copied.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fxq import numerics


def channels_last(x: Tensor) -> Tensor:
    """x: [B, C, *spatial], with the channels innermost in memory."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def from_numpy(x: numerics.Array) -> Tensor:
    """A result of `fxq.numerics` as a channels-last tensor."""
    return channels_last(torch.from_numpy(np.ascontiguousarray(x)))


def empty(like: Tensor, channels: int, sizes: list[int], dtype: torch.dtype) -> Tensor:
    """A channels-last tensor [B, channels, *sizes] without content, B the first size of `like`."""
    return like.new_empty((like.shape[0], *sizes, channels), dtype=dtype).movedim(-1, 1)


def is_channels_last(x: Tensor) -> bool:
    """Whether x is dense with the channels innermost, and not contiguous as well."""
    return x.dim() > 2 and not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def laid_like(y: Tensor, *operands: Tensor) -> Tensor:
    """y, channels-last where an operand of its shape is, else contiguous: what elementwise ops return."""
    last = any(is_channels_last(operand) and operand.shape == y.shape for operand in operands)
    return channels_last(y) if last else y.contiguous()


def empty_pair(a: Tensor, b: Tensor) -> Tensor:
    """A tensor without content, of the shape that `a` and `b` broadcast to and the dtype of `a`, laid like them."""
    shape = torch.broadcast_shapes(a.shape, b.shape)  # type: ignore[no-untyped-call]
    return laid_like(a.new_empty(shape), a, b)
