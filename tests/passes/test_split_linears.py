"""split_linears: q, k and v from one linear have ranges of their own; other cuts stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.pipeline import run
from fxq.spelling import ATTENTION, LINEAR
from passes import split_linears

X = torch.randn(4, 6, 16)
attend = F.scaled_dot_product_attention


def heads(x):
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def packed(s, x):
    b, t, c = x.shape
    return s.qkv(x).reshape(b, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)


def flat_first(s, x):
    b, t, c = x.shape
    y = s.qkv(x.reshape(-1, c)).view(b, t, 48)
    return attend(*map(heads, y.split(16, dim=2)))


def unbound(s, x):
    q, k, v = packed(s, x).unbind(0)
    return attend(q, k, v)


SPELLINGS = {
    "split": lambda s, x: attend(*map(heads, s.qkv(x).split(16, -1))),
    "chunk": lambda s, x: attend(*map(heads, s.qkv(x).chunk(3, dim=2))),
    "slices": lambda s, x: (lambda y: attend(*(heads(y[..., i : i + 16]) for i in (0, 16, 32))))(s.qkv(x)),
    "unbind": unbound,
    "indices": lambda s, x: (lambda y: attend(y[0], y[1], y[2]))(packed(s, x)),
    "select": lambda s, x: (lambda y: attend(*(y.select(0, i) for i in range(3))))(packed(s, x)),
    "view between": flat_first,
    "counted": lambda s, x: (lambda y: attend(*map(heads, y)) * len(y))(s.qkv(x).split(16, -1)),
}


def model(model_of, forward, **members):
    return model_of(forward, qkv=nn.Linear(16, 48), **members)


def linears(gm):
    return [node for node in gm.graph.nodes if node.target is LINEAR]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(staged, model_of, name):
    gm, ctx = staged(model(model_of, SPELLINGS[name]), X, "split-linears")
    before = gm(X)
    run((split_linears.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    assert len(linears(gm)) == 3
    torch.testing.assert_close(gm(X), before, rtol=1e-5, atol=1e-6)
    assert split_linears.PASS.run(gm, ctx) == 0


@pytest.mark.parametrize("name", SPELLINGS)
def test_other_sizes(model_of, name):
    original = model(model_of, SPELLINGS[name])
    qmodel = fxq.quantize(original, X, check=True)
    assert fxq.compare(original, qmodel, torch.randn(2, 9, 16)).output > 25


def test_torchs_layer_and_shared_heads(staged, model_of):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    gm, ctx = staged(layer, X, "split-linears")
    before = gm(X)
    run((split_linears.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    torch.testing.assert_close(gm(X), before, rtol=1e-5, atol=1e-6)

    def grouped(s, x):
        q, k, v = s.qkv(x).split((32, 8, 8), -1)
        q, k, v = (y.unflatten(-1, (-1, 8)).transpose(1, 2) for y in (q, k, v))
        return attend(q, k, v, enable_gqa=True)

    gm, ctx = staged(model(model_of, grouped), X, "split-linears")
    run((split_linears.PASS,), gm, ctx)
    assert sorted(node.meta["value"].shape[-1] for node in linears(gm)) == [8, 8, 32]


OTHERS = {
    "the whole is read": lambda s, x: (lambda y: (attend(*map(heads, y.split(16, -1))), y))(s.qkv(x)),
    "no attention": lambda s, x: (lambda q, k, v: q * k + v)(*s.qkv(x).split(16, -1)),
    "one part": lambda s, x: attend(*[s.qkv(x).unflatten(-1, (6, 8)).transpose(1, 2)] * 3),
    "heads interleaved": lambda s, x: attend(*s.qkv(x).unflatten(-1, (2, 3, 8)).permute(3, 0, 1, 2, 4).unbind(0)),
    "rows cut": lambda s, x: (lambda y: attend(y[0], y[1], y[2]))(s.qkv(x).unflatten(-1, (6, 8))),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_cuts_stay(staged, model_of, name):
    gm, ctx = staged(model(model_of, OTHERS[name]), X, "split-linears")
    run((split_linears.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 0
    assert len(linears(gm)) == 1


def test_a_small_v_keeps_its_accuracy(model_of):
    original = model(
        model_of,
        lambda s, x: s.out(attend(*map(heads, s.qkv(x).split(16, -1))).transpose(1, 2).flatten(2)),
        out=nn.Linear(16, 16),
    )
    with torch.no_grad():
        original.qkv.weight[32:] *= 0.01
        original.qkv.bias[32:] *= 0.01
        original.out.bias.zero_()
    qmodel = fxq.quantize(original, X)
    assert [d.form for d in qmodel.report.decisions if d.op == "attention"] == ["int8"]
    assert fxq.compare(original, qmodel, X).output > 30
    assert ATTENTION not in {node.target for node in qmodel.graph.nodes}
