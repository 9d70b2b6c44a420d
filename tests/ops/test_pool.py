"""Pooling, upsampling and products: NumPy against torch's float64, the ops against NumPy bit for bit."""

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fxq import numerics
from fxq.layout import channels_last
from fxq.ops.add import qadd
from fxq.ops.fixed_point import qadd_fixed, requantize_fixed
from fxq.ops.mul import qmul
from fxq.ops.pool import qadaptive_avg_pool, qavg_pool, qmax_pool
from fxq.ops.upsample import qupsample_bilinear, qupsample_nearest
from fxq.qdq import dequantize, quantize, requantize


def draw(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def same(found, expected):
    assert found.movedim(1, -1).is_contiguous()
    assert (found.numpy().dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(found.numpy(), expected)


POOLS = [
    # shape, kernel, stride, padding, ceil_mode
    ((2, 3, 9), (3,), (2,), (1,), False),
    ((2, 20, 9, 8), (3, 3), (2, 2), (1, 1), False),
    ((1, 65, 9, 8), (3, 2), (2, 3), (1, 0), True),
    ((1, 70, 6, 5), (2, 2), (2, 2), (1, 1), True),
    ((0, 3, 6, 5), (2, 2), (2, 2), (0, 0), False),
    ((1, 4, 4, 5, 6), (2, 3, 2), (2, 1, 2), (1, 1, 0), True),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0), False),
]


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("count_include_pad", [True, False])
def test_average(on_isa, case, count_include_pad):
    shape, kernel, stride, padding, ceil_mode = case
    x = draw(*shape)
    args = (kernel, stride, padding, ceil_mode, count_include_pad)
    expected = numerics.qavg_pool(x.numpy(), *args, None, 30, 1.0, 0, 0, 255)
    pool = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    if len(x):
        wanted = pool(x.double() - 30, *args).numpy()
        clear = np.abs(wanted - np.floor(wanted) - 0.5) > 1e-6  # not a tie, so that a float64 tells the integer
        assert np.array_equal(expected[clear], np.clip(np.rint(wanted), 0, 255)[clear])
    for own in (x, channels_last(x)):
        same(on_isa(qavg_pool, own, *args, None, 30, 1.0, 0, 0, 255), expected)
    expected = numerics.qavg_pool(x.numpy(), *args, 5, 200, 0.7, 128, 10, 240)
    same(on_isa(qavg_pool, x, *args, 5, 200, 0.7, 128, 10, 240), expected)


def test_an_average_is_rounded_once():
    """Against fractions: three values with the sum 4 and the multiplier 0.7."""
    x = torch.tensor([[[1, 1, 2]]], dtype=torch.uint8)
    m = Fraction(float(np.float32(0.7 / 3)))
    assert numerics.qavg_pool(x.numpy(), [3], [1], [0], False, True, None, 0, 0.7, 5, 0, 255) == 5 + round(4 * m)


@pytest.mark.parametrize(("shape", "out"), [((2, 70, 7, 7), (1, 1)), ((1, 5, 9, 8), (4, 3)), ((2, 3, 5), (7,))])
def test_adaptive_average(on_isa, shape, out):
    x = draw(*shape)
    expected = numerics.qadaptive_avg_pool(x.numpy(), out, 30, 1.0, 0, 0, 255)
    pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d)[len(out) - 1]
    wanted = pool(x.double() - 30, out).numpy()
    clear = np.abs(wanted - np.floor(wanted) - 0.5) > 1e-6
    assert np.array_equal(expected[clear], np.clip(np.rint(wanted), 0, 255)[clear])
    for own in (x, channels_last(x)):
        same(on_isa(qadaptive_avg_pool, own, out, 30, 1.0, 0, 0, 255), expected)
        other = numerics.qadaptive_avg_pool(x.numpy(), out, 9, 1.3, 100, 100, 200)
        same(on_isa(qadaptive_avg_pool, own, out, 9, 1.3, 100, 100, 200), other)


@pytest.mark.parametrize("case", POOLS)
@pytest.mark.parametrize("dilation", [1, 2])
def test_maximum(on_isa, case, dilation):
    shape, kernel, stride, padding, ceil_mode = case
    if any(n + 2 * p < dilation * (k - 1) + 1 for n, p, k in zip(shape[2:], padding, kernel, strict=True)):
        pytest.skip("the window does not fit")
    x = draw(*shape)
    args = (kernel, stride, padding, [dilation] * len(kernel), ceil_mode)
    expected = numerics.qmax_pool(x.numpy(), *args)
    if len(x):
        pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
        assert np.array_equal(expected, pool(x.float(), *args).numpy().astype(np.uint8))
    for own in (x, channels_last(x)):
        same(on_isa(qmax_pool, own, *args), expected)


UPSAMPLED = [((1, 3, 4, 5), (8, 10)), ((2, 70, 3, 4), (7, 5)), ((1, 1, 5, 5), (3, 2)), ((1, 17, 1, 1), (4, 3))]


@pytest.mark.parametrize(("shape", "size"), UPSAMPLED)
def test_nearest(on_isa, shape, size):
    x = draw(*shape)
    for scales in ([0.0, 0.0], [2.0, 1.7]):
        expected = numerics.qupsample_nearest(x.numpy(), size, scales)
        if not scales[0]:
            assert np.array_equal(expected, F.interpolate(x.float(), size).numpy().astype(np.uint8))
        for own in (x, channels_last(x)):
            same(on_isa(qupsample_nearest, own, size, scales), expected)
    signal = x.flatten(2)
    expected = numerics.qupsample_nearest(signal.numpy(), [11], [0.0])
    same(on_isa(qupsample_nearest, signal, [11], [0.0]), expected)


@pytest.mark.parametrize(("shape", "size"), UPSAMPLED)
@pytest.mark.parametrize("align_corners", [False, True])
def test_bilinear(on_isa, shape, size, align_corners):
    x = draw(*shape)
    for scales in ([0.0, 0.0], [2.0, 1.7]):
        expected = numerics.qupsample_bilinear(x.numpy(), size, scales, align_corners)
        if not scales[0]:
            wanted = F.interpolate(x.double(), size, mode="bilinear", align_corners=align_corners).numpy()
            assert np.abs(expected - wanted).max() < 0.501
        for own in (x, channels_last(x)):
            same(on_isa(qupsample_bilinear, own, size, scales, align_corners), expected)


@pytest.mark.parametrize("scale", [-9.0, -1e-30, float("nan")])
def test_scales_that_lead_out_of_the_image_are_refused(on_isa, scale):
    x = draw(1, 3, 4, 5)
    for op, *rest in ((qupsample_nearest,), (qupsample_bilinear, False)):
        with pytest.raises((RuntimeError, ValueError)):
            on_isa(op, x, [8, 10], [scale, 0.0], *rest)


PAIRS = [
    ((2, 70, 5, 6), (2, 70, 1, 1)),
    ((2, 3, 5, 6), (2, 3, 5, 6)),
    ((1, 16, 4), (1, 16, 1)),
    ((3, 5), (5,)),
    ((), (7,)),
    ((0, 3, 2, 2), (0, 3, 1, 1)),
]
FACTORS = [(0.004, 3, 250, 7, 0, 255), (1.0, 0, 0, 0, 0, 255), (2.0**-9, 255, 128, 128, 128, 200)]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_products(on_isa, a, b):
    a, b = draw(*a), draw(*b)
    for args in FACTORS:
        expected = numerics.qmul(a.numpy(), b.numpy(), *args)
        assert np.array_equal(on_isa(qmul, a, b, *args).numpy(), expected)
        swapped = (args[0], args[2], args[1], *args[3:])
        assert np.array_equal(on_isa(qmul, b, a, *swapped).numpy(), expected)
        if a.dim() > 2:
            for y in (b, channels_last(b)):
                assert np.array_equal(on_isa(qmul, channels_last(a), y, *args).numpy(), expected)
            assert np.array_equal(on_isa(qmul, b, channels_last(a), *swapped).numpy(), expected)


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 5, 7), (1, 3, 2, 3, 4)])
def test_elementwise_ops_leave_channels_last_as_it_is(on_isa, shape):
    q, p = channels_last(draw(*shape)), channels_last(draw(*shape))
    gate = draw(*shape[:2], *[1] * (len(shape) - 2))
    x = q.float() - 100
    assert np.array_equal(q.numpy(), q.contiguous().numpy())
    same(on_isa(quantize, x, 1.5, 9), numerics.quantize(x.numpy(), 1.5, 9))
    same(on_isa(dequantize, q, 1.5, 9), numerics.dequantize(q.numpy(), 1.5, 9))
    same(on_isa(requantize, q, 9, 0.7, 5, 0, 255), numerics.requantize(q.numpy(), 9, 0.7, 5, 0, 255))
    same(
        on_isa(requantize_fixed, q, 9, 2**30, 31, 5, 0, 255),
        numerics.requantize_fixed(q.numpy(), 9, 2**30, 31, 5, 0, 255),
    )
    sums, fixed = (0.3, 4, 0.5, 6, 7, 0, 255), (2**29, 4, 2**30, 6, 31, 7, 0, 255)
    for a, b in ((q, p), (q, p.contiguous()), (p.contiguous(), q), (q, gate), (gate, q)):
        same(on_isa(qadd, a, b, *sums), numerics.qadd(a.numpy(), b.numpy(), *sums))
        same(on_isa(qadd_fixed, a, b, *fixed), numerics.qadd_fixed(a.numpy(), b.numpy(), *fixed))
        same(on_isa(qmul, a, b, *FACTORS[0]), numerics.qmul(a.numpy(), b.numpy(), *FACTORS[0]))
    torch.library.opcheck(qadd, (q, gate, *sums))
    torch.library.opcheck(quantize, (x, 1.5, 9))
    torch.library.opcheck(requantize, (q, 9, 0.7, 5, 0, 255))


def test_a_product_against_fractions():
    m = float(np.float32(0.0137))
    for q_a, q_b, *rest in ((200, 3, 9, 100, 7), (255, 0, 0, 255, 255), (0, 255, 255, 0, 128)):
        z_a, z_b, zero_point = rest
        exact = Fraction(float(np.float32((q_a - z_a) * (q_b - z_b) * m)))
        wanted = min(max(round(exact) + zero_point, 0), 255)
        assert numerics.qmul(np.uint8([q_a]), np.uint8([q_b]), m, z_a, z_b, zero_point, 0, 255) == wanted


def test_opcheck():
    x = draw(2, 3, 6, 6)
    torch.library.opcheck(qavg_pool, (x, (2, 2), (2, 2), (0, 0), False, True, None, 3, 0.5, 4, 0, 255))
    torch.library.opcheck(qadaptive_avg_pool, (x, (1, 1), 3, 0.5, 4, 0, 255))
    torch.library.opcheck(qmax_pool, (x, (2, 2), (2, 2), (0, 0), (1, 1), False))
    torch.library.opcheck(qupsample_nearest, (x, (7, 7), (0.0, 0.0)))
    torch.library.opcheck(qupsample_bilinear, (x, (7, 7), (0.0, 0.0), False))
    torch.library.opcheck(qmul, (x, x[:, :, :1, :1], 0.5, 3, 4, 5, 0, 255))
