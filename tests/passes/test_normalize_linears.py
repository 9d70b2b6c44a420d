"""normalize_linears: every spelling of a linear becomes one, with the same bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq

X = torch.randn(6, 8)

SEQ = torch.randn(2, 3, 8)

W, B = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8))

LINEARS = {
    "module": (lambda s, x: s.l(x), "linear(x, l.weight, l.bias)"),
    "positional": (lambda s, x: F.linear(x, s.w, s.b), "linear(x, w, b)"),
    "keywords": (lambda s, x: F.linear(bias=s.b, input=x, weight=s.w), "linear(x, w, b)"),
    "without bias": (lambda s, x: F.linear(x, s.w), "linear(x, w, None)"),
    "t": (lambda s, x: x @ s.w.t(), "linear(x, w, None)"),
    "T": (lambda s, x: x @ s.w.T, "linear(x, w, None)"),
    "mT": (lambda s, x: torch.matmul(x, s.w.mT), "linear(x, w, None)"),
    "transpose": (lambda s, x: torch.mm(x, s.w.transpose(1, 0)), "linear(x, w, None)"),
    "permute": (lambda s, x: x.matmul(s.w.permute(1, 0)), "linear(x, w, None)"),
    "plain": (lambda s, x: x @ s.w, "linear(x, w_t, None)"),
    "matmul keywords": (lambda s, x: torch.matmul(other=s.w, input=x), "linear(x, w_t, None)"),
    "mm keywords": (lambda s, x: torch.mm(mat2=s.w, input=x), "linear(x, w_t, None)"),
    "addmm": (lambda s, x: torch.addmm(s.b, x, s.w), "linear(x, w_t, b)"),
    "addmm of t": (lambda s, x: torch.addmm(s.b, x, s.w.t(), beta=1, alpha=1), "linear(x, w, b)"),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linears(name, model_of, normalized):
    forward, expected = LINEARS[name]
    model = model_of(forward, l=nn.Linear(8, 8), w=W, b=B)
    assert normalized(model, X) == f"%0 = {expected}\nreturn %0"


NOT_LINEARS = {
    "addmm with beta": lambda s, x: torch.addmm(s.b, x, s.w, beta=2),
    "addmm with alpha": lambda s, x: torch.addmm(s.b, x, s.w, alpha=0.5),
    "addmm with one bias for all": lambda s, x: torch.addmm(s.one, x, s.w),
    "addmm with a matrix": lambda s, x: torch.addmm(x, x, s.w),
    "two tensors": lambda s, x: x @ x.t(),
    "three dimensions": lambda s, x: x @ s.three,
    "vector": lambda s, x: x @ s.b,
    "permuted to itself": lambda s, x: x @ s.w.permute(0, 1),
}


@pytest.mark.parametrize("name", NOT_LINEARS)
def test_what_is_no_linear(name, model_of, normalized):
    members = {"w": W, "b": B, "one": nn.Parameter(torch.randn(1)), "three": nn.Parameter(torch.randn(2, 8, 8))}
    assert "linear" not in normalized(model_of(NOT_LINEARS[name], **members), X)


def test_a_transposed_weight_does_not_take_the_name_of_the_users(model_of, normalized):
    model = model_of(lambda s, x: x @ s.w + F.linear(x, s.w_t), w=W, w_t=torch.randn(8, 8))
    expected = "%0 = linear(x, w_t_1, None)\n%1 = linear(x, w_t, None)\n%2 = add(%0, %1)\nreturn %2"
    assert normalized(model, X) == expected


def test_a_weight_is_transposed_once(model_of, normalized):
    model = model_of(lambda s, x: x @ s.w @ s.w, w=W)
    assert normalized(model, X) == "%0 = linear(x, w_t, None)\n%1 = linear(%0, w_t, None)\nreturn %1"


def test_a_weight_that_the_model_modifies_is_no_constant(model_of, normalized):
    def forward(self, x):
        self.w.add_(1)
        return x @ self.w, x @ self.w.t()

    assert "linear" not in normalized(model_of(forward, w=torch.randn(8, 8)), X)


def test_the_table_of_positions_stays_dynamic(model_of):
    model = model_of(lambda s, x: s.l(x + s.table[: x.shape[1]]), l=nn.Linear(8, 4), table=torch.randn(16, 8))
    qmodel = fxq.quantize(model, SEQ)
    assert qmodel(torch.randn(2, 9, 8)).shape == (2, 9, 4)


@pytest.mark.parametrize("rank", range(1, 6))
def test_inputs_of_any_rank(rank):
    x = torch.randn(*(2,) * (rank - 1), 8)
    qmodel = fxq.quantize(nn.Linear(8, 4).eval(), x, check=True)
    assert fxq.report(qmodel).int8_share == 1
    assert qmodel(x).shape == (*x.shape[:-1], 4)


@pytest.mark.filterwarnings("ignore::fxq.api.KeptFloatWarning")
def test_bilinear_is_reported(model_of):
    qmodel = fxq.quantize(model_of(lambda s, x: s.m(x, x), m=nn.Bilinear(8, 8, 4)), X)
    (decision,) = fxq.report(qmodel).refusals()
    assert (decision.op, decision.module, decision.macs > 0) == ("Bilinear", "m", True)


def test_a_weight_that_changes_is_no_constant(model_of):
    def forward(self, x):
        self.l.weight.mul_(2)
        return self.l(x)

    x = torch.randn(6, 8)
    model = model_of(forward, l=nn.Linear(8, 4).requires_grad_(False))
    with pytest.warns(fxq.api.KeptFloatWarning):
        qmodel = fxq.quantize(model, x)
    for _ in range(2):
        assert torch.equal(qmodel(x), model(x))
