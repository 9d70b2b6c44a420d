"""quantize, dequantize, requantize and the weight ops against the NumPy reference, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fxq import numerics, qdq

SHAPES = [(), (0,), (7,), (33,), (0, 5), (3, 5), (2, 3, 4), (1, 2, 3, 2), (2, 1, 2, 1, 17)]
uint8 = st.integers(0, 255)
scales = st.floats(2.0**-60, 2.0**60, width=32) | st.sampled_from([1.0, 0.5, 0.1])


def spread(shape, scale):
    """Values around the whole range of a quantized tensor, with ties and values far outside."""
    x = torch.randn(shape) * 60 * scale
    return torch.where(torch.rand(shape) < 0.3, (torch.randint(-300, 300, shape) + 0.5) * scale, x)


@pytest.mark.parametrize("shape", SHAPES)
def test_all_ops_on_all_shapes(on_isa, shape):
    for scale, zero_point in ((0.5, 128), (0.0371, 0), (2.0**-60, 255), (1.0, 3)):
        x = spread(shape, scale)
        q = on_isa(qdq.quantize, x, scale, zero_point)
        assert (q.dtype, q.shape) == (torch.uint8, x.shape)
        assert np.array_equal(q.numpy(), numerics.quantize(x.numpy(), scale, zero_point))
        y = on_isa(qdq.dequantize, q, scale, zero_point)
        assert (y.dtype, y.shape) == (torch.float32, x.shape)
        assert np.array_equal(y.numpy(), numerics.dequantize(q.numpy(), scale, zero_point))
        for args in ((zero_point, 0.7, 5, 0, 255), (zero_point, 3.0, 250, 10, 200), (0, 1e-6, 0, 0, 255)):
            found = on_isa(qdq.requantize, q, *args)
            assert np.array_equal(found.numpy(), numerics.requantize(q.numpy(), *args))


@given(npst.arrays(np.float32, st.integers(0, 40), elements=st.floats(width=32)), scales, uint8)
@example(np.float32([np.nan, np.inf, -np.inf, 0.0, -0.0, 3e38]), 2.0**-60, 1)
@example(np.float32([0.5, 1.5, 2.5, -0.5, 126.5]), 1.0, 1)
def test_quantize_any_float(x, scale, zero_point):
    found = qdq.quantize(torch.from_numpy(x), scale, zero_point)
    assert np.array_equal(found.numpy(), numerics.quantize(x, scale, zero_point))


def test_quantize_what_is_not_finite(on_isa):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 2.0**31] * 30)  # more than four vectors
    for zero_point in (0, 7, 255):
        found = on_isa(qdq.quantize, x, 0.5, zero_point)
        assert np.array_equal(found.numpy(), numerics.quantize(x.numpy(), 0.5, zero_point))


def test_memory_in_any_order(on_isa):
    x = spread((6, 8, 10), 0.5)
    for view in (x.transpose(0, 2), x[:, ::2, 1::3], x.expand(2, 6, 8, 10), x[:, :, 3]):
        q = on_isa(qdq.quantize, view, 0.5, 9)
        assert np.array_equal(q.numpy(), numerics.quantize(view.numpy(), 0.5, 9))
    q = on_isa(qdq.quantize, x, 0.5, 9)
    for view in (q.transpose(0, 2), q[:, ::2, 1::3], q[:, :, 3]):
        assert np.array_equal(on_isa(qdq.dequantize, view, 0.5, 9).numpy(), numerics.dequantize(view.numpy(), 0.5, 9))
        found = on_isa(qdq.requantize, view, 9, 0.7, 5, 0, 255)
        assert np.array_equal(found.numpy(), numerics.requantize(view.numpy(), 9, 0.7, 5, 0, 255))


@pytest.mark.parametrize("shape", [(3, 5), (1, 1), (4,), (2, 3, 4)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_weights(shape, per_channel):
    w = torch.randn(shape)
    w[0] = 0
    peaks = w.abs().reshape(len(w), -1).amax(1)
    s_w = numerics.weight_scales((peaks if per_channel else peaks.amax().reshape(1)).numpy())
    q = qdq.quantize_weight(w, torch.from_numpy(s_w))
    assert np.array_equal(q.numpy(), numerics.quantize_weight(w.numpy(), s_w))
    back = qdq.dequantize_weight(q, torch.from_numpy(s_w))
    assert np.array_equal(back.numpy(), numerics.dequantize_weight(q.numpy(), s_w))


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (qdq.quantize, (torch.randn(3, 4).t(), 0.5, 9)),
        (qdq.dequantize, (torch.randint(0, 256, (3, 4), dtype=torch.uint8), 0.5, 9)),
        (qdq.requantize, (torch.randint(0, 256, (3, 4), dtype=torch.uint8), 9, 0.7, 5, 0, 255)),
        (qdq.quantize_weight, (torch.randn(3, 4), torch.ones(3))),
        (qdq.dequantize_weight, (torch.randint(-127, 128, (3, 4), dtype=torch.int8), torch.ones(3))),
    ],
)
def test_opcheck(op, args):
    torch.library.opcheck(op, args)


@pytest.mark.parametrize(
    ("op", "args"),
    [
        (qdq.quantize, (torch.randn(3).double(), 0.5, 9)),
        (qdq.dequantize, (torch.randn(3), 0.5, 9)),
        (qdq.requantize, (torch.randn(3), 9, 0.7, 5, 0, 255)),
    ],
)
def test_another_dtype_is_refused(on_isa, op, args):
    with pytest.raises((TypeError, RuntimeError), match=r"dtype|float32|uint8|scalar type"):
        on_isa(op, *args)


@given(st.floats(-20, 20), st.floats(-20, 20), uint8, scales.filter(lambda s: 1e-3 < s < 1e3))
def test_integer_bounds_clamp_like_float_ones(a, b, zero_point, scale):
    low, high = min(a, b), max(a, b)
    x = torch.linspace(-30, 30, 200)
    q_low, q_high = qdq.integer_bounds((low, high), scale, zero_point)
    clamped = qdq.quantize(x.clamp(low, high), scale, zero_point)
    assert torch.equal(qdq.quantize(x, scale, zero_point).clamp(q_low, q_high), clamped)
    assert qdq.integer_bounds((None, None), scale, zero_point) == (0, 255)
    assert qdq.integer_bounds((0.0, None), scale, zero_point) == (zero_point, 255)
