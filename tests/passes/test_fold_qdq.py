"""fold_qdq: pairs cancel, integers flow through moves, weights become int8; the same bits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.pipeline import run
from fxq.qdq import dequantize, quantize, quantize_weight
from passes import fold_qdq

X, SEQ = torch.randn(16, 8), torch.randn(4, 6, 8)


@pytest.fixture
def folded(staged, text, model_of):
    def fold(forward, x=X, **members):
        model = model_of(forward, l=nn.Linear(8, 8), **members)
        gm, ctx = staged(model, x, "fold-qdq")
        run((fold_qdq.PASS,), gm, ctx)
        after = text(gm)
        assert fold_qdq.PASS.run(gm, ctx) == 0
        assert text(gm) == after
        return gm

    return fold


MOVES = {
    "reshape": (lambda s, x: s.k(s.l(x).reshape(8, 16)), 16, torch.reshape),
    "computed shape": (lambda s, x: s.k(s.l(x).reshape(x.shape[0] // 2, -1)), 16, torch.reshape),
    "flatten": (lambda s, x: s.k(s.l(x).unflatten(0, (8, 2)).flatten(1)), 16, torch.flatten),
    "transpose": (lambda s, x: s.k(s.l(x).t()), 16, torch.transpose),
    "permute": (lambda s, x: s.k(s.l(x).permute(1, 0)), 16, torch.permute),
    "cat": (lambda s, x: s.k(torch.cat([s.l(x), s.l(-x)], 1)), 16, torch.cat),
    "stack": (lambda s, x: s.k(torch.stack([s.l(x), s.l(-x)])), 8, torch.stack),
    "slice": (lambda s, x: s.k(s.l(x)[2:, ::2]), 4, None),
    "computed index": (lambda s, x: s.k(s.l(x)[x.shape[0] // 2]), 8, None),
    "chunk": (lambda s, x: s.k(s.l(x).chunk(2, -1)[1]), 4, torch.chunk),
    "split": (lambda s, x: s.k(s.l(x).split([3, 5], -1)[0]), 3, torch.split),
    "unbind": (lambda s, x: s.k(s.l(x).unbind(0)[3]), 8, torch.unbind),
    "flip": (lambda s, x: s.k(s.l(x).flip(1)), 8, torch.flip),
    "max pool": (lambda s, x: s.k(F.max_pool2d(s.l(x)[None], 2)), 4, torch.max_pool2d),
}


@pytest.mark.parametrize("name", MOVES)
def test_integers_flow_through(name, folded):
    forward, width, target = MOVES[name]
    gm = folded(forward, k=nn.Linear(width, 4))
    moves = [node for node in gm.graph.nodes if node.target is target]
    assert all(
        node.args[0].meta["value"].dtype == torch.uint8 for node in moves if isinstance(node.args[0], torch.fx.Node)
    )
    products = [node for node in gm.graph.nodes if node.target is F.linear]
    assert products[-1].args[0].target is dequantize  # nothing between the integers and the product
    quantized = [node for node in gm.graph.nodes if node.target is quantize]
    calls = len(products) - 1
    assert len(quantized) == calls + (
        2 if name in ("cat", "stack") else 1
    )  # the inputs, and what the first linears give


def test_len_of_a_split_is_asked_of_the_integers(folded):
    def forward(self, x):
        a, b = self.l(x).chunk(2, -1)
        return self.k(a) + self.k(b)

    gm = folded(forward, k=nn.Linear(4, 4))
    assert all(node.args[0].meta["value"].dtype == torch.uint8 for node in gm.graph.nodes if node.target is torch.chunk)
    assert sum(node.target is torch.chunk for node in gm.graph.nodes) == 1


def test_a_split_that_is_never_taken_apart(folded):
    gm = folded(lambda s, x: s.l(x) + len(s.l(x).chunk(2)))
    assert sum(node.target is torch.chunk for node in gm.graph.nodes) == 1


def test_sizes_are_asked_of_the_integers(folded):
    def forward(self, x):
        y = self.l(x)
        return self.l(y).view(y.shape[0], -1)

    gm = folded(forward)
    asked = next(node for node in gm.graph.nodes if node.target == "size")
    assert asked.args[0].target is quantize


def test_what_reads_floats_keeps_them(folded):
    gm = folded(lambda s, x: s.l(s.l(x).cumsum(0).reshape(-1, 8)))
    sums = next(node for node in gm.graph.nodes if node.target == "cumsum")
    assert sums.args[0].target is F.linear
    move = next(node for node in gm.graph.nodes if node.target is torch.reshape)
    assert move.args[0] is sums


def test_other_parameters_do_not_cancel(staged):
    gm, ctx = staged(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), X, "fold-qdq")
    pair = next(node for node in gm.graph.nodes if node.target is dequantize)
    with gm.graph.inserting_after(pair):
        again = gm.graph.call_function(quantize, (pair, pair.args[1] * 2, pair.args[2]))
        again.meta = {**pair.meta, "qparams": again.args[1:]}
    with gm.graph.inserting_after(again):
        back = gm.graph.call_function(dequantize, (again, *again.args[1:]))
        back.meta = dict(pair.meta)
    for reader in [user for user in pair.users if user is not again]:
        reader.replace_input_with(pair, back)
    run((fold_qdq.PASS,), gm, ctx)
    assert again in gm.graph.nodes


def test_weights_become_int8_once_for_all_calls(folded):
    gm = folded(lambda s, x: s.l(F.relu(s.l(x))))
    assert not any(node.target is quantize_weight for node in gm.graph.nodes)
    assert {node.target for node in gm.graph.nodes if node.op == "get_attr" and "int8" in str(node.target)} == {
        "l.weight_int8"
    }
    assert gm.l.weight_int8.dtype == torch.int8


def test_tied_weights_are_one(folded):
    tied = nn.Linear(8, 8)
    weight = tied.weight
    gm = folded(lambda s, x: F.linear(F.relu(F.linear(x, s.a)), s.b), a=weight, b=weight)
    assert len({node.target for node in gm.graph.nodes if node.op == "get_attr" and "int8" in str(node.target)}) == 1


def test_all_of_the_zoo(zoo, staged, text):
    gm, ctx = staged(zoo.model, zoo.inputs, "fold-qdq")
    run((fold_qdq.PASS,), gm, ctx)
    after = text(gm)
    assert fold_qdq.PASS.run(gm, ctx) == 0
    assert text(gm) == after
