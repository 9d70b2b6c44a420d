"""observe: an observer on every value that annotate wants quantized; the same bits."""

import torch
import torch.nn.functional as F
from torch import nn

from fxq.observers import Histogram, Observer, WeightObserver
from fxq.pipeline import run
from fxq.recipe import Recipe
from passes import observe

X = torch.randn(16, 8)


def observed(staged, model, x=X, recipe=None):
    gm, ctx = staged(model, x, "observe", recipe)
    wanted = len(ctx.specs)
    run((observe.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == wanted
    assert ctx.specs == {}
    assert observe.PASS.run(gm, ctx) == 0
    return gm


def test_text(staged, text):
    gm = observed(staged, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    names = [name for name, _ in gm.observers.named_children()]
    assert len(names) == 4
    activations = [name for name in names if isinstance(gm.observers.get_submodule(name), Observer)]
    weights = [name for name in names if isinstance(gm.observers.get_submodule(name), WeightObserver)]
    lines = text(gm).splitlines()
    assert lines[-1] == "return %6"
    assert [line for line in lines if "linear" in line] == [
        "%2 = linear(%0, %1, 0.bias)",
        "%6 = linear(%4, %5, 2.bias)",
    ]
    assert sorted(lines[:2]) == [f"%0 = observers.{activations[0]}(input)", f"%1 = observers.{weights[0]}(0.weight)"]
    assert lines[3:5] == ["%3 = relu(%2)", f"%4 = observers.{activations[1]}(%3)"]


def test_places_have_names(staged):
    gm = observed(staged, nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)))
    where = [observer.where for observer in gm.observers.children()]
    assert where[0] == "the input 'input'"
    assert where[1].startswith("the output of 1 (%")
    assert where[2:] == ["weight 0.weight", "weight 2.weight"]


def test_a_shared_range_has_one_observer(staged, model_of):
    model = model_of(
        lambda s, x: s.k(torch.cat([s.l(x), s.m(x)])), l=nn.Linear(8, 8), m=nn.Linear(8, 8), k=nn.Linear(8, 8)
    )
    gm = observed(staged, model)
    calls = [node.target for node in gm.graph.nodes if node.op == "call_module"]
    assert max(calls.count(name) for name in calls) == 3
    assert sum(isinstance(m, Histogram) for m in gm.observers.children()) == 2


def test_an_edge_is_observed_after_what_works_in_place(staged, model_of):
    def forward(self, x):
        y = self.l(x)
        y[:, 0] = 100
        return self.k(y)

    gm = observed(staged, model_of(forward, l=nn.Linear(8, 8), k=nn.Linear(8, 8)))
    with torch.no_grad():
        gm(X.clone())
    peaks = [m.high.item() for m in gm.observers.children() if isinstance(m, Observer)]
    assert max(peaks) == 100


def test_the_chosen_observer(staged):
    gm = observed(staged, nn.Sequential(nn.Linear(8, 8)), recipe=Recipe(observer="min_max"))
    assert [type(m).__name__ for m in gm.observers.children()] == ["MinMax", "WeightObserver"]


def test_the_same_bits(zoo, staged):
    gm, _ = staged(zoo.model, zoo.inputs, "observe")
    before = gm(*[x.clone() for x in zoo.inputs])
    after = observed(staged, zoo.model, zoo.inputs)(*[x.clone() for x in zoo.inputs])
    leaves = torch.utils._pytree.tree_leaves
    assert all(torch.equal(a, b) for a, b in zip(leaves(before), leaves(after), strict=True))


def test_a_relu_is_not_observed_twice(staged, model_of):
    gm = observed(staged, model_of(lambda s, x: s.k(F.relu(s.l(x))), l=nn.Linear(8, 8), k=nn.Linear(8, 8)))
    assert sum(isinstance(m, Observer) for m in gm.observers.children()) == 2
