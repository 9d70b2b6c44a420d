"""qadd against the NumPy reference, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.ops.add import add_clamp, qadd

PAIRS = [
    ((), ()),
    ((7,), (7,)),
    ((0, 4), (0, 4)),
    ((3, 5), (3, 5)),
    ((3, 5), (5,)),
    ((3, 1, 5), (2, 1)),
    ((2, 3, 4, 5), (2, 3, 4, 5)),
    ((2, 1, 2, 3, 4), (4,)),
    ((), (3,)),
    ((40, 33), (40, 33)),
]
PARAMETERS = [
    (0.5, 128, 0.5, 3, 7, 0, 255),
    (0.7, 0, 1.3, 255, 128, 128, 255),
    (3.0, 9, 1e-6, 9, 0, 5, 200),
    (2.0**-9, 255, 100.0, 0, 255, 0, 255),
]


def draw(shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_shapes(on_isa, a, b):
    a, b = draw(a), draw(b)
    for args in PARAMETERS:
        found = on_isa(qadd, a, b, *args)
        wanted = numerics.qadd(a.numpy(), b.numpy(), *args)
        assert (found.dtype, found.shape) == (torch.uint8, wanted.shape)
        assert np.array_equal(found.numpy(), wanted)


def test_all_pairs_of_integers(on_isa):
    every = torch.arange(256, dtype=torch.uint8)
    for args in PARAMETERS:
        found = on_isa(qadd, every[:, None], every[None, :], *args)
        assert np.array_equal(found.numpy(), numerics.qadd(every[:, None].numpy(), every[None, :].numpy(), *args))


def test_infinities_that_cancel_are_the_lowest_integer(on_isa):
    a = torch.tensor([255, 0, 255, 0, 128] * 15, dtype=torch.uint8)  # more than four vectors, and a tail
    b = torch.tensor([0, 255, 255, 0, 128] * 15, dtype=torch.uint8)
    for low, high in ((0, 255), (7, 255), (3, 200)):
        args = 1e38, 128, 1e38, 128, 7, low, high
        found = on_isa(qadd, a, b, *args)
        assert found.tolist() == [low, low, high, low, 7] * 15
        with np.errstate(over="ignore", invalid="ignore"):
            assert np.array_equal(found.numpy(), numerics.qadd(a.numpy(), b.numpy(), *args))


def test_memory_in_any_order(on_isa):
    a, b = draw((6, 8)), draw((8, 12))
    for x, y in ((a.t(), b[:, ::2]), (a[:, 1:], b.t()[:6, 1:]), (a[:1].expand(6, 8), a)):
        found = on_isa(qadd, x, y, *PARAMETERS[1])
        assert found.is_contiguous()
        assert np.array_equal(found.numpy(), numerics.qadd(x.numpy(), y.numpy(), *PARAMETERS[1]))


uint8 = st.integers(0, 255)
multiplier = st.floats(2.0**-40, 2.0**20, width=32)


@given(multiplier, uint8, multiplier, uint8, uint8, uint8, uint8)
def test_any_parameters(m_a, z_a, m_b, z_b, zero_point, low, high):
    a, b = torch.arange(256, dtype=torch.uint8), torch.arange(255, -1, -1, dtype=torch.uint8)
    args = m_a, z_a, m_b, z_b, zero_point, min(low, high), max(low, high)
    assert np.array_equal(qadd(a, b, *args).numpy(), numerics.qadd(a.numpy(), b.numpy(), *args))


def test_operands_that_do_not_belong_together_are_refused(on_isa):
    with pytest.raises((RuntimeError, ValueError), match=r"(?i)broadcast|size of tensor|shape"):
        on_isa(qadd, draw((3,)), draw((4,)), *PARAMETERS[0])
    with pytest.raises((TypeError, RuntimeError), match=r"uint8|Byte"):
        on_isa(qadd, draw((3,)).float(), draw((3,)), *PARAMETERS[0])


@pytest.mark.parametrize(("a", "b"), [((3, 5), (3, 5)), ((3, 5), (5,))])
def test_opcheck(a, b):
    torch.library.opcheck(qadd, (draw(a), draw(b), *PARAMETERS[0]))


def test_add_clamp_is_add_then_clamp():
    a, b = torch.randn(4, 3), torch.randn(3)
    assert torch.equal(add_clamp(a, b, 0.0, None), (a + b).relu())
    assert torch.equal(add_clamp(a, b, -0.5, 0.5), (a + b).clamp(-0.5, 0.5))
