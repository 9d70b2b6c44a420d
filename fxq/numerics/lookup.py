"""Functions of one integer: tables of 256 entries."""

from __future__ import annotations

import numpy as np

from fxq.numerics.affine import U8, Array


def lookup(q: U8, table: Array) -> Array:
    """y = table[q]; q: uint8, any shape; table: uint8 or float32 [256]."""
    y: Array = table[q]
    return y


def lookup_channels(q: U8, table: Array, dim: int) -> Array:
    """y = table[c, q], c the index along `dim`; table: uint8 or float32 [C, 256]."""
    channels = np.arange(q.shape[dim]).reshape(-1, *[1] * (q.ndim - 1 - dim))
    y: Array = table[channels, q]
    return y
