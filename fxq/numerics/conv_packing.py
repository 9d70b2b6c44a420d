"""The layout of packed convolution weights: that of `pack` per group, over runs of bytes that lie together in an input.

In channels-last memory the pixels of a kernel row lie side by side, so a row of `kernel` pixels is one run of
kernel * C bytes, unless dilation spreads it or a group takes part of the channels only: then every tap is a run. Each
run is padded to a multiple of four bytes with zeros; as many stand once more at the end, so that the length tells C.
Where groups are so small that every output channel has inputs of its own (depthwise ones, and groups of 4 or 8
channels), all groups are packed as one weight [N, taps * C / groups].
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fxq.numerics.affine import I8
from fxq.numerics.conv import Phase, phases
from fxq.numerics.packing import in_lines, pack, packed_size, unpack

Ints = Sequence[int]


def in_lanes(n: int, channels: int, groups: int) -> bool:
    """Whether a depthwise convolution, or one of groups of 4 or 8 channels in and out; channels: those of one group."""
    return n == groups * channels and (channels == 1 or (channels in (4, 8) and groups > 1))


def conv_runs(channels: int, kernel: Ints, dilation: Ints, groups: int) -> tuple[int, int]:
    """(number, bytes) of the runs of one window; channels: those of one group."""
    if groups == 1 and dilation[-1] == 1:
        return math.prod(kernel[:-1]), kernel[-1] * channels
    return math.prod(kernel), channels


def packed_conv_size(n: int, channels: int, kernel: Ints, dilation: Ints, groups: int) -> int:
    """Bytes of an [n, channels, *kernel] weight once packed."""
    if in_lanes(n, channels, groups):
        return packed_size(n, math.prod(kernel) * channels)
    runs, length = conv_runs(channels, kernel, dilation, groups)
    return groups * packed_size(n // groups, runs * (-(-length // 4) * 4)) + -length % 4


def pack_conv(q_w: I8, dilation: Ints, groups: int) -> I8:
    """int8 [N, C / groups, *kernel] -> int8 [packed_conv_size]."""
    n, channels, *kernel = q_w.shape
    rows = q_w.reshape(n, channels, -1).transpose(0, 2, 1)
    if in_lanes(n, channels, groups):
        return pack(rows.reshape(n, -1))
    runs, length = conv_runs(channels, kernel, dilation, groups)
    rows = np.pad(rows.reshape(n, runs, length), ((0, 0), (0, 0), (0, -length % 4))).reshape(groups, n // groups, -1)
    return in_lines([*(pack(group) for group in rows), np.zeros(-length % 4, np.int8)])


def unpack_conv(packed: I8, n: int, channels: int, kernel: Ints, dilation: Ints, groups: int) -> I8:
    """The inverse of `pack_conv`: int8 [n, channels, *kernel]; channels: those of one group."""
    assert packed.shape == (packed_conv_size(n, channels, kernel, dilation, groups),), (packed.shape, n, channels)
    if in_lanes(n, channels, groups):
        rows = unpack(packed, n, math.prod(kernel) * channels)
    else:
        runs, length = conv_runs(channels, kernel, dilation, groups)
        padded = -(-length // 4) * 4
        parts = np.split(packed[: len(packed) - (padded - length)], groups)
        rows = np.concatenate([unpack(part, n // groups, runs * padded) for part in parts])
        rows = rows.reshape(n, runs, padded)[:, :, :length]
    return np.ascontiguousarray(rows.reshape(n, -1, channels).transpose(0, 2, 1)).reshape(n, channels, *kernel)


def _phases_with_taps(kernel: Ints, stride: Ints, padding: Ints, dilation: Ints) -> list[Phase]:
    ones, zeros = [1] * len(kernel), [0] * len(kernel)
    return [phase for phase in phases(ones, kernel, stride, padding, zeros, dilation) if all(phase.taps)]


def packed_transposed_size(
    n: int, channels: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> int:
    """Bytes of an [n, channels, *kernel] weight of a transposed convolution once packed."""
    return sum(
        packed_conv_size(n, channels, [len(taps) for taps in phase.taps], phase.dilation, groups)
        for phase in _phases_with_taps(kernel, stride, padding, dilation)
    )


def pack_transposed(q_w: I8, stride: Ints, padding: Ints, dilation: Ints, groups: int) -> I8:
    """int8 [N, C / groups, *kernel] -> the weights of all `phases` in turn, each as `pack_conv` packs it."""
    parts = [
        pack_conv(phase.select(q_w), phase.dilation, groups)
        for phase in _phases_with_taps(q_w.shape[2:], stride, padding, dilation)
    ]
    return in_lines(parts)


def unpack_transposed(
    packed: I8, n: int, channels: int, kernel: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> I8:
    """The inverse of `pack_transposed`: int8 [n, channels, *kernel]."""
    q_w = np.zeros((n, channels, *kernel), np.int8)
    start = 0
    for phase in _phases_with_taps(kernel, stride, padding, dilation):
        own = [len(taps) for taps in phase.taps]
        size = packed_conv_size(n, channels, own, phase.dilation, groups)
        where = np.ix_(range(n), range(channels), *phase.taps)
        q_w[where] = unpack_conv(packed[start : start + size], n, channels, own, phase.dilation, groups)
        start += size
    assert packed.shape == (start,), (packed.shape, start)
    return q_w
