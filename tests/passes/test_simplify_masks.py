"""simplify_masks: a mask spelled out by small tensors is a view of what was given, and what says more stays."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.recipe import Recipe
from fxq.spelling import ATTENTION
from passes import simplify_masks


def spelled_out(x, seen):
    """As Hugging Face's masks are made."""
    b, t = x.shape[:2]
    s = seen.shape[1]
    batch = torch.arange(b)[:, None, None, None]
    queries, keys = torch.arange(t) + 0, torch.arange(s) + 0
    everything = queries.new_ones((), dtype=torch.bool) & (queries[None, None, :, None] >= 0)
    return (everything & seen[batch, keys[None, None, None, :]]).expand(b, -1, t, s)


def model_with(model_of, make_mask):
    def forward(self, x, seen):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        y = F.scaled_dot_product_attention(q, k, v, make_mask(x, seen))
        return self.out(y.transpose(1, 2).flatten(2))

    torch.manual_seed(0)
    return model_of(forward, **{name: nn.Linear(16, 16) for name in ("q", "k", "v", "out")})


def inputs(b, t):
    return torch.randn(b, t, 16), torch.arange(t) < torch.randint(t // 2, t + 1, (b, 1))


def mask_of(gm):
    (attention,) = [node for node in gm.graph.nodes if node.target is ATTENTION]
    return attention.args[3]


def test_a_mask_is_a_view_of_what_was_given(staged, model_of):
    model = model_with(model_of, spelled_out)
    gm, ctx = staged(model, inputs(3, 7), "simplify-masks", Recipe())
    before = {str(node.target) for node in gm.graph.nodes}
    assert simplify_masks.PASS.run(gm, ctx) == 3
    gm.graph.lint()
    gm.recompile()
    names = {getattr(node.target, "__name__", str(node.target)) for node in gm.graph.nodes}
    assert not names & {"arange", "new_ones", "ge", "and_", "expand"}, before
    for b, t in ((3, 7), (1, 1), (5, 12)):
        x, seen = inputs(b, t)
        assert torch.allclose(gm(x, seen), model(x, seen), atol=1e-6)
    assert simplify_masks.PASS.run(gm, ctx) == 0, "idempotent"
    with pytest.raises((RuntimeError, IndexError)):
        gm(torch.randn(4, 7, 16), inputs(3, 7)[1])


def test_in_integers(model_of):
    model = model_with(model_of, spelled_out)
    qmodel = fxq.quantize(model, inputs(3, 7))
    assert "arange" not in qmodel.code
    x, seen = inputs(4, 11)
    assert fxq.compare(model, qmodel, (x, seen)).output > 20
    longer = torch.cat([x, torch.randn(4, 5, 16)], 1), torch.cat([seen, torch.zeros(4, 5, dtype=torch.bool)], 1)
    assert torch.equal(qmodel(*longer)[:, :11], qmodel(x, seen))


def count_from_one(x, seen):
    t = x.shape[1]
    return (torch.arange(t)[:, None] >= 1) & seen[:, None, None, :]


def from_one(x, seen):
    return seen[torch.arange(x.shape[0])[:, None, None, None], torch.arange(1, x.shape[1] + 1)[None, None, None, :] - 1]


def past(x, seen):
    t = torch.arange(x.shape[1])
    return (t[:, None] >= t[None, :]) & seen[:, None, None, :]


def crossed(x, seen):
    return seen[torch.arange(x.shape[0])[None, :, None], torch.arange(seen.shape[1])[None, None, :]][:, :1, None]


@pytest.mark.parametrize("make_mask", [count_from_one, from_one, past])
def test_what_says_more_stays(staged, model_of, make_mask):
    model = model_with(model_of, make_mask)
    args = inputs(3, 7)
    gm, ctx = staged(model, args, "simplify-masks", Recipe())
    if mask_of(gm) is None:
        pytest.skip("the mask became is_causal")
    kept = mask_of(gm)
    assert simplify_masks.PASS.run(gm, ctx) == 0
    assert mask_of(gm) is kept


def test_a_mask_that_others_read_stays(staged, model_of):
    def forward(self, x, seen):
        mask = spelled_out(x, seen)
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        return F.scaled_dot_product_attention(q, k, v, mask), mask.sum()

    model = model_of(forward, **{name: nn.Linear(16, 16) for name in "qkv"})
    gm, ctx = staged(model, inputs(3, 7), "simplify-masks", Recipe())
    assert simplify_masks.PASS.run(gm, ctx) == 0
