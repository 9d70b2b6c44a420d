"""Layer norm and RMS norm: NumPy against float64 within the stated error, every kernel against NumPy bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.ops.norm import norm, norm_and_quantize, norm_quantize

SHAPES = [(1,), (64,), (0, 5), (3, 63), (2, 3, 65), (2, 0, 4), (5, 384), (4, 1, 1030)]
KINDS = list(numerics.NORMS)


def rows(k, *names):
    return [torch.randn(k) if name else None for name in names]


def arrays(*tensors):
    return [None if t is None else t.numpy() for t in tensors]


def check(run, x, kind, weight, bias, eps=1e-5):
    with np.errstate(all="ignore"):
        y = numerics.NORMS[kind](x.numpy(), *arrays(weight, bias), eps)
        found = run(norm, x, kind, weight, bias, eps)
        assert np.array_equal(found.numpy(), y, equal_nan=True)
        for factor in (None, torch.exp2(torch.randint(-9, 9, x.shape[-1:]).float())):
            q = numerics.norm_quantize(x.numpy(), kind, *arrays(weight, bias), eps, 0.037, 3, *arrays(factor))
            operands = (x, kind, weight, bias, eps, 0.037, 3, factor)
            assert np.array_equal(run(norm_quantize, *operands).numpy(), q)
            both = run(norm_and_quantize, *operands)
            assert np.array_equal(both[0].numpy(), y, equal_nan=True)
            assert np.array_equal(both[1].numpy(), q)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_shapes(on_isa, shape, kind):
    for weight, bias in ((1, 1), (1, 0), (0, 0)):
        check(on_isa, torch.randn(shape) * 9 + 1, kind, *rows(shape[-1], weight, bias))


@pytest.mark.parametrize("kind", KINDS)
def test_extremes_and_strides(on_isa, kind):
    x = torch.randn(8, 12, 2)[..., 0].t().repeat(1, 9)
    x[0, 0], x[1, 1], x[2, 2], x[3], x[4], x[5] = torch.nan, torch.inf, -torch.inf, 3e38, 0, 1e-40
    check(on_isa, x[:, ::2], kind, *rows(36, 1, 1))


@given(st.integers(1, 200), st.integers(0, 2**31), st.sampled_from(KINDS), st.floats(-30, 30))
def test_any_row(k, seed, kind, power):
    x = torch.randn(2, k, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    check(lambda op, *args: op(*args), x, kind, None, None)


@pytest.mark.parametrize("offset", [0, 1, 100, 3e4])
@pytest.mark.parametrize("k", [1, 7, 384, 4096])
def test_errors_are_as_stated(offset, k):
    x = (np.random.default_rng(k).normal(size=(50, k)) + offset).astype(np.float32)
    d = x.astype(np.float64)
    eps = float(np.float32(1e-5))
    m, s = d.mean(-1, keepdims=True), np.sqrt(d.var(-1, keepdims=True) + eps)
    expected = (d - m) / s
    error = np.abs(numerics.layer_norm(x, None, None, 1e-5) - expected)
    assert (error <= 4e-7 * (1 + np.abs(m) / s + np.abs(expected))).all()
    expected = d / np.sqrt((d**2).mean(-1, keepdims=True) + eps)
    assert (np.abs(numerics.rms_norm(x, None, None, 1e-5) - expected) <= 4e-7 * np.abs(expected)).all()


def test_row_sum_is_in_the_stated_order():
    x = np.random.default_rng(0).normal(size=150).astype(np.float32)
    sums = [np.float32(0)] * 64
    for k, value in enumerate(x):
        sums[k % 64] = sums[k % 64] + value
    while len(sums) > 1:
        sums = [a + b for a, b in zip(sums[: len(sums) // 2], sums[len(sums) // 2 :], strict=True)]
    assert numerics.row_sum(x)[0] == sums[0]


def test_what_is_refused(on_isa):
    x = torch.zeros(2, 4)
    with pytest.raises((ValueError, RuntimeError), match="batch_norm"):
        on_isa(norm, x, "batch_norm", None, None, 1e-5)
    with pytest.raises((ValueError, RuntimeError), match="weight has shape"):
        on_isa(norm, x, "rms_norm", torch.ones(3), None, 1e-5)
    with pytest.raises((ValueError, RuntimeError), match="factor has shape"):
        on_isa(norm_quantize, x, "rms_norm", None, None, 1e-5, 1.0, 0, torch.ones(3))
    with pytest.raises((TypeError, RuntimeError), match="float32"):
        on_isa(norm, x.double(), "rms_norm", None, None, 1e-5)


def test_opcheck():
    x, row = torch.randn(3, 4), torch.ones(4)
    torch.library.opcheck(norm, (x, "layer_norm", row, row, 1e-5))
    torch.library.opcheck(norm_quantize, (x, "rms_norm", row, None, 1e-5, 0.1, 3))
    torch.library.opcheck(norm_and_quantize, (x, "layer_norm", None, None, 1e-5, 0.1, 3, row))


def test_threads_return_the_same_bits():
    x, threads = torch.randn(257, 300), torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(norm(x, "layer_norm", None, None, 1e-5))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)
