"""The one layout of packed weights, the same for all instruction sets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fxq.numerics.affine import I8

PANEL = 64
"""Output channels in a full panel of the packed layout."""

_LINE = 64
"""Bytes of a cache line, and of the widest vector."""


def panel_widths(n: int) -> list[int]:
    """Widths of the panels that hold `n` output channels: 64 each, the last rounded up to a multiple of 16."""
    full, rest = divmod(n, PANEL)
    return [PANEL] * full + ([-(-rest // 16) * 16] if rest else [])


def packed_size(n: int, k: int) -> int:
    """Bytes of an [n, k] weight once packed: both rounded up, n to a multiple of 16 and k of 4, and what k lacks."""
    return sum(panel_widths(n)) * (-(-k // 4) * 4) + -k % 4


def in_lines(parts: Sequence[I8]) -> I8:
    """The parts one after the other, from a multiple of 64 bytes on: no vector of a panel then lies in two cache lines.

    Where NumPy would put them, each does, and a layer of one row takes up to a fifth longer.
    """
    size = sum(map(len, parts))
    memory = np.empty(size + _LINE - 1, np.int8)
    start = -memory.ctypes.data % _LINE
    return np.concatenate(parts, out=memory[start : start + size])


def pack(q_w: I8) -> I8:
    """The one packed layout, for every instruction set: panels of 64 output channels, [panel][K/4][width][4].

    q_w: int8 [N, K]. Four consecutive k of one channel lie together (what `vpdpbusd` multiplies), then the channels of
    the panel, then k. The last panel is as wide as N needs, in steps of 16; padding is 0. At the end stand as many
    zeros as K lacks of a multiple of four, so that the length tells K, and an input of another width is refused.
    Returns int8 [packed_size].
    """
    n, k = q_w.shape
    k4 = -(-k // 4)
    panels = []
    for i, width in enumerate(panel_widths(n)):
        panel = np.zeros((width, k4 * 4), np.int8)
        rows = q_w[i * PANEL : i * PANEL + width]
        panel[: len(rows), :k] = rows
        panels.append(panel.reshape(width, k4, 4).transpose(1, 0, 2).reshape(-1))
    return in_lines([*panels, np.zeros(-k % 4, np.int8)])


def unpack(packed: I8, n: int, k: int) -> I8:
    """The inverse of `pack`: int8 [n, k]."""
    assert packed.shape == (packed_size(n, k),), (packed.shape, n, k)
    k4 = -(-k // 4)
    rows, start = [], 0
    for width in panel_widths(n):
        panel = packed[start : start + width * k4 * 4].reshape(k4, width, 4)
        rows.append(panel.transpose(1, 0, 2).reshape(width, k4 * 4))
        start += width * k4 * 4
    return np.ascontiguousarray(np.concatenate(rows)[:n, :k]) if rows else np.zeros((n, k), np.int8)
