"""prune: dead nodes and orphan constants go; what has an effect stays."""

import torch
from torch import nn

from fxq.pipeline import run
from passes import prune

X = torch.randn(16, 8)


def pruned(staged, model, x=X):
    """The graph, with a product behind its last one that nobody reads, and the count of what went."""
    gm, ctx = staged(model, x, "prune")
    *_, last, output = gm.graph.nodes
    with gm.graph.inserting_before(output):
        gm.graph.node_copy(last).meta["dead"] = True
    run((prune.PASS,), gm, ctx)
    assert prune.PASS.run(gm, ctx) == 0
    assert not any("dead" in node.meta for node in gm.graph.nodes)
    return gm, ctx.timings[-1][1]


def test_float_weights_and_dead_products_go(model_of, staged):
    model = model_of(
        lambda s, x: (s.dead(x), s.l(x))[1], l=nn.Linear(8, 8), dead=nn.Linear(8, 8), spare=nn.Linear(8, 8)
    )
    gm, count = pruned(staged, model)
    assert count > 0
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in [*gm.named_parameters(), *gm.named_buffers()]} == used
    assert not any(name.startswith(("dead", "spare")) for name, _ in gm.named_modules())


def test_a_called_module_keeps_what_it_holds(model_of, staged):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(8, 8)

        def forward(self, x):
            return self.rnn(x)[0]

    gm, _ = pruned(staged, model_of(lambda s, x: s.l(s.c(x)), c=Scaled(), l=nn.Linear(8, 8)), torch.randn(2, 3, 8))
    names = {name for name, _ in gm.named_parameters()}
    assert names == {f"c.rnn.{name}" for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")}


def test_effects_stay(model_of, staged):
    def forward(self, x):
        assert x.shape[1] == 8
        self.seen.add_(1)
        x.mul_(2)
        return self.l(x)

    model = model_of(forward, l=nn.Linear(8, 8), seen=torch.zeros(()))
    gm, _ = pruned(staged, model)
    x = X.clone()
    with torch.no_grad():
        gm(x)
        gm(x)
    assert torch.equal(x, X * 4)
    assert gm.seen == 2
    assert any("guard" in str(node.target) for node in gm.graph.nodes)


def test_an_unused_input_stays(model_of, staged):
    gm, _ = pruned(staged, model_of(lambda s, x, y: s.l(x), l=nn.Linear(8, 8)), (X, X))
    assert [node.target for node in gm.graph.nodes if node.op == "placeholder"] == ["x", "y"]


def test_all_of_the_zoo(zoo, staged):
    gm, _ = pruned(staged, zoo.model, zoo.inputs)
    used = {str(node.target) for node in gm.graph.nodes if node.op == "get_attr"}
    assert {name for name, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers()]} == used
