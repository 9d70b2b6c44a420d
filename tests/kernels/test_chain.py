"""The chain op against NumPy and against its layers one by one; its program's bytes."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fxq.ops
from fxq import kernels, numerics
from fxq.ops.chain import Chain, Layer, decode, encode, qchain, qchain_float, reference
from fxq.qtypes import QParams

assert fxq.ops.FAMILIES  # its import registers the ops that a chain consists of


def make(sizes, from_float=True, to_float=True, seed=0):
    """A chain of len(sizes) - 1 random layers whose results spread over uint8."""
    rng = np.random.default_rng(seed)
    layers = []
    for k, n in itertools.pairwise(sizes):
        z = int(rng.integers(0, 256))
        layers.append(
            Layer(
                torch.from_numpy(numerics.pack(rng.integers(-127, 128, (n, k), np.int8))),
                k,
                torch.from_numpy(rng.integers(-9000, 9000, n, np.int32)),
                torch.from_numpy((rng.uniform(0.2, 2, n) / (60 * np.sqrt(k))).astype(np.float32)),
                z,
                int(rng.choice([0, z])),
                255,
            )
        )
    return Chain(tuple(layers), QParams(0.0625, 101) if from_float else None, to_float)


def draw(chain, *shape, seed=0):
    rng = np.random.default_rng(seed)
    shape = (*shape, chain.layers[0].in_features)
    if chain.quantize is None:
        return rng.integers(0, 256, shape, np.uint8)
    return rng.normal(0, 4, shape).astype(np.float32)


def op_of(chain):
    return qchain_float if chain.to_float else qchain


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("to_float", [False, True])
@pytest.mark.parametrize("from_float", [False, True])
@pytest.mark.parametrize("sizes", [(1, 1), (5, 3, 70, 1), (33, 17, 65, 130, 7), (64, 128, 64, 10), (784, 256, 10)])
def test_bits(on_isa, sizes, from_float, to_float):
    chain = make(sizes, from_float, to_float)
    program = encode(chain)
    for rows in (0, 1, 5, 6, 7, 100):
        x = draw(chain, rows)
        found = on_isa(op_of(chain), torch.from_numpy(x), program)
        expected = reference(chain, x)
        assert found.numpy().dtype == expected.dtype
        assert np.array_equal(found.numpy(), expected)


@pytest.mark.parametrize("rows", [1, 2, 11, 50, 200])
@pytest.mark.parametrize("sizes", [(784, 256, 128, 10), (300, 1100, 1000, 20), (40, 5000, 30)])
def test_rows_and_layers_shared_by_threads(threads, sizes, rows):
    """Few weights: threads take rows; many weights and few rows: they share each layer; wide rows leave the stack."""
    chain = make(sizes)
    x = draw(chain, rows)
    assert np.array_equal(qchain_float(torch.from_numpy(x), encode(chain)).numpy(), reference(chain, x))


@given(
    sizes=st.lists(st.integers(1, 90), min_size=2, max_size=5),
    rows=st.integers(0, 30),
    ends=st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 2**32),
)
def test_any_chain(sizes, rows, ends, seed):
    chain = make(sizes, *ends, seed=seed)
    x = draw(chain, rows, seed=seed)
    assert np.array_equal(op_of(chain)(torch.from_numpy(x), encode(chain)).numpy(), reference(chain, x))


def test_equals_its_ops_one_by_one():
    chain = make((20, 30, 10))
    x = torch.from_numpy(draw(chain, 9))
    ops = torch.ops.fxq
    q = ops.quantize(x, chain.quantize.scale, chain.quantize.zero_point)
    first, last = chain.layers
    q = ops.qlinear(q, first.weight, first.bias, first.multiplier, first.zero_point, first.low, first.high)
    y = ops.qlinear_float(q, last.weight, last.bias, last.multiplier)
    assert torch.equal(qchain_float(x, encode(chain)), y)


def test_leading_dimensions_and_strides(on_isa):
    chain = make((20, 30, 10))
    program = encode(chain)
    for x in (draw(chain), draw(chain, 2, 3), draw(chain, 3, 4, 2)[:, ::2], np.zeros((2, 0, 20), np.float32)):
        found = on_isa(qchain_float, torch.from_numpy(x), program)
        assert np.array_equal(found.numpy(), reference(chain, x))


def test_decode_is_the_inverse_of_encode():
    chain = make((33, 17, 65, 7), from_float=False)
    found = decode(encode(chain))
    assert (found.quantize, found.to_float) == (chain.quantize, chain.to_float)
    for ours, theirs in zip(found.layers, chain.layers, strict=True):
        assert (ours.in_features, ours.zero_point, ours.low, ours.high) == (
            theirs.in_features,
            theirs.zero_point,
            theirs.low,
            theirs.high,
        )
        assert torch.equal(ours.weight, theirs.weight)
        assert torch.equal(ours.bias, theirs.bias)
        assert torch.equal(ours.multiplier, theirs.multiplier)
    assert decode(encode(make((3, 4)))).quantize == QParams(0.0625, 101)


def test_sections_are_aligned_and_the_shape_names_the_features():
    program = encode(make((33, 17, 7)))
    assert program.shape[0] == 7
    programs = [encode(make((33, 17, n))) for n in range(1, 9)]  # kept: memory that comes again may lie well by chance
    weights = [layer.weight for each in programs for layer in decode(each).layers]
    assert all(weight.data_ptr() % 64 == 0 for weight in weights), "a vector of weights lies in two lines"


def test_opcheck():
    chain = make((20, 30, 10))
    torch.library.opcheck(qchain_float, (torch.from_numpy(draw(chain, 3)), encode(chain)))
    chain = make((20, 30, 10), to_float=False)
    torch.library.opcheck(qchain, (torch.from_numpy(draw(chain, 2, 3)), encode(chain)))


def _damage(offset, value):
    def change(program):
        program.view(-1)[offset] = value
        return program

    return change


@pytest.mark.parametrize(
    ("damage", "native", "python"),
    [
        (lambda program: program[:, :6].contiguous(), "shorter than a header", "shorter than its header"),
        (lambda program: program[:, :150].contiguous(), "cut off", "cut off"),
        (_damage(0, 0), "does not begin with", "begins"),
        (_damage(8, 2), "version is 2", "version 2"),
        (_damage(12, 200), "no table of 200 layers", "200 layers"),
        (_damage(17, 1), "layer 0 is damaged", "layer 0"),
        (_damage(64 + 7, 9), "layer 0 is damaged", "layer 0"),
        (_damage(64 + 24, 99), "layer 0 is damaged", "layer 0"),
    ],
)
def test_a_damaged_program_is_refused(damage, native, python):
    program = damage(encode(make((20, 30, 10))))
    x = torch.zeros(2, 20)
    if kernels.info().available:
        with pytest.raises(RuntimeError, match=native):
            qchain_float(x, program)
    with pytest.raises(ValueError, match=python):
        kernels.portable("qchain_float")(x, program)


def test_inputs_that_do_not_fit_are_refused():
    if not kernels.info().available:
        pytest.skip("the portable kernels have messages of their own")
    program = encode(make((20, 30, 10)))
    with pytest.raises(RuntimeError, match=r"x\[2, 21\], expected \[..., 20\]"):
        qchain_float(torch.zeros(2, 21), program)
    with pytest.raises(RuntimeError, match="expected float32"):
        qchain_float(torch.zeros(2, 20, dtype=torch.uint8), program)
    with pytest.raises(RuntimeError, match="not what its shape and the operator say"):
        qchain(torch.zeros(2, 20), program)
    with pytest.raises(RuntimeError, match="not what its shape and the operator say"):
        qchain_float(torch.zeros(2, 20), program.view(5, -1))
