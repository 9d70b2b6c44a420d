"""softmax(q k^T) v on integers: two exact products, and between them a softmax whose weights are uint8.

    acc[t, s] = sum_d (q[t, d] - z_q) * (k[s, d] - 128)                                                exact int32
    x[t, s]   = f32(acc * m) [+ mask]        m = f32(s_qk * scale), s_qk = s_q * s_k; -inf where a key is masked
    i[t, s]   = min(rne(f32(f32(max_s x[t, s] - x[t, s]) * f32(255 / (9 ln 2)))), 255)                 uint8
    p[t, s]   = rne(255 * 2**(-9 i[t, s] / 255))                                        a table of 256 uint8
    y[t, e]   = f32(sum_s p[t, s] * (v[s, e] - z_v)) * f32(m_v / f32(sum_s p[t, s]))

scale is 1 / sqrt(D) where it is None; it and m are computed in float64, then rounded. `causal`: query t sees the keys
0..t. The weights are those of `softmax_weights`.

The zero point of k adds the same number to all scores of a query, which a softmax does not see, so it is not there. The
weights are normalised by their own integer sum: they add up to one exactly, and no float sum depends on an order.
A key that is masked by -inf has p = 0. A query without any key has no weights, and its row says so (`masked`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import F32, I32, U8, round_clamp

Mask = F32 | npt.NDArray[np.bool_] | None

_OCTAVES = 9  # 255 * 2**-9 is the first power of two that rounds to 0
_STEPS = 255 / (_OCTAVES * math.log(2))  # of the table, for each factor of e
EXPONENTIALS: U8 = np.rint(255 * 2.0 ** (np.arange(256) * -_OCTAVES / 255)).astype(np.uint8)
"""p of i. Half a step of i is 1.2 % of p; p's own half step is more below 41."""


def softmax_weights(x: F32) -> U8:
    """rne(255 * exp(x - max(x))) along the last axis; 0 for all where the maximum is not finite.

    The difference goes to a step of `EXPONENTIALS` first. NaN counts as -inf.
    """
    if not x.shape[-1]:
        return np.zeros(x.shape, np.uint8)
    top = np.fmax.reduce(x, axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", over="ignore"):
        d = (top - x) * np.float32(_STEPS)
    steps = np.rint(np.where(d < np.float32(255), d, np.float32(255)))
    return EXPONENTIALS[steps.astype(np.uint8)]


def _product(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> I32:
    """a @ b of integers; float64 holds every partial sum exactly."""
    product: I32 = (a.astype(np.float64) @ b.astype(np.float64)).astype(np.int32)
    return product


def attention_scores(q: U8, k: U8, mask: Mask, is_causal: bool, scale: float | None, z_q: int, s_qk: float) -> F32:
    """x above. q: [B, H, T, D] or [B, T, D]; k: [B, G, S, D] or [B, S, D], H a multiple of G.

    mask: bool (True may look) or float32 (added), broadcastable to the scores. is_causal: query t sees keys 0..t.
    scale: 1 / sqrt(D) where None.
    """
    multiplier = s_qk * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    acc = _product(q.astype(np.int32) - z_q, np.swapaxes(_per_head(k, q).astype(np.int32) - 128, -1, -2))
    x = acc.astype(np.float32) * np.float32(multiplier)
    if mask is not None:
        with np.errstate(over="ignore"):
            x = np.where(mask, x, np.float32(-np.inf)) if mask.dtype == np.bool_ else (x + mask).astype(np.float32)
    if is_causal:
        x = np.where(np.tri(*x.shape[-2:], dtype=np.bool_), x, np.float32(-np.inf))
    return x


def _per_head(k: U8, q: U8) -> U8:
    """Each head of k for as many heads of q as share it."""
    return np.repeat(k, q.shape[1] // k.shape[1], 1) if q.ndim == 4 and k.shape[1] != q.shape[1] else k


def split_heads(q: U8, k: U8, v: U8, heads: int) -> tuple[U8, U8, U8]:
    """q [B, T, H * D], k [B, S, G * D] and v [B, S, G * E] as [B, H, T, D], [B, G, S, D] and [B, G, S, E]; views.

    heads: H; G is what the rows of k hold of q's D. 0: the three as they are.
    """
    if not heads:
        return q, k, v
    depth = q.shape[-1] // heads
    counts = heads, k.shape[-1] // depth, k.shape[-1] // depth
    q, k, v = (
        np.swapaxes(x.reshape(*x.shape[:-1], n, x.shape[-1] // n), 1, 2) for x, n in zip((q, k, v), counts, strict=True)
    )
    return q, k, v


def _join_heads(y: F32, heads: int) -> F32:
    """[B, H, T, E] as [B, T, H * E]."""
    return np.swapaxes(y, 1, 2).reshape(y.shape[0], y.shape[2], heads * y.shape[3]) if heads else y


def _attend(
    q: U8,
    k: U8,
    v: U8,
    mask: Mask,
    is_causal: bool,
    scale: float | None,
    z_q: int,
    z_v: int,
    s_qk: float,
    m_v: float,
    heads: int,
) -> F32:
    """y above, NaN in the rows of queries without a key."""
    q, k, v = split_heads(q, k, v, heads)
    p = softmax_weights(attention_scores(q, k, mask, is_causal, scale, z_q, s_qk))
    acc = _product(p, _per_head(v, q).astype(np.int32) - z_v)
    total = p.sum(-1, keepdims=True, dtype=np.int32).astype(np.float32)
    with np.errstate(divide="ignore", invalid="ignore"):
        y: F32 = acc.astype(np.float32) * (np.float32(m_v) / total)
    return _join_heads(np.where(total > 0, y, np.float32(np.nan)), heads)


def qattention_float(
    q: U8,
    k: U8,
    v: U8,
    mask: Mask,
    is_causal: bool,
    scale: float | None,
    z_q: int,
    z_v: int,
    s_qk: float,
    s_v: float,
    nan_if_masked: bool,
    heads: int = 0,
) -> F32:
    """y above with m_v = s_v; a query without a key gives NaN (the softmax of -inf) or 0 (torch's attention)."""
    y = _attend(q, k, v, mask, is_causal, scale, z_q, z_v, s_qk, s_v, heads)
    return y if nan_if_masked else np.where(np.isnan(y), np.float32(0), y)


def qattention(
    q: U8,
    k: U8,
    v: U8,
    mask: Mask,
    is_causal: bool,
    scale: float | None,
    z_q: int,
    z_v: int,
    s_qk: float,
    m_v: float,
    zero_point: int,
    masked: int,
    heads: int = 0,
) -> U8:
    """clamp(rne(y) + zero_point, 0, 255) with m_v = f32(s_v / s_y); `masked` for a query without a key."""
    y = _attend(q, k, v, mask, is_causal, scale, z_q, z_v, s_qk, m_v, heads)
    return np.where(np.isnan(y), np.uint8(masked), round_clamp(y, zero_point, 0, 255))
