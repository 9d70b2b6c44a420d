"""fold_batch_norm: into the linear before it, to a fixed point, within float rounding."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.pattern import Cause
from fxq.pipeline import run
from passes import fold_batch_norm

X = torch.randn(16, 8)


def norm(n=8, **options):
    norm = nn.BatchNorm1d(n, **options)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm


@pytest.fixture
def folded(staged, text):
    """Rewrites, and the text of a model's graph before and after; run checks the numbers, a second run does nothing."""

    def fold(model, x=X):
        gm, ctx = staged(model, x, "fold-batch-norm")
        before = text(gm)
        run((fold_batch_norm.PASS,), gm, ctx)
        after = text(gm)
        assert fold_batch_norm.PASS.run(gm, ctx) == 0
        assert text(gm) == after
        return ctx.timings[-1][1], before, after

    return fold


@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}])
@pytest.mark.parametrize("bias", [True, False])
def test_fold(options, bias, folded):
    count, _, after = folded(nn.Sequential(nn.Linear(8, 8, bias=bias), norm(**options), nn.ReLU()))
    assert count == 1
    assert after == "%0 = linear(input, 0.weight_folded, 0.bias_folded)\n%1 = relu(%0)\nreturn %1"


def test_the_folded_numbers(staged):
    linear, bn = nn.Linear(8, 8), norm()
    gm, ctx = staged(nn.Sequential(linear, bn), X, "fold-batch-norm")
    run((fold_batch_norm.PASS,), gm, ctx)
    gain = bn.weight.double() / (bn.running_var.double() + bn.eps).sqrt()
    layer = gm.get_submodule("0")
    assert torch.equal(layer.weight_folded, (linear.weight.double() * gain[:, None]).float())
    assert torch.equal(layer.bias_folded, ((linear.bias.double() - bn.running_mean) * gain + bn.bias).float())
    assert torch.equal(layer.weight, linear.weight)


def test_two_in_a_row(folded):
    count, _, after = folded(nn.Sequential(nn.Linear(8, 8), norm(), norm()))
    assert count == 2
    assert after == "%0 = linear(input, 0.weight_folded_1, 0.bias_folded_1)\nreturn %0"


def test_a_shared_linear_gets_weights_of_its_own_where_a_norm_follows(model_of, folded):
    count, _, after = folded(model_of(lambda s, x: s.n(s.l(x)) + s.l(x), l=nn.Linear(8, 8), n=norm()))
    assert count == 1
    assert after.splitlines()[:2] == [
        "%0 = linear(x, l.weight_folded, l.bias_folded)",
        "%1 = linear(x, l.weight, l.bias)",
    ]


def two_readers(self, x):
    y = self.l(x)
    return self.n(y) + y


MISSES = {
    "two readers": (two_readers, X),
    "shared statistics": (lambda s, x: s.n(s.l(x)) + s.n(s.m(x)), X),
    "three dimensions": (lambda s, x: s.n(s.l(x)), torch.randn(4, 8, 8)),
    "something between": (lambda s, x: s.n(s.l(x).relu()), X),
    "a computed bias": (lambda s, x: s.n(F.linear(x, s.l.weight, x[0])), X),
    "a computed gain": (lambda s, x: F.batch_norm(s.l(x), s.n.running_mean, s.n.running_var, x[0], s.n.bias), X),
    "no statistics": (lambda s, x: s.free(s.l(x)), X),
    "a computed weight": (lambda s, x: s.n(F.linear(x, x[:8] * 2, s.l.bias)), X),
}


@pytest.mark.parametrize("name", MISSES)
def test_not_folded(name, model_of, folded):
    forward, x = MISSES[name]
    free = norm(track_running_stats=False)
    count, before, after = folded(model_of(forward, l=nn.Linear(8, 8), m=nn.Linear(8, 8), n=norm(), free=free), x)
    assert count == 0
    assert after == before


def test_the_reasons_of_a_miss(model_of, staged):
    for forward, cause in ((two_readers, Cause.SHARED_INTERMEDIATE), (lambda s, x: s.n(s.l(x).relu()), Cause.OTHER_OP)):
        gm, _ = staged(model_of(forward, l=nn.Linear(8, 8), n=norm()), X, "fold-batch-norm")
        node = next(node for node in gm.graph.nodes if node.target is F.batch_norm)
        assert fold_batch_norm.PATTERN.match(node).cause is cause


def test_all_of_the_zoo(zoo, folded):
    count, _, after = folded(zoo.model, zoo.inputs)
    assert count == (2 if zoo.name == "batch_norm" else 0)
    assert "batch_norm" not in after
