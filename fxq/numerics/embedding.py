"""Rows of int8 tables, added up in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import F32, I8, U8
from fxq.numerics.norms import norm_and_quantize

Ids = npt.NDArray[np.integer]


def embed(ids: Sequence[Ids], tables: Sequence[I8], scales: Sequence[F32]) -> F32:
    """y[..., k] = the sum over tables, from the first on, of f32(scale[id] * q[id, k]), each addition rounded once.

    ids: of shapes that broadcast together; tables: int8 [V, K]; scales: float32 [V]. Raises IndexError for an id that
    is not in 0..V-1.
    """
    y: F32 | None = None
    for index, table, scale in zip(ids, tables, scales, strict=True):
        if index.size and (index.min() < 0 or index.max() >= len(table)):
            raise IndexError("index out of range in self")
        rows = table[index].astype(np.float32) * scale[index][..., None]
        y = rows if y is None else y + rows
    assert y is not None
    return y


def qembedding(ids: Ids, table: I8, scales: F32) -> F32:
    """y[..., k] = f32(scales[id] * table[id, k]): `embed` of one table; float32 [..., K]."""
    return embed([ids], [table], [scales])


def qembedding_norm(
    ids: Sequence[Ids],
    tables: Sequence[I8],
    scales: Sequence[F32],
    kind: str,
    weight: F32 | None,
    bias: F32 | None,
    eps: float,
    scale: float,
    zero_point: int,
    factor: F32 | None = None,
) -> tuple[F32, U8]:
    """norm(embed(...)) as float32, and quantized as `norm_and_quantize` does it."""
    return norm_and_quantize(embed(ids, tables, scales), kind, weight, bias, eps, scale, zero_point, factor)
