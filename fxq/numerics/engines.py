"""What torch's quantized engines compute, so that their integers can be reproduced: constants and roundings.

Every engine forms the same exact sums, here with the zero points taken out: acc = sum_k (q_x - z_x) * (q_w - z_w).

    fbgemm    q_y = clamp(rne(f32(f32(f32(acc) + b / a) * f32(a / s_y))) + z_y, low, 255),  a = f32(s_x * s_w[n])
    onednn    v   = f32(f32(f32(f32(acc) * r(s_x)) * r(s_w[n])) + b), r(s) = f32(1 / f32(1 / s));  a relu: max(v, 0)
              in convolutions s_w[n] without r
              q_y = clamp(rne(f32(f32(v * f32(1 / r(s_y))) + z_y)), 0, 255)
    qnnpack   q_y = clamp(rne(f32(f32(acc + rne(f32(b * f32(1 / a)))) * f32(a * f32(1 / s_y)))) + z_y, low, 255)
    tensors   q_x = clamp(rne(fma(x, f32(1 / s_x), z_x)), 0, 255), a fused multiply-add: one rounding

    add       q_y = clamp(rne(f32(f32(a + b) * f32(1 / s_y))) + z_y, low, 255), a = fma(q_a, s_a, -f32(s_a * z_a)); on
              qnnpack in integers, see `qadd_engine`
    mul       q_y = clamp(rne(f32((q_a - z_a) * (q_b - z_b) * f32(f32(s_a * s_b) * f32(1 / s_y)))) + z_y, low, 255)
    average   q_y = rne(f32(sum q_x * f32(1 / count))), of all pixels; on qnnpack
              q_y = rne(f32(sum (q_x - z_x) * f32(s / f32(s * count)))) + z_x

Where the input is quantized as the model runs (`torch.ao.quantization.quantize_dynamic`), one scale and zero point
serve the whole tensor, so that what shares a batch changes an answer (`engine_qparams`), and

    fbgemm    q_x as tensors;                                       y = fma(f32(acc), a, b): one rounding
    onednn    q_x = clamp(rne(f32(f32(x * f32(1 / r(s_x))) + z_x))); y = f32(f32(f32(f32(acc) * r(s_x)) * r(s_w)) + b)
    qnnpack   q_x as tensors;                                       y = f32(f32(f32(acc) * a) + b)

Found with torch 2.13.0 on a processor with VNNI, and held to it by the tests. Without VNNI, torch's sums may saturate.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fxq.numerics.affine import F32, I8, U8, fused_multiply_add, round_clamp
from fxq.numerics.linear import accumulate
from fxq.qtypes import ACT_QMAX, ACT_QMIN

ENGINES = ("fbgemm", "onednn", "qnnpack")


def fbgemm_constants(bias: F32 | None, s_x: float, s_w: F32, s_y: float) -> tuple[F32, F32]:
    """(b / a, a / s_y), float32 [N]: what is added to the sums, and what they are multiplied by then."""
    step = np.float32(s_x) * s_w
    return (np.zeros_like(step) if bias is None else bias / step), step / np.float32(s_y)


def onednn_scales(scales: float | npt.NDArray[np.float64]) -> F32:
    """r(s) = f32(1 / f32(1 / s)): scales on their way through a reciprocal, taken in float64, and back."""
    return np.float32(1) / np.asarray(1 / np.float64(scales)).astype(np.float32)


def qnnpack_constants(bias: F32 | None, s_x: float, s_w: F32, s_y: float) -> tuple[F32, F32]:
    """(rne(b * (1 / a)), a * (1 / s_y)), float32 [N]: whole steps that are added to the sums, and their multiplier."""
    step = np.float32(s_x) * s_w
    added = np.zeros_like(step) if bias is None else np.rint(bias * (np.float32(1) / step))
    return added, step * (np.float32(1) / np.float32(s_y))


def quantize_fused(x: F32, scale: float, zero_point: int) -> U8:
    """q = clamp(rne(fma(x, f32(1 / scale), zero_point)), 0, 255); NaN becomes 0."""
    return _clamp(
        fused_multiply_add(np.asarray(x, np.float32), np.float32(1) / np.float32(scale), np.float32(zero_point))
    )


def quantize_onednn(x: F32, factor: F32, bias: F32, relu: bool, scale: float, zero_point: int) -> U8:
    """q = clamp(rne(f32(f32(v * f32(1 / scale)) + zero_point)), 0, 255), v = f32(f32(x * factor) + bias) or max(v, 0).

    x: float32 [..., N]; factor, bias: float32 [N].
    """
    v = x * factor + bias
    v = np.maximum(v, np.float32(0)) if relu else v
    return _clamp(v * (np.float32(1) / np.float32(scale)) + np.float32(zero_point))


def qadd_engine(
    q_a: U8, q_b: U8, s_a: float, z_a: int, s_b: float, z_b: int, s_y: float, z_y: int, relu: bool, engine: str
) -> U8:
    """q_y of two tensors, which broadcast; of fbgemm and onednn what whole vectors give, see docs/numerics.md.

    qnnpack: e = floor(log2(max(r_a, r_b))) of the ratios r = f32(s / s_y), m = rne(r * 2**(21 - e)), and the sum of
    (q - z) * m is divided by 2**(21 - e) and rounded to the nearest, halves away from zero.
    """
    low = z_y if relu else ACT_QMIN
    if engine == "qnnpack":
        ratios = [np.float32(s) / np.float32(s_y) for s in (s_a, s_b)]
        shift = 22 - int(np.frexp(max(ratios))[1])
        m_a, m_b = (int(np.rint(np.ldexp(np.float64(ratio), shift))) for ratio in ratios)
        acc = (q_a.astype(np.int64) - z_a) * m_a + (q_b.astype(np.int64) - z_b) * m_b
        steps = np.sign(acc) * ((np.abs(acc) + (1 << (shift - 1))) >> shift)
        q: U8 = np.clip(steps + z_y, low, ACT_QMAX).astype(np.uint8)
        return q
    a, b = (
        fused_multiply_add(q.astype(np.float32), np.float32(s), -(np.float32(s) * np.float32(z)))
        for q, s, z in ((q_a, s_a, z_a), (q_b, s_b, z_b))
    )
    return round_clamp((a + b) * (np.float32(1) / np.float32(s_y)), z_y, low, ACT_QMAX)


def qmul_multiplier(s_a: float, s_b: float, s_y: float) -> float:
    """f32(f32(s_a * s_b) * f32(1 / s_y)): the multiplier of `qmul` on every engine."""
    return float(np.float32(s_a) * np.float32(s_b) * (np.float32(1) / np.float32(s_y)))


def average_multiplier(scale: float, count: int) -> float:
    """f32(s / f32(s * count)): what qnnpack multiplies the sum of an average by."""
    return float(np.float32(scale) / (np.float32(scale) * np.float32(count)))


SMALLEST_SCALE = np.float32(6.1e-5)
"""What torch widens a range to that would give a smaller scale."""


def engine_qparams(x: F32, steps: int) -> tuple[float, int]:
    """Scale (float64) and zero point of a whole tensor, as torch's ChooseQuantizationParams finds them.

    low, high = the least and the greatest of x and 0;  s = (high - low) / steps, 0.1 where that has no reciprocal
    z = rne(-low / s), or rne(steps - high / s) where that is not above low / s, in 0..steps
    """
    low, high = min(float(np.min(x, initial=0)), 0.0), max(float(np.max(x, initial=0)), 0.0)
    scale = (high - low) / steps
    with np.errstate(divide="ignore", over="ignore"):
        if np.float32(scale) == 0 or np.isinf(np.float32(1) / np.float32(scale)):
            scale = 0.1
    if scale < SMALLEST_SCALE:
        widening = SMALLEST_SCALE / np.float32(scale)
        scale = float(SMALLEST_SCALE)
        reach = float(SMALLEST_SCALE * np.float32(steps))
        if low == 0:
            high = reach
        elif high == 0:
            low = -reach
        else:
            low, high = float(np.float32(low) * widening), float(np.float32(high) * widening)
    from_low, from_high = -low / scale, steps - high / scale
    zero_point = from_low if -from_low < from_high else from_high
    return scale, int(np.clip(np.rint(zero_point), 0, steps))


def quantize_engine(x: F32, engine: str, steps: int) -> tuple[U8, float, int]:
    """q_x, s_x (float64) and z_x of the whole tensor; 0, NaN and 0 where it holds NaN or infinity.

    steps: 255, or the 127 of torch's `reduce_range`; they divide the range and do not clamp q_x.
    """
    x = np.asarray(x, np.float32)
    if not np.isfinite(x).all():
        return np.zeros(x.shape, np.uint8), float("nan"), 0
    scale, zero_point = engine_qparams(x, steps)
    if engine == "onednn":
        inverse = np.float32(1) / onednn_scales(scale)
        return _clamp(x * inverse + np.float32(zero_point)), scale, zero_point
    return quantize_fused(x, scale, zero_point), scale, zero_point


def engine_result(sums: F32, s_x: float, scale: F32, bias: F32 | None, engine: str) -> F32:
    """y of the sums f32(acc), float32 [..., N]. scale: f32(s_w), for onednn r(s_w), float32 [N]."""
    with np.errstate(over="ignore", invalid="ignore"):
        if engine == "onednn":
            y: F32 = sums * onednn_scales(s_x) * scale
            return y if bias is None else y + bias
        step = np.float32(s_x) * scale
        if engine == "fbgemm" and bias is not None:
            return fused_multiply_add(sums, step, bias)
        return sums * step if bias is None else sums * step + bias


def qlinear_dynamic_engine(x: F32, q_w: I8, scale: F32, bias: F32 | None, engine: str, steps: int) -> F32:
    """y of x, float32 [..., K], quantized as a whole; q_w: int8 [N, K]; scale and bias: as in `engine_result`."""
    q, s_x, z_x = quantize_engine(x, engine, steps)
    acc = accumulate(q, q_w) - z_x * q_w.sum(1, dtype=np.int32)
    return engine_result(acc.astype(np.float32), s_x, scale, bias, engine)


def _clamp(steps: F32) -> U8:
    steps = np.where(np.isnan(steps), np.float32(0), steps)
    return np.clip(np.rint(steps), ACT_QMIN, ACT_QMAX).astype(np.uint8)
