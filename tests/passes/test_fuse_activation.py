"""fuse_activation: an activation between linears becomes an epilogue."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.ops.activation import qlinear_act, qlinear_act_quantize
from fxq.pipeline import run
from passes import fuse_activation

X = torch.randn(16, 8)
SPELLINGS = {
    "gelu": [nn.GELU(), F.gelu],
    "gelu_tanh": [nn.GELU(approximate="tanh"), lambda x: F.gelu(x, approximate="tanh")],
    "silu": [nn.SiLU(), F.silu],
    "tanh": [nn.Tanh(), torch.tanh, lambda x: x.tanh()],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, lambda x: x.sigmoid()],
}
CASES = [(name, spelling) for name, spellings in SPELLINGS.items() for spelling in spellings]


def calls(gm, target):
    return [node for node in gm.graph.nodes if node.target is target]


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_between_linears(staged, model_of, name, spelling):
    members = {"act": spelling} if isinstance(spelling, nn.Module) else {}
    model = model_of(
        (lambda s, x: s.b(s.act(s.a(x)))) if members else (lambda s, x: s.b(spelling(s.a(x)))),
        a=nn.Linear(8, 16),
        b=nn.Linear(16, 4),
        **members,
    )
    gm, ctx = staged(model, X, "fuse-activation")
    before = gm(X)
    run((fuse_activation.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 2
    (node,) = calls(gm, qlinear_act_quantize)
    assert node.args[4] == name
    assert (gm(X) - before).abs().max() <= before.abs().max() * 0.02, "at most a step of the integers between"
    assert fuse_activation.PASS.run(gm, ctx) == 0
    (decision,) = [d for d in ctx.report.decisions if "epilogue" in d.detail]
    assert decision.form == "int8"


def test_a_factor_per_channel_goes_with_it(model_of):
    x = torch.randn(64, 8)
    a, b = nn.Linear(8, 16), nn.Linear(16, 4)
    with torch.no_grad():
        a.weight[3] *= 100
        b.weight[:, 3] /= 100
    model = model_of(lambda s, x: s.b(F.gelu(s.a(x))), a=a, b=b)
    plain = fxq.quantize(model, x, recipe=fxq.Recipe(balance=False, scale_rows=False), on_low_sqnr="ignore")
    assert len(calls(plain, qlinear_act_quantize)[0].args) == 7
    qmodel = fxq.quantize(model, x)
    (node,) = calls(qmodel, qlinear_act_quantize)
    assert len(node.args) == 8
    compared = fxq.compare(model, qmodel, x)
    (layer,) = [layer for layer in compared.layers if layer.op == "fxq.qlinear_act_quantize"]
    assert layer.alone > 25
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()


@pytest.mark.parametrize(
    ("function", "atol"),
    [(F.gelu, 2.1e-4), *[(f, 1e-6) for f in (F.silu, torch.tanh, torch.sigmoid, F.hardswish, F.hardsigmoid)]],
)
def test_at_the_exit_it_stays_float(staged, model_of, function, atol):
    gm, ctx = staged(model_of(lambda s, x: function(s.a(x)), a=nn.Linear(8, 16)), X, "fuse-activation")
    before = gm(X)
    run((fuse_activation.PASS,), gm, ctx)
    assert len(calls(gm, qlinear_act)) == 1
    torch.testing.assert_close(gm(X), before, rtol=0 if function is F.gelu else 1e-5, atol=atol)


def test_a_result_that_others_read_is_left_alone(staged, model_of):
    gm, ctx = staged(model_of(lambda s, x: (lambda y: F.gelu(y) * y)(s.a(x)), a=nn.Linear(8, 16)), X, "fuse-activation")
    run((fuse_activation.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 0
    assert not calls(gm, qlinear_act)


def test_other_activations_are_left_alone(staged, model_of):
    gm, ctx = staged(model_of(lambda s, x: F.softplus(s.a(x)), a=nn.Linear(8, 16)), X, "fuse-activation")
    run((fuse_activation.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 0


def test_golden_and_compare_follow():
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4)).eval()
    qmodel = fxq.quantize(model, X)
    assert (fxq.golden(qmodel)(X.numpy()) == qmodel(X).numpy()).all()
    assert fxq.compare(model, qmodel, X).output > 25
