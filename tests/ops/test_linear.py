"""qlinear and qlinear_float against the NumPy reference, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.ops.linear import linear_clamp, qlinear, qlinear_float
from fxq.packing import unpack
from fxq.qtypes import MAX_K

LEADING = [(), (0,), (1,), (5,), (2, 3), (2, 0, 3), (1, 2, 3), (2, 1, 2, 2)]


def operands(leading, n, k, rng, extreme=False):
    """x, unpacked and packed weight, bias, multiplier; extreme: only the ends of the ranges."""
    choose = rng.choice if extreme else None
    x = choose([0, 255], (*leading, k)) if choose else rng.integers(0, 256, (*leading, k))
    w = choose([-127, 127], (n, k)) if choose else rng.integers(-127, 128, (n, k))
    x, w = x.astype(np.uint8), w.astype(np.int8)
    bias = rng.integers(-(2**14) * k, 2**14 * k, n).astype(np.int32)
    multiplier = (rng.uniform(0.2, 4, n) / (200 * np.sqrt(k))).astype(np.float32)
    return x, w, numerics.pack(w), bias, multiplier


def check(run, x, w, packed, bias, multiplier, addend=None):
    tensors = [torch.from_numpy(a) for a in (x, packed, bias, multiplier)]
    for zero_point, low, high in ((0, 0, 255), (128, 128, 255), (255, 3, 200), (7, 9, 9)):
        found = run(qlinear, *tensors, zero_point, low, high)
        assert (found.dtype, found.shape) == (torch.uint8, (*x.shape[:-1], len(w)))
        assert np.array_equal(found.numpy(), numerics.qlinear(x, w, bias, multiplier, zero_point, low, high))
    found = run(qlinear_float, *tensors, None if addend is None else torch.from_numpy(addend))
    assert (found.dtype, found.shape) == (torch.float32, (*x.shape[:-1], len(w)))
    assert np.array_equal(found.numpy(), numerics.qlinear_float(x, w, bias, multiplier, addend))


@pytest.mark.parametrize("leading", LEADING)
def test_leading_dimensions(on_isa, leading):
    rng = np.random.default_rng(len(leading))
    check(on_isa, *operands(leading, 20, 13, rng))


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(1, 1, 1), (1, 17, 1), (3, 16, 4), (7, 64, 64), (5, 65, 63), (33, 130, 31), (64, 3, 257), (2, 200, 1024)],
)
@pytest.mark.parametrize("extreme", [False, True])
def test_sizes(on_isa, m, n, k, extreme):
    check(on_isa, *operands((m,), n, k, np.random.default_rng(m + n + k), extreme))


def test_the_longest_dot_product(on_isa):
    x = np.full((2, MAX_K), 255, np.uint8)
    w = np.full((2, MAX_K), 127, np.int8)
    w[1] = -127
    m = np.float32([1e-7, 1e-7])
    check(on_isa, x, w, numerics.pack(w), np.int32([0, 0]), m)
    check(on_isa, x[:, :-1], w[:, :-1], numerics.pack(w[:, :-1]), np.int32([255 * 127, -255 * 127]), m)


@pytest.mark.parametrize("multiplier", [2.0**-40, 0.5, 1.0, 3.0, 2.0**20])
def test_multipliers_and_ties(on_isa, multiplier):
    x = np.arange(256, dtype=np.uint8)[:, None]
    w = np.int8([[1], [-1], [127], [0]])
    check(on_isa, x, w, numerics.pack(w), np.int32([0, 0, 1, -3]), np.full(4, multiplier, np.float32))


def test_the_accumulator_is_rounded_above_2_to_the_24(on_isa):
    x, w = np.uint8([[255, 1]]), np.int8([[127, 1]])
    for bias in (2**24, 2**24 + 2, 2**30 + 1, -(2**31) + 1):
        check(on_isa, x, w, numerics.pack(w), np.int32([bias]), np.float32([2.0**-17]))


@pytest.mark.parametrize("shape", [(20,), (5, 20)])
def test_addends(on_isa, shape):
    rng = np.random.default_rng(0)
    check(on_isa, *operands((5,), 20, 13, rng), rng.normal(size=shape).astype(np.float32))


@pytest.mark.parametrize("shape", [(1, 20), (2, 1, 20), (2, 3, 1), (4, 2, 3, 20), (4, 1, 1, 20), ()])
def test_addends_of_another_shape_broadcast(on_isa, shape):
    rng = np.random.default_rng(0)
    x, w, packed, bias, multiplier = operands((2, 3) if len(shape) != 4 else (2, 1), 20, 13, rng)
    addend = np.asarray(rng.normal(size=shape), np.float32)
    found = on_isa(qlinear_float, *map(torch.from_numpy, (x, packed, bias, multiplier, addend)))
    assert np.array_equal(found.numpy(), numerics.qlinear_float(x, w, bias, multiplier, addend))
    torch.library.opcheck(qlinear_float, tuple(map(torch.from_numpy, (x, packed, bias, multiplier, addend))))


@pytest.mark.parametrize("shape", [(3, 7, 20), (2, 3, 5)])
def test_addends_that_do_not_broadcast_are_refused(on_isa, shape):
    x, _, packed, bias, multiplier = (torch.from_numpy(a) for a in operands((2, 3), 20, 13, np.random.default_rng(0)))
    with pytest.raises((ValueError, RuntimeError), match=r"addend|must match"):
        on_isa(qlinear_float, x, packed, bias, multiplier, torch.zeros(shape))


def test_memory_in_any_order(on_isa):
    rng = np.random.default_rng(0)
    x, w, packed, bias, multiplier = operands((6, 4), 20, 13, rng)
    rest = [torch.from_numpy(a) for a in (packed, bias, multiplier)]
    wide = torch.from_numpy(rng.integers(0, 256, (4, 6, 26)).astype(np.uint8))
    for view in (
        torch.from_numpy(x).transpose(0, 1),
        wide[:, :, ::2],
        wide[..., 13:],
        wide[1:2, :1, :13].expand(3, 2, 13),
    ):
        wanted = numerics.qlinear(view.numpy(), w, bias, multiplier, 5, 0, 255)
        assert np.array_equal(on_isa(qlinear, view, *rest, 5, 0, 255).numpy(), wanted)


@given(st.integers(1, 6), st.integers(1, 70), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_any_size(m, n, k, seed, extreme):
    check(lambda op, *args: op(*args), *operands((m,), n, k, np.random.default_rng(seed), extreme))


@given(st.integers(1, 130), st.integers(1, 9))
def test_unpack(n, k):
    w = np.random.default_rng(n).integers(-127, 128, (n, k)).astype(np.int8)
    assert np.array_equal(unpack(torch.from_numpy(numerics.pack(w)), n, k).numpy(), w)


def test_a_packed_weight_of_another_size_is_refused(on_isa):
    x, _, packed, bias, multiplier = (torch.from_numpy(a) for a in operands((2,), 20, 13, np.random.default_rng(0)))
    with pytest.raises((ValueError, RuntimeError), match="packed"):
        on_isa(qlinear, x, packed[:-1], bias, multiplier, 0, 0, 255)
    with pytest.raises((ValueError, RuntimeError), match="multiplier"):
        on_isa(qlinear, x, packed, bias, multiplier[:3], 0, 0, 255)
    with pytest.raises((TypeError, RuntimeError), match=r"uint8|Byte"):
        on_isa(qlinear, x.float(), packed, bias, multiplier, 0, 0, 255)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3)])
def test_opcheck(leading):
    x, _, packed, bias, multiplier = (torch.from_numpy(a) for a in operands(leading, 5, 6, np.random.default_rng(0)))
    torch.library.opcheck(qlinear, (x, packed, bias, multiplier, 3, 0, 255))
    torch.library.opcheck(qlinear_float, (x, packed, bias, multiplier))
    torch.library.opcheck(qlinear_float, (x, packed, bias, multiplier, torch.randn(5)))


def test_threads_return_the_same_bits():
    x, _, packed, bias, multiplier = (torch.from_numpy(a) for a in operands((257,), 130, 70, np.random.default_rng(0)))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(qlinear(x, packed, bias, multiplier, 3, 0, 255))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], result) for result in results)


def test_linear_clamp_is_linear_then_clamp():
    x, w, b = torch.randn(4, 3), torch.randn(5, 3), torch.randn(5)
    y = torch.nn.functional.linear(x, w, b)
    assert torch.equal(linear_clamp(x, w, b, 0.0, None), y.relu())
    assert torch.equal(linear_clamp(x, w, b, -0.5, 0.5), y.clamp(-0.5, 0.5))
    assert torch.equal(linear_clamp(x, w, b, None, 0.5), y.clamp(max=0.5))
