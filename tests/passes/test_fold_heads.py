"""fold_heads: attention reads the rows that linears give, for every batch and length, or stays as it is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.ops.attention import qattention, qattention_float
from fxq.shapes import shapes
from passes import CONVERT, PREPARE, fold_heads, fuse_blocks

WITHOUT = (PREPARE, tuple(step for step in CONVERT if step not in (fold_heads.PASS, fuse_blocks.PASS)))
FOLDED = (PREPARE, tuple(step for step in CONVERT if step is not fuse_blocks.PASS))


def layers(*names, kv=32):
    torch.manual_seed(0)
    return {name: nn.Linear(32, kv if name in "kv" else 32) for name in names}


def views(self, x):
    b, t, c = x.shape
    q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


def minus_one(self, x):
    q, k, v = (layer(x).view(*x.shape[:-1], -1, 8).transpose(1, 2) for layer in (self.q, self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(2, 1).contiguous()
    return self.out(y.view(x.shape[0], -1, 32))


def grouped(self, x):
    b, t, _ = x.shape
    q = self.q(x).view(b, -1, 4, 8).transpose(1, 2)
    k, v = (layer(x).view(b, t, 2, 8).transpose(1, 2) for layer in (self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return self.out(y.transpose(1, 2).flatten(2))


def to_float(self, x):
    b, t, c = x.shape
    q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c)


def count(qmodel, target):
    return sum(node.target is target for node in qmodel.graph.nodes)


@pytest.mark.parametrize(
    ("forward", "kv", "op"),
    [(views, 32, qattention), (minus_one, 32, qattention), (grouped, 16, qattention), (to_float, 32, qattention_float)],
)
def test_heads_stay_in_their_rows(model_of, forward, kv, op):
    names = ("q", "k", "v") if forward is to_float else ("q", "k", "v", "out")
    model, x = model_of(forward, **layers(*names, kv=kv)), torch.randn(3, 6, 32)
    apart, qmodel = (fxq.quantize(model, x, passes=passes) for passes in (WITHOUT, FOLDED))
    assert count(apart, torch.transpose) >= 4
    assert count(qmodel, torch.transpose) == count(qmodel, torch.reshape) == count(qmodel, torch.flatten) == 0
    (node,) = (node for node in qmodel.graph.nodes if node.target is op)
    assert node.args[-1] == 4
    for shape in ((3, 6, 32), (1, 1, 32), (5, 17, 32), (2, 64, 32)):
        y = torch.randn(shape)
        assert torch.equal(qmodel(y), apart(y))
    golden = fxq.golden(qmodel, islands="torch")
    assert (golden(x.numpy()) == qmodel(x).numpy()).all()
    assert fxq.compare(model, qmodel, x).layers
    assert fold_heads.PASS.run(qmodel, None) == 0, "idempotent"


def crossed(self, x):
    """Batch and rows in one another's places."""
    b, t, c = x.shape
    q, k, v = (layer(x).view(t, b, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


def by_rows(self, x):
    """Heads in blocks of rows, not of channels."""
    b, t, _ = x.shape
    q, k, v = (layer(x).view(b, 4, t, 8) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, 32))


def read_twice(self, x):
    b, t, c = x.shape
    q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    y = F.scaled_dot_product_attention(q, k, v)
    return self.out(y.transpose(1, 2).reshape(b, t, c)), y.amax(1)


def not_joined(self, x):
    b, t, c = x.shape
    q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).reshape(b, t, c))


@pytest.mark.parametrize("forward", [crossed, by_rows, read_twice, not_joined])
def test_other_views_stay(model_of, forward):
    """On these examples batch and length are alike; on others they are not."""
    model, x = model_of(forward, **layers("q", "k", "v", "out")), torch.randn(4, 4, 32)
    apart, qmodel = (fxq.quantize(model, x, passes=passes) for passes in (WITHOUT, FOLDED))
    assert all(node.args[-1] != 4 for node in qmodel.graph.nodes if node.target in (qattention, qattention_float))
    for shape in ((4, 4, 32), (2, 6, 32)):
        y = torch.randn(shape)
        found, wanted = qmodel(y), apart(y)
        assert all(map(torch.equal, found, wanted)) if isinstance(found, tuple) else torch.equal(found, wanted)


def test_shapes_come_from_what_the_graph_says(model_of):
    model, x = model_of(views, **layers("q", "k", "v", "out")), torch.randn(4, 4, 32)
    qmodel = fxq.quantize(model, x, passes=WITHOUT)
    (root,) = qmodel.graph.find_nodes(op="placeholder")
    known = shapes(qmodel)
    (node,) = qmodel.graph.find_nodes(op="call_function", target=qattention)
    assert known[node] == ((root, 0), 4, (root, 1), 8)
    (result,) = next(iter(qmodel.graph.find_nodes(op="output"))).all_input_nodes
    assert known[result] == ((root, 0), (root, 1), 32)


def test_a_broadcast_addend_has_rows_of_its_own(model_of):
    def forward(self, x, position):
        return self.out(F.relu(self.q(x))) + position

    model = model_of(forward, **layers("q", "out"))
    qmodel = fxq.quantize(model, (torch.randn(4, 4, 32), torch.randn(4, 4, 32)), passes=WITHOUT)
    (result,) = next(iter(qmodel.graph.find_nodes(op="output"))).all_input_nodes
    assert shapes(qmodel)[result][:2] == ((result, 0), (result, 1))
