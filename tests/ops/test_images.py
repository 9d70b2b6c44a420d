"""qimages: the bits of its operations one by one, on every instruction set; what is damaged is refused."""

import contextlib
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fxq import kernels, numerics
from fxq.ops import images
from fxq.ops.images import Word, encode, qimages


def conv(n, k, groups=1):
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8).numpy()
    packed = torch.from_numpy(numerics.pack(weight))
    return packed, torch.randint(-900, 900, (n,), dtype=torch.int32), torch.rand(n) * 2e-3


def network():
    """Every kind of argument that there is, values read late and twice, results from the middle."""
    constants = []

    def held(*tensors):
        constants.extend(tensors)
        return [Word(f"c{i}") for i in range(len(constants) - len(tensors), len(constants))]

    v = [Word(f"v{i}") for i in range(20)]
    steps = [
        ("quantize_channels_last", (v[0], 0.02, 128)),  # 2
        ("qconv", (v[2], *held(*conv(8, 36)), "3x3 stride 2 pad 1", 128, 3, 3, 255)),
        ("qmax_pool", (v[3], (3, 3), [1, 1], (1, 1), (1, 1), False)),
        ("qconv_add", (v[4], *held(*conv(8, 8)), "1x1", 3, v[3], 0.7, 3, 120, 0, 250)),  # 5
        ("qavg_pool", (v[5], (2, 2), (2, 2), (0, 0), True, False, None, 120, 0.9, 110, 0, 255)),
        ("qupsample_nearest", (v[6], (7, 9), (0.0, 1.5))),
        ("qupsample_bilinear", (v[6], (7, 9), (0.0, 0.0), True)),
        ("qadd", (v[7], v[8], 0.5, 110, 0.5, 110, 100, 0, 255)),  # 9
        ("qcat", ([v[9], v[9], v[7]],)),
        ("lookup", (v[10], *held(torch.randint(0, 256, (256,), dtype=torch.uint8)))),
        ("qmul", (v[9], v[1], 2e-3, 100, 7, 90, 0, 255)),  # 12
        ("qadaptive_avg_pool", (v[11], (1, 1), 100, 1.1, 100, 0, 255)),
        ("flatten", (v[13], 1, -1)),
        ("qlinear_float", (v[14], *held(*conv(5, 24)), None)),  # 15
        ("qconv_act_quantize", (v[12], *held(*conv(8, 8)), "1x1", 90, "hardswish", 0.03, 20)),
        ("flatten", (v[11], 1, 3)),
        ("dequantize", (v[3], 0.1, 3)),  # 18
    ]
    return steps, constants, [15, 16, 12, 18, 17]


def call(batch, height=11, width=14):
    steps, constants, results = network()
    x = torch.randn(batch, 4, height, width)
    other = torch.randint(0, 256, (batch, 8, 1, 1), dtype=torch.uint8)
    return [x, other], constants, encode(steps, results)


@pytest.mark.parametrize("size", [(1, 11, 14), (3, 11, 14), (0, 11, 14), (2, 40, 31)])
def test_same_bits_as_one_by_one(on_isa, size):
    args = call(*size)
    for got, expected in zip(on_isa(qimages, *args), kernels.portable("qimages")(*args), strict=True):
        assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
        assert got.stride() == expected.stride() or not got.numel()
        assert torch.equal(got, expected)


def test_calls_of_many_sizes_share_memory():
    """The memory grows and shrinks with what a call needs, and results do not lie in it."""
    first = call(1)
    kept = qimages(*first)
    copies = [x.clone() for x in kept]
    for size in ((4, 50, 60), (1, 11, 14), (1, 7, 8), (6, 30, 30)):
        args = call(*size)
        for got, expected in zip(qimages(*args), kernels.portable("qimages")(*args), strict=True):
            assert torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(kept, copies, strict=True))


@pytest.fixture
def threads():
    """Sets the number of torch's threads, which is what it was afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_same_bits_on_any_number_of_threads(threads):
    args = call(2, 90, 70)
    threads(1)
    wanted = qimages(*args)
    for count in (2, 5, 3, 1, 2):
        threads(count)
        for _ in range(20):
            assert all(map(torch.equal, qimages(*args), wanted))


def test_calls_at_the_same_time(threads):
    """Each has memory of its own."""
    threads(2)
    args = call(2, 90, 70)
    wanted = qimages(*args)
    with ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: qimages(*args), range(80)):
            assert all(map(torch.equal, found, wanted))


def test_operands_in_any_memory():
    (x, other), *rest = call(3)
    strided = [x.to(memory_format=torch.channels_last), torch.cat([other, other], 1)[:, ::2]]
    plain = [strided[0].contiguous(), strided[1].contiguous()]
    for got, expected in zip(qimages(strided, *rest), qimages(plain, *rest), strict=True):
        assert torch.equal(got, expected)


def test_last_reads_are_marked():
    steps = [
        ("dequantize", (Word("v0"), 0.1, 3)),
        ("qcat", ([Word("v0"), Word("v0")],)),
        ("lookup", (Word("v1"), Word("c0"))),
    ]
    assert encode(steps, [2]) == " 2\ndequantize v0 0.1 3\nqcat [v0. v0.]\nlookup v1. c0\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("qadd", "qsub"),
        (" 0.02 128", " 0.02"),
        (" 0.02 128", " 0.02 128 1"),
        ("v0. 0.02", "v19 0.02"),
        ("v0. 0.02", "c99 0.02"),
        ("v0. 0.02", "v-1 0.02"),
        ("v0. 0.02", "7 0.02"),
        ("'3x3 stride 2 pad 1'", "9"),
        ("'3x3 stride 2 pad 1'", "'3x3 stride 2 pad 1"),
        ("[v9 v9 v7.]", "[v9 v9 v7."),
        ("qmax_pool v3", "qmax_pool v3."),
        ("[1 1]", "1"),
        ("110 0.5 110", f"{1 << 64} 0.5 110"),
        ("False", "v99."),
        ("None 120 0.9", "None 300 0.9"),
        ("stride 2", f"stride {1 << 40}"),
        ("[7 9] [0.0 1.5]", f"[{1 << 24} {1 << 24}] [0.0 1.5]"),
        (" 15 ", " 99 "),
        (" 15 ", " 14 "),
    ],
)
def test_damaged_programs_are_refused(old, new):
    inputs, constants, program = call(2)
    assert program.count(old)
    with pytest.raises(RuntimeError, match="fxq:"):
        qimages(inputs, constants, program.replace(old, new, 1))
    with pytest.raises(RuntimeError, match="cut off"):
        qimages(inputs, constants, program[:-9])
    assert len(qimages(inputs, constants, program)) == 5, "a call that failed leaves the next one as it is"


@pytest.mark.parametrize(
    "new", ["-9", "9" * 11, "9" * 20, "v99.", "Nv99.", "c0", "[9 9]", "1e-30", "nan", "'9x9 pad 4'"]
)
def test_any_damage_is_an_error_or_other_numbers(new):
    """Any word of the program changed: never memory that is not the call's."""
    inputs, constants, program = call(1, 5, 6)
    for word in re.finditer(r"'[^']*'|\[[^]]*]|[^\s[\]]+", program):
        with contextlib.suppress(RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, MemoryError):
            qimages(inputs, constants, program[: word.start()] + new + program[word.end() :])


def test_a_damaged_program_is_refused_without_a_compiler():
    inputs, constants, program = call(2)
    for broken in (program.replace("qadd", "qsub"), program.replace("v0.", "v19"), program[:-9]):
        with pytest.raises((ValueError, TypeError)):
            kernels.portable("qimages")(inputs, constants, broken)


def test_op():
    torch.library.opcheck(qimages, call(2))
    assert images.target("qconv") is torch.ops.fxq.qconv.default
