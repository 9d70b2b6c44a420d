"""Fixed-point requantization against Python's own integers and fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fxq import numerics
from fxq.qtypes import INT32_MAX, INT32_MIN

int32 = st.integers(INT32_MIN, INT32_MAX) | st.sampled_from([INT32_MIN, -1, 0, 1, INT32_MAX])
mantissas = st.integers(2**30, 2**31 - 1) | st.sampled_from([0, 2**30, 2**30 + 1, 2**31 - 1])
shifts = st.integers(0, 62) | st.sampled_from([0, 1, 30, 31, 32, 61, 62])


def half_up(value):
    return math.floor(value + Fraction(1, 2))


def truncated(numerator, denominator):
    """C's integer division."""
    quotient = abs(numerator) // denominator
    return quotient if numerator >= 0 else -quotient


def high_mul(a, b):
    """gemmlowp's SaturatingRoundingDoublingHighMul, line by line."""
    if a == b == INT32_MIN:
        return INT32_MAX
    ab = a * b
    return truncated(ab + (2**30 if ab >= 0 else 1 - 2**30), 2**31)


def divide_by_pot(x, exponent):
    """gemmlowp's RoundingDivideByPOT, line by line."""
    mask = 2**exponent - 1
    return (x >> exponent) + ((x & mask) > (mask >> 1) + (x < 0))


def tflite(v, multiplier, exponent):
    """TFLite's MultiplyByQuantizedMultiplier; its left shift saturates as gemmlowp's does."""
    shifted = min(max(v << max(exponent, 0), INT32_MIN), INT32_MAX)
    return divide_by_pot(high_mul(shifted, multiplier), max(-exponent, 0))


def scale(rounding, v, multiplier, shift):
    operands = np.array([multiplier], np.int32), np.array([shift], np.int32)
    return int(numerics.ROUNDINGS[rounding](np.array([v], np.int64), *operands)[0])


@given(int32, mantissas, shifts)
@example(INT32_MIN, 2**31 - 1, 0)
@example(INT32_MIN, 2**31 - 1, 62)
@example(INT32_MIN, 2**30, 62)
@example(INT32_MAX, 2**31 - 1, 62)
@example(-1, 2**30, 31)
def test_single_rounding(v, multiplier, shift):
    assert scale("single", v, multiplier, shift) == half_up(Fraction(v * multiplier, 2**shift))


@given(int32, mantissas, shifts)
@example(INT32_MIN, 2**31 - 1, 0)
@example(INT32_MIN, 2**31 - 1, 31)
@example(INT32_MIN, 2**30, 62)
@example(-3, 2**30, 31)
def test_tflite_rounding(v, multiplier, shift):
    assert scale("tflite", v, multiplier, shift) == tflite(v, multiplier, 31 - shift)


@pytest.mark.parametrize(("v", "single", "double"), [(1, 1, 1), (-1, 0, 0), (3, 2, 2), (-3, -1, -1), (5, 3, 3)])
def test_ties_of_one_half(v, single, double):
    """v / 2: with a shift of 31 there is one rounding under both, and it goes up."""
    assert (scale("single", v, 2**30, 31), scale("tflite", v, 2**30, 31)) == (single, double)


def test_where_the_roundings_differ():
    assert (scale("single", -6, 2**30, 33), scale("tflite", -6, 2**30, 33)) == (-1, -1)  # -0.75
    assert (scale("single", -4, 2**30, 33), scale("tflite", -4, 2**30, 33)) == (0, -1)  # -0.5: up, and away from zero
    assert (scale("single", 3, 2**30, 33), scale("tflite", 3, 2**30, 33)) == (0, 1)  # 0.375: 1.5 becomes 2, then 1


@given(st.floats(2.0**-31, 2.0**31, exclude_max=True))
@example(1.0)
@example(1 - 2.0**-53)
@example(2.0**-31)
@example(0.5)
def test_a_multiplier_is_the_nearest_there_is(factor):
    multiplier, shift = (int(part) for part in numerics.fixed_multiplier(np.float64(factor)))
    assert 2**30 <= multiplier < 2**31
    assert 0 <= shift <= 62
    exact = Fraction(factor) * 2**shift
    assert abs(multiplier - exact) <= Fraction(1, 2) or (multiplier == 2**31 - 1 and shift == 0)


@given(int32, st.floats(0, 2.0**-32, exclude_max=True) | st.floats(2.0**31, 1e300))
@example(INT32_MIN, 0.0)
def test_factors_beyond_the_ends(v, factor):
    """What the multiplier gives and what the exact factor would are the same once clamped to uint8."""
    found = scale("single", v, *(int(part) for part in numerics.fixed_multiplier(np.float64(factor))))
    assert min(max(found, -255), 255) == min(max(half_up(v * Fraction(factor)), -255), 255)


@given(st.floats(2.0**-20, 2.0**8), st.floats(2.0**-20, 2.0**8))
def test_multipliers_under_one_shift(a, b):
    multipliers, shift = numerics.fixed_multipliers(np.array([a, b]))
    assert max(multipliers) >= 2**30
    for found, factor in zip(multipliers, (a, b), strict=True):
        assert abs(int(found) - Fraction(factor) * 2**shift) <= 1


@given(
    st.integers(0, 2**32),
    st.sampled_from(["single", "tflite"]),
    st.booleans(),
    st.integers(0, 255),
    st.integers(0, 255),
)
def test_a_linear_with_affine_weights(seed, rounding, affine, z_x, z_y):
    """From the definition sum (q_x - z_x) * (q_w - z_w) + b on, in Python integers."""
    rng = np.random.default_rng(seed)
    m, n, k = 2, 3, int(rng.integers(0, 9))
    q_x, q_w = rng.integers(0, 256, (m, k), np.uint8), rng.integers(-128, 128, (n, k), np.int8)
    z_w = rng.integers(-128, 128, n, np.int32) * affine
    b = rng.integers(-3000, 3000, n)
    bias = (b - z_x * q_w.astype(np.int64).sum(1) + k * z_x * z_w).astype(np.int32)
    multiplier, shift = numerics.fixed_multiplier(rng.uniform(0.5, 2, n) / 2.0 ** rng.integers(-2, 14, n))
    operands = q_x, q_w, bias, multiplier, shift, z_y, 3, 250, rounding, z_w.astype(np.int32) if affine else None
    expected = []
    for row in q_x.tolist():
        for channel in range(n):
            weights = zip(row, q_w[channel].tolist(), strict=True)
            v = sum((x - z_x) * (w - int(z_w[channel])) for x, w in weights) + int(b[channel])
            exact = Fraction(v * int(multiplier[channel]), 2 ** int(shift[channel]))
            steps = (
                half_up(exact)
                if rounding == "single"
                else tflite(v, int(multiplier[channel]), 31 - int(shift[channel]))
            )
            expected.append(min(max(int(steps) + z_y, 3), 250))
    assert numerics.qlinear_fixed(*operands).ravel().tolist() == expected


@given(st.floats(2.0**-8, 2.0**8), st.floats(2.0**-8, 2.0**8), st.integers(0, 255), st.integers(0, 255))
def test_an_add_rounds_the_exact_sum_once(factor_a, factor_b, z_a, z_b):
    (m_a, m_b), shift = numerics.fixed_multipliers(np.array([factor_a, factor_b]))
    a, b = np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)[::-7][:8, None]
    found = numerics.qadd_fixed(a, b, int(m_a), z_a, int(m_b), z_b, shift, 9, 0, 255)
    exact = [
        half_up(Fraction((i - z_a) * int(m_a) + (j - z_b) * int(m_b), 2**shift))
        for j in b.ravel().tolist()
        for i in range(256)
    ]
    assert found.ravel().tolist() == [min(max(steps + 9, 0), 255) for steps in exact]
    in_float = numerics.qadd(a, b, numerics.f32(factor_a), z_a, numerics.f32(factor_b), z_b, 9, 0, 255)
    assert np.abs(found.astype(int) - in_float).max() <= 1


@pytest.mark.parametrize("rounding", ["single", "tflite"])
def test_fixed_and_float_differ_by_one_at_most(rounding):
    rng = np.random.default_rng(0)
    x, w = rng.integers(0, 256, (200, 40), np.uint8), rng.integers(-127, 128, (50, 40)).astype(np.int8)
    bias = rng.integers(-3000, 3000, 50, np.int32)
    s_w, s_x, s_y = rng.uniform(1e-3, 5e-3, 50).astype(np.float32), 0.02, 0.011
    fixed = numerics.fixed_multiplier(numerics.real_multiplier(s_x, s_w, s_y))
    found = numerics.qlinear_fixed(x, w, bias, *fixed, 100, 0, 255, rounding)
    in_float = numerics.qlinear(x, w, bias, numerics.requantize_multiplier(s_x, s_w, s_y), 100, 0, 255)
    off = np.abs(found.astype(int) - in_float)
    assert off.max() <= 1
    assert np.count_nonzero(off) < 20  # of 10,000
