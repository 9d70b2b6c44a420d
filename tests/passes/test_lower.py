"""lower: each dequantize -> op -> quantize becomes one integer op, at most one step away, and as NumPy has it."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq import numerics
from fxq.ops.add import qadd
from fxq.ops.linear import qlinear, qlinear_float
from fxq.pipeline import run
from fxq.qdq import dequantize, quantize, requantize
from passes import lower

X = torch.randn(16, 8)


class Values(torch.fx.Interpreter):
    """Runs a graph and keeps what each node computes."""

    def __init__(self, gm):
        super().__init__(gm, garbage_collect_values=False)
        self.operands, self.results = {}, {}

    def run_node(self, n):
        # Copies: what comes later may work in place.
        self.operands[n] = torch.utils._pytree.tree_map_only(
            torch.Tensor, torch.clone, self.fetch_args_kwargs_from_env(n)[0]
        )
        result = super().run_node(n)
        self.results[n] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, result)
        return result


@pytest.fixture
def lowered(staged):
    def lower_it(model, inputs, *recipe):
        gm, ctx = staged(model, inputs, "lower", *recipe)
        before = copy.deepcopy(gm)
        run((lower.PASS,), gm, ctx)
        count = ctx.timings[-1][1]
        assert lower.PASS.run(gm, ctx) == 0
        return before, gm, ctx, count

    return lower_it


def key(node):
    return node.meta.get("source"), node.meta.get("qparams")


def check_steps(before, after, inputs):
    """Give the trees of `before` the integers that `after` has, and compare each result with that of `after`."""
    values = Values(after)
    with torch.no_grad():
        values.run(*inputs)
    by_name = {node.name: node for node in after.graph.nodes}
    by_key = {key(node): node for node in after.graph.nodes if "qparams" in node.meta}
    checked = 0

    def integers(node):
        return values.results[by_name.get(node.name) or by_key[key(node)]]

    def evaluate(node):
        """A node of `before` on the integers of `after`."""
        if node.target is dequantize:
            return dequantize(integers(node.args[0]), *node.args[1:])
        if node.op == "get_attr":
            return getattr(before.get_submodule(node.target.rpartition(".")[0]), node.target.rpartition(".")[2])
        if node.name in by_name and node.op != "call_function":
            return values.results[by_name[node.name]]
        return node.target(*torch.fx.node.map_arg(node.args, evaluate))

    roots = {key(node): node for node in before.graph.nodes if node.target is quantize}
    with torch.no_grad():
        for node in after.graph.nodes:
            if node.target in (qlinear, qadd, requantize):
                wanted = evaluate(roots[key(node)]).int()
                assert (wanted - values.results[node].int()).abs().max() <= 1
                checked += 1
    return checked


TRUTH = {"qlinear": numerics.qlinear, "qlinear_float": numerics.qlinear_float, "qadd": numerics.qadd}
TRUTH |= {"quantize": numerics.quantize, "dequantize": numerics.dequantize, "requantize": numerics.requantize}


def check_numpy(gm, inputs):
    values = Values(gm)
    with torch.no_grad():
        values.run(*inputs)
    checked = 0
    for node, args in values.operands.items():
        name = node.target.name().removeprefix("fxq::") if isinstance(node.target, torch._ops.OpOverload) else ""
        if name not in TRUTH:
            continue
        operands = [a.numpy() if isinstance(a, torch.Tensor) else a for a in args]
        if name.startswith("qlinear"):
            operands[1] = numerics.unpack(operands[1], len(operands[2]), operands[0].shape[-1])
        assert np.array_equal(values.results[node].numpy(), TRUTH[name](*operands)), node
        checked += 1
    return checked


def test_all_of_the_zoo(zoo, lowered):
    before, after, _, count = lowered(zoo.model, zoo.inputs)
    others = tuple(x.flip(0) * 1.3 for x in zoo.inputs)
    assert count > 0
    for inputs in (zoo.inputs, others):
        check_steps(before, after, [x.clone() for x in inputs])
        assert check_numpy(after, [x.clone() for x in inputs]) >= count


def test_text(model_of, lowered, text):
    model = model_of(lambda s, x: s.k(F.relu(s.l(x) + x)), l=nn.Linear(8, 8), k=nn.Linear(8, 4))
    _, gm, _, _ = lowered(model, X)
    found = text(gm).splitlines()
    operands = [line.partition("(")[2] for line in found]
    assert [line.partition("(")[0] for line in found] == [
        "%0 = fxq.quantize",
        "%1 = fxq.qlinear",
        "%2 = fxq.qadd",
        "%3 = fxq.qlinear_float",
        "return %3",
    ]
    assert operands[1].startswith("%0, l.weight_packed, l.bias_i32, l.multiplier, ")
    assert operands[2].startswith("%1, %0, ")
    assert operands[3] == "%2, k.weight_packed, k.bias_i32, k.multiplier)"


def constants(gm):
    return dict(gm.named_buffers())


def test_the_derived_constants(lowered):
    linear = nn.Linear(8, 8)
    _, gm, _, _ = lowered(nn.Sequential(linear), X, fxq.Recipe(round_weights=None, correct_bias=None))
    found = constants(gm.get_submodule("0"))
    (scale, zero_point) = next(n.args[1:] for n in gm.graph.nodes if n.target is quantize)
    w, b = linear.weight.detach().numpy(), linear.bias.detach().numpy()
    s_w = numerics.weight_scales(np.abs(w).max(1))
    q_w = numerics.quantize_weight(w, s_w)
    assert np.array_equal(found["weight_packed"].numpy(), numerics.pack(q_w))
    assert np.array_equal(found["bias_i32"].numpy(), numerics.fold_bias(b, q_w, scale, zero_point, s_w))
    assert np.array_equal(found["multiplier"].numpy(), numerics.dequantize_multiplier(scale, s_w))
    assert found["bias_i32"].dtype == torch.int32


def test_one_packed_weight_for_all_calls(lowered):
    linear = nn.Linear(8, 8)
    _, gm, _, _ = lowered(nn.Sequential(linear, nn.ReLU(), linear), X)
    nodes = [node for node in gm.graph.nodes if node.target in (qlinear, qlinear_float)]
    assert [node.args[1].target for node in nodes] == ["0.weight_packed", "0.weight_packed"]
    assert len({node.args[2].target for node in nodes}) == 2  # a bias of its own for each input scale


def test_a_buffer_of_the_users_keeps_its_name(model_of, lowered):
    linear = nn.Linear(8, 4)
    linear.register_buffer("weight_packed", torch.randn(4))
    model = model_of(lambda s, x: s.l(x) + s.l.weight_packed, l=linear)
    _, gm, _, _ = lowered(model, X)
    assert torch.equal(gm.l.weight_packed, linear.weight_packed)
    assert next(n for n in gm.graph.nodes if n.target is qlinear_float).args[1].target != "l.weight_packed"


@pytest.mark.parametrize("clamp", [lambda y: y, F.relu, lambda y: y.clamp(-1, 1)])
def test_a_bias_that_leaves_int32_stays_float(clamp, model_of, lowered):
    model = model_of(lambda s, x: s.k(clamp(s.l(x))), l=nn.Linear(8, 8), k=nn.Linear(8, 4))
    model.l.weight.data[3] = 1e-9
    model.l.bias.data[3] = 50.0
    before, gm, ctx, _ = lowered(model, X)
    node = next(node for node in gm.graph.nodes if node.target is qlinear_float)
    assert len(node.args) == 5
    assert node.args[4].target == "l.bias"
    assert [note for note in ctx.report.notes if "bias is too large" in note and note.startswith("l ")]
    with torch.no_grad():
        torch.testing.assert_close(gm(X), before(X), rtol=0, atol=2e-3)


def test_bounds_become_integers(lowered):
    model = nn.Sequential(nn.Linear(8, 8), nn.Hardtanh(-0.25, 0.5), nn.Linear(8, 4))
    _, gm, _, _ = lowered(model, X)
    node = next(node for node in gm.graph.nodes if node.target is qlinear)
    scale, zero_point = node.meta["qparams"]
    bounds = numerics.quantize(np.float32([-0.25, 0.5]), scale, zero_point).tolist()
    assert list(node.args[4:]) == [zero_point, *bounds]
    assert torch.equal(dequantize(torch.tensor([zero_point], dtype=torch.uint8), scale, zero_point), torch.zeros(1))


def test_requantize_where_two_scales_meet(model_of, staged):
    """No pass of today's leaves such a pair; a graph that has one must still be right."""
    gm, ctx = staged(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)), X, "lower")
    first = next(node for node in gm.graph.nodes if node.target is dequantize)
    last = [node for node in gm.graph.nodes if node.target is quantize][-1]
    with gm.graph.inserting_after(first):
        again = gm.graph.call_function(quantize, (first, 0.05, 100))
        again.meta = {**first.meta, "qparams": (0.05, 100)}
    with gm.graph.inserting_after(again):
        back = gm.graph.call_function(dequantize, (again, 0.05, 100))
        back.meta = dict(first.meta)
    for reader in [user for user in first.users if user is not again]:
        reader.replace_input_with(first, back)
    assert last in gm.graph.nodes
    run((lower.PASS,), gm, ctx)
    node = next(node for node in gm.graph.nodes if node.target is requantize)
    assert node.args[3:] == (100, 0, 255)
    check_numpy(gm, [X])
