"""merge_linears: q, k and v are one call with the same bits, and compare, golden and files still know each."""

import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.ops.linear import qlinear
from fxq.ops.linears import qlinears
from passes import CONVERT, PREPARE, fuse_blocks, fuse_chains, merge_linears

ALONE = tuple(step for step in CONVERT if step not in (fuse_blocks.PASS, fuse_chains.SINGLE))
WITHOUT = (PREPARE, tuple(step for step in ALONE if step is not merge_linears.PASS))


def attend(self, x):
    b, t, c = x.shape
    q, k, v = (layer(x).view(b, t, 4, c // 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
    return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


def layers(*names):
    torch.manual_seed(0)
    return {name: nn.Linear(32, 32) for name in names}


def count(qmodel, target):
    return sum(node.target is target for node in qmodel.graph.nodes)


def test_q_k_and_v_are_one_call(model_of, tmp_path):
    model, x = model_of(attend, **layers("q", "k", "v", "out")), torch.randn(3, 6, 32)
    qmodel, apart = (fxq.quantize(model, x, passes=passes) for passes in ((PREPARE, ALONE), WITHOUT))
    assert (count(qmodel, qlinears), count(qmodel, qlinear)) == (1, 0)
    assert (count(apart, qlinears), count(apart, qlinear)) == (0, 3)
    for shape in ((3, 6, 32), (1, 1, 32), (5, 17, 32)):
        y = torch.randn(shape)
        assert torch.equal(qmodel(y), apart(y))
    golden = fxq.golden(qmodel, islands="torch")
    assert (golden(x.numpy()) == qmodel(x).numpy()).all()
    seen, before = (
        [(layer.module, layer.op, layer.alone) for layer in fxq.compare(model, m, x).layers] for m in (qmodel, apart)
    )
    assert seen == before
    fxq.save(qmodel, tmp_path / "m.fxq")
    assert torch.equal(fxq.load(tmp_path / "m.fxq")(x), qmodel(x))
    fxq.draw(qmodel, tmp_path / "m.dot")
    assert torch.equal(torch.compile(qmodel, backend="eager")(x), qmodel(x))
    assert merge_linears.PASS.run(qmodel, None) == 0, "idempotent"


def test_linears_of_different_inputs_or_chains_stay(model_of):
    def forward(self, x, y):
        q, k = self.q(x).view(-1, 4, 8), self.k(y).view(-1, 4, 8)
        return self.out(F.scaled_dot_product_attention(q, k, k).reshape(x.shape))

    def branches(self, x):
        return self.k(F.relu(self.q(x))) + self.out(F.relu(self.v(x)))

    x = torch.randn(6, 32)
    assert count(fxq.quantize(model_of(forward, **layers("q", "k", "out")), (x, x + 1)), qlinears) == 0
    assert count(fxq.quantize(model_of(branches, **layers("q", "k", "v", "out")), x), qlinears) == 0
