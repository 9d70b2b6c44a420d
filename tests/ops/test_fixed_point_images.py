"""Convolutions and average pools in fixed point: NumPy against fractions, the ops against NumPy bit for bit."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fxq import numerics
from fxq.layout import channels_last
from fxq.ops.conv import qconv_fixed
from fxq.ops.pool import qadaptive_avg_pool_fixed, qavg_pool_fixed

CONVS = [
    # x, n, kernel, stride, padding, dilation, groups: products, pixels as rows, channels in lanes
    ((2, 3, 7), 5, (3,), (2,), (1, 0), (1,), 1),
    ((2, 3, 9, 8), 70, (3, 3), (2, 1), (1, 1, 0, 2), (1, 2), 1),
    ((1, 8, 6, 5), 21, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    ((2, 21, 6, 5), 21, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 21),
    ((1, 32, 6, 5), 32, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 32),
    ((1, 24, 6, 5), 24, (3, 2), (1, 2), (1, 1, 1, 0), (1, 1), 6),
    ((1, 12, 5, 5), 18, (2, 2), (1, 1), (0, 0, 0, 0), (1, 1), 3),
    ((1, 4, 3, 4, 5), 6, (2, 2, 2), (1, 1, 1), (0, 1, 0, 1, 0, 1), (1, 1, 1), 2),
    ((0, 3, 9, 8), 4, (3, 3), (1, 1), (0, 0, 0, 0), (1, 1), 1),
]


@pytest.mark.parametrize("rounding", ["single", "tflite"])
@pytest.mark.parametrize("case", CONVS)
def test_convolution(on_isa, case, rounding):
    shape, n, kernel, stride, padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, shape, np.uint8)
    w = rng.integers(-127, 128, (n, shape[1] // groups, *kernel)).astype(np.int8)
    for extreme in (False, True):
        if extreme:
            multiplier = rng.choice(np.array([0, 2**30, 2**31 - 1], np.int32), n)
            shift, bias = rng.integers(0, 63, n, np.int32), rng.integers(-(2**30), 2**30, n, np.int32)
        else:
            multiplier, shift = numerics.fixed_multiplier(rng.uniform(0.2, 2, n) / (90 * np.sqrt(w[0].size)))
            bias = rng.integers(-3000, 3000, n, np.int32)
        scale = bias, multiplier, shift
        rest = 130, 5, 250, rounding
        conv = numerics.Conv(stride, padding, dilation, groups, 9)
        expected = numerics.qconv_fixed(x, w, *scale, conv, *rest)
        packed = torch.from_numpy(numerics.pack_conv(w, dilation, groups))
        window = str(numerics.Window(kernel, stride, padding, dilation, groups))
        operands = packed, *map(torch.from_numpy, scale), window, 9, *rest
        for own in (torch.from_numpy(x), channels_last(torch.from_numpy(x))):
            found = on_isa(qconv_fixed, own, *operands)
            assert np.array_equal(found.numpy(), expected)
            assert found.movedim(1, -1).is_contiguous()


def test_a_convolution_of_one_pixel_is_a_linear():
    rng = np.random.default_rng(1)
    x, w = rng.integers(0, 256, (5, 9, 1, 1), np.uint8), rng.integers(-127, 128, (7, 9, 1, 1)).astype(np.int8)
    scale = rng.integers(-3000, 3000, 7, np.int32), *numerics.fixed_multiplier(rng.uniform(0.001, 0.01, 7))
    conv = numerics.Conv((1, 1), (0, 0, 0, 0), (1, 1), 1, 0)
    found = numerics.qconv_fixed(x, w, *scale, conv, 100, 0, 255, "tflite")
    assert np.array_equal(
        found[..., 0, 0], numerics.qlinear_fixed(x[..., 0, 0], w[..., 0, 0], *scale, 100, 0, 255, "tflite")
    )


@given(st.integers(2**30, 2**31 - 1), st.integers(0, 62), st.integers(1, 2**23))
@example(2**31 - 1, 31, 2**23)
@example(2**30, 31, 3)
@example(2**31 - 1, 0, 1)
@example(2**30, 40, 2**23)
def test_the_multiplier_of_a_mean_is_the_nearest(multiplier, shift, count):
    m, s = (int(part) for part in numerics.mean_multiplier(multiplier, shift, np.array(count)))
    exact = Fraction(multiplier, count * 2**shift)
    if m == 0:
        assert 255 * count * exact < Fraction(1, 2)
    else:
        assert 2**30 <= m < 2**31
        assert abs(m - exact * 2**s) <= Fraction(1, 2)


POOLS = [
    ((2, 3, 9), (3,), (2,), (1,), False),
    ((2, 20, 9, 8), (3, 3), (2, 2), (1, 1), False),
    ((1, 65, 9, 8), (3, 2), (2, 3), (1, 0), True),
    ((0, 3, 6, 5), (2, 2), (2, 2), (0, 0), False),
    ((1, 4, 4, 5, 6), (2, 3, 2), (2, 1, 2), (1, 1, 0), True),
]


@pytest.mark.parametrize("rounding", ["single", "tflite"])
@pytest.mark.parametrize("case", POOLS)
def test_average(on_isa, case, rounding):
    shape, *windows = case
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    for include, divisor, factor in itertools.product((True, False), (None, 5), (1.0, 0.37, 2.0**-12)):
        scale = [int(part) for part in numerics.fixed_multiplier(np.float64(factor))]
        args = *windows, include, divisor, 30, *scale, 128, 10, 240, rounding
        expected = numerics.qavg_pool_fixed(x.numpy(), *args)
        for own in (x, channels_last(x)):
            assert np.array_equal(on_isa(qavg_pool_fixed, own, *args).numpy(), expected)
        in_float = numerics.qavg_pool(x.numpy(), *windows, include, divisor, 30, factor, 128, 10, 240)
        assert np.abs(in_float.astype(int) - expected).max(initial=0) <= 1


@pytest.mark.parametrize("rounding", ["single", "tflite"])
@pytest.mark.parametrize(("shape", "out"), [((2, 3, 9), (1,)), ((2, 20, 7, 5), (3, 2)), ((1, 70, 6, 6), (1, 1))])
def test_adaptive_average(on_isa, shape, out, rounding):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    args = out, 30, *(int(part) for part in numerics.fixed_multiplier(np.float64(0.8))), 20, 0, 255, rounding
    found = on_isa(qadaptive_avg_pool_fixed, channels_last(x), *args)
    assert np.array_equal(found.numpy(), numerics.qadaptive_avg_pool_fixed(x.numpy(), *args))


def test_a_mean_in_python_integers():
    x = np.random.default_rng(3).integers(0, 256, (1, 6, 3, 5), np.uint8)
    found = numerics.qadaptive_avg_pool_fixed(x, (1, 1), 17, 1_500_000_000, 30, 90, 0, 255)
    for channel in range(6):
        m, s = numerics.mean_multiplier(1_500_000_000, 30, np.array(15))
        total = sum(x[0, channel].ravel().tolist()) - 15 * 17
        steps = (total * int(m) + (1 << int(s) >> 1)) >> int(s)
        assert found[0, channel, 0, 0] == min(max(steps + 90, 0), 255)


def test_opcheck():
    x, scale = torch.randint(0, 256, (2, 3, 6, 6), dtype=torch.uint8), (2**30, 31)
    weight = torch.from_numpy(numerics.pack_conv(np.ones((4, 3, 3, 3), np.int8), (1, 1), 1))
    own = (torch.full((4,), value, dtype=torch.int32) for value in (5, *scale))
    geometry = "3x3 pad 1", 7
    torch.library.opcheck(qconv_fixed, (x, weight, *own, *geometry, 100, 0, 255))
    pool = (2, 2), (2, 2), (0, 0), False, True, None
    torch.library.opcheck(qavg_pool_fixed, (x, *pool, 3, *scale, 0, 0, 255, "tflite"))
    torch.library.opcheck(qadaptive_avg_pool_fixed, (x, (2, 2), 3, *scale, 0, 0, 255))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({3: torch.ones(4)}, "multiplier"),
        ({4: torch.full((4,), 63, dtype=torch.int32)}, "shift"),
        ({4: torch.zeros(3, dtype=torch.int32)}, "shift"),
        ({10: "twice"}, "rounding"),
    ],
)
def test_arguments_that_make_no_sense(on_isa, changed, message):
    ones = torch.ones(4, dtype=torch.int32)
    weight = torch.from_numpy(numerics.pack_conv(np.ones((4, 3, 1, 1), np.int8), (1, 1), 1))
    geometry = ["1x1", 7]
    args = [torch.zeros(1, 3, 2, 2, dtype=torch.uint8), weight, ones, ones, ones, *geometry, 0, 0, 255, "single"]
    for at, value in changed.items():
        args[at] = value
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        on_isa(qconv_fixed, *args)


def test_divisors_that_make_no_sense(on_isa):
    x = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for divisor in (-1, 2**23 + 1):
        with pytest.raises((RuntimeError, ValueError), match="divisor_override"):
            on_isa(qavg_pool_fixed, x, (1, 1), (1, 1), (0, 0), False, True, divisor, 0, 2**30, 31, 0, 0, 255)
