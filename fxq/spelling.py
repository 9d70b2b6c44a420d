"""The one spelling per operation that the normalize passes leave, so that every pattern is written once.

Operands are positional; an operation that is not listed keeps the spelling that the user gave it.
"""

from __future__ import annotations

import operator

import torch
import torch.nn.functional as F
from torch.fx import Node

LINEAR = F.linear
"""linear(x, weight, bias): weight [N, K], bias [N] or None."""

RELU = torch.relu
"""relu(x)."""

CLAMP = torch.clamp
"""clamp(x, low, high): also relu6 and hardtanh; a bound is a number or None."""

ADD = torch.add
"""add(a, b)."""

MUL = torch.mul
"""mul(a, b)."""

BATCH_NORM = F.batch_norm
"""batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)."""

CONVS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
"""conv(x, weight, bias, stride, padding, dilation, groups), the settings with one number for each spatial dimension."""


def conv_transpose(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: tuple[int, ...],
    padding: tuple[int, ...],
    output_padding: tuple[int, ...],
    groups: int,
    dilation: tuple[int, ...],
) -> torch.Tensor:
    """A transposed convolution whose weight [N, C / groups, ...] has the output channels first, as every other has."""
    transposes = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
    y: torch.Tensor = transposes[len(stride) - 1](
        x, swap_channels(weight, groups), bias, stride, padding, output_padding, groups, dilation
    )
    return y


def swap_channels(weight: torch.Tensor, groups: int) -> torch.Tensor:
    """[A, B / groups, ...] as [B, A / groups, ...]: torch's weight of a transposed convolution and ours, both ways.

    A view where there is one group.
    """
    if groups == 1:
        return weight.transpose(0, 1)
    split = weight.reshape(groups, -1, *weight.shape[1:]).transpose(1, 2)
    return split.flatten(0, 1)


CONV_TRANSPOSE = conv_transpose
"""conv_transpose(x, weight, bias, stride, padding, output_padding, groups, dilation)."""

AVG_POOLS = frozenset({torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d})
"""avg_pool(x, kernel, stride, padding, ceil_mode, count_include_pad[, divisor]); no divisor in one dimension."""

ADAPTIVE_AVG_POOLS = frozenset({F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d})
"""adaptive_avg_pool(x, sizes), a size None where it stays as it is."""

MEAN = torch.mean
"""mean(x, dims, keepdim)."""

PAD = F.pad
"""pad(x, pads, mode, value), value None or a number."""

INTERPOLATE = F.interpolate
"""interpolate(x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)."""

GETITEM = operator.getitem
"""getitem(x, index): slicing and indexing."""

SPLITS = frozenset({torch.chunk, torch.split, torch.unbind, torch.tensor_split})
"""split(x, ...): a tuple of views of x."""


def max_pool1d(x: torch.Tensor, kernel: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> torch.Tensor:
    """Max-pooling over the last dimension of [N, C, L] or [C, L], for float32 and for uint8, which torch's lacks."""
    pooled = torch.max_pool2d(x.unsqueeze(-2), (1, kernel), (1, stride), (0, padding), (1, dilation), ceil_mode)
    return pooled.squeeze(-2)


MAX_POOLS = frozenset({max_pool1d, torch.max_pool2d, torch.max_pool3d})
"""max_pool(x, kernel, stride, padding, dilation, ceil_mode)."""


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
    nan_if_masked: bool,
) -> torch.Tensor:
    """softmax(q k^T * scale + mask) v: q [B, H, T, D], k and v [B, G, S, D], H a multiple of G; or all without heads.

    mask: bool (True may look) or float32 (added), broadcastable to [B, H, T, S]. is_causal: query t sees the keys 0..t.
    scale: 1 / sqrt(D) where None. A query without any key gives 0, as in torch's attention, or NaN, as in a softmax.
    """
    shared = q.dim() == 4 and q.shape[1] != k.shape[1]
    y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, is_causal, scale=scale, enable_gqa=shared)
    if not nan_if_masked or mask is None:
        return y
    masked = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    return torch.where(masked.all(-1, keepdim=True), torch.nan, y)


ATTENTION = attention
"""attention(q, k, v, mask, is_causal, scale, nan_if_masked)."""

MOVES = frozenset(
    {
        torch.reshape,
        torch.flatten,
        torch.unflatten,
        torch.squeeze,
        torch.unsqueeze,
        torch.transpose,
        torch.permute,
        torch.movedim,
        torch.narrow,
        torch.select,
        torch.flip,
        torch.tile,
        F.pixel_shuffle,
        F.pixel_unshuffle,
        torch.channel_shuffle,
        PAD,
        INTERPOLATE,
    }
)
"""move(x, ...): the same numbers in another order or shape. Padding adds zeros, and interpolation moves where it copies
the nearest (`is_move`)."""

CAT = frozenset({torch.cat, torch.stack})
"""cat([x, ...], dim)."""


def is_move(node: Node) -> bool:
    """Whether the call `node` of one of `MOVES` computes nothing."""
    if node.target is PAD:
        return node.args[2] != "constant" or node.args[3] in (None, 0)
    return node.target is not INTERPOLATE or node.args[3] in ("nearest", "nearest-exact")


def float_bounds(node: object) -> tuple[float | None, float | None] | None:
    """The bounds of a relu or clamp in real units; None where `node` is neither, or its bounds are not numbers.

    A lower bound above the upper one is the upper one, as torch has it: clamp(x, 1, -1) is -1 everywhere.
    """
    if not isinstance(node, Node) or node.op != "call_function":
        return None
    if node.target is RELU:
        return 0.0, None
    if node.target is CLAMP:
        low, high = node.args[1:3]
        if isinstance(low, int | float | None) and isinstance(high, int | float | None):
            if low is not None and high is not None:
                low = min(low, high)
            return (None if low is None else float(low)), (None if high is None else float(high))
    return None
