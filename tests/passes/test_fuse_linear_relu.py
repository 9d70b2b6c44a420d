"""fuse_linear_relu: a clamp behind a linear or an add becomes part of it, where only a quantize reads it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.ops.add import add_clamp
from fxq.ops.linear import linear_clamp
from fxq.pipeline import run
from passes import fuse_linear_relu

X = torch.randn(16, 8)


@pytest.fixture
def fused(staged, text, model_of):
    """The clamped calls of a model `k(forward)` with their bounds, after the pass; and whether the graph changed."""

    def fuse(forward, x=X):
        model = model_of(forward, l=nn.Linear(8, 8), m=nn.Linear(8, 8), k=nn.Linear(8, 4))
        gm, ctx = staged(model, x, "fuse-linear-relu")
        before = text(gm)
        run((fuse_linear_relu.PASS,), gm, ctx)
        calls = [(n.target, n.args[-2:]) for n in gm.graph.nodes if n.target in (linear_clamp, add_clamp)]
        assert ctx.timings[-1][1] == len(calls)
        assert fuse_linear_relu.PASS.run(gm, ctx) == 0
        assert (text(gm) == before) == (not calls)
        return calls

    return fuse


@pytest.mark.parametrize(
    ("clamp", "bounds"),
    [
        (F.relu, (0.0, None)),
        (F.relu6, (0.0, 6.0)),
        (lambda y: y.clamp(-1, 2), (-1.0, 2.0)),
        (lambda y: y.clamp(max=0.5), (None, 0.5)),
        (lambda y: y.clamp(0.25), (0.25, None)),
        (lambda y: y.clamp(2.0, -1.0), (-1.0, -1.0)),  # as torch has it: the upper bound everywhere
    ],
)
def test_fuse(clamp, bounds, fused):
    assert fused(lambda s, x: s.k(clamp(s.l(x)))) == [(linear_clamp, bounds)]
    assert fused(lambda s, x: s.k(clamp(s.l(x) + s.m(x)))) == [(add_clamp, bounds)]


def test_only_the_first_of_two(fused):
    assert fused(lambda s, x: s.k(s.l(x).relu().clamp(max=0.5))) == [(linear_clamp, (0.0, None))]


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: F.relu(s.l(x)),
        lambda s, x: F.relu(s.l(x)).sin(),
        lambda s, x: (lambda y: s.k(y) * y[:, :4])(F.relu(s.l(x))),
        lambda s, x: (lambda y: s.k(F.relu(y)) + s.k(y))(s.l(x)),
        lambda s, x: s.k(F.relu(s.l(x).sin())),
        lambda s, x: s.k(s.l(x).clamp(min=x.mean())),
    ],
)
def test_not_fused(forward, fused):
    assert fused(forward) == []


def test_all_of_the_zoo(zoo, staged):
    gm, ctx = staged(zoo.model, zoo.inputs, "fuse-linear-relu")
    run((fuse_linear_relu.PASS,), gm, ctx)
    wanted = {"mlp": 2, "residual": 1, "batch_norm": 1, "shared": 2, "tied": 1, "functional": 1, "dropout": 1}
    wanted |= {"reused_relu": 2, "clamps": 1, "in_place": ctx.timings[-1][1]}
    assert ctx.timings[-1][1] == wanted.get(zoo.name, 0)
