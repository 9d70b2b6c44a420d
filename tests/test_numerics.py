"""Every reference function against Python integers and fractions."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fxq import numerics
from fxq.qtypes import INT32_MAX, INT32_MIN, MAX_K, SCALE_FLOOR, QParams

uint8 = st.integers(0, 255) | st.sampled_from([0, 1, 127, 128, 254, 255])
int8 = st.integers(-127, 127) | st.sampled_from([-127, -1, 0, 1, 127])
scales = st.floats(SCALE_FLOOR, 2.0**60, width=32) | st.sampled_from([1.0, 0.5, 2.0**-8, 0.1])
multipliers = st.floats(2.0**-40, 2.0**20, width=32) | st.sampled_from([0.5, 1.0, 0.25, 3.0])
floats32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


def f32(value):
    """The float32 nearest to an exact number, ties to even, as an exact number."""
    value = Fraction(value)
    if value == 0:
        return value
    exponent = max(math.floor(math.log2(abs(value))), -126)
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while exponent > -126 and abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    ulp = Fraction(2) ** (exponent - 23)
    return round(value / ulp) * ulp


def clamp(value, low, high):
    return min(max(value, low), high)


def requantized(steps, zero_point, low=0, high=255):
    """clamp(rne(steps) + zero_point); Python's round is half to even."""
    return clamp(round(Fraction(steps)) + zero_point, low, high)


@given(st.floats(-1e30, 1e30))
@example(16777217.0)
@example(16777219.0)
@example(2.0**-149)
@example(2.0**-150)
def test_f32_rounds_half_to_even(value):
    assert Fraction(numerics.f32(value)) == f32(Fraction(value))


moderate = st.floats(-(2.0**60), 2.0**60, width=32)


@given(moderate, moderate, moderate)
@example(1 + 2.0**-23, 127.0, -127.0)
@example((1 + 2.0**-12) * 2.0**-24, 1 - 2.0**-12 + 2.0**-24, 1.0)  # the sum is above half way between two float32,
@example((1 + 2.0**-23) * 2.0**-24, 1 - 2.0**-23, 1 + 2.0**-23)  # or below, by less than float64 tells apart
@example(2.0**-60, 2.0**-60, 1 + 2.0**-23)
@example(2.0**-100, 2.0**-40, 2.0**-149)
@example(0.0, -1.0, 0.0)
def test_fused_multiply_add(a, b, c):
    for addend in (c, -c):
        found = numerics.fused_multiply_add(*(np.array([v], np.float32) for v in (a, b, addend)))
        assert found.dtype == np.float32
        assert Fraction(float(found[0])) == f32(Fraction(a) * Fraction(b) + Fraction(addend))


@given(st.floats(-(2.0**80), 2.0**80), st.floats(-(2.0**80), 2.0**80))
@example(0.0, 0.0)
@example(3.0, 5.0)
@example(-5.0, -3.0)
@example(0.0, 5e-324)
@example(-3.4e38, 3.4e38)
def test_activation_qparams(a, b):
    low, high = min(a, b), max(a, b)
    q = numerics.activation_qparams(low, high)
    assert q.scale == numerics.f32(q.scale) >= SCALE_FLOOR
    assert 0 <= q.zero_point <= 255
    if min(low, 0) == max(high, 0):
        assert q == QParams(1.0, 0)
        return
    assert numerics.dequantize(np.uint8([q.zero_point]), q.scale, q.zero_point)[0] == 0
    if low >= 0:
        assert q.zero_point == 0
    if high <= 0:
        assert q.zero_point == 255 or q.scale == SCALE_FLOOR
    # The range is covered up to half a step at each end.
    assert -q.zero_point * q.scale <= min(low, 0) + q.scale
    assert (255 - q.zero_point) * q.scale >= max(high, 0) - q.scale


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=5))
@example([0.0, 1e-38, 127.0])
def test_weight_scales(peaks):
    found = numerics.weight_scales(np.float32(peaks))
    assert found.dtype == np.float32
    for peak, scale in zip(np.float32(peaks), found, strict=True):
        assert scale == 1 if peak == 0 else scale == max(np.float32(np.float64(peak) / 127), np.float32(SCALE_FLOOR))


@given(floats32, scales, uint8)
@example(0.5, 1.0, 0)
@example(1.5, 1.0, 255)
@example(2.5, 1.0, 7)
@example(-0.5, 1.0, 1)
@example(3.0e38, SCALE_FLOOR, 3)
def test_quantize(x, scale, zero_point):
    inverse = f32(1 / Fraction(scale))
    steps = Fraction(x) * inverse
    if abs(steps) < 2**120:
        steps = f32(steps)
    assert numerics.quantize(np.float32([x]), scale, zero_point).tolist() == [requantized(steps, zero_point)]


def test_quantize_of_what_is_not_finite():
    assert numerics.quantize(np.float32([np.inf, -np.inf, np.nan]), 0.5, 9).tolist() == [255, 0, 0]


def test_the_zero_point_is_added_after_rounding():
    assert numerics.quantize(np.float32([0.5, 1.5]), 1.0, 1).tolist() == [1, 3]  # before rounding: 2, 2


@given(uint8, scales, uint8)
def test_dequantize(q, scale, zero_point):
    found = numerics.dequantize(np.uint8([q]), scale, zero_point)
    assert found.dtype == np.float32
    assert Fraction(float(found[0])) == f32(Fraction(scale) * (q - zero_point))


@given(uint8, scales, uint8)
def test_quantize_is_the_inverse_of_dequantize(q, scale, zero_point):
    assert numerics.quantize(numerics.dequantize(np.uint8([q]), scale, zero_point), scale, zero_point) == [q]


@given(npst.arrays(np.float32, (3, 4), elements=st.floats(-100, 100, width=32)), st.booleans())
@example(np.zeros((3, 4), np.float32), True)
def test_quantize_weight(w, per_channel):
    peaks = np.abs(w).max(1) if per_channel else np.abs(w).max(keepdims=True).reshape(1)
    s_w = numerics.weight_scales(peaks)
    q = numerics.quantize_weight(w, s_w)
    assert q.dtype == np.int8
    for n in range(3):
        scale = Fraction(float(s_w[n if per_channel else 0]))
        # The quotient is rounded to float64 first, which leaves 29 bits more than the operands have.
        wanted = [clamp(round(float(Fraction(float(v)) / scale)), -127, 127) for v in w[n]]
        assert q[n].tolist() == wanted
    back = numerics.dequantize_weight(q, s_w)
    assert back.dtype == np.float32
    assert np.abs(back - w).max() <= s_w.max() * 0.5001


@given(st.data(), st.integers(0, 3), st.integers(1, 4), st.sampled_from([1, 2, 3, 5, 8]))
def test_accumulate(data, m, n, k):
    x = data.draw(npst.arrays(np.uint8, (m, k), elements=uint8))
    w = data.draw(npst.arrays(np.int8, (n, k), elements=int8))
    wanted = [[sum(int(a) * int(b) for a, b in zip(row, column, strict=True)) for column in w] for row in x]
    assert numerics.accumulate(x, w).tolist() == wanted


def test_the_longest_dot_product_fits():
    assert MAX_K == 66311
    x, w = np.full((1, MAX_K), 255, np.uint8), np.full((2, MAX_K), 127, np.int8)
    w[1] = -127
    assert numerics.accumulate(x, w).tolist() == [[255 * 127 * MAX_K, -255 * 127 * MAX_K]]
    assert 255 * 127 * MAX_K <= INT32_MAX < 255 * 127 * (MAX_K + 1)


@given(st.data(), scales, uint8, st.booleans())
def test_fold_bias_and_the_affine_identity(data, s_x, z_x, with_bias):
    """s_x s_w (acc + bias_i32) = s_x s_w sum (q_x - z_x) q_w + b, up to the rounding of the bias."""
    w = data.draw(npst.arrays(np.int8, (2, 3), elements=int8))
    x = data.draw(npst.arrays(np.uint8, (1, 3), elements=uint8))
    s_w = np.float32(data.draw(st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=2, max_size=2)))
    b = np.float32(data.draw(st.lists(st.floats(-1000, 1000, width=32), min_size=2, max_size=2)))
    folded = numerics.fold_bias(b if with_bias else None, w, s_x, z_x, s_w)
    assert folded.dtype == np.int64
    for n in range(2):
        correction = -z_x * int(w[n].astype(int).sum())
        step = Fraction(float(np.float64(s_x) * np.float64(s_w[n])))
        quotient = float(b[n]) / float(step)
        steps = clamp(round(quotient), -(2**62), 2**62) if with_bias else 0
        assert folded[n] == correction + steps
        real = sum((int(q) - z_x) * int(v) for q, v in zip(x[0], w[n], strict=True))
        assert int(numerics.accumulate(x, w)[0, n]) + correction == real


@given(st.data())
def test_accumulator_bounds_are_reached(data):
    w = data.draw(npst.arrays(np.int8, (2, 2), elements=int8))
    bias = np.int64(data.draw(st.lists(st.integers(-(2**40), 2**40), min_size=2, max_size=2)))
    corners = [np.uint8([[a, b]]) for a in (0, 255) for b in (0, 255)]
    values = [int(v) for x in corners for v in numerics.accumulate(x, w)[0]]
    values += [int(a) + int(b) for x in corners for a, b in zip(numerics.accumulate(x, w)[0], bias, strict=True)]
    values += [0, *map(int, bias)]
    assert numerics.accumulator_bounds(bias, w) == (min(values), max(values))


def test_fits_int32():
    assert numerics.fits_int32((INT32_MIN, INT32_MAX))
    assert not numerics.fits_int32((INT32_MIN - 1, 0))
    assert not numerics.fits_int32((0, INT32_MAX + 1))


@given(scales, st.floats(2.0**-20, 2.0**20, width=32), st.floats(2.0**-20, 2.0**20, width=32))
def test_multipliers(s_x, s_w, s_y):
    found = numerics.requantize_multiplier(s_x, np.float32([s_w]), s_y)
    assert found.dtype == np.float32
    assert found[0] == np.float32(np.float64(s_x) * np.float64(s_w) / np.float64(s_y))
    assert numerics.dequantize_multiplier(s_x, np.float32([s_w])) == np.float32(np.float64(s_x) * np.float64(s_w))


bounds = st.tuples(uint8, uint8).map(sorted)


@given(st.data(), multipliers, uint8, bounds, st.integers(INT32_MIN // 2, INT32_MAX // 2))
def test_qlinear(data, m, zero_point, low_high, bias):
    low, high = low_high
    x = data.draw(npst.arrays(np.uint8, (2, 3), elements=uint8))
    w = data.draw(npst.arrays(np.int8, (1, 3), elements=int8))
    found = numerics.qlinear(x, w, np.int32([bias]), np.float32([m]), zero_point, low, high)
    real = numerics.qlinear_float(x, w, np.int32([bias]), np.float32([m]))
    added = numerics.qlinear_float(x, w, np.int32([bias]), np.float32([m]), np.float32([0.3]))
    assert found.dtype == np.uint8
    assert real.dtype == added.dtype == np.float32
    for row in range(2):
        acc = sum(int(a) * int(b) for a, b in zip(x[row], w[0], strict=True)) + bias
        steps = f32(f32(acc) * Fraction(m))  # the accumulator is rounded once, above 2**24
        assert found[row, 0] == requantized(steps, zero_point, low, high)
        assert Fraction(float(real[row, 0])) == steps
        assert Fraction(float(added[row, 0])) == f32(steps + Fraction(float(np.float32(0.3))))


@pytest.mark.parametrize(("m", "wanted"), [(0.5, [0, 0, 1, 2, 2]), (1.0, [0, 1, 2, 3, 4]), (3.0, [0, 3, 6, 9, 12])])
def test_ties_go_to_even(m, wanted):
    x, w = np.uint8([[0], [1], [2], [3], [4]]), np.int8([[1]])
    assert numerics.qlinear(x, w, np.int32([0]), np.float32([m]), 0, 0, 255).ravel().tolist() == wanted


@given(uint8, uint8, multipliers, multipliers, uint8, uint8, uint8, bounds)
def test_qadd(a, b, m_a, m_b, z_a, z_b, zero_point, low_high):
    low, high = low_high
    found = numerics.qadd(np.uint8([a]), np.uint8([b]), m_a, z_a, m_b, z_b, zero_point, low, high)
    steps = f32(f32((a - z_a) * Fraction(m_a)) + f32((b - z_b) * Fraction(m_b)))
    assert found.dtype == np.uint8
    assert found.tolist() == [requantized(steps, zero_point, low, high)]


@given(uint8, uint8, multipliers, uint8, bounds)
def test_requantize(q, z_x, m, zero_point, low_high):
    low, high = low_high
    found = numerics.requantize(np.uint8([q]), z_x, m, zero_point, low, high)
    assert found.tolist() == [requantized(f32((q - z_x) * Fraction(m)), zero_point, low, high)]


@given(st.integers(0, 150), st.integers(1, 20))
@example(1, 1)
@example(64, 4)
@example(65, 5)
@example(128, 3)
def test_pack_and_unpack(n, k):
    rng = np.random.default_rng(n * 31 + k)
    w = rng.integers(-127, 128, (n, k)).astype(np.int8)
    packed = numerics.pack(w)
    assert packed.dtype == np.int8
    assert packed.shape == (numerics.packed_size(n, k),)
    assert packed.size == -(-n // 16) * 16 * (-(-k // 4) * 4) + -k % 4
    assert np.array_equal(numerics.unpack(packed, n, k), w)
    assert n == 0 or packed.ctypes.data % 64 == 0  # no vector of weights lies in two cache lines


def test_where_the_packed_layout_puts_a_weight():
    w = np.zeros((70, 6), np.int8)
    w[66, 5] = 7  # the second panel is 16 wide; k = 5 is the second group of four, its second place
    packed = numerics.pack(w)
    assert np.flatnonzero(packed).tolist() == [64 * 8 + 1 * 16 * 4 + 2 * 4 + 1]


def test_unpack_refuses_another_size():
    with pytest.raises(AssertionError):
        numerics.unpack(np.zeros(5, np.int8), 1, 1)
