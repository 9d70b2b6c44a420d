"""fuse_conv_add: before and after, its numbers, and what it must not take; order_channels behind it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.pipeline import run
from passes import fuse_conv_add, order_channels

X = torch.randn(2, 4, 6, 5)


def conv(m=4, n=4, **options):
    return nn.Conv2d(m, n, 3, padding=1, **options)


@pytest.fixture
def targets(staged):
    """The integer ops of a model's graph before `until`, and after the pass named so."""

    def both(step, forward, model_of, **members):
        model = model_of(forward, **{"c": conv(), "k": conv(), "g": conv(), **members})
        gm, ctx = staged(model, X, step.name)
        before = [node.target.name() for node in gm.graph.nodes if "fxq" in str(node.target)]
        run((step,), gm, ctx)
        assert step.run(gm, ctx) == 0
        after = [node.target.name() for node in gm.graph.nodes if "fxq" in str(node.target)]
        return before, after

    return both


def residual(self, x):
    y = F.relu(self.c(x))
    return self.g(F.relu(self.k(y) + y))


def test_a_residual(targets, model_of):
    before, after = targets(fuse_conv_add.PASS, residual, model_of)
    assert before == ["fxq::quantize", "fxq::qconv", "fxq::qconv", "fxq::qadd", "fxq::qconv_float"]
    assert after == ["fxq::quantize", "fxq::qconv", "fxq::qconv_add", "fxq::qconv_float"]


MISSES = {
    "another reader": lambda s, x: (lambda y: s.g(y + s.c(x).relu()) + s.g(y))(s.k(x)),
    "a relu between": lambda s, x: s.g(F.relu(s.k(x)) + F.relu(s.c(x))),
    "a clamp at both ends of the range": lambda s, x: s.g(s.k(x).clamp(-0.1, 0.1) + F.relu6(s.c(x))),
    "a sum with itself, turned around": lambda s, x: (lambda y: s.g(y + y.flip(-1)))(s.k(x)),
    "a row for all": lambda s, x: s.g(s.k(x) + F.relu(s.c(x)[:, :, :1])),
}


@pytest.mark.parametrize("name", MISSES)
def test_not_fused(name, targets, model_of):
    before, after = targets(fuse_conv_add.PASS, MISSES[name], model_of)
    assert before.count("fxq::qadd") == 1
    assert before == after


def test_one_rounding_less_is_no_worse(model_of):
    model = model_of(residual, c=conv(), k=conv(), g=conv())
    fused = fxq.quantize(model, X, recipe=fxq.Recipe(observer="min_max"))
    with torch.no_grad():
        expected = model(X)
    assert any("qconv_add" in str(node.target) for node in fused.graph.nodes)
    assert fxq.comparison.sqnr(expected, fused(X)) > 38
    assert torch.equal(torch.from_numpy(fxq.golden(fused)(X.numpy())), fused(X))


def test_order_channels(targets, model_of):
    before, after = targets(order_channels.PASS, residual, model_of)
    assert [a for a, b in zip(before, after, strict=True) if a != b] == ["fxq::quantize"]
    assert after[0] == "fxq::quantize_channels_last"
    _, after = targets(order_channels.PASS, lambda s, x: s.c(F.pad(x, (1, 1, 0, 0), mode="reflect")), model_of)
    assert after[0] == "fxq::quantize_channels_last"
    before, after = targets(order_channels.PASS, lambda s, x: s.l(x), model_of, l=nn.Linear(5, 3))
    assert before == after
