"""rewrite_einsum: an einsum that is a linear becomes one."""

import pytest
import torch
from torch import nn

X = torch.randn(6, 8)

SEQ = torch.randn(2, 3, 8)

W, WIDE, B = (nn.Parameter(torch.randn(*shape)) for shape in ((4, 8), (24, 8), (24,)))

EINSUMS = {
    "rows": (lambda s, x: torch.einsum("bi,oi->bo", x, s.w), X, "w"),
    "dots": (lambda s, x: torch.einsum("...i,oi->...o", x, s.w), SEQ, "w"),
    "letters": (lambda s, x: torch.einsum("b t c, d c -> b t d", x, s.w), SEQ, "w"),
    "list": (lambda s, x: torch.einsum("btc,dc->btd", [x, s.w]), SEQ, "w"),
    "weight first": (lambda s, x: torch.einsum("dc,btc->btd", s.w, x), SEQ, "w"),
    "not transposed": (lambda s, x: torch.einsum("bti,io->bto", x, s.w.t()), SEQ, "w"),
    "one row": (lambda s, x: torch.einsum("i,oi->o", x, s.w), X[0], "w"),
    "plain": (lambda s, x: torch.einsum("bi,io->bo", x, s.wide), torch.randn(6, 24), "wide_t"),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsums_that_are_a_linear(name, model_of, normalized):
    forward, x, weight = EINSUMS[name]
    assert normalized(model_of(forward, w=W, wide=WIDE), x) == f"%0 = linear(x, {weight}, None)\nreturn %0"


NOT_LINEARS = {
    "other operand varies": lambda s, x: torch.einsum("bi,oi->bo", x, x),
    "result turned": lambda s, x: torch.einsum("bi,oi->ob", x, s.w),
    "summed letter not last": lambda s, x: torch.einsum("ib,oi->bo", x.t(), s.w),
    "outer product": lambda s, x: torch.einsum("bi,oj->bioj", x, s.w),
    "diagonal": lambda s, x: torch.einsum("bi,ii->bi", x, s.square),
    "sum kept": lambda s, x: torch.einsum("bi,oi->bio", x, s.w),
    "implicit result": lambda s, x: torch.einsum("bi,oi", x, s.w),
    "one operand": lambda s, x: torch.einsum("bi->ib", x),
    "three operands": lambda s, x: torch.einsum("bi,oi,o->bo", x, s.w, s.b),
}


@pytest.mark.parametrize("name", NOT_LINEARS)
def test_other_einsums_stay(name, model_of, normalized):
    model = model_of(NOT_LINEARS[name], w=W, square=torch.eye(8), b=B[:4].detach().clone())
    assert "einsum(" in normalized(model, X)
