"""Convolutions: NumPy against sums over Python integers, the ops against NumPy bit for bit."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.layout import channels_last
from fxq.numerics import Conv, ConvTranspose, Window
from fxq.ops.conv import qconv, qconv_act_quantize, qconv_add, qconv_float
from fxq.ops.conv_transpose import qconv_transpose, qconv_transpose_float
from fxq.qdq import quantize_channels_last


def is_channels_last(y):
    return y.movedim(1, -1).is_contiguous()


def operands(rng, batch, sizes, channels, n, kernel, groups=1, extreme=False):
    """x, the unpacked weight, bias and multiplier; the results spread over uint8."""
    shape = (batch, channels, *sizes), (n, channels // groups, *kernel)
    if extreme:
        x, w = rng.choice([0, 255], shape[0]), rng.choice([-127, 127], shape[1])
    else:
        x, w = rng.integers(0, 256, shape[0]), rng.integers(-127, 128, shape[1])
    k = math.prod(shape[1][1:])
    bias = rng.integers(-3000, 3000, n).astype(np.int32)
    multiplier = (rng.uniform(0.2, 2, n) / (90 * np.sqrt(k))).astype(np.float32)
    return x.astype(np.uint8), w.astype(np.int8), bias, multiplier


def brute(x, w, stride, padding, dilation, groups, z_x):
    """The sum of the definition, over Python integers."""
    sizes = numerics.conv_sizes(x.shape[2:], w.shape[2:], stride, padding, dilation)
    y = np.zeros((len(x), len(w), *sizes), np.int64)
    per_group = len(w) // groups
    for b, n, *o in itertools.product(*map(range, y.shape)):
        total = 0
        for c, *t in itertools.product(*map(range, w.shape[1:])):
            i = [oo * s - p + tt * d for oo, s, p, tt, d in zip(o, stride, padding[::2], t, dilation, strict=True)]
            inside = all(0 <= ii < size for ii, size in zip(i, x.shape[2:], strict=True))
            q = int(x[(b, n // per_group * w.shape[1] + c, *i)]) if inside else z_x
            total += q * int(w[(n, c, *t)])
        y[(b, n, *o)] = total
    return y


BRUTE = [
    # sizes, channels, n, kernel, stride, padding, dilation, groups
    ((5,), 2, 3, (3,), (2,), (1, 0), (1,), 1),
    ((5, 4), 4, 6, (3, 2), (1, 2), (1, 2, 0, 3), (2, 1), 2),
    ((4, 3), 3, 3, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 3),
    ((3, 3, 4), 2, 2, (2, 1, 3), (1, 2, 1), (0, 1, 0, 0, 1, 1), (1, 1, 2), 1),
    ((6, 6), 1, 2, (2, 2), (1, 1), (-1, 1, 2, -2), (1, 1), 1),
]


@pytest.mark.parametrize("case", BRUTE)
def test_the_definition(case):
    sizes, channels, n, kernel, stride, padding, dilation, groups = case
    x, w, *_ = operands(np.random.default_rng(0), 2, sizes, channels, n, kernel, groups)
    found = numerics.accumulate_conv(x, w, stride, padding, dilation, groups, 7)
    assert np.array_equal(found, brute(x, w, stride, padding, dilation, groups, 7))


TRANSPOSED = [
    # sizes, channels, n, kernel, stride, padding, output_padding, dilation, groups
    ((5,), 2, 3, (4,), (2,), (1, 1), (0,), (1,), 1),
    ((3, 4), 4, 6, (3, 2), (2, 2), (1, 1, 0, 0), (1, 1), (1, 1), 2),
    ((3, 2), 3, 2, (2, 2), (2, 2), (0, 0, 0, 0), (0, 0), (1, 1), 1),
    ((3, 3), 3, 3, (3, 3), (2, 3), (1, 0, 0, 1), (0, 1), (2, 1), 3),
    ((4,), 5, 2, (2,), (3,), (0, 0), (2,), (3,), 1),
    ((4, 3), 5, 17, (4, 4), (1, 2), (2, 2, 1, 1), (0, 0), (1, 2), 1),
    ((2, 3, 2), 2, 2, (3, 1, 2), (2, 1, 2), (1, 1, 0, 0, 0, 0), (1, 0, 0), (1, 1, 1), 1),
    ((24, 25), 64, 48, (6, 6), (2, 2), (3, 2, 2, 3), (0, 0), (1, 1), 1),  # four convolutions by tiles
]


def transposed_in_torch(x, w, z_x, stride, padding, output_padding, dilation, groups):
    """conv_transpose of (q_x - z_x) in float64: exact, from another hand."""
    rank = len(stride)
    own = torch.from_numpy(w).reshape(groups, len(w) // groups, -1, *w.shape[2:]).transpose(1, 2).flatten(0, 1)
    function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    y = function(torch.from_numpy(x.astype(np.float64) - z_x), own.double(), None, stride, 0, 0, groups, dilation)
    widths = [e for i in reversed(range(rank)) for e in (-padding[2 * i], output_padding[i] - padding[2 * i + 1])]
    return F.pad(y, widths).numpy()


@pytest.mark.parametrize("case", TRANSPOSED)
def test_a_transposed_convolution_sums_what_it_should(case):
    sizes, channels, n, kernel, stride, padding, output_padding, dilation, groups = case
    x, w, *_ = operands(np.random.default_rng(0), 2, sizes, channels, n, kernel, groups)
    ones = np.ones(n, np.float32)
    b = np.arange(n).astype(np.float32)
    bias = numerics.fold_transposed_bias(b, w, 1.0, 7, ones, stride, padding, dilation)
    conv = ConvTranspose(stride, padding, output_padding, dilation, groups, 7)
    found = numerics.qconv_transpose_float(x, w, bias.astype(np.int32), ones, conv)
    expected = transposed_in_torch(x, w, 7, stride, padding, output_padding, dilation, groups)
    assert np.array_equal(found, (expected + b.reshape(-1, *[1] * len(sizes))).astype(np.float32))


SHAPES = [
    # batch, sizes, channels, n, kernel, stride, padding, dilation, groups
    (1, (1,), 1, 1, (1,), (1,), (0, 0), (1,), 1),
    (2, (9,), 3, 5, (3,), (2,), (1, 2), (1,), 1),
    (1, (40,), 4, 130, (9,), (4,), (4, 4), (2,), 1),
    (0, (5, 5), 3, 4, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (2, (5, 5), 64, 64, (1, 1), (1, 1), (0, 0, 0, 0), (1, 1), 1),
    (1, (6, 7), 20, 33, (1, 1), (2, 2), (0, 0, 0, 0), (1, 1), 1),
    (2, (7, 8), 3, 16, (7, 7), (2, 2), (3, 3, 3, 3), (1, 1), 1),
    (1, (9, 9), 1, 20, (5, 5), (1, 1), (2, 2, 2, 2), (1, 1), 1),
    (1, (8, 13), 16, 70, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (3, (6, 5), 8, 12, (3, 3), (1, 2), (0, 0, 0, 0), (1, 1), 1),
    (1, (9, 8), 5, 12, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 1),
    (1, (9, 8), 5, 12, (3, 2), (2, 1), (0, 0, 0, 0), (2, 1), 1),
    (1, (8, 8), 12, 12, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 4),
    (2, (6, 9), 36, 36, (3, 3), (1, 2), (1, 1, 1, 1), (1, 1), 9),
    (1, (6, 7), 72, 72, (3, 2), (1, 1), (0, 0, 0, 0), (2, 1), 9),
    (1, (30,), 16, 16, (3,), (1,), (1, 1), (1,), 4),
    (1, (5, 6), 6, 40, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 2),
    (2, (5, 6), 6, 12, (2, 3), (1, 1), (0, 1, 1, 1), (1, 1), 6),
    (2, (9, 9), 19, 19, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 19),
    (1, (9, 30), 80, 80, (5, 5), (2, 2), (2, 2, 2, 2), (1, 1), 80),
    (1, (7, 9), 33, 33, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 33),
    (1, (40,), 16, 16, (7,), (1,), (3, 3), (1,), 16),
    (1, (5, 7), 72, 72, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 72),
    (1, (6, 9), 116, 116, (2, 3), (2, 1), (0, 0, 0, 0), (1, 2), 116),
    (2, (3, 4, 5), 48, 48, (2, 2, 1), (1, 2, 1), (1, 0, 0, 0, 0, 0), (1, 1, 1), 48),
    (1, (3, 5, 6), 3, 8, (3, 3, 3), (1, 2, 1), (1, 1, 1, 1, 1, 1), (1, 1, 1), 1),
    (1, (4, 5, 6), 8, 8, (3, 3, 3), (1, 1, 1), (1, 1, 1, 1, 1, 1), (1, 1, 1), 8),
    (1, (6, 6), 4, 6, (2, 2), (1, 1), (-1, 1, 2, -2), (1, 1), 1),
    (1, (2, 2), 4, 6, (3, 3), (1, 1), (4, 4, 4, 4), (1, 1), 1),
    (1, (2, 4), 8, 400, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
]


TILES = [
    # by tiles of 4 x 4 outputs, or for one reason not
    (1, (27, 27), 68, 70, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    (2, (24, 25), 64, 33, (3, 3), (1, 1), (0, 1, 1, 0), (1, 1), 1),
    (1, (1, 22, 26), 132, 36, (1, 3, 3), (1, 1, 1), (0, 0, 2, 1, 2, 2), (1, 1, 1), 1),
    (1, (2, 24, 28), 64, 64, (1, 3, 3), (1, 1, 1), (0, 0, 1, 1, 1, 1), (1, 1, 1), 1),
    (1, (32, 31), 68, 64, (3, 3), (2, 1), (1, 1, 1, 1), (1, 1), 1),
    (1, (28, 30), 68, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 2), 1),
    (1, (24, 27), 128, 128, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 2),
    (1, (24, 27), 66, 64, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1),
]


def tensors(x, w, bias, multiplier, dilation, groups):
    packed = numerics.pack_conv(w, dilation, groups)
    return [torch.from_numpy(a) for a in (x, packed, bias, multiplier)]


def same(found, expected):
    assert is_channels_last(found)
    assert (found.numpy().dtype, found.shape) == (expected.dtype, expected.shape)
    assert np.array_equal(found.numpy(), expected)


def check(run, rng, case, z_x=9, extreme=False):
    batch, sizes, channels, n, kernel, stride, padding, dilation, groups = case
    arrays = operands(rng, batch, sizes, channels, n, kernel, groups, extreme)
    x, *rest = tensors(*arrays, dilation, groups)
    conv = Conv(stride, padding, dilation, groups, z_x)
    geometry = (str(Window(kernel, stride, padding, dilation, groups)), z_x)
    expected = numerics.qconv(*arrays, conv, 100, 20, 240)
    same(run(qconv, channels_last(x), *rest, *geometry, 100, 20, 240), expected)
    expected_float = numerics.qconv_float(*arrays, conv)
    same(run(qconv_float, channels_last(x), *rest, *geometry, None), expected_float)
    added = rng.integers(0, 256, expected.shape).astype(np.uint8)
    wanted = numerics.qconv_add(*arrays, conv, added, 0.4, 3, 100, 100, 255)
    same(run(qconv_add, x, *rest, *geometry, torch.from_numpy(added), 0.4, 3, 100, 100, 255), wanted)
    addend = rng.normal(size=expected.shape).astype(np.float32)
    for own in (addend, addend[0, :, *[0] * len(sizes)]) if addend.size else ():
        wanted = numerics.qconv_float(*arrays, conv, own)
        same(run(qconv_float, x, *rest, *geometry, torch.from_numpy(np.ascontiguousarray(own))), wanted)
    for activation in ("silu", "hardswish"):
        wanted = numerics.qconv_act_quantize(*arrays, conv, activation, 0.03, 9)
        same(run(qconv_act_quantize, x, *rest, *geometry, activation, 0.03, 9), wanted)


@pytest.mark.parametrize("case", SHAPES)
def test_shapes(on_isa, case):
    check(on_isa, np.random.default_rng(0), case)


@pytest.mark.parametrize("case", TILES)
def test_tiles(on_isa, case):
    check(on_isa, np.random.default_rng(0), case)


@pytest.mark.parametrize("case", TILES[:3])
def test_extremes_by_tiles(on_isa, case):
    check(on_isa, np.random.default_rng(0), case, 255, extreme=True)


@pytest.mark.parametrize("sign", [-1, 1])
def test_sums_that_tiles_cannot_hold(on_isa, sign):
    x, w = np.full((1, 128, 24, 24), 255, np.uint8), np.full((64, 128, 3, 3), 127 * sign, np.int8)
    w[:32, 115:] = 0  # those of half the channels fit
    bias, multiplier = np.zeros(64, np.int32), np.ones(64, np.float32)
    conv = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 9)
    expected = numerics.qconv_float(x, w, bias, multiplier, conv)
    assert np.abs(expected).max() > 2**25
    x, *rest = tensors(x, w, bias, multiplier, (1, 1), 1)
    found = on_isa(qconv_float, channels_last(x), *rest, str(Window((3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)), 9, None)
    assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("case", SHAPES[6:20:4])
def test_extremes(on_isa, case):
    check(on_isa, np.random.default_rng(0), case, 255, extreme=True)


@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 20), st.integers(1, 3),
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(0, 2),
    st.sampled_from([1, 1, 2, 3]), st.integers(0, 255), st.booleans(),
)  # fmt: skip
def test_any_convolution(b, h, w, c, n, kh, kw, s, d, before, after, groups, z_x, depthwise):
    c, n = c * groups, n * groups
    if depthwise:
        groups = n = c
    if h + before + after < d * (kh - 1) + 1 or w + before + after < d * (kw - 1) + 1:
        return
    case = b, (h, w), c, n, (kh, kw), (s, 3 - min(s, 2)), (before, after, after, before), (d, d), groups
    check(lambda op, *args: op(*args), np.random.default_rng(0), case, z_x)


@pytest.mark.parametrize("case", TRANSPOSED)
def test_transposed_shapes(on_isa, case):
    sizes, channels, n, kernel, stride, padding, output_padding, dilation, groups = case
    rng = np.random.default_rng(0)
    x, w, _, multiplier = operands(rng, 2, sizes, channels, n, kernel, groups)
    bias = rng.integers(-3000, 3000, (math.prod(stride), n)).astype(np.int32)
    packed = numerics.pack_transposed(w, stride, padding, dilation, groups)
    conv = ConvTranspose(stride, padding, output_padding, dilation, groups, 9)
    rest = [torch.from_numpy(a) for a in (packed, bias, multiplier)]
    geometry = (str(Window(kernel, stride, padding, dilation, groups, output_padding)), 9)
    for own in (torch.from_numpy(x), channels_last(torch.from_numpy(x))):
        expected = numerics.qconv_transpose(x, w, bias, multiplier, conv, 100, 20, 240)
        same(on_isa(qconv_transpose, own, *rest, *geometry, 100, 20, 240), expected)
    expected = numerics.qconv_transpose_float(x, w, bias, multiplier, conv)
    same(on_isa(qconv_transpose_float, torch.from_numpy(x), *rest, *geometry, None), expected)
    for addend in (rng.normal(size=n), rng.normal(size=expected.shape)):
        own = addend.astype(np.float32)
        wanted = numerics.qconv_transpose_float(x, w, bias, multiplier, conv, own)
        same(on_isa(qconv_transpose_float, torch.from_numpy(x), *rest, *geometry, torch.from_numpy(own)), wanted)


@given(
    st.integers(1, 70), st.integers(1, 9), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 2),
    st.sampled_from([1, 2, 4]), st.booleans(),
)  # fmt: skip
def test_packing_and_back(n, c, kernel, d, groups, depthwise):
    n, c = n * groups, 1 if depthwise else c
    groups = n if depthwise else groups
    dilation = [1] * (len(kernel) - 1) + [d]
    w = np.random.default_rng(n).integers(-127, 128, (n, c, *kernel)).astype(np.int8)
    packed = numerics.pack_conv(w, dilation, groups)
    assert packed.shape == (numerics.packed_conv_size(n, c, kernel, dilation, groups),)
    assert np.array_equal(numerics.unpack_conv(packed, n, c, kernel, dilation, groups), w)
    assert packed.ctypes.data % 64 == 0


@pytest.mark.parametrize("case", TRANSPOSED)
def test_packing_of_transposed_weights_and_back(case):
    _, channels, n, kernel, stride, padding, _, dilation, groups = case
    w = np.random.default_rng(n).integers(-127, 128, (n, channels // groups, *kernel)).astype(np.int8)
    packed = numerics.pack_transposed(w, stride, padding, dilation, groups)
    geometry = (n, channels // groups, kernel, stride, padding, dilation, groups)
    assert packed.shape == (numerics.packed_transposed_size(*geometry),)
    assert np.array_equal(numerics.unpack_transposed(packed, *geometry), w)
    assert packed.ctypes.data % 64 == 0


@given(st.integers(1, 3).flatmap(lambda rank: st.tuples(
    *[st.tuples(*[st.integers(low, 3)] * (rank * many)) for low, many in ((1, 1), (1, 1), (-2, 2), (1, 1), (0, 1))]
)), st.integers(1, 20))  # fmt: skip
def test_a_window_is_what_its_text_says(entries, groups):
    *window, output_padding = entries
    own = Window(*window, groups, output_padding)
    assert Window.parse(str(own)) == own


def test_the_text_of_a_window():
    assert str(Window((3, 3), (1, 1), (0,) * 4, (1, 1))) == "3x3"
    assert str(Window((5,), (2,), (2, 1), (3,), 8, (1,))) == "5 stride 2 pad 2,1 output pad 1 dilation 3 groups 8"
    assert str(Window((3, 7), (2, 2), (1, 1, 3, 3), (1, 2), 4)) == "3x7 stride 2 pad 1,1,3,3 dilation 1x2 groups 4"


def test_first_layers_waste_little():
    """A row of 7 pixels of 3 channels takes 24 bytes, where 7 padded pixels would take 28."""
    assert numerics.packed_conv_size(64, 3, [7, 7], [1, 1], 1) == 64 * 7 * 24 + 3


def test_memory_in_any_order(on_isa):
    rng = np.random.default_rng(0)
    _, w, bias, multiplier = operands(rng, 1, (1, 1), 5, 7, (3, 3))
    packed, b, m = (torch.from_numpy(a) for a in (numerics.pack_conv(w, (1, 1), 1), bias, multiplier))
    whole = torch.from_numpy(rng.integers(0, 256, (2, 6, 7, 20), np.uint8))
    conv = Conv((1, 1), (1, 1, 1, 1), (1, 1), 1, 9)
    geometry = ("3x3 pad 1", 9)
    views = [
        whole.permute(0, 3, 1, 2)[:, :5],  # channels-last rows at a distance
        whole.permute(0, 3, 1, 2)[:, 15:, 1:],
        whole[:, :5, :, ::2],
        whole.permute(0, 3, 1, 2)[:, :5, ::2],
        whole[:1].expand(3, 6, 7, 20)[:, 1:],
        whole.permute(0, 3, 1, 2)[:, :1].expand(2, 5, 6, 7),
    ]
    for x in views:
        expected = numerics.qconv(x.numpy(), w, bias, multiplier, conv, 100, 0, 255)
        same(on_isa(qconv, x, packed, b, m, *geometry, 100, 0, 255), expected)


@pytest.mark.parametrize("shape", [(2, 3, 5), (0, 3, 4), (1, 1, 6, 7), (2, 33, 6, 7), (1, 70, 9, 5), (2, 3, 2, 3, 4)])
def test_quantize_channels_last(on_isa, shape):
    x = torch.randn(shape) * 60
    for own in (x, channels_last(x), x.transpose(1, 2)):
        same(on_isa(quantize_channels_last, own, 0.5, 9), numerics.quantize(own.numpy(), 0.5, 9))


def test_threads_return_the_same_bits():
    threads = torch.get_num_threads()
    cases = [(2, (30, 30), 24, 70, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1), TILES[0]]
    cases += [(1, (40, 40), 80, 80, (3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 80)]
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for case in cases:
                check(lambda op, *args: op(*args), np.random.default_rng(0), case)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 4, 5)}, "x"),
        ({0: torch.zeros(1, 4, 5, 5)}, r"uint8|Byte"),
        ({0: torch.zeros(1, 9, 5, 5, dtype=torch.uint8)}, "packed"),
        ({1: torch.zeros(5, dtype=torch.int8)}, "packed"),
        ({3: torch.zeros(5)}, "multiplier"),
        ({4: "3x3 groups 3"}, "groups"),
        ({4: "3 pad 1"}, "x"),
        ({4: "3x3x3x3"}, "window|x"),
        ({4: "3x3 pad 1,1,1"}, "window"),
        ({4: "3x3 stride 0"}, "window"),
        ({4: "3x3 groups 1x1"}, "window"),
        ({4: "3x0"}, "window"),
        ({4: "3x3 dilation"}, "window"),
        ({4: "3x3 pad 1 stride 2"}, "window"),
        ({4: "3x3 "}, "window"),
        ({4: ""}, "window"),
    ],
)
def test_operands_that_do_not_fit_are_refused_by_name(on_isa, change, message):
    _, w, bias, multiplier = operands(np.random.default_rng(0), 1, (5, 5), 4, 6, (3, 3))
    x = torch.zeros(1, 4, 5, 5, dtype=torch.uint8)
    args = [x, *tensors(x.numpy(), w, bias, multiplier, (1, 1), 1)[1:]]
    args += ["3x3 pad 1", 0, 0, 0, 255]
    for i, value in change.items():
        args[i] = value
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        on_isa(qconv, *args)


def test_opcheck():
    x, w, bias, multiplier = operands(np.random.default_rng(0), 2, (5, 6), 4, 6, (3, 3))
    rest = tensors(x, w, bias, multiplier, (1, 1), 1)
    geometry = ("3x3 stride 2x1 pad 1", 9)
    added = torch.zeros(2, 6, 3, 6, dtype=torch.uint8)
    torch.library.opcheck(qconv, (*rest, *geometry, 3, 0, 255))
    torch.library.opcheck(qconv_float, (*rest, *geometry))
    torch.library.opcheck(qconv_act_quantize, (*rest, *geometry, "silu", 0.1, 3))
    torch.library.opcheck(qconv_add, (*rest, *geometry, added, 0.5, 3, 3, 0, 255))
    packed = torch.from_numpy(numerics.pack_transposed(w, (2, 2), (1, 1, 1, 1), (1, 1), 1))
    operands_ = (rest[0], packed, rest[2].expand(4, 6).contiguous(), rest[3])
    geometry = ("3x3 stride 2 pad 1 output pad 1x0", 9)
    torch.library.opcheck(qconv_transpose, (*operands_, *geometry, 3, 0, 255))
    torch.library.opcheck(qconv_transpose_float, (*operands_, *geometry))
    torch.library.opcheck(quantize_channels_last, (torch.randn(2, 3, 4, 5), 0.5, 9))
