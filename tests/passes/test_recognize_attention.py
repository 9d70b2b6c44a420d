"""recognize_attention: every spelling becomes one, and what is not attention stays as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fxq.pipeline import run
from fxq.spelling import ATTENTION
from passes import recognize_attention

HEADS = torch.randn(3, 2, 4, 6, 8).unbind(0)
SEEN = torch.rand(6, 6) > 0.4
SEEN[:, 0] = True
FLOATS = torch.randn(2, 1, 6, 6)
LOW = torch.finfo(torch.float32).min


def softmax(scores):
    return F.softmax(scores, dim=-1)


SPELLINGS = {
    "torch": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v),
    "torch, mask": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=s.seen, scale=0.5),
    "torch, float mask": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.floats, 0.0, False),
    "torch, causal": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.0),
    "torch, shared heads": lambda s, q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "torch, q scaled": lambda s, q, k, v: F.scaled_dot_product_attention((q * 0.3).contiguous(), k, v, scale=1.0),
    "operators": lambda s, q, k, v: softmax(q @ k.transpose(-2, -1) / math.sqrt(8)) @ v,
    "no scale": lambda s, q, k, v: softmax(q @ k.mT) @ v,
    "functions": lambda s, q, k, v: torch.matmul(torch.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) * 0.5, 3), v),
    "methods": lambda s, q, k, v: q.matmul(k.transpose(3, 2)).mul(0.5).softmax(-1).matmul(v),
    "module": lambda s, q, k, v: s.softmax(q @ k.mT * 0.5) @ v,
    "scaled operands": lambda s, q, k, v: softmax((q / 2) @ (0.7 * k).mT) @ v,
    "scaled transpose": lambda s, q, k, v: softmax(q @ (k.mT * 0.7)) @ v,
    "scale of sizes": lambda s, q, k, v: softmax(q @ k.mT * (1.0 / math.sqrt(k.size(-1)))) @ v,
    "operands scaled by sizes": lambda s, q, k, v: softmax((q * q.size(-1) ** -0.5) @ (k / k.size(1) ** 0.25).mT) @ v,
    "scale in a buffer": lambda s, q, k, v: softmax(q @ k.mT / s.scale) @ v,
    "in place": lambda s, q, k, v: softmax((q @ k.mT).mul_(0.5).masked_fill_(~s.seen, -math.inf)) @ v,
    "dropout at rest": lambda s, q, k, v: F.dropout(softmax(q @ k.mT), 0.1, s.training) @ v,
    "cast": lambda s, q, k, v: F.softmax(q @ k.mT, -1, dtype=torch.float32).to(q.dtype) @ v,
    "three dimensions": lambda s, q, k, v: torch.bmm(softmax(torch.bmm(q[0], k[0].mT) * 0.5), v[0]),
    "baddbmm": lambda s, q, k, v: torch.bmm(softmax(torch.baddbmm(s.floats[0], q[0], k[0].mT)), v[0]),
    "einsum": lambda s, q, k, v: torch.einsum(
        "bhts,bhse->bhte", softmax(torch.einsum("bhtd,bhsd->bhts", q, k) * 0.5), v
    ),
    "einsum, heads inside": lambda s, q, k, v: torch.einsum(
        "bhts,bshe->bthe",
        softmax(torch.einsum("bthd,bshd->bhts", q.transpose(1, 2), k.transpose(1, 2))),
        v.transpose(1, 2),
    ),
    "einsum, operands swapped": lambda s, q, k, v: torch.einsum(
        "bhse,bhts->bhte", v, softmax(torch.einsum("bhsd,bhtd->bhts", k, q))
    ),
    "added mask": lambda s, q, k, v: softmax(q @ k.mT / 3 + s.floats) @ v,
    "mask before": lambda s, q, k, v: softmax(s.floats + q @ k.mT) @ v,
    "two masks": lambda s, q, k, v: softmax(q @ k.mT + s.floats + torch.where(s.seen, 0.0, -1e9)) @ v,
    "masked_fill": lambda s, q, k, v: softmax((q @ k.mT).masked_fill(s.seen == 0, -math.inf)) @ v,
    "masked_fill of 1e9": lambda s, q, k, v: softmax((q @ k.mT * 0.5).masked_fill(~s.seen, -1e9)) @ v,
    "where": lambda s, q, k, v: softmax(torch.where(s.seen, q @ k.mT, LOW)) @ v,
    "where hidden": lambda s, q, k, v: softmax(torch.where(~s.seen, -math.inf, q @ k.mT)) @ v,
    "fill and add": lambda s, q, k, v: softmax((q @ k.mT + s.floats).masked_fill(~s.seen, -math.inf)) @ v,
    "alibi": lambda s, q, k, v: merged(s, q, k, v, s.floats),
    "alibi, mask without batch": lambda s, q, k, v: merged(s, q, k, v, s.floats[0]),
    "alibi, mask of a head": lambda s, q, k, v: merged(s, q, k, v, s.floats.expand(-1, 4, -1, -1)),
    "repeated heads": lambda s, q, k, v: softmax(q @ repeat(k[:, :2]).mT * 0.5) @ repeat(v[:, :2]),
    "interleaved heads": lambda s, q, k, v: F.scaled_dot_product_attention(
        q, k[:, :2].repeat_interleave(2, 1), torch.repeat_interleave(v[:, :2], 2, dim=1)
    ),
}


def repeat(k):
    b, g, s, d = k.shape
    return k[:, :, None, :, :].expand(b, g, 2, s, d).reshape(b, g * 2, s, d)


def merged(s, q, k, v, mask, beta=1.0, split=None):
    """As BLOOM has it: products of all heads in one batch, a bias within the first, a mask in its own shape."""
    b, h, t, d = q.shape
    a, c, e = (x.reshape(b * h, -1, d) for x in (q, k, v))
    bias = s.floats[0, 0, :1].expand(b * h, 1, -1)
    scores = torch.baddbmm(bias, batch1=a, batch2=c.transpose(1, 2), beta=beta, alpha=0.3)
    weights = softmax(scores.view(*(split or (b, h)), t, t) + mask)
    return torch.bmm(weights.view(b * h, t, -1), e).view(b, h, t, d)


def members():
    scale = torch.tensor(2.5)
    return {"seen": SEEN, "floats": FLOATS, "scale": scale, "softmax": nn.Softmax(-1)}


def attentions(gm):
    return [node for node in gm.graph.nodes if node.target is ATTENTION]


@pytest.mark.parametrize("name", SPELLINGS)
def test_spellings(staged, model_of, name):
    gm, ctx = staged(model_of(SPELLINGS[name], **members()), HEADS, "recognize-attention")
    before = gm(*HEADS)
    run((recognize_attention.PASS,), gm, ctx)
    (node,) = attentions(gm)
    assert node.args[6] is (not name.startswith("torch") and name != "interleaved heads")
    left = {"softmax", "matmul", "bmm", "einsum", "baddbmm", "masked_fill", "scaled_dot_product_attention"}
    assert left.isdisjoint(str(getattr(n.target, "__name__", n.target)) for n in gm.graph.nodes)
    torch.testing.assert_close(gm(*HEADS), before, rtol=1e-4, atol=1e-5)
    assert recognize_attention.PASS.run(gm, ctx) == 0
    if "heads" in name and "inside" not in name:
        assert node.args[1].meta["value"].shape[1] == 2
    if name in ("masked_fill", "where hidden", "in place"):
        assert node.args[3].meta["value"].dtype == torch.bool
    factors = {"torch, q scaled": 0.3, "operators": 1 / math.sqrt(8), "scaled operands": 0.35, "scale in a buffer": 0.4}
    if name in factors:
        assert node.args[5] == pytest.approx(factors[name])


OTHERS = {
    "softmax over queries": lambda s, q, k, v: torch.softmax(q @ k.mT, -2) @ v,
    "weights returned": lambda s, q, k, v: (lambda p: (p @ v, p))(softmax(q @ k.mT)),
    "scores returned": lambda s, q, k, v: (lambda x: (softmax(x) @ v, x))(q @ k.mT),
    "weights changed": lambda s, q, k, v: (softmax(q @ k.mT) * 0.5) @ v,
    "dropout": lambda s, q, k, v: F.dropout(softmax(q @ k.mT), 1.0, True) @ v,
    "torch, dropout": lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=1.0),
    "product with weights second": lambda s, q, k, v: v.mT @ softmax(q @ k.mT),
    "scaled mask": lambda s, q, k, v: softmax((q @ k.mT + s.floats) * 0.5) @ v,
    "high fill": lambda s, q, k, v: softmax((q @ k.mT).masked_fill(~s.seen, -5.0)) @ v,
    "mask with more rows": lambda s, q, k, v: softmax(q[:1] @ k[:1].mT + s.floats) @ v,
    "gate": lambda s, q, k, v: softmax(torch.sigmoid(q @ k.mT)) @ v,
    "matrices": lambda s, q, k, v: softmax(q[0, 0] @ k[0, 0].mT) @ v[0, 0],
    "heads of v": lambda s, q, k, v: softmax(q[:, :1] @ k[:, :1].mT) @ v,
    "q changed in between": lambda s, q, k, v: (lambda a, x: (a[:, 0].zero_(), softmax(x) @ v, a))(
        *(lambda a: (a, a @ k.mT))(q * 1.5)
    )[1],
    "scaled bias": lambda s, q, k, v: merged(s, q, k, v, s.floats, beta=0.5),
    "a split of unknown size": lambda s, q, k, v: merged(s, q, k, v, s.floats, split=(-1, 4)),
    "tanh": lambda s, q, k, v: softmax(torch.tanh(q @ k.mT / 50) * 50) @ v,
    "double softmax": lambda s, q, k, v: softmax(softmax(q @ k.mT)) @ v,
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_attention_is_left_alone(staged, model_of, name):
    gm, ctx = staged(model_of(OTHERS[name], **members()), HEADS, "recognize-attention")
    before = str(gm.graph)
    run((recognize_attention.PASS,), gm, ctx)
    assert not attentions(gm)
    assert str(gm.graph) == before


@pytest.mark.parametrize("fill", [-math.inf, LOW])
def test_a_query_without_a_key_is_as_it_was_spelled(staged, model_of, fill):
    seen = SEEN.clone()
    seen[2] = False
    by_hand = model_of(lambda s, q, k, v: softmax((q @ k.mT).masked_fill(~s.seen, fill)) @ v, seen=seen)
    torchs = model_of(lambda s, q, k, v: F.scaled_dot_product_attention(q, k, v, s.seen), seen=seen)
    for model in (by_hand, torchs):
        gm, ctx = staged(model, HEADS, "recognize-attention")
        expected = model(*HEADS)
        run((recognize_attention.PASS,), gm, ctx)
        torch.testing.assert_close(gm(*HEADS), expected, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert len(attentions(gm)) == 1
