"""qlinears against qlinear on every instruction set, at odd sizes and any number of threads; its errors."""

import pytest
import torch

from fxq import numerics
from fxq.ops.linear import qlinear
from fxq.ops.linears import qlinears


def operands(k, *widths):
    weights = [torch.randint(-127, 128, (n, k), dtype=torch.int8) for n in widths]
    packed = [torch.from_numpy(numerics.pack(w.numpy())) for w in weights]
    biases = [torch.randint(-999, 999, (n,), dtype=torch.int32) for n in widths]
    multipliers = [torch.rand(n) / (10 * k) for n in widths]
    count = len(widths)
    return packed, biases, multipliers, [3, 128, 255][:count], [3, 0, 9][:count], [255, 200, 255][:count]


@pytest.mark.parametrize(
    ("shape", "widths"),
    [((5, 16), (3, 70, 64)), ((2, 7, 33), (130, 1)), ((0, 8), (4, 4)), ((1, 64), (5,)), ((8,), (2, 3))],
)
def test_the_parts_are_qlinears(on_isa, shape, widths):
    x = torch.randint(0, 256, shape, dtype=torch.uint8)
    lists = operands(shape[-1], *widths)
    found = on_isa(qlinears, x, *lists)
    expected = [on_isa(qlinear, x, *each) for each in zip(*lists, strict=True)]
    assert len(found) == len(widths)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_strides_and_opcheck(on_isa):
    x = torch.randint(0, 256, (24, 6), dtype=torch.uint8).t()
    lists = operands(24, 16, 20)
    assert all(torch.equal(a, b) for a, b in zip(on_isa(qlinears, x, *lists), qlinears(x.contiguous(), *lists)))  # noqa: B905
    torch.library.opcheck(qlinears, (x, *lists), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [40, 700])
def test_threads_share_the_channels_of_all(threads, rows):
    x, lists = torch.randint(0, 256, (rows, 128), dtype=torch.uint8), operands(128, 384, 300, 200)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = qlinears(x, *lists)
    finally:
        torch.set_num_threads(before)
    expected = [qlinear(x, *each) for each in zip(*lists, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_does_not_fit_is_refused(on_isa):
    x, lists = torch.randint(0, 256, (2, 8), dtype=torch.uint8), operands(8, 4, 5)
    with pytest.raises((RuntimeError, ValueError), match="not as many"):
        on_isa(qlinears, x, lists[0][:1], *lists[1:])
    with pytest.raises((RuntimeError, ValueError), match="packed"):
        on_isa(qlinears, x[:, :4].contiguous(), *lists)
    with pytest.raises((RuntimeError, TypeError), match="uint8"):
        on_isa(qlinears, x.float(), *lists)
