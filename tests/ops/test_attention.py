"""qattention and qattention_float against brute force and the NumPy reference, bit for bit."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxq import kernels, numerics
from fxq.ops.attention import qattention, qattention_float
from fxq.spelling import attention

SHAPES = [  # B, H, G, T, S, D, E
    (2, 3, 3, 5, 7, 8, 8),
    (1, 4, 2, 16, 16, 32, 32),
    (1, 2, 1, 1, 33, 5, 9),
    (2, 1, 1, 13, 70, 64, 66),
    (1, 1, 1, 20, 3, 1, 1),
    (1, 2, 2, 65, 65, 16, 32),
    (1, 1, 1, 31, 140, 8, 40),
    (1, 2, 2, 4, 0, 8, 8),
    (0, 2, 2, 4, 4, 8, 8),
]


def draw(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def operands(b, h, g, t, s, d, e):
    """q as a view of [B, T, H, D], k and v as views of one tensor where they are alike."""
    q = draw(b, t, h, d).transpose(1, 2)
    if d == e:
        k, v = draw(b, s, 2, g, d).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v
    return q, draw(b, g, s, d), draw(b, s, g, e).transpose(1, 2)


def masks(b, h, t, s):
    return [
        None,
        torch.rand(b, 1, 1, s) > 0.3,
        torch.rand(1, h, t, s) > 0.5,
        (torch.rand(b, t, s) > 0.7)[:, None].expand(b, h, t, s),
        torch.randn(b, 1, t, s) * 3,
        torch.where(torch.rand(s) > 0.5, -torch.inf, 0.0),
        torch.full((1, 1, t, 1), torch.finfo().min),
        torch.tensor([math.nan, math.inf, -math.inf, 0.0, 1e30, -1e30, 2.0])[:s] if 0 < s <= 7 else torch.zeros(()),
    ]


def numpy_of(args):
    return [arg.numpy() if isinstance(arg, torch.Tensor) else arg for arg in args]


def check(on_isa, args):
    found = on_isa(qattention, *args, 1.7, 100, 3)
    wanted = numerics.qattention(*numpy_of(args), 1.7, 100, 3)
    assert (found.dtype, found.shape) == (torch.uint8, wanted.shape)
    assert np.array_equal(found.numpy(), wanted)
    for nan_if_masked in (False, True):
        found = on_isa(qattention_float, *args, 0.02, nan_if_masked)
        wanted = numerics.qattention_float(*numpy_of(args), 0.02, nan_if_masked)
        assert (found.dtype, found.shape) == (torch.float32, wanted.shape)
        assert np.array_equal(found.numpy(), wanted, equal_nan=True)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_and_masks(on_isa, shape):
    q, k, v = operands(*shape)
    b, h, _, t, s, *_ = shape
    for mask in masks(b, h, t, s):
        for is_causal in (False, True):
            check(on_isa, (q, k, v, mask, is_causal, None, 120, 77, 3e-4))


def test_without_a_dimension_of_heads(on_isa):
    q, k, v = draw(6, 5, 8), draw(5, 6, 8).transpose(0, 1), draw(6, 5, 4)
    for mask in (None, torch.rand(6, 5, 5) > 0.3, torch.randn(5, 5), torch.rand(6, 1, 5) > 0.5):
        check(on_isa, (q, k, v, mask, False, 0.3, 128, 128, 1e-3))


def test_memory_in_any_order(on_isa):
    q, k, v = draw(2, 8, 5, 3).permute(0, 3, 2, 1), draw(2, 3, 7, 16)[..., ::2], draw(1, 3, 7, 8).expand(2, 3, 7, 8)
    check(on_isa, (q, k, v, None, False, None, 1, 2, 1e-3))
    check(on_isa, (q, draw(1, 3, 7, 8), v, torch.rand(7, 5).t() > 0.5, False, None, 1, 2, 1e-3))


def test_extremes(on_isa):
    """All integers at the ends of their range, scores of any size."""
    for a, b, c in itertools.product((0, 255), repeat=3):
        q, k, v = (torch.full((1, 2, 9, 67), value, dtype=torch.uint8) for value in (a, b, c))
        k[:, :, 3], v[:, :, 3] = 255 - b, 255 - c
        for z, s_qk in ((0, 1e-9), (255, 1.0), (128, 1e30)):
            check(on_isa, (q, k, v, None, False, 1.0, z, 255 - z, s_qk))


uint8 = st.integers(0, 255)


@given(
    uint8, uint8, uint8, st.floats(2.0**-40, 2.0**20, width=32), st.floats(2.0**-20, 2.0**10, width=32), st.booleans()
)
def test_any_parameters(z_q, z_v, zero_point, s_qk, m_v, is_causal):
    q, k, v = (torch.arange(256, dtype=torch.uint8).reshape(1, 2, 16, 8).roll(i, -1) for i in range(3))
    args = (q, k, v, None, is_causal, 0.25, z_q, z_v, s_qk, m_v, zero_point, 0)
    assert np.array_equal(qattention(*args).numpy(), numerics.qattention(*numpy_of(args)))


def test_brute_force_integers():
    """Both sums in Python's integers; the softmax within half a step of its weights and of its table in float64."""
    q, k, v = draw(1, 1, 3, 5), draw(1, 1, 4, 5), draw(1, 1, 4, 2)
    z_q, z_v, scale = 120, 77, 2e-4
    p = numerics.softmax_weights(numerics.attention_scores(*numpy_of((q, k, None, False, 1.0, z_q, scale))))
    y = numerics.qattention_float(*numpy_of((q, k, v, None, False, 1.0, z_q, z_v, scale, 1.0, False)))
    for t in range(3):
        row = [sum((int(q[0, 0, t, d]) - z_q) * (int(k[0, 0, s, d]) - 128) for d in range(5)) for s in range(4)]
        exact = [255 * math.exp((x - max(row)) * scale) for x in row]
        assert all(abs(int(w) - e) <= 0.52 + 0.0124 * e for w, e in zip(p[0, 0, t], exact, strict=True))
        for e in range(2):
            acc = sum(int(p[0, 0, t, s]) * (int(v[0, 0, s, e]) - z_v) for s in range(4))
            assert y[0, 0, t, e] == np.float32(acc) * (np.float32(1) / np.float32(int(p[0, 0, t].sum())))


def test_weights_of_the_softmax():
    x = np.linspace(-20, 0, 100_001, dtype=np.float32)
    exact = 255 * np.exp(x.astype(np.float64))
    assert (np.abs(numerics.softmax_weights(x) - exact) <= 0.51 + 0.0124 * exact).all()
    for row in ([-np.inf, -np.inf], [np.nan, np.nan], [np.inf, 0]):
        assert not numerics.softmax_weights(np.array(row, np.float32)).any()
    assert numerics.softmax_weights(np.array([-np.inf, np.nan, 3, -1e30], np.float32)).tolist() == [0, 0, 255, 0]


def test_close_to_float_attention():
    q, k, v = (torch.randn(2, 4, 40, 32) for _ in range(3))
    mask = torch.rand(2, 1, 40, 40) > 0.2
    integers = [torch.clamp(torch.round(x / 0.035) + 128, 0, 255).to(torch.uint8) for x in (q, k, v)]
    y = qattention_float(*integers, mask, False, None, 128, 128, 0.035**2, 0.035, False)
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    assert 10 * torch.log10(expected.square().sum() / (y - expected).square().sum()) > 35


@pytest.mark.parametrize("nan_if_masked", [False, True])
def test_queries_without_a_key_are_as_in_float(on_isa, nan_if_masked):
    q, k, v = operands(1, 2, 2, 3, 5, 8, 8)
    x = [(t.float() - 128) / 64 for t in (q, k, v)]
    seen = torch.ones(3, 5, dtype=torch.bool)
    seen[1] = False
    for mask in (seen, torch.where(seen, 0.0, -torch.inf), torch.where(seen, 0.0, torch.finfo().min)):
        y = on_isa(qattention_float, q, k, v, mask, False, None, 128, 128, 2.0**-12, 2.0**-6, nan_if_masked)
        expected = attention(*x, mask, False, None, nan_if_masked)
        torch.testing.assert_close(y, expected, atol=0.02, rtol=0, equal_nan=True)
    y = on_isa(qattention, q, k, v, seen, False, None, 128, 128, 2.0**-12, 1.0, 90, 90)
    assert (y[:, :, 1] == 90).all()


def test_padding_changes_no_other_row(on_isa):
    q, k, v = (draw(1, 2, 9, 8) for _ in range(3))
    alone = on_isa(qattention, q, k, v, None, False, None, 120, 130, 1e-3, 1.0, 128, 128)
    padded = [torch.cat([x, draw(1, 2, 30, 8)], 2) for x in (q, k, v)]
    for mask in (torch.arange(39) < 9, torch.where(torch.arange(39) < 9, 0.0, torch.finfo().min)):
        y = on_isa(qattention, *padded, mask, False, None, 120, 130, 1e-3, 1.0, 128, 128)
        assert torch.equal(y[:, :, :9], alone)


def test_the_transpose_behind_it_copies_nothing(on_isa):
    y = on_isa(qattention, *(draw(2, 4, 6, 8) for _ in range(3)), None, False, None, 0, 0, 1e-3, 1.0, 0, 0)
    assert y.transpose(1, 2).is_contiguous()


def test_any_number_of_threads():
    kernels.info()
    q, k, v = (draw(2, 2, 150, 64) for _ in range(3))
    args = (q, k, v, torch.rand(2, 1, 1, 150) > 0.2, False, None, 120, 130, 1e-3, 1.0, 128, 128)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(qattention(*args))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results)


def test_operands_that_do_not_belong_together_are_refused(on_isa):
    q = draw(1, 2, 4, 8)
    rest = (False, None, 0, 0, 1e-3, 1.0, 0, 0)
    for bad in (
        (q, draw(1, 2, 4, 7), q, None),
        (q, q, draw(1, 2, 5, 8), None),
        (q, draw(1, 3, 4, 8), draw(1, 3, 4, 8), None),
        (q, q[0], q[0], None),
        (q, q, q, torch.ones(3, 4, dtype=torch.bool)),
    ):
        with pytest.raises((RuntimeError, ValueError)):
            on_isa(qattention, *bad, *rest)
    with pytest.raises((RuntimeError, TypeError), match=r"q has|uint8"):
        on_isa(qattention, q.float(), q, q, None, *rest)
    with pytest.raises((RuntimeError, TypeError), match="mask"):
        on_isa(qattention, q, q, q, torch.ones(4, 4, dtype=torch.int64), *rest)


@pytest.mark.parametrize("mask", [None, torch.ones(1, 1, 1, 5, dtype=torch.bool)])
def test_opcheck(mask):
    q, k, v = operands(1, 2, 2, 3, 5, 8, 8)
    args = (q, k, v, mask, False, None, 120, 77, 3e-4)
    torch.library.opcheck(qattention, (*args, 1.0, 100, 100))
    torch.library.opcheck(qattention_float, (*args, 1.0, False))
    torch.library.opcheck(qattention_float, (q[0], k[0], v[0], None, *args[4:], 1.0, True))


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[4] and s[0]])
def test_heads_side_by_side_in_rows(on_isa, shape):
    """The same bits as heads in a dimension of their own, from what linears give to what they take."""
    b, h, g, t, s, d, e = shape
    q, k, v = draw(b, t, h * d), draw(b, s, g * d), draw(b, s, g * e)
    for mask in masks(b, h, t, s):
        rows = (q, k, v, mask, False, 0.2, 120, 77, 3e-4)
        apart = (
            *(x.unflatten(2, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), (h, g, g), strict=True)),
            *rows[3:],
        )
        for op, rest in ((qattention, (1.7, 100, 3)), (qattention_float, (0.02, False))):
            found = on_isa(op, *rows, *rest, h)
            assert torch.equal(found, on_isa(op, *apart, *rest).transpose(1, 2).flatten(2))
            wanted = getattr(numerics, op._schema.name.removeprefix("fxq::"))(*numpy_of(rows), *rest, h)
            assert found.is_contiguous() and np.array_equal(found.numpy(), wanted)


def test_rows_that_do_not_hold_the_heads_are_refused(on_isa):
    for q, k, v in ((10, 8, 8), (8, 6, 8), (8, 8, 3)):
        with pytest.raises((RuntimeError, ValueError)):
            on_isa(qattention, *(draw(1, 4, n) for n in (q, k, v)), None, False, None, 1, 1, 1e-3, 1.0, 0, 0, 4)
