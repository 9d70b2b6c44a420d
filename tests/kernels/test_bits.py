"""Every kernel against NumPy, bit for bit: awkward sizes, strides, extremes, each instruction set, 1 and 2 threads."""

import itertools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import kernels, numerics
from fxq.numerics import ACTIVATIONS, pack
from fxq.ops import FAMILIES, activation

assert FAMILIES
assert activation.qlinear_act  # these imports register the ops that are tested here
OPS = torch.ops.fxq
EXTREMES = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 0.5, -0.5, 1.5, 2.5, 3e38, -3e38, 1e-45], np.float32)


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def same(result, expected):
    """Equal dtype, shape and bits; a NaN equals any NaN, as its payload is nobody's business."""
    assert result.is_contiguous()
    found = result.numpy()
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    if found.dtype == np.float32:
        nan = np.isnan(found)
        assert np.array_equal(nan, np.isnan(expected))
        found, expected = (np.where(nan, 0, v.view(np.int32)) for v in (found, expected))
    assert np.array_equal(found, expected)


def layer(rng, m, n, k, extreme=False):
    """Operands of a linear whose results spread over uint8; extreme: products that saturate vpmaddubsw everywhere."""
    x = rng.integers(0, 256, (m, k), np.uint8)
    w = rng.integers(-128, 128, (n, k), np.int8)
    if extreme:
        x[...] = 255
        w[...] = rng.choice(np.array([-128, 127], np.int8), (n, 1))
    bias = rng.integers(-3000, 3000, n, np.int32)
    multiplier = (rng.uniform(0.2, 2, n) / (30 * np.sqrt(k + 1))).astype(np.float32)
    return x, w, bias, multiplier


def tensors(x, w, bias, multiplier):
    return torch.from_numpy(x), torch.from_numpy(pack(w)), torch.from_numpy(bias), torch.from_numpy(multiplier)


def check_layer(on_isa, rng, m, n, k, extreme=False, activation="gelu"):
    operands = layer(rng, m, n, k, extreme)
    inputs = tensors(*operands)
    residual = rng.normal(0, 3, (m, n)).astype(np.float32)
    same(on_isa(OPS.qlinear.default, *inputs, 7, 7, 250), numerics.qlinear(*operands, 7, 7, 250))
    same(on_isa(OPS.qlinear_float.default, *inputs), numerics.qlinear_float(*operands))
    for addend in (residual, residual[0]) if m else ():
        expected = numerics.qlinear_float(*operands, addend)
        same(on_isa(OPS.qlinear_float.default, *inputs, torch.from_numpy(addend)), expected)
    expected = numerics.qlinear_act(*operands, activation, residual)
    same(on_isa(OPS.qlinear_act.default, *inputs, activation, torch.from_numpy(residual)), expected)
    expected = numerics.qlinear_act_quantize(*operands, activation, 0.02, 9)
    same(on_isa(OPS.qlinear_act_quantize.default, *inputs, activation, 0.02, 9), expected)


@pytest.mark.parametrize("k", [0, 1, 3, 4, 5, 67])
def test_every_awkward_size(on_isa, k):
    rng = np.random.default_rng(k)
    activations = itertools.cycle(ACTIVATIONS)
    sizes = itertools.product([0, 1, 2, 3, 5, 6, 7, 13], [0, 1, 15, 16, 17, 47, 64, 65, 130])
    for i, (m, n) in enumerate(sizes):
        check_layer(on_isa, rng, m, n, k, extreme=i % 3 == 0, activation=next(activations))


@pytest.mark.parametrize("k", [4, 67, 516])
def test_three_panels_at_a_time(on_isa, k):
    """As tall tiles go through them, where an instruction set has those: of more rows than other tiles, of whole k."""
    rng = np.random.default_rng(k)
    activations = itertools.cycle(ACTIVATIONS)
    sizes = itertools.product([6, 7, 8, 9, 13, 16, 17], [176, 177, 190, 192, 193, 400])
    for i, (m, n) in enumerate(sizes):
        check_layer(on_isa, rng, m, n, k, extreme=i % 5 == 0, activation=next(activations))


@pytest.mark.parametrize(
    ("m", "n", "k"), [(97, 131, 127), (211, 17, 257), (1, 259, 4099), (103, 640, 19), (103, 640, 20), (6, 64, 2052)]
)
def test_sizes_worth_several_threads(on_isa, threads, m, n, k):
    check_layer(on_isa, np.random.default_rng(m), m, n, k, extreme=m == 103)


@given(
    m=st.integers(0, 40), n=st.integers(0, 150), k=st.integers(0, 80), seed=st.integers(0, 2**32), extreme=st.booleans()
)
def test_any_size(m, n, k, seed, extreme):
    """On the instruction set in use; the two above go through all of them."""
    check_layer(lambda op, *args: op(*args), np.random.default_rng(seed), m, n, k, extreme)


def test_the_longest_dot_product(on_isa):
    """255 * 127 * 66311 is the largest accumulator that fits int32, and rounds when it becomes a float."""
    k = 66311
    operands = (np.full((2, k), 255, np.uint8), np.full((3, k), 127, np.int8), np.zeros(3, np.int32))
    operands[1][1] = -127
    operands[1][2, ::2] = -127
    multiplier = np.full(3, 1e-7, np.float32)
    expected = numerics.qlinear_float(*operands, multiplier)
    same(on_isa(OPS.qlinear_float.default, *tensors(*operands, multiplier)), expected)


def test_strides_and_offsets(on_isa):
    rng = np.random.default_rng(0)
    _, w, bias, multiplier = layer(rng, 0, 33, 21)
    whole = torch.from_numpy(rng.integers(0, 256, (4, 7, 50), np.uint8))
    views = [
        whole[:, :, 3:24],  # rows at a distance
        whole[1:, 2:5, 29:],  # and planes at a distance that no one stride spans
        whole[:, 1, :21],
        whole[2, 3, 5:26],  # one row, and one dimension only
        whole.transpose(0, 1)[:, :, :21],
        whole[:, :, ::2][..., :21],
        whole[:, :1, :21].expand(4, 7, 21),
        whole[:0, :, :21],
        whole.permute(2, 0, 1)[:21].permute(1, 2, 0),
    ]
    for x in views:
        expected = numerics.qlinear(x.numpy(), w, bias, multiplier, 3, 0, 255)
        same(on_isa(OPS.qlinear.default, x, *tensors(x.numpy(), w, bias, multiplier)[1:], 3, 0, 255), expected)
        same(on_isa(OPS.dequantize.default, x, 0.37, 9), numerics.dequantize(x.numpy(), 0.37, 9))
        same(on_isa(OPS.requantize.default, x, 9, 0.77, 3, 3, 200), numerics.requantize(x.numpy(), 9, 0.77, 3, 3, 200))
        same(on_isa(OPS.quantize.default, x.float(), 1.7, 30), numerics.quantize(x.float().numpy(), 1.7, 30))
        for other in (views[0], whole[:, :, 7:28], whole[0, 0, :21], whole[:, :1, :1]):
            if x.shape[:1] == other.shape[:1] or other.dim() == 1:
                expected = (
                    numerics.qadd(x.numpy(), other.numpy(), 0.3, 4, 0.5, 6, 7, 0, 255) if _fits(x, other) else None
                )
                if expected is not None:
                    same(on_isa(OPS.qadd.default, x, other, 0.3, 4, 0.5, 6, 7, 0, 255), expected)


def _fits(a, b):
    try:
        torch.broadcast_shapes(a.shape, b.shape)
    except RuntimeError:
        return False
    return True


def test_weights_and_addends_that_are_not_contiguous(on_isa):
    operands = layer(np.random.default_rng(0), 5, 20, 9)
    x, weight, bias, multiplier = tensors(*operands)
    weight, bias, multiplier = (torch.stack([t, t], 1)[:, 1] for t in (weight, bias, multiplier))
    addend = torch.randn(20, 5).t()
    expected = numerics.qlinear_float(*operands, addend.numpy())
    same(on_isa(OPS.qlinear_float.default, x, weight, bias, multiplier, addend), expected)


@pytest.mark.parametrize("size", [0, 1, 3, 15, 16, 17, 63, 1000, 200_003])
def test_elementwise_sizes(on_isa, threads, size):
    rng = np.random.default_rng(size)
    x = rng.normal(0, 40, size).astype(np.float32)
    x[: len(EXTREMES)] = EXTREMES[:size]
    a, b = rng.integers(0, 256, (2, size), np.uint8)
    same(on_isa(OPS.quantize.default, torch.from_numpy(x), 0.37, 77), numerics.quantize(x, 0.37, 77))
    same(on_isa(OPS.dequantize.default, torch.from_numpy(a), 0.37, 77), numerics.dequantize(a, 0.37, 77))
    expected = numerics.requantize(a, 3, 0.77, 9, 9, 200)
    same(on_isa(OPS.requantize.default, torch.from_numpy(a), 3, 0.77, 9, 9, 200), expected)
    expected = numerics.qadd(a, b, 0.3, 4, 0.5, 6, 7, 0, 255)
    same(on_isa(OPS.qadd.default, torch.from_numpy(a), torch.from_numpy(b), 0.3, 4, 0.5, 6, 7, 0, 255), expected)


@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
@pytest.mark.parametrize("scale", [2.0**-60, 0.003, 1.0, 7.7, 1e30])
def test_quantize_of_ties_and_extremes(on_isa, scale, zero_point):
    ties = (np.arange(-1200, 1200) * np.float32(0.25) * np.float32(scale)).astype(np.float32)
    x = np.concatenate([EXTREMES, ties, np.nextafter(ties, np.float32(0)), -EXTREMES])
    same(on_isa(OPS.quantize.default, torch.from_numpy(x), scale, zero_point), numerics.quantize(x, scale, zero_point))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_of_any_float(on_isa, activation):
    """A product of zeros leaves the addend alone, so the epilogue meets a sample of all float32 bit patterns."""
    patterns = np.arange(0, 2**32, 65_521, np.int64).astype(np.uint32).view(np.float32)
    patterns = np.where(np.isnan(patterns), np.float32(np.nan), patterns)  # NumPy warns of signalling ones
    addend = np.concatenate([EXTREMES, patterns, np.linspace(-12, 12, 4001, dtype=np.float32)])
    rows = len(addend) // 16
    addend = addend[: rows * 16].reshape(rows, 16)
    operands = np.zeros((rows, 1), np.uint8), np.ones((16, 1), np.int8), np.zeros(16, np.int32), np.ones(16, np.float32)
    expected = numerics.qlinear_act(*operands, activation, addend)
    same(on_isa(OPS.qlinear_act.default, *tensors(*operands), activation, torch.from_numpy(addend)), expected)


def test_many_python_threads_at_once():
    """No scratch memory is shared: eight threads with different inputs all get their own answers."""
    rng = np.random.default_rng(0)
    cases = [layer(rng, 3 + i, 37, 50 + i) for i in range(8)]
    expected = [numerics.qlinear_act(*case, "gelu") for case in cases]
    wrong = []

    def work(i):
        inputs = tensors(*cases[i])
        for _ in range(200):
            if not np.array_equal(OPS.qlinear_act(*inputs, "gelu").numpy(), expected[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_python_runs_on_while_a_kernel_does():
    """The interpreter lock is released: this thread counts while another waits for a tenth of a second of work."""
    if not kernels.info().available:
        pytest.skip("the portable kernels are torch's own")
    inputs = tensors(*layer(np.random.default_rng(0), 600, 1024, 2048))
    running, done, ticks = threading.Event(), threading.Event(), 0

    def work():
        running.set()
        OPS.qlinear(*inputs, 0, 0, 255)
        done.set()

    with kernels.use_isa("generic"):
        worker = threading.Thread(target=work)
        worker.start()
        running.wait()
        while not done.is_set():
            ticks += 1
        worker.join()
    assert ticks > 1000


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x has"),
        ({"x": torch.zeros(2, 9, dtype=torch.uint8)}, "K = 9"),
        ({"x": torch.zeros((), dtype=torch.uint8)}, "scalar"),
        ({"weight": torch.zeros(9, dtype=torch.int8)}, "expected [131]"),
        ({"weight": torch.zeros(128)}, "weight has"),
        ({"bias": torch.zeros(3)}, "bias has"),
        ({"multiplier": torch.ones(2)}, "multiplier[2]"),
        ({"addend": torch.zeros(4)}, "addend[4]"),
        ({"addend": torch.zeros(3, dtype=torch.float64)}, "addend has"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(change, message):
    if not kernels.info().available:
        pytest.skip("the portable kernels have messages of their own")
    x, weight, bias, multiplier = tensors(*layer(np.random.default_rng(0), 2, 3, 5))
    operands = {"x": x, "weight": weight, "bias": bias, "multiplier": multiplier, **change}
    with pytest.raises(RuntimeError) as caught:
        OPS.qlinear_float(**operands)
    assert f"fxq::qlinear_float: {message}" in str(caught.value) or message in str(caught.value)


def test_an_unknown_activation_and_shapes_that_do_not_broadcast():
    if not kernels.info().available:
        pytest.skip("the portable kernels have messages of their own")
    with pytest.raises(RuntimeError, match="activation 'swish', expected one of"):
        OPS.qlinear_act(*tensors(*layer(np.random.default_rng(0), 2, 3, 5)), "swish")
    a, b = torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match=r"a\[2, 3\] and b\[2\] do not broadcast"):
        OPS.qadd(a, b, 1.0, 0, 1.0, 0, 0, 0, 255)
