"""normalize_pointwise: one spelling for relu, clamp and add, with the same bits."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

X = torch.randn(6, 8)

B = nn.Parameter(torch.randn(8))

CLAMPS = {
    "nn.ReLU": (lambda s, x: s.relu(x), "relu(x)"),
    "nn.ReLU in place": (lambda s, x: s.relu_(x.neg()), "relu(%0)"),
    "F.relu": (lambda s, x: F.relu(x), "relu(x)"),
    "F.relu in place": (lambda s, x: F.relu(x.neg(), inplace=True), "relu(%0)"),
    "F.relu_": (lambda s, x: F.relu_(x.neg()), "relu(%0)"),
    "torch.relu": (lambda s, x: torch.relu(x), "relu(x)"),
    "torch.relu_": (lambda s, x: torch.relu_(x.neg()), "relu(%0)"),
    "x.relu": (lambda s, x: x.relu(), "relu(x)"),
    "x.relu_": (lambda s, x: x.neg().relu_(), "relu(%0)"),
    "clamp(min=0)": (lambda s, x: x.clamp(min=0), "relu(x)"),
    "clamp_min(0)": (lambda s, x: torch.clamp_min(x, 0.0), "relu(x)"),
    "clip(0)": (lambda s, x: torch.clip(x, 0), "relu(x)"),
    "clamp(a, b)": (lambda s, x: x.clamp(-1, 0.5), "clamp(x, -1, 0.5)"),
    "clamp_(max)": (lambda s, x: x.neg().clamp_(max=0.5), "clamp(%0, None, 0.5)"),
    "clamp_max": (lambda s, x: x.clamp_max(0.5), "clamp(x, None, 0.5)"),
    "nn.ReLU6": (lambda s, x: s.relu6(x), "clamp(x, 0, 6)"),
    "F.relu6": (lambda s, x: F.relu6(x), "clamp(x, 0, 6)"),
    "nn.Hardtanh": (lambda s, x: s.hardtanh(x), "clamp(x, -2, 1)"),
    "F.hardtanh": (lambda s, x: F.hardtanh(x, max_val=0.5), "clamp(x, -1, 0.5)"),
    "integers": (lambda s, x: x.long().clamp(min=0.0), "clamp(%0, 0, None)"),
    "tensor bound": (lambda s, x: x.clamp(min=s.b), "clamp(x, b, None)"),
}


@pytest.mark.parametrize("name", CLAMPS)
def test_clamps(name, model_of, normalized):
    forward, expected = CLAMPS[name]
    modules = {"relu": nn.ReLU(), "relu_": nn.ReLU(inplace=True), "relu6": nn.ReLU6(), "hardtanh": nn.Hardtanh(-2, 1)}
    found = normalized(model_of(forward, b=B, **modules), X)
    assert found.splitlines()[-2].partition(" = ")[2] == expected


ADDS = {
    "add": (lambda s, x: x + x, "add(x, x)"),
    "x.add": (lambda s, x: x.add(other=x), "add(x, x)"),
    "add with alpha 1": (lambda s, x: torch.add(x, x, alpha=1), "add(x, x)"),
}


@pytest.mark.parametrize("name", ADDS)
def test_adds(name, model_of, normalized):
    forward, expected = ADDS[name]
    assert normalized(model_of(forward), X) == f"%0 = {expected}\nreturn %0"


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: torch.add(x, x, alpha=2),
        lambda s, x: 1 + x,
        lambda s, x: operator.iadd(x.neg(), x.double()),  # in place the sum stays float32
    ],
)
def test_what_is_no_plain_add_keeps_its_spelling(forward, model_of, normalized):
    found = normalized(model_of(forward), X)
    assert "= add(x, x)" not in found
    assert "= add(%0, %1)" not in found
