"""quantize_scaled and the activation epilogues against NumPy, bit for bit, and what they refuse."""

import numpy as np
import pytest
import torch

from fxq import numerics
from fxq.ops.activation import qlinear_act, qlinear_act_quantize
from fxq.ops.quantize_scaled import quantize_scaled

SHAPES = [(1,), (17,), (0, 5), (3, 33), (2, 3, 64), (2, 0, 4), (5, 1, 130)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("zero_point", [0, 3, 255])
def test_quantize_scaled(on_isa, shape, zero_point):
    x, factor = torch.randn(shape) * 40, torch.exp2(torch.randint(-9, 9, shape[-1:]).float())
    found = on_isa(quantize_scaled, x, factor, 0.37, zero_point)
    assert np.array_equal(found.numpy(), numerics.quantize_scaled(x.numpy(), factor.numpy(), 0.37, zero_point))


def test_quantize_scaled_is_mul_then_quantize_on_strided_and_extreme_input(on_isa):
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, 0.5] * 6).reshape(6, 6).t()[:, ::2]
    factor = torch.tensor([1.0, 0.1, 3.0])
    found = on_isa(quantize_scaled, x, factor, 0.1, 7)
    with np.errstate(over="ignore"):
        expected = numerics.quantize((x * factor).numpy(), 0.1, 7)
    assert np.array_equal(found.numpy(), expected)


def test_quantize_scaled_refuses_a_factor_of_another_length(on_isa):
    with pytest.raises((ValueError, RuntimeError), match="factor has shape"):
        on_isa(quantize_scaled, torch.zeros(2, 4), torch.ones(3), 1.0, 0)


def operands(n=19, k=23, rows=5):
    x = torch.randint(0, 256, (rows, k), dtype=torch.uint8)
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    bias = torch.randint(-9999, 9999, (n,), dtype=torch.int32)
    multiplier = torch.rand(n) * 1e-3
    return x, w, bias, multiplier


@pytest.mark.parametrize("activation", list(numerics.ACTIVATIONS))
def test_activations(on_isa, activation):
    x, w, bias, multiplier = operands()
    packed = torch.from_numpy(numerics.pack(w.numpy()))
    arrays = [t.numpy() for t in (x, w, bias, multiplier)]
    found = on_isa(qlinear_act, x, packed, bias, multiplier, activation)
    assert np.array_equal(found.numpy(), numerics.qlinear_act(*arrays, activation))
    quantized = on_isa(qlinear_act_quantize, x, packed, bias, multiplier, activation, 0.02, 9)
    assert np.array_equal(quantized.numpy(), numerics.qlinear_act_quantize(*arrays, activation, 0.02, 9))
    factor = torch.exp2(torch.randint(-3, 4, bias.shape).float())
    quantized = on_isa(qlinear_act_quantize, x, packed, bias, multiplier, activation, 0.02, 9, factor)
    expected = numerics.quantize_scaled(numerics.qlinear_act(*arrays, activation), factor.numpy(), 0.02, 9)
    assert np.array_equal(quantized.numpy(), expected)
    assert np.array_equal(
        quantized.numpy(), numerics.qlinear_act_quantize(*arrays, activation, 0.02, 9, factor.numpy())
    )


def test_a_factor_of_another_length_is_refused(on_isa):
    x, w, bias, multiplier = operands()
    packed = torch.from_numpy(numerics.pack(w.numpy()))
    with pytest.raises((ValueError, RuntimeError), match="factor"):
        on_isa(qlinear_act_quantize, x, packed, bias, multiplier, "gelu", 0.02, 9, torch.ones(3))


def test_unknown_activation(on_isa):
    x, w, bias, multiplier = operands()
    packed = torch.from_numpy(numerics.pack(w.numpy()))
    with pytest.raises((ValueError, RuntimeError), match="mish"):
        on_isa(qlinear_act, x, packed, bias, multiplier, "mish")


def test_opcheck():
    x, w, bias, multiplier = operands()
    packed = torch.from_numpy(numerics.pack(w.numpy()))
    torch.library.opcheck(quantize_scaled, (torch.randn(3, 4), torch.ones(4), 0.1, 3))
    torch.library.opcheck(qlinear_act, (x, packed, bias, multiplier, "gelu"))
    torch.library.opcheck(qlinear_act, (x, packed, bias, multiplier, "gelu", torch.randn(2, 1, 19)))
    torch.library.opcheck(qlinear_act_quantize, (x, packed, bias, multiplier, "gelu", 0.1, 3))
    torch.library.opcheck(qlinear_act_quantize, (x, packed, bias, multiplier, "gelu", 0.1, 3, torch.rand(19)))
