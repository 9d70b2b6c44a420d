"""fuse_residual: an add behind a linear moves into its epilogue."""

import pytest
import torch
from torch import nn

import fxq
from fxq.ops.linear import qlinear_float
from fxq.pipeline import run
from fxq.spelling import ADD
from passes import fuse_residual

X = torch.randn(16, 8)


def calls(gm, target):
    return [node for node in gm.graph.nodes if node.target is target]


def fuse(staged, model, *inputs):
    gm, ctx = staged(model, inputs, "fuse-residual")
    before = gm(*inputs)
    run((fuse_residual.PASS,), gm, ctx)
    assert torch.equal(gm(*inputs), before)
    assert fuse_residual.PASS.run(gm, ctx) == 0
    return gm, ctx


@pytest.mark.parametrize("swapped", [False, True])
def test_before_and_after(staged, model_of, text, swapped):
    model = model_of(lambda s, x: x + s.a(x) if swapped else s.a(x) + x, a=nn.Linear(8, 8))
    gm, ctx = fuse(staged, model, X)
    lines = text(gm).splitlines()
    assert lines[0].startswith("%0 = fxq.quantize(x, ")
    assert lines[1:] == ["%1 = fxq.qlinear_float(%0, a.weight_packed, a.bias_i32, a.multiplier, x)", "return %1"]
    (decision,) = [d for d in ctx.report.decisions if d.op == "add"]
    assert (decision.form, decision.detail) == ("int8", "in the epilogue of linear, in float32")


def test_of_two_linears_the_later_adds_the_other(staged, model_of):
    gm, _ = fuse(staged, model_of(lambda s, x: s.a(x) + s.b(x), a=nn.Linear(8, 8), b=nn.Linear(8, 8)), X)
    first, second = calls(gm, qlinear_float)
    assert (len(first.args), second.args[4]) == (4, first)
    assert not calls(gm, ADD)


def test_a_second_add_stays(staged, model_of):
    gm, _ = fuse(staged, model_of(lambda s, x, y: s.a(x) + x + y, a=nn.Linear(8, 8)), X, X.clone())
    assert len(calls(gm, ADD)) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: (lambda y: (y + x, y))(s.a(x)),
        lambda s, x: s.one(x) + x,
        lambda s, x: s.a(x) + x[:, :1],
        lambda s, x: s.a(x) + x.double(),
        lambda s, x: (lambda y: (y[:, 0].mul_(2), y))(torch.add(s.a(x), x)),
    ],
    ids=["shared", "channels would repeat", "one channel", "float64", "modified in place"],
)
def test_left_alone(staged, model_of, forward):
    gm, ctx = staged(model_of(forward, a=nn.Linear(8, 8), one=nn.Linear(8, 1)), X, "fuse-residual")
    assert fuse_residual.PASS.run(gm, ctx) == 0


def test_batches_that_no_longer_broadcast_alike(model_of):
    model = model_of(lambda s, x, y: s.a(x) + y, a=nn.Linear(8, 8))
    qmodel = fxq.quantize(model, (X[:1], X[1:2]), calibration_data=[(X, X)])
    for x, y in ((X, X[:1]), (X[:1], X), (X, X.flip(0)), (X[None], X)):
        torch.testing.assert_close(qmodel(x, y), model(x, y), atol=0.2, rtol=0)
        assert (fxq.golden(qmodel)(x.numpy(), y.numpy()) == qmodel(x, y).numpy()).all()
