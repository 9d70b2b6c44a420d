"""linear_weight_only: the same bits everywhere, in every dtype, close to float, and no float weight on the way."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxq import kernels, numerics
from fxq.numerics.weight_only import BLOCK
from fxq.ops.linear_weight_only import linear_weight_only

SIZES = [(0, 3, 4), (1, 1, 1), (4, 5, 0), (3, 17, 5), (6, 64, BLOCK), (7, 130, 67), (13, 65, 2 * BLOCK + 3)]
NARROW = (torch.bfloat16, torch.float16)


def operands(m, n, k, seed=0):
    rng = np.random.default_rng(seed)
    w = rng.integers(-127, 128, (n, k)).astype(np.int8)
    arrays = rng.normal(0, 3, (m, k)), rng.uniform(0.001, 0.1, n), rng.normal(size=n)
    x, s_w, bias = (a.astype(np.float32) for a in arrays)
    return x, w, s_w, bias


def run(call, x, w, s_w, bias=None):
    bias = None if bias is None else torch.from_numpy(bias)
    return call(linear_weight_only, torch.as_tensor(x), torch.from_numpy(numerics.pack(w)), torch.from_numpy(s_w), bias)


def exact_f32(value):
    """A fraction rounded to the nearest float32, ties to even; normal numbers."""
    if value == 0:
        return value
    exponent = math.floor(math.log2(abs(value)))
    exponent += abs(value) >= Fraction(2) ** (exponent + 1)
    exponent -= abs(value) < Fraction(2) ** exponent
    unit = Fraction(2) ** (exponent - 23)
    return round(value / unit) * unit


def same(found, expected):
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(found, expected, equal_nan=True)


def test_the_order_of_the_sum():
    """2**24 + 1 - 2**24 is 0 in this order and 1 in another; a block's sum begins anew."""
    x = np.float32([[2.0**24, 1, -(2.0**24)]])
    assert numerics.linear_weight_only(x, np.ones((1, 3), np.int8), np.float32([1])) == 0
    x = np.zeros((1, BLOCK + 2), np.float32)
    x[0, [0, BLOCK, BLOCK + 1]] = 2.0**24, 1, 1
    assert numerics.linear_weight_only(x, np.ones_like(x, np.int8), np.float32([1])) == 2**24 + 2


@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 3), st.integers(1, 6))
def test_by_plain_steps(seed, m, n, k):
    x, w, s_w, bias = operands(m, n, k, seed)
    found = numerics.linear_weight_only(x, w, s_w, bias)
    for i in range(m):
        for j in range(n):
            total = Fraction(0)
            for t in range(k):
                total = exact_f32(total + Fraction(float(x[i, t])) * int(w[j, t]))
            assert found[i, j] == np.float32(np.float32(np.float32(float(total)) * s_w[j]) + bias[j])


def test_a_product_is_added_unrounded():
    x = np.float32([[1, 1 + 2.0**-23]])
    w = np.int8([[-127, 127]])
    assert numerics.linear_weight_only(x, w, np.float32([1])) == 127 * 2.0**-23  # rounded to float32 it is 128 * 2**-23


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
def test_sizes(on_isa, m, n, k):
    x, w, s_w, bias = operands(m, n, k)
    same(run(on_isa, x, w, s_w).numpy(), numerics.linear_weight_only(x, w, s_w))
    same(run(on_isa, x, w, s_w, bias).numpy(), numerics.linear_weight_only(x, w, s_w, bias))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("m", [1, 3, 30])
def test_narrow_activations(on_isa, m, dtype):
    x, w, s_w, bias = operands(m, 70, 2 * BLOCK + 5)
    x = torch.from_numpy(x).to(dtype)
    found = run(on_isa, x, w, s_w, bias)
    assert found.dtype == dtype
    expected = torch.from_numpy(numerics.linear_weight_only(x.float().numpy(), w, s_w, bias)).to(dtype)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", NARROW)
def test_every_narrow_number_is_widened_and_rounded(on_isa, dtype):
    """All 65536 of them, and float32 results between them, on ties, beyond the largest and below the smallest."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    one = torch.from_numpy(numerics.pack(np.ones((1, 1), np.int8)))
    for scale in (1.0, 3.0, 0.5, 2.0**-20, 2.0**20, 1 + 2.0**-11, 1 + 2.0**-8, 1 - 2.0**-12):
        s = torch.tensor([scale])
        found = on_isa(linear_weight_only, x[:, None], one, s)[:, 0]
        wanted = (x.float() * s).to(dtype)
        assert torch.equal(found.isnan(), wanted.isnan())
        assert torch.equal(found.nan_to_num(0, torch.inf, -torch.inf), wanted.nan_to_num(0, torch.inf, -torch.inf))


@pytest.mark.parametrize("k", [1, 2, 67, BLOCK, 2 * BLOCK + 5])
@pytest.mark.parametrize(("m", "n"), [(8, 5), (13, 130), (200, 20)])
def test_bfloat16_by_pairs(on_isa, m, n, k):
    """Processors with vdpbf16ps take it for several rows, where no sum of theirs can leave the normal numbers."""
    x, w, s_w, bias = operands(m, n, k)
    x = torch.from_numpy(x).bfloat16()
    x[::3, ::2] = 0
    for scale in (1.0, 2.0**-90, 2.0**90, 2.0**-125, 2.0**-131, 2.0**124):
        own = (x.float() * scale).bfloat16()
        sums = numerics.linear_weight_only(own.float().numpy(), w, np.ones_like(s_w))
        for found, wanted in (
            (run(on_isa, own, w, s_w, bias), sums * s_w + bias),
            (run(on_isa, own, w, np.ones_like(s_w)), sums),
        ):
            same(found.float().numpy(), torch.from_numpy(wanted).bfloat16().float().numpy())


@pytest.mark.parametrize("leading", [(), (5,), (2, 3), (2, 0, 3)])
def test_leading_dimensions_strides_and_opcheck(on_isa, leading):
    _, w, s_w, bias = operands(0, 20, 13)
    wide = torch.randn(*leading, 26)
    for x in (wide[..., :13], wide[..., ::2], wide.bfloat16()[..., 13:]):
        expected = torch.from_numpy(numerics.linear_weight_only(x.float().numpy(), w, s_w, bias)).to(x.dtype)
        assert torch.equal(run(on_isa, x, w, s_w, bias), expected)
    arguments = (wide[..., :13], torch.from_numpy(numerics.pack(w)), torch.from_numpy(s_w), torch.from_numpy(bias))
    torch.library.opcheck(linear_weight_only, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_stays_in_its_row(on_isa, dtype):
    x, w, s_w, bias = operands(9, 20, 13)
    x = torch.from_numpy(x).to(dtype).float().numpy()
    w[3, 4] = 0
    x[1, 4], x[2, 5], x[7, 0] = np.nan, np.inf, -np.inf
    found = run(on_isa, torch.from_numpy(x).to(dtype), w, s_w, bias).float().numpy()
    expected = torch.from_numpy(numerics.linear_weight_only(x, w, s_w, bias)).to(dtype)
    same(found, expected.float().numpy())
    assert np.isfinite(found[[0, 3, 4, 5, 6, 8]]).all()
    assert np.isnan(found[1]).all()


def test_threads_return_the_same_bits():
    x, w, s_w, bias = operands(300, 200, 70)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows in (1, 5, 300):
                found = run(lambda op, *args: op(*args), x[:rows], w, s_w, bias)
                same(found.numpy(), numerics.linear_weight_only(x[:rows], w, s_w, bias))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("k", [64, 4096])
def test_as_close_as_float(k):
    """To the product in float64, within a few units in the last place of the greatest terms."""
    x, w, s_w, bias = operands(20, 64, k)
    exact = (x.astype(np.float64) @ w.T.astype(np.float64)) * s_w + bias
    magnitude = (np.abs(x).astype(np.float64) @ np.abs(w.T).astype(np.float64)) * s_w
    found = run(lambda op, *args: op(*args), x, w, s_w, bias).numpy()
    assert (np.abs(found - exact) <= 2.0**-22 * magnitude).all()
    dequantized = torch.from_numpy(w.astype(np.float32) * s_w[:, None])
    reference = F.linear(torch.from_numpy(x), dequantized, torch.from_numpy(bias)).numpy()
    assert (np.abs(found - reference) <= 2.0**-21 * magnitude).all()


def test_no_float_weight_is_made():
    """A defect of TinyQ: a float copy of the weight at every call. Here torch allocates the result and no more."""
    if not kernels.info().available:
        pytest.skip("the portable op is plain torch code")
    x, w, s_w, _ = operands(1, 1024, 1024)
    arguments = torch.from_numpy(x), torch.from_numpy(numerics.pack(w)), torch.from_numpy(s_w)
    linear_weight_only(*arguments)
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_weight_only(*arguments)
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated <= 2 * 1024 * 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a | {"x": a["x"].double()}, "x has"),
        (lambda a: a | {"x": a["x"].int()}, "x has"),
        (lambda a: a | {"weight": a["weight"][:-1]}, "packed"),
        (lambda a: a | {"scale": a["scale"].bfloat16()}, "scale has"),
        (lambda a: a | {"bias": a["bias"][:2]}, "bias"),
        (lambda a: a | {"bias": a["bias"].bfloat16()}, "bias has"),
    ],
)
def test_operands_that_do_not_belong_together(on_isa, change, message):
    x, w, s_w, bias = operands(3, 20, 13)
    values = {"x": x, "weight": numerics.pack(w), "scale": s_w, "bias": bias}
    with pytest.raises((TypeError, ValueError, RuntimeError), match=message):
        on_isa(linear_weight_only, *change({name: torch.from_numpy(a) for name, a in values.items()}).values())
