"""The fixed-point ops against NumPy, bit for bit, on every instruction set."""

import itertools

import numpy as np
import pytest
import torch

from fxq import numerics
from fxq.ops.fixed_point import qadd_fixed, qlinear_fixed, requantize_fixed

SIZES = [(0, 5, 4), (1, 1, 1), (2, 16, 0), (3, 17, 5), (7, 64, 64), (13, 130, 67), (6, 259, 19), (15, 400, 516)]


def layer(rng, m, n, k, extreme):
    """extreme: all shifts, mantissas at their ends, sums that reach the ends of int32."""
    x, w = rng.integers(0, 256, (m, k), np.uint8), rng.integers(-127, 128, (n, k)).astype(np.int8)
    if extreme:
        multiplier = rng.choice(np.array([0, 2**30, 2**30 + 1, 2**31 - 1], np.int32), n)
        shift = rng.integers(0, 63, n, np.int32)
        room = 255 * 127 * k
        bias = rng.choice(np.array([-(2**31) + room, 2**31 - 1 - room, 0, -1, 1], np.int32), n)
    else:
        multiplier, shift = numerics.fixed_multiplier(rng.uniform(0.2, 2, n) / (30 * np.sqrt(k + 1)))
        bias = rng.integers(-3000, 3000, n, np.int32)
    return x, w, bias, multiplier, shift


def tensors(x, w, *rest):
    return torch.from_numpy(x), torch.from_numpy(numerics.pack(w)), *map(torch.from_numpy, rest)


@pytest.mark.parametrize("rounding", ["single", "tflite"])
def test_linear(on_isa, rounding):
    rng = np.random.default_rng(0)
    for (m, n, k), extreme in itertools.product(SIZES, (False, True)):
        operands = layer(rng, m, n, k, extreme)
        rest = 7, 7, 250, rounding
        assert np.array_equal(
            on_isa(qlinear_fixed, *tensors(*operands), *rest).numpy(), numerics.qlinear_fixed(*operands, *rest)
        )


@pytest.mark.parametrize("rounding", ["single", "tflite"])
def test_linear_with_affine_weights(on_isa, rounding):
    rng = np.random.default_rng(1)
    for m, n, k in SIZES:
        operands = layer(rng, m, n, k, extreme=False)
        zero_w = rng.integers(-128, 128, n, np.int32)
        found = on_isa(qlinear_fixed, *tensors(*operands), 3, 0, 255, rounding, torch.from_numpy(zero_w))
        assert np.array_equal(found.numpy(), numerics.qlinear_fixed(*operands, 3, 0, 255, rounding, zero_w))


def test_strides_and_threads(on_isa):
    rng = np.random.default_rng(2)
    x, w, *rest = layer(rng, 500, 33, 40, extreme=False)
    whole = torch.from_numpy(np.concatenate([x, x], 1))
    zero_w = torch.from_numpy(rng.integers(-9, 9, 33, np.int32))
    for view in (whole[:, 11:51], whole[::2, 11:51], whole[:, ::2], whole.t()[:40].t()):
        _, *operands = tensors(x, w, *rest)
        found = on_isa(qlinear_fixed, view, *operands, 3, 0, 255, "single", zero_w)
        expected = numerics.qlinear_fixed(view.numpy(), w, *rest, 3, 0, 255, "single", zero_w.numpy())
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("rounding", ["single", "tflite"])
def test_requantize(on_isa, rounding):
    q = torch.arange(256, dtype=torch.uint8).repeat(2)[:-5]
    for (multiplier, shift), z_x in itertools.product(
        [(2**30, 31), (2**31 - 1, 0), (2**31 - 1, 62), (1234567890, 33)], (0, 77)
    ):
        args = z_x, multiplier, shift, 9, 3, 250, rounding
        assert np.array_equal(on_isa(requantize_fixed, q, *args).numpy(), numerics.requantize_fixed(q.numpy(), *args))


def test_add(on_isa):
    a, b = torch.arange(256, dtype=torch.uint8), torch.arange(256, dtype=torch.uint8)[:, None]
    for m_a, m_b, shift in [
        (2**30, 2**30, 31),
        (2**31 - 1, 1, 0),
        (2**31 - 1, 2**31 - 1, 62),
        (1234567890, 987654321, 33),
    ]:
        args = m_a, 12, m_b, 200, shift, 9, 3, 250
        assert np.array_equal(on_isa(qadd_fixed, a, b, *args).numpy(), numerics.qadd_fixed(a.numpy(), b.numpy(), *args))
        assert np.array_equal(on_isa(qadd_fixed, a, a, *args).numpy(), numerics.qadd_fixed(a.numpy(), a.numpy(), *args))


def operands(**changes):
    x, w, bias, multiplier, shift = tensors(*layer(np.random.default_rng(0), 2, 3, 4, extreme=False))
    given = {"x": x, "weight": w, "bias": bias, "multiplier": multiplier, "shift": shift, "zero_point": 3, "low": 0}
    return list((given | {"high": 255, "rounding": "single", "zero_w": None} | changes).values())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 4)}, "x has"),
        ({"multiplier": torch.ones(3)}, "multiplier has"),
        ({"shift": torch.ones(4, dtype=torch.int32)}, "shift"),
        ({"shift": torch.full((3,), 63, dtype=torch.int32)}, "63|shift"),
        ({"shift": torch.full((3,), -1, dtype=torch.int32)}, "-1|shift"),
        ({"rounding": "up"}, "rounding 'up', expected single or tflite"),
        ({"zero_w": torch.ones(2, dtype=torch.int32)}, "zero_w"),
        ({"weight": torch.zeros(5, dtype=torch.int8)}, "weight"),
    ],
)
def test_operands_that_do_not_fit_are_refused(on_isa, changes, message):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        on_isa(qlinear_fixed, *operands(**changes))


def test_other_operands_that_do_not_fit_are_refused(on_isa):
    q = torch.zeros(3, dtype=torch.uint8)
    for op, args in (
        (requantize_fixed, (q, 0, 2**31, 5, 0, 0, 255, "single")),
        (requantize_fixed, (q, 0, 1, 63, 0, 0, 255, "single")),
        (requantize_fixed, (q, 0, 1, 5, 0, 0, 255, "up")),
        (qadd_fixed, (q, q, -1, 0, 1, 0, 5, 0, 0, 255)),
        (qadd_fixed, (q, q, 1, 0, 1, 0, -1, 0, 0, 255)),
        (qadd_fixed, (q, q.float(), 1, 0, 1, 0, 5, 0, 0, 255)),
    ):
        with pytest.raises((RuntimeError, TypeError, ValueError), match="fixed"):
            on_isa(op, *args)


def test_opcheck():
    torch.library.opcheck(qlinear_fixed, tuple(operands()))
    q = torch.arange(6, dtype=torch.uint8)
    torch.library.opcheck(requantize_fixed, (q, 0, 2**30, 31, 0, 0, 255, "tflite"))
    torch.library.opcheck(qadd_fixed, (q.view(2, 3), q[:3], 2**30, 0, 2**30, 0, 31, 0, 0, 255))
