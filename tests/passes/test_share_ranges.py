"""share_ranges, and the ranges of concatenations: own ones where they differ, requantized where they meet."""

import numpy as np
import pytest
import torch
from torch import nn

import fxq
from fxq import numerics
from fxq.pipeline import run
from fxq.qdq import requantize
from passes import share_ranges

X = torch.randn(64, 8)
RECIPE = fxq.Recipe(observer="min_max", judge_costs=False, balance=False)


@pytest.fixture
def skip(model_of):
    """A U-Net's skip: y is read by m and concatenated with what m makes of it, which is `factor` as large."""

    def make(factor, alone=False):
        def forward(self, x):
            y = self.l(x)
            z = self.m(y) if not alone else self.m(x)
            return self.k(torch.cat([y, z], -1))

        model = model_of(forward, l=nn.Linear(8, 8), m=nn.Linear(8, 8), k=nn.Linear(16, 8))
        with torch.no_grad():
            model.l.bias.zero_(), model.m.bias.zero_()
            model.m.weight.copy_(factor * torch.eye(8))
        return model

    return make


def paths(gm):
    """The observers of the values that are concatenated, and of the concatenation."""
    (cat,) = [node for node in gm.graph.nodes if node.target is torch.cat]
    return [node.target for node in cat.all_input_nodes], next(iter(cat.users)).target


def requantized(qmodel):
    return [node for node in qmodel.graph.nodes if node.target is requantize]


@pytest.mark.parametrize(("factor", "shared"), [(1.2, True), (1.0, True), (0.5, True), (20.0, False)])
def test_near_ranges_are_one(staged, skip, factor, shared):
    gm, ctx = staged(skip(factor), X, "share-ranges", RECIPE)
    (skipped, other), common = paths(gm)
    assert other == common and skipped != common
    before = gm(X)
    run((share_ranges.PASS,), gm, ctx)
    assert torch.equal(gm(X), before)
    (skipped, other), common = paths(gm)
    assert other == common and (skipped == common) == shared
    assert share_ranges.PASS.run(gm, ctx) == 0


def test_what_is_concatenated_alone_shares_from_the_start(staged, skip):
    gm, ctx = staged(skip(20.0, alone=True), X, "share-ranges", RECIPE)
    sources, common = paths(gm)
    assert set(sources) == {common}
    assert share_ranges.PASS.run(gm, ctx) == 0


def test_unequal_ranges_are_requantized_where_they_meet(skip):
    model = skip(50.0)
    qmodel = fxq.quantize(model, X, recipe=RECIPE, check=True)
    (node,) = requantized(qmodel)
    (s_x, z_x), (s_y, z_y) = node.args[0].meta["qparams"], node.meta["qparams"]
    assert s_y > 20 * s_x and node.args[1:] == (z_x, numerics.f32(s_x / s_y), z_y, 0, 255)
    assert not qmodel.report.kept_float()
    assert np.array_equal(fxq.golden(qmodel)(X.numpy()), qmodel(X).numpy())
    alone = next(layer.alone for layer in fxq.compare(model, qmodel, X).layers if layer.module == "l")
    assert alone > 35  # it would lose 30 dB by the range of its neighbour
    assert requantized(fxq.quantize(skip(1.0), X, recipe=RECIPE)) == []


def test_a_reader_in_float_keeps_the_ranges_tied(model_of):
    """Neither where the concatenation is returned nor where what it concatenates is."""
    layers = {"l": nn.Linear(8, 8), "m": nn.Linear(8, 8), "k": nn.Linear(16, 8)}

    def returned(self, x):
        y = self.l(x)
        return torch.cat([y, 50 * self.m(y)], -1)

    def read(self, x):
        y = self.l(x)
        return self.k(torch.cat([y, self.m(x)], -1)), y

    for forward in (returned, read):
        qmodel = fxq.quantize(model_of(forward, **layers), X, recipe=RECIPE, check=True)
        assert requantized(qmodel) == []
        assert [d.form for d in qmodel.report.decisions if d.op == "cat"] == ["float"]


def test_one_range_after_another(model_of):
    """A dense block: each value is concatenated more than once, with all before."""

    def forward(self, x):
        a = self.l(x)
        b = self.m(a)
        c = self.k(torch.cat([a, b], -1))
        return self.o(torch.cat([a, b, c], -1))

    layers = {"l": nn.Linear(8, 8), "m": nn.Linear(8, 8), "k": nn.Linear(16, 8), "o": nn.Linear(24, 8)}
    model = model_of(forward, **layers)
    with torch.no_grad():
        model.m.weight.mul_(30), model.k.weight.mul_(30)
    qmodel = fxq.quantize(model, X, recipe=RECIPE, check=True)
    assert not qmodel.report.kept_float()
    assert requantized(qmodel)
    assert np.array_equal(fxq.golden(qmodel)(X.numpy()), qmodel(X).numpy())
    assert fxq.report(qmodel).sqnr > 25
