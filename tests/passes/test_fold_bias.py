"""fold_bias: a constant per channel behind a linear is its bias."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq

X = torch.randn(6, 8)
SEQ = torch.randn(2, 3, 8)
W, B = nn.Parameter(torch.randn(4, 8)), nn.Parameter(torch.randn(4))

SUMS = {
    "after": (lambda s, x: x @ s.w.t() + s.b, X, "b"),
    "before": (lambda s, x: s.b + torch.matmul(x, s.w.t()), SEQ, "b"),
    "in place": (lambda s, x: F.linear(x, s.w).add_(s.b), X, "b"),
    "one row": (lambda s, x: x @ s.w.t() + s.b, X[0], "b"),
    "as a row": (lambda s, x: x @ s.w.t() + s.row, X, "row_flat"),
    "einsum": (lambda s, x: torch.einsum("bti,oi->bto", x, s.w) + s.b, SEQ, "b"),
}


@pytest.mark.parametrize("name", SUMS)
def test_one_linear(name, model_of, normalized):
    forward, x, bias = SUMS[name]
    assert normalized(model_of(forward, w=W, b=B, row=B.detach()[None]), x) == f"%0 = linear(x, w, {bias})\nreturn %0"


OTHERS = {
    "read by others": lambda s, x: (y := x @ s.w.t()) + s.b + y,
    "one number for all": lambda s, x: x @ s.w.t() + s.one,
    "one number per row": lambda s, x: x @ s.w.t() + s.column,
    "more dimensions": lambda s, x: x[0] @ s.w.t() + s.row,
    "varies": lambda s, x: x @ s.w.t() + x[0, :4],
    "a number": lambda s, x: x @ s.w.t() + 1.0,
    "twice": lambda s, x: 2 * (x @ s.w.t()) + s.b,
    "has a bias": lambda s, x: F.linear(x, s.w, s.b) + s.b,
    "alpha": lambda s, x: torch.add(x @ s.w.t(), s.b, alpha=2),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_sums_stay(name, model_of, normalized):
    members = {"w": W, "b": B, "one": torch.randn(1), "column": torch.randn(6, 1), "row": torch.randn(1, 4)}
    found = normalized(model_of(OTHERS[name], **members), X)
    assert "add(" in found
    assert "linear(x, w, b)\nreturn" not in found


def test_a_bias_that_changes_stays(model_of, normalized):
    def forward(self, x):
        self.b.add_(1)
        return x @ self.w.t() + self.b

    assert "add(%" in normalized(model_of(forward, w=W, b=B.detach().clone()), X)


def test_it_runs_int8_with_its_bias(model_of):
    qmodel = fxq.quantize(model_of(lambda s, x: x @ s.w.t() + s.b, w=W, b=B), X, check=True)
    assert [d.form for d in fxq.report(qmodel).decisions if d.op in ("linear", "add")] == ["int8"]
