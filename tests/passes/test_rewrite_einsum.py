"""rewrite_einsum: an einsum that is a linear becomes one."""

import pytest
import torch
from torch import nn

import fxq

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


HEADS = nn.Parameter(torch.randn(8, 2, 4))


def test_heads_are_made_by_a_linear(model_of, normalized):
    model = model_of(lambda s, x: torch.einsum("btc,chd->bthd", x, s.w), w=HEADS)
    lines = normalized(model, SEQ).splitlines()
    assert "linear(x, w_matrix_t, None)" in lines[2] and "reshape(%2, (%0, %1, 2, 4))" in lines[3]


def test_heads_are_joined_by_a_linear(model_of, normalized):
    model = model_of(lambda s, x: torch.einsum("...hd,chd->...c", x, s.w), w=HEADS)
    lines = normalized(model, torch.randn(3, 5, 2, 4)).splitlines()
    assert "reshape(x, (%0, %1, 8))" in lines[2] and "linear(%2, w_matrix, None)" in lines[3]


def test_products_of_heads_take_any_batch_and_share_memory_with_the_parameter(model_of):
    def forward(s, x):
        q, k = torch.einsum("btc,chd->bthd", x, s.w), torch.einsum("btc,chd->bthd", x.relu(), s.w)
        return torch.einsum("bthd,chd->btc", q + k, s.w)

    model, x = model_of(forward, w=HEADS), torch.randn(16, 7, 8)
    qmodel = fxq.quantize(model, x)
    assert qmodel.report.int8_share == 1
    for rows in (1, 5):
        y = torch.randn(rows, 3, 8)
        assert fxq.comparison.output_sqnr(model(y), qmodel(y)) > 30


NOT_LINEARS = {
    "a letter of the weight in the batch": lambda s, x: torch.einsum("bi,bij->bj", x, s.heads),
    "summed in another order": lambda s, x: torch.einsum("bhd,cdh->bc", x.reshape(6, 2, 4), s.turned),
    "new letters in another order": lambda s, x: torch.einsum("bi,ihd->bdh", x, s.w3),
    "summed letters apart": lambda s, x: torch.einsum("bhd,hcd->bc", x.reshape(6, 2, 4), s.apart),
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
    heads = {"heads": torch.randn(6, 8, 3), "turned": torch.randn(5, 4, 2), "w3": HEADS, "apart": torch.randn(2, 3, 4)}
    model = model_of(NOT_LINEARS[name], w=W, square=torch.eye(8), b=B[:4].detach().clone(), **heads)
    assert "einsum(" in normalized(model, X)
