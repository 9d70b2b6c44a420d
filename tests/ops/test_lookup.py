"""lookup and lookup_channels against the NumPy reference; tables against the operations that they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxq import numerics
from fxq.layout import channels_last, is_channels_last
from fxq.ops.lookup import lookup, lookup_channels

TABLES = [torch.randint(0, 256, (256,), dtype=torch.uint8), torch.randn(256)]
SHAPES = [(), (0, 3), (1,), (7,), (63,), (64,), (65, 1), (3, 5, 129), (2, 3, 40, 41)]


def draw(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


@pytest.mark.parametrize("table", TABLES, ids=["uint8", "float32"])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(on_isa, shape, table):
    q = draw(*shape)
    y = on_isa(lookup, q, table)
    assert (y.dtype, y.shape, y.is_contiguous()) == (table.dtype, q.shape, True)
    assert np.array_equal(y.numpy(), numerics.lookup(q.numpy(), table.numpy()))


def test_every_integer_at_every_place_of_a_vector(on_isa):
    q = (torch.arange(256)[:, None] + torch.arange(70)).to(torch.uint8)
    for table in TABLES:
        for row in q:
            assert torch.equal(on_isa(lookup, row, table), table[row.long()])


def test_nothing_beyond_the_end_is_written(on_isa):
    for table in TABLES:
        for count in (1, 9, 63, 65):
            whole = draw(200)
            assert torch.equal(on_isa(lookup, whole[3 : 3 + count], table), table[whole[3 : 3 + count].long()])


@pytest.mark.parametrize("table", TABLES, ids=["uint8", "float32"])
def test_memory_order(on_isa, table):
    q = draw(2, 5, 6, 7)
    for x in (channels_last(q), q.transpose(1, 3), q[:, ::2], q[:, 1:2].expand(2, 5, 6, 7)):
        y = on_isa(lookup, x, table)
        assert is_channels_last(y) == is_channels_last(x)
        assert is_channels_last(y) or y.is_contiguous()
        assert torch.equal(y, table[x.long()])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("shape", "dim"), [((4,), 0), ((0, 3), 1), ((6, 5), 1), ((2, 3, 7), 1), ((2, 3, 7), 2), ((2, 4, 9, 70), 1)]
)
def test_channels(on_isa, shape, dim, dtype):
    q, table = draw(*shape), draw(shape[dim], 256).to(dtype)
    wanted = torch.from_numpy(numerics.lookup_channels(q.numpy(), table.numpy(), dim))
    y = on_isa(lookup_channels, q, table, dim)
    assert (y.dtype, y.is_contiguous()) == (dtype, True)
    assert torch.equal(y, wanted)


def test_channels_in_any_memory(on_isa):
    q, table = draw(2, 5, 6, 7), draw(5, 256)
    wanted = torch.from_numpy(numerics.lookup_channels(q.numpy(), table.numpy(), 1))
    y = on_isa(lookup_channels, channels_last(q), table, 1)
    assert is_channels_last(y)
    assert torch.equal(y, wanted)
    wide = draw(2, 9, 6, 7)[:, 2:7]
    assert torch.equal(
        on_isa(lookup_channels, wide, table, 1),
        torch.from_numpy(numerics.lookup_channels(wide.numpy(), table.numpy(), 1)),
    )
    rows = draw(7, 256).t().contiguous().t()
    y = on_isa(lookup_channels, channels_last(q), rows, 3)
    assert y.is_contiguous()
    assert torch.equal(y, torch.from_numpy(numerics.lookup_channels(q.numpy(), rows.numpy(), 3)))


@given(st.lists(st.integers(0, 255), min_size=0, max_size=300), st.randoms())
def test_random_bytes(values, random):
    q = np.array(values, np.uint8)
    table = np.array([random.randrange(256) for _ in range(256)], np.uint8)
    assert np.array_equal(lookup(torch.from_numpy(q), torch.from_numpy(table)).numpy(), numerics.lookup(q, table))


@pytest.mark.parametrize(
    ("op", "args", "why"),
    [
        (lookup, (torch.zeros(3), TABLES[0]), "q has"),
        (lookup, (draw(3), torch.zeros(256, dtype=torch.int8)), "table has .*dtype"),
        (lookup, (draw(3), draw(255)), r"expected \[256\]"),
        (lookup, (draw(3), draw(1, 256)), r"expected \[256\]"),
        (lookup_channels, (draw(2, 3), draw(2, 256), 1), r"expected \[3, 256\]"),
        (lookup_channels, (draw(2, 3), draw(3, 256), 2), "dim = 2"),
        (lookup_channels, (draw(2, 3), draw(3, 256), -1), "dim = -1"),
    ],
)
def test_bad_arguments(on_isa, op, args, why):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=why):
        on_isa(op, *args)


def test_opcheck():
    table, floats = TABLES
    for args in ((draw(3, 5), table), (channels_last(draw(2, 3, 4, 5)), floats)):
        torch.library.opcheck(lookup, args)
    for q, dim in ((draw(3, 5), 1), (channels_last(draw(2, 5, 4, 3)), 1), (channels_last(draw(2, 4, 3, 5)), 3)):
        torch.library.opcheck(lookup_channels, (q, draw(5, 256), dim))
