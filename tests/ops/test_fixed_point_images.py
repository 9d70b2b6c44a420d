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
from fxq.ops.conv_transpose import qconv_transpose_fixed
from fxq.ops.fixed_point import qmul_fixed
from fxq.ops.pool import qadaptive_avg_pool_fixed, qavg_pool_fixed
from fxq.ops.upsample import qupsample_bilinear_fixed

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


TRANSPOSED = [
    # x, n, kernel, stride, padding, output padding, dilation, groups
    ((2, 3, 7), 5, (3,), (2,), (1, 1), (1,), (1,), 1),
    ((2, 6, 5, 4), 10, (4, 3), (2, 3), (1, 1, 0, 0), (0, 2), (1, 2), 2),
    ((1, 70, 3, 4), 70, (2, 2), (3, 2), (0, 0, 0, 0), (0, 0), (1, 1), 70),
    ((1, 4, 2, 3, 3), 6, (2, 1, 3), (2, 2, 1), (0, 0, 0, 0, 1, 1), (0, 1, 0), (1, 1, 1), 2),
    ((0, 3, 4, 4), 4, (3, 3), (1, 1), (0, 0, 0, 0), (0, 0), (1, 1), 1),
]


@pytest.mark.parametrize("rounding", ["single", "tflite"])
@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_convolution(on_isa, case, rounding):
    shape, n, kernel, stride, padding, output_padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, shape, np.uint8)
    w = rng.integers(-127, 128, (n, shape[1] // groups, *kernel)).astype(np.int8)
    phases = int(np.prod(stride))
    for extreme in (False, True):
        if extreme:
            multiplier = rng.choice(np.array([0, 2**30, 2**31 - 1], np.int32), n)
            shift, bias = rng.integers(0, 63, n, np.int32), rng.integers(-(2**30), 2**30, (phases, n), np.int32)
        else:
            multiplier, shift = numerics.fixed_multiplier(rng.uniform(0.2, 2, n) / (90 * np.sqrt(w[0].size)))
            bias = rng.integers(-3000, 3000, (phases, n), np.int32)
        scale = bias, multiplier, shift
        rest = 130, 5, 250, rounding
        conv = numerics.ConvTranspose(stride, padding, output_padding, dilation, groups, 9)
        expected = numerics.qconv_transpose_fixed(x, w, *scale, conv, *rest)
        packed = torch.from_numpy(numerics.pack_transposed(w, stride, padding, dilation, groups))
        window = str(numerics.Window(kernel, stride, padding, dilation, groups, output_padding))
        operands = packed, *map(torch.from_numpy, scale), window, 9, *rest
        for own in (torch.from_numpy(x), channels_last(torch.from_numpy(x))):
            found = on_isa(qconv_transpose_fixed, own, *operands)
            assert np.array_equal(found.numpy(), expected)
            assert found.movedim(1, -1).is_contiguous()


def test_a_transposed_convolution_in_python_integers():
    """Every product goes to its place, as in the definition, with the zero point taken off the input."""
    rng = np.random.default_rng(4)
    x, w = rng.integers(0, 256, (1, 2, 3, 2), np.uint8), rng.integers(-127, 128, (3, 2, 3, 2)).astype(np.int8)
    b, z_x, (multiplier, shift) = rng.integers(-3000, 3000, 3), 77, (1_400_000_000, 41)
    sums = {(n, i, j): int(b[n]) for n in range(3) for i in range(6) for j in range(4)}
    for n, c, i, j, t, u in itertools.product(range(3), range(2), range(3), range(2), range(3), range(2)):
        place = n, 2 * i + t - 1, 2 * j + u
        if place in sums:
            sums[place] += (int(x[0, c, i, j]) - z_x) * int(w[n, c, t, u])
    geometry = (2, 2), (1, 1, 0, 0), (1, 1)
    bias = numerics.fold_transposed_bias(b.astype(np.float32), w, 1.0, z_x, np.ones(3, np.float32), *geometry)
    conv = numerics.ConvTranspose(*geometry[:2], (1, 0), (1, 1), 1, z_x)
    scale = np.full(3, multiplier, np.int32), np.full(3, shift, np.int32)
    found = numerics.qconv_transpose_fixed(x, w, bias.astype(np.int32), *scale, conv, 90, 0, 255)
    assert found.shape == (1, 3, 6, 4)
    for (n, i, j), v in sums.items():
        steps = (v * multiplier + (1 << shift >> 1)) >> shift
        assert found[0, n, i, j] == min(max(steps + 90, 0), 255)


@pytest.mark.parametrize("rounding", ["single", "tflite"])
@pytest.mark.parametrize("shapes", [((3, 70), (3, 70)), ((2, 5, 4, 3), (2, 5, 1, 1)), ((1, 7), (6, 1)), ((), (9,))])
def test_product(on_isa, shapes, rounding):
    a, b = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes)
    for multiplier, shift in ((2**30, 40), (2**31 - 1, 31), (2**31 - 1, 0), (0, 5), (1_234_567_891, 62)):
        args = 3, 250, multiplier, shift, 128, 5, 250, rounding
        expected = numerics.qmul_fixed(a.numpy(), b.numpy(), *args)
        assert np.array_equal(on_isa(qmul_fixed, a, b, *args).numpy(), expected)
        if a.dim() == 4:
            assert np.array_equal(on_isa(qmul_fixed, channels_last(a), b, *args).numpy(), expected)


@given(st.integers(0, 255), st.integers(0, 255), st.integers(2**30, 2**31 - 1), st.integers(20, 62))
def test_a_product_is_rounded_once(z_a, z_b, multiplier, shift):
    a, b = np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8)[::-9][:9, None]
    found = numerics.qmul_fixed(a, b, z_a, z_b, multiplier, shift, 7, 0, 255)
    for i, j in itertools.product(range(0, 256, 5), range(9)):
        steps = ((i - z_a) * (int(b[j, 0]) - z_b) * multiplier + (1 << shift >> 1)) >> shift
        assert found[j, i] == min(max(steps + 7, 0), 255)


BILINEAR = [  # x, size, factors, align_corners
    ((2, 3, 5, 4), (10, 8), (2.0, 2.0), False),
    ((1, 70, 5, 7), (11, 21), (0.0, 0.0), False),
    ((1, 4, 9, 6), (4, 3), (0.5, 0.5), False),
    ((2, 3, 5, 4), (17, 1), (0.0, 0.0), True),
    ((1, 5, 1, 3), (6, 7), (0.0, 2.5), False),
    ((1, 2, 300, 3), (1999, 3), (0.0, 0.0), False),
    ((0, 2, 3, 3), (6, 6), (2.0, 2.0), False),
]


@pytest.mark.parametrize("case", BILINEAR)
def test_bilinear(on_isa, case):
    shape, size, factors, align_corners = case
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    steps = [numerics.fixed_step(factor) for factor in factors]
    expected = numerics.qupsample_bilinear_fixed(x.numpy(), size, steps, align_corners)
    for own in (x, channels_last(x)):
        assert np.array_equal(on_isa(qupsample_bilinear_fixed, own, size, steps, align_corners).numpy(), expected)
    in_float = numerics.qupsample_bilinear(x.numpy(), size, factors, align_corners)
    assert np.abs(in_float.astype(int) - expected).max(initial=0) <= 1


@given(st.integers(1, 40), st.integers(1, 90), st.booleans())
def test_bilinear_against_fractions(size, out, align_corners):
    """The exact mean at the exact place, to one half and the rounding of the weights."""
    x = np.random.default_rng(size * out).integers(0, 256, (1, 1, 1, size), np.uint8)
    found = numerics.qupsample_bilinear_fixed(x, (1, out), (0, 0), align_corners)[0, 0, 0]
    for o in range(out):
        if align_corners:
            place = Fraction(o * (size - 1), out - 1) if out > 1 else Fraction(0)
        else:
            place = max(Fraction((2 * o + 1) * size, 2 * out) - Fraction(1, 2), Fraction(0))
        first = min(int(place), size - 1)
        pair = [int(x[0, 0, 0, i]) for i in (first, min(first + 1, size - 1))]
        exact = pair[0] + (place - first) * (pair[1] - pair[0])
        assert abs(int(found[o]) - exact) <= Fraction(1, 2) + Fraction(256, 2**12)


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
    torch.library.opcheck(qupsample_bilinear_fixed, (x, (9, 9), (0, 2**31), False))
    torch.library.opcheck(qmul_fixed, (x, x[:, :, :1, :1], 3, 4, *scale, 0, 0, 255, "tflite"))
    weight = torch.from_numpy(numerics.pack_transposed(np.ones((4, 3, 2, 2), np.int8), (2, 2), (0,) * 4, (1, 1), 1))
    own = (torch.full(s, value, dtype=torch.int32) for s, value in (((4, 4), 5), ((4,), 2**30), ((4,), 31)))
    torch.library.opcheck(qconv_transpose_fixed, (x, weight, *own, "2x2 stride 2", 7, 100, 0, 255))


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


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({2: torch.ones(4, dtype=torch.int32)}, "bias"),
        ({3: torch.ones(4)}, "multiplier"),
        ({4: torch.full((4,), 63, dtype=torch.int32)}, "shift"),
        ({4: torch.zeros(3, dtype=torch.int32)}, "shift"),
        ({10: "twice"}, "rounding"),
    ],
)
def test_a_transposed_convolution_that_makes_no_sense(on_isa, changed, message):
    ones = torch.ones(4, dtype=torch.int32)
    weight = torch.from_numpy(numerics.pack_transposed(np.ones((4, 3, 1, 1), np.int8), (1, 1), (0,) * 4, (1, 1), 1))
    args = [torch.zeros(1, 3, 2, 2, dtype=torch.uint8), weight, ones[None], ones, ones, "1x1", 7, 0, 0, 255, "single"]
    for at, value in changed.items():
        args[at] = value
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        on_isa(qconv_transpose_fixed, *args)


def test_products_and_images_that_make_no_sense(on_isa):
    q = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for args, message in [
        ((q, q, 0, 0, 2**31, 5, 0, 0, 255), "multiplier"),
        ((q, q, 0, 0, 1, 63, 0, 0, 255), "shift"),
        ((q, q, 0, 0, 1, 5, 0, 0, 255, "up"), "rounding"),
        ((q.float(), q, 0, 0, 1, 5, 0, 0, 255), "a has"),
    ]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
            on_isa(qmul_fixed, *args)
    for args in [(q.float(), (4, 4), (0, 0), False), (q, (4,), (0, 0), False), (q[:, :, :0], (4, 4), (0, 0), False)]:
        with pytest.raises((RuntimeError, TypeError, ValueError), match="qupsample_bilinear_fixed"):
            on_isa(qupsample_bilinear_fixed, *args)


def test_divisors_that_make_no_sense(on_isa):
    x = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    for divisor in (-1, 2**23 + 1):
        with pytest.raises((RuntimeError, ValueError), match="divisor_override"):
            on_isa(qavg_pool_fixed, x, (1, 1), (1, 1), (0, 0), False, True, divisor, 0, 2**30, 31, 0, 0, 255)
