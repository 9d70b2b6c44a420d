"""rewrite_products: products with one constant matrix that are a linear in other words."""

import pytest
import torch
from torch import nn

import fxq

X = torch.randn(8, 6)
SEQ = torch.randn(2, 8, 3)
W = nn.Parameter(torch.randn(4, 8))

PRODUCTS = {
    "matrix": (
        lambda s, x: s.w @ x,
        X,
        "%0 = transpose(x, -2, -1)\n%1 = linear(%0, w, None)\n%2 = transpose(%1, -2, -1)",
    ),
    "mm": (
        lambda s, x: torch.mm(s.w, x.t()),
        X.t().contiguous(),
        "%0 = linear(x, w, None)\n%1 = transpose(%0, -2, -1)",
    ),
    "batch": (
        lambda s, x: torch.matmul(s.w, x),
        SEQ,
        "%0 = transpose(x, -2, -1)\n%1 = linear(%0, w, None)\n%2 = transpose(%1, -2, -1)",
    ),
    "vector": (lambda s, x: s.w @ x, X[:, 0].contiguous(), "%0 = linear(x, w, None)"),
    "transposed": (
        lambda s, x: s.v.t() @ x,
        X,
        "%0 = transpose(x, -2, -1)\n%1 = linear(%0, v_t, None)\n%2 = transpose(%1, -2, -1)",
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_linears_of_the_transposed_input(name, model_of, normalized):
    forward, x, expected = PRODUCTS[name]
    assert normalized(model_of(forward, w=W, v=torch.randn(8, 4)), x).rpartition("\n")[0] == expected


BATCHED = {
    "bmm": lambda s, x: torch.bmm(x, s.v.expand(x.shape[0], -1, -1)),
    "bmm of one": lambda s, x: torch.matmul(x, s.v[None]),
    "baddbmm": lambda s, x: torch.baddbmm(s.b, x, s.v.unsqueeze(0).expand(x.shape[0], -1, -1)),
}


@pytest.mark.parametrize("name", BATCHED)
def test_one_weight_for_a_batch(name, model_of, normalized):
    found = normalized(model_of(BATCHED[name], v=torch.randn(8, 4), b=torch.randn(4)), SEQ.transpose(1, 2)).splitlines()
    assert "= linear(x, v_" in found[-2]
    assert found[-2].endswith("b)" if name == "baddbmm" else "None)")


def test_a_weight_for_each_of_a_batch_is_no_linear(model_of, normalized):
    assert "bmm(" in normalized(model_of(lambda s, x: torch.bmm(x, s.v), v=torch.randn(2, 8, 4)), SEQ.transpose(1, 2))
    assert "matmul(" in normalized(model_of(lambda s, x: torch.matmul(x, s.v), v=torch.randn(1, 8, 4)), X.t())


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: x.t() @ x,
        lambda s, x: s.row @ x,
        lambda s, x: s.cube @ x,
        lambda s, x: x.t() @ s.w.t(),
        lambda s, x: s.w.double() @ x.double(),
    ],
)
def test_other_products_stay(forward, model_of, staged, text):
    gm, ctx = staged(model_of(forward, w=W, row=torch.randn(8), cube=torch.randn(2, 4, 8)), (X,), "rewrite-products")
    before = text(gm)
    from passes import rewrite_products

    assert rewrite_products.PASS.run(gm, ctx) == 0
    assert text(gm) == before


def test_it_runs_int8(model_of):
    model = model_of(lambda s, x: torch.relu(s.w @ x), w=W)
    qmodel = fxq.quantize(model, SEQ, check=True)
    assert fxq.report(qmodel).int8_share == 1
    assert qmodel(torch.randn(5, 8, 7)).shape == (5, 4, 7)
