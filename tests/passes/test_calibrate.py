"""calibrate: statistics become scales and zero points, observers become quantize and dequantize."""

import pytest
import torch
from torch import nn

from fxq.errors import CalibrationError
from fxq.numerics import activation_qparams
from fxq.pipeline import run
from fxq.qdq import dequantize, dequantize_weight, quantize, quantize_weight
from fxq.recipe import Recipe
from passes import calibrate

X = torch.randn(16, 8)


def calibrated(staged, model, x=X, recipe=None):
    gm, ctx = staged(model, x, "calibrate", recipe)
    run((calibrate.PASS,), gm, ctx)
    assert calibrate.PASS.run(gm, ctx) == 0
    assert not hasattr(gm, "observers")
    return gm, ctx.timings[-1][1]


def test_pairs_in_the_place_of_observers(staged):
    gm, count = calibrated(
        staged, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), recipe=Recipe(observer="min_max")
    )
    targets = [node.target for node in gm.graph.nodes]
    assert count == 4
    assert [targets.count(t) for t in (quantize, dequantize, quantize_weight, dequantize_weight)] == [2, 2, 2, 2]
    node = next(node for node in gm.graph.nodes if node.target is quantize)
    q = activation_qparams(X.min().item(), X.max().item())
    assert node.args[1:] == node.meta["qparams"] == (q.scale, q.zero_point)


def test_granularity(staged):
    for weight, size in (("per_channel", 8), ("per_tensor", 1)):
        gm, _ = calibrated(staged, nn.Sequential(nn.Linear(8, 8)), recipe=Recipe(weight=weight, balance=False))
        assert gm.get_submodule("0").weight_scale.shape == (size,)


def test_sizes_are_asked_of_the_integers(staged, model_of):
    def forward(self, x):
        y = self.l(x)
        return self.k(y).view(y.shape[0], -1)

    gm, _ = calibrated(staged, model_of(forward, l=nn.Linear(8, 8), k=nn.Linear(8, 8)))
    assert next(node for node in gm.graph.nodes if node.target == "size").args[0].target is quantize


def test_what_no_data_reached_is_named(staged):
    gm, ctx = staged(nn.Sequential(nn.Linear(8, 8)), X, "calibrate")
    for observer in gm.observers.children():
        if hasattr(observer, "low"):
            observer.low.fill_(torch.inf)
            observer.high.fill_(-torch.inf)
    with pytest.raises(CalibrationError, match="the input 'input' was never computed while calibrating"):
        calibrate.PASS.run(gm, ctx)


def test_all_of_the_zoo(zoo, staged):
    gm, count = calibrated(staged, zoo.model, zoo.inputs)
    assert count >= 2
    with torch.no_grad():
        gm(*[x.clone() for x in zoo.inputs])
