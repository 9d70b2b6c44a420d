"""keep_dropout: every spelling becomes one module, which does nothing in eval mode and drops in training mode."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq import tracing
from fxq.inputs import Call
from fxq.ops import FAMILIES
from fxq.pipeline import Context, begin, run
from fxq.recipe import Recipe
from passes import keep_dropout

X = torch.randn(4, 8, 6)


def kept(model, x=X):
    gm = tracing.trace(model, (x,), {})
    ctx = Context(Recipe(), FAMILIES, Call((x,)), check=True)
    begin(gm, ctx)
    run((keep_dropout.PASS,), gm, ctx)
    assert keep_dropout.PASS.run(gm, ctx) == 0
    return gm, ctx.timings[-1][1]


@pytest.mark.parametrize(
    "spelling",
    [
        nn.Dropout(0.9),
        nn.Dropout(0.9, inplace=True),
        nn.Dropout1d(0.9),
        nn.AlphaDropout(0.9),
        nn.FeatureAlphaDropout(0.9),
        lambda s, x: F.dropout(x, 0.9, s.training),
        lambda s, x: F.dropout(x, p=0.9, training=s.training),
        lambda s, x: torch.dropout(x, 0.9, s.training),
        lambda s, x: F.dropout1d(x, 0.9, training=s.training),
    ],
)
def test_spellings(spelling, model_of, text):
    model = nn.Sequential(spelling).eval() if isinstance(spelling, nn.Module) else model_of(spelling)
    gm, count = kept(model)
    assert count == 1
    assert text(gm).startswith("%0 = dropouts.")
    assert torch.equal(gm(X), X)
    assert not torch.equal(gm.train()(X), X)


def test_it_drops_what_it_should():
    gm, _ = kept(nn.Sequential(nn.Dropout(0.25)).eval())
    y = gm.train()(torch.ones(4, 8, 600))
    assert y.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Identity()), nn.Sequential(nn.ReLU())])
def test_what_is_no_dropout(model):
    assert kept(model.eval())[1] == 0


def test_one_that_drops_in_eval_mode_too_stays_what_it_is(model_of):
    """The tracer takes a model whose answers are random for what it is: nothing to keep here."""
    call = torch.fx.Graph()
    x = call.placeholder("x")
    call.output(call.call_function(F.dropout, (x,), {"training": True}))
    assert keep_dropout.PASS.run(torch.fx.GraphModule(nn.Module(), call), None) == 0
