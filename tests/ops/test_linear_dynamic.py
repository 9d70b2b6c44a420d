"""qlinear_dynamic against plain arithmetic and the NumPy reference; rows that know nothing of one another."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fxq import numerics
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.qdq import fake_quantize_rows

ROWS = np.float32(
    [
        [0, 0, 0, 0, 0],
        [-0.0, 1e-45, 0, 0, 0],
        [1, 2, 3, 4, 5],
        [-1, -2, -3, -4, -5],
        [3e38, -3e38, 0, 1, 2],
        [np.nan, 1, 2, 3, 4],
        [1, 2, np.inf, 3, 4],
        [1, 2, 3, -np.inf, 4],
        [0.5, -0.5, 1e-20, 100, 7],
        [-127.5, 127.5, 0.5, 1.5, 2.5],
    ]
)


def f32(value):
    return np.float32(float(value))


def operands(m, n, k, seed):
    rng = np.random.default_rng(seed)
    x = (rng.normal(0, 3, (m, k)) + rng.normal(0, 3, (m, 1))).astype(np.float32)
    w = rng.integers(-127, 128, (n, k)).astype(np.int8)
    return x, w, rng.uniform(0.001, 0.1, n).astype(np.float32), rng.normal(size=n).astype(np.float32)


def packed(w):
    return torch.from_numpy(numerics.pack(w)), torch.from_numpy(w.astype(np.int32).sum(1, dtype=np.int32))


def run(call, x, w, s_w, bias=None, addend=None, *rest):
    arrays = (None if a is None else torch.from_numpy(a) for a in (s_w, bias, addend))
    return call(qlinear_dynamic, torch.from_numpy(x), *packed(w), *arrays, *rest).numpy()


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(found), nan)
    assert np.array_equal(np.where(nan, 0, found).view(np.int32), np.where(nan, 0, expected).view(np.int32))


@given(npst.arrays(np.float32, (2, 3), elements=st.floats(-(2.0**100), 2.0**100, width=32)))
def test_row_qparams_and_quantize_rows_by_fractions(x):
    q, scale, zero_point = numerics.quantize_rows(x)
    for row, q_row, s, z in zip(x, q, scale[:, 0], zero_point[:, 0], strict=True):
        low, high = min(0, *row.tolist()), max(0, *row.tolist())
        exact = Fraction(float(f32(Fraction(high) / 255))) - Fraction(float(f32(Fraction(low) / 255)))
        assert s == max(f32(exact), np.float32(2.0**-60))
        inverse = f32(1 / Fraction(float(s)))
        assert z == min(255, round(Fraction(float(f32(Fraction(-low) * Fraction(float(inverse)))))))
        for value, q_value in zip(row.tolist(), q_row.tolist(), strict=True):
            steps = round(Fraction(float(f32(Fraction(value) * Fraction(float(inverse))))))
            assert q_value == min(255, max(0, steps + int(z)))


@given(st.integers(0, 2**31), st.integers(1, 4), st.integers(1, 5), st.integers(1, 6))
def test_the_product_by_integers(seed, m, n, k):
    x, w, s_w, bias = operands(m, n, k, seed)
    q, scale, zero_point = numerics.quantize_rows(x)
    found = numerics.qlinear_dynamic(x, w, s_w, bias)
    for i in range(m):
        for j in range(n):
            exact = sum((int(q[i, t]) - int(zero_point[i, 0])) * int(w[j, t]) for t in range(k))
            y = f32(Fraction(exact) * Fraction(float(f32(Fraction(float(scale[i, 0])) * Fraction(float(s_w[j]))))))
            assert found[i, j] == f32(Fraction(float(y)) + Fraction(float(bias[j])))


def test_zero_is_exact_and_nothing_is_lost_but_half_a_step():
    x = np.random.default_rng(0).normal(0, 3, (50, 40)).astype(np.float32)
    x[:, ::7] = 0
    found = numerics.fake_quantize_rows(x)
    assert not found[:, ::7].any()
    assert (np.abs(found - x) <= 0.51 * numerics.row_qparams(x)[0]).all()


def test_rows_that_are_zero_or_not_finite(on_isa):
    w = operands(0, 70, 5, 0)[1]
    s_w, bias = np.full(70, 0.01, np.float32), np.arange(70, dtype=np.float32)
    found = run(on_isa, ROWS, w, s_w, bias)
    same(found, numerics.qlinear_dynamic(ROWS, w, s_w, bias))
    assert np.array_equal(found[0], bias)  # a row of zeros: the bias alone, not NaN
    assert np.isnan(found[5:8]).all()
    assert np.isfinite(found[[0, 1, 2, 3, 8, 9]]).all()
    same(on_isa(fake_quantize_rows, torch.from_numpy(ROWS)).numpy(), numerics.fake_quantize_rows(ROWS))


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(0, 3, 4), (1, 1, 1), (4, 5, 0), (3, 17, 5), (7, 130, 67), (13, 65, 1030), (200, 70, 130), (15, 400, 516)],
)
def test_sizes(on_isa, m, n, k):
    x, w, s_w, bias = operands(m, n, k, m + n + k)
    residual = np.random.default_rng(0).normal(size=(m, n)).astype(np.float32)
    same(run(on_isa, x, w, s_w), numerics.qlinear_dynamic(x, w, s_w))
    same(run(on_isa, x, w, s_w, bias), numerics.qlinear_dynamic(x, w, s_w, bias))
    same(run(on_isa, x, w, s_w, None, residual), numerics.qlinear_dynamic(x, w, s_w, None, residual))
    for low, high in ((0.0, None), (-1.0, 1.5), (None, 0.25)):
        expected = numerics.qlinear_dynamic(x, w, s_w, bias, residual, "", low, high)
        same(run(on_isa, x, w, s_w, bias, residual, "", low, high), expected)


@pytest.mark.parametrize("activation", numerics.ACTIVATIONS)
def test_activations(on_isa, activation):
    x, w, s_w, bias = operands(9, 37, 20, 1)
    x[3, 2] = np.nan
    same(run(on_isa, x, w, s_w, bias, None, activation), numerics.qlinear_dynamic(x, w, s_w, bias, None, activation))


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0, 3)])
def test_leading_dimensions_strides_and_opcheck(on_isa, leading):
    _, w, s_w, bias = operands(0, 20, 13, 1)
    wide = torch.randn(*leading, 26)
    for x in (wide[..., :13], wide[..., ::2], wide[..., :13].movedim(0, -2) if leading else wide[:13]):
        found = on_isa(qlinear_dynamic, x, *packed(w), torch.from_numpy(s_w), torch.from_numpy(bias))
        same(found.numpy(), numerics.qlinear_dynamic(x.numpy(), w, s_w, bias))
    addend = torch.randn(20)
    arguments = (wide[..., :13], *packed(w), torch.from_numpy(s_w), torch.from_numpy(bias), addend, "gelu")
    torch.library.opcheck(qlinear_dynamic, arguments)


def test_an_addend_with_more_dimensions(on_isa):
    x, w, s_w, bias = operands(5, 20, 13, 1)
    addend = np.random.default_rng(0).normal(size=(3, 1, 20)).astype(np.float32)
    same(run(on_isa, x, w, s_w, bias, addend), numerics.qlinear_dynamic(x, w, s_w, bias, addend))


def test_who_shares_the_batch_changes_nothing(on_isa):
    x, w, s_w, bias = operands(40, 70, 33, 2)
    alone = np.concatenate([run(on_isa, x[i : i + 1], w, s_w, bias) for i in range(40)])
    x[1::2] *= 1e6
    x[3, 0] = np.nan
    x[5] = 0
    same(run(on_isa, x, w, s_w, bias)[::2], alone[::2])


def test_threads_return_the_same_bits():
    x, w, s_w, bias = operands(300, 200, 70, 3)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 5, 300):
                found = run(lambda op, *args: op(*args), x[:rows], w, s_w, bias)
                same(found, numerics.qlinear_dynamic(x[:rows], w, s_w, bias))
    finally:
        torch.set_num_threads(threads)


def test_the_longest_dot_product(on_isa):
    k = 66311
    x = np.ones((2, k), np.float32)
    x[1] = -1
    w = np.full((2, k), 127, np.int8)
    w[1] = -127
    same(run(on_isa, x, w, np.float32([1, 1])), numerics.qlinear_dynamic(x, w, np.float32([1, 1])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].double()}, "x has"),
        (lambda a: a | {"weight": a["weight"][:-1]}, "packed"),
        (lambda a: a | {"scale": a["scale"][:2]}, "scale|multiplier"),
        (lambda a: a | {"bias": a["bias"][:2]}, "bias"),
        (lambda a: a | {"addend": torch.ones(7)}, "addend"),
        (lambda a: a | {"activation": "mish"}, "mish"),
    ],
)
def test_operands_that_do_not_belong_together(on_isa, change, message):
    x, w, s_w, bias = operands(3, 20, 13, 1)
    names = ["x", "weight", "column_sums", "scale", "bias", "addend", "activation"]
    values = (torch.from_numpy(x), *packed(w), torch.from_numpy(s_w), torch.from_numpy(bias), None, "")
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        on_isa(qlinear_dynamic, *change(dict(zip(names, values, strict=True))).values())
