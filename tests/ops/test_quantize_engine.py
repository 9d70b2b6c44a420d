"""quantize_fused, quantize_onednn and qadd_engine: against exact arithmetic, NumPy and torch."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.ops.add_engine import qadd_engine
from fxq.ops.quantize_engine import quantize_fused, quantize_onednn

FLOATS = st.floats(-1e4, 1e4, width=32)
SCALES = st.floats(2.0**-20, 2.0**10, width=32)


def exact_f32(value):
    """A fraction rounded to the nearest float32, ties to even; normal numbers."""
    if value == 0:
        return Fraction(0)
    exponent = math.floor(math.log2(abs(value)))
    while abs(value) >= Fraction(2) ** (exponent + 1):
        exponent += 1
    while abs(value) < Fraction(2) ** exponent:
        exponent -= 1
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


@given(st.lists(FLOATS, min_size=1, max_size=8), SCALES, st.integers(0, 255))
def test_fused_is_one_rounding_of_the_exact_sum(x, scale, zero_point):
    inverse = Fraction(float(np.float32(1) / np.float32(scale)))
    wanted = [min(max(round(exact_f32(Fraction(v) * inverse + zero_point)), 0), 255) for v in x]
    assert numerics.quantize_fused(np.array(x, np.float32), scale, zero_point).tolist() == wanted


@pytest.mark.parametrize("zero_point", [0, 3, 117, 255])
def test_fused_on_ties_and_extremes(zero_point):
    """Where the product falls next to a tie, fusing decides."""
    scale = 0.0173
    x = (torch.arange(-600, 600) + 0.5) * scale
    x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1)])
    x = torch.cat([x, torch.tensor([0.0, -0.0, 3e38, -3e38, torch.inf, -torch.inf])])
    q = quantize_fused(x, scale, zero_point)
    assert np.array_equal(q.numpy(), numerics.quantize_fused(x.numpy(), scale, zero_point))
    assert q[-4:].tolist() == [255, 0, 255, 0]
    assert quantize_fused(torch.tensor([torch.nan]), scale, zero_point).item() == 0


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning")
@pytest.mark.parametrize(("scale", "zero_point"), [(0.0173, 117), (0.05, 93), (0.1, 7), (0.25, 3), (1e-3, 0)])
def test_fused_is_how_torch_quantizes_tensors(scale, zero_point):
    ties = (torch.randint(-300, 300, (200_000,)) + 0.5) * scale
    x = torch.cat([ties, torch.randn(200_000) * 60 * scale])
    wanted = torch.quantize_per_tensor(x, scale, zero_point, torch.quint8).int_repr()
    assert torch.equal(quantize_fused(x, scale, zero_point), wanted)


@pytest.mark.parametrize("relu", [True, False])
def test_onednn(relu):
    x, factor, bias = torch.randn(64, 33) * 50, torch.rand(33) + 0.1, torch.randn(33)
    q = quantize_onednn(x.t().contiguous().t(), factor, bias, relu, 0.31, 101)
    assert np.array_equal(q.numpy(), numerics.quantize_onednn(x.numpy(), factor.numpy(), bias.numpy(), relu, 0.31, 101))
    assert bool(q.min() >= 101) is relu
    assert len(q.unique()) > 50


def test_opcheck():
    torch.library.opcheck(quantize_fused, (torch.randn(3, 5), 0.1, 7))
    torch.library.opcheck(quantize_onednn, (torch.randn(3, 5), torch.rand(5), torch.randn(5), True, 0.1, 7))


def test_dtypes():
    with pytest.raises(TypeError, match="quantize_fused: x has dtype"):
        quantize_fused(torch.zeros(3, dtype=torch.float64), 1.0, 0)
    with pytest.raises(TypeError, match="quantize_onednn: factor has dtype"):
        quantize_onednn(torch.zeros(3), torch.zeros(3).double(), torch.zeros(3), True, 1.0, 0)


@pytest.mark.parametrize("engine", numerics.ENGINES)
def test_adding(engine):
    """Close to fractions, on shapes that broadcast; tests/test_from_torch.py has torch's own integers."""
    a, b = (torch.randint(0, 256, shape, dtype=torch.uint8) for shape in ((5, 1, 7), (3, 7)))
    settings = 0.25, 3, 0.5, 250, 0.375, 91, False, engine
    q = qadd_engine(a, b, *settings)
    assert q.shape == (5, 3, 7)
    assert np.array_equal(q.numpy(), numerics.qadd_engine(a.numpy(), b.numpy(), *settings))
    exact = ((a.double() - 3) / 4 + (b.double() - 250) / 2) / 0.375 + 91
    assert (q - exact.clamp(0, 255)).abs().max() < 0.501
    torch.library.opcheck(qadd_engine, (a, b, *settings))
    with pytest.raises(TypeError, match="qadd_engine: b has dtype"):
        qadd_engine(a, b.float(), *settings)
    with pytest.raises(ValueError, match="qadd_engine: unknown engine 'x86'"):
        qadd_engine(a, b, *settings[:-1], "x86")
