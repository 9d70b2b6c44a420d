"""scale_rows: hopeless edges go to their rows, with or without factors of balance; all others stay as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.observers import Edge, Fixed, Rows, WeightObserver
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.pipeline import run
from fxq.recipe import Recipe
from passes import balance, round_weights, scale_rows
from passes.fit_products import FitProducts


def uneven(rows=256, width=32):
    """Rows of which every eighth is far larger than the rest."""
    x = torch.randn(rows, width)
    x[::8] *= 100
    return x


def edges(gm):
    return [type(m) for m in gm.modules() if isinstance(m, Edge | Fixed | Rows)]


def test_a_hopeless_edge_is_given_to_its_rows(staged):
    x = uneven()
    gm, ctx = staged(nn.Linear(32, 16), x, "scale-rows", Recipe(balance=False))
    expected = gm(x)
    run((scale_rows.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    assert torch.equal(gm(x), expected)
    assert edges(gm) == [Rows]
    (decision,) = ctx.report.decisions
    assert decision.scheme == "w8a8-dynamic"
    assert decision.detail.startswith("rows by themselves: ")
    assert scale_rows.PASS.run(gm, ctx) == 0, "idempotent"


def test_the_factors_of_balance_go_and_the_weight_is_what_it_was(staged):
    x = uneven()
    x[:, :3] *= 60
    gm, ctx = staged(nn.Linear(32, 16), x, "balance", Recipe())
    weight = next(p for p in gm.parameters() if p.dim() == 2).detach().clone()
    expected = gm(x)
    run((balance.PASS,), gm, ctx)
    assert [name for name, _ in gm.named_buffers() if name.endswith("_factors")], "otherwise this tests nothing"
    run((scale_rows.PASS,), gm, ctx)
    assert edges(gm) == [Rows]
    assert torch.equal(gm(x), expected)
    (observer,) = [m for m in gm.modules() if isinstance(m, WeightObserver)]
    assert observer.factors is None and torch.equal(observer(weight), weight)


def test_samples_of_rows_go_whatever_it_does(staged):
    for recipe in (Recipe(balance=False), Recipe(balance=False, scale_rows=False)):
        gm, ctx = staged(nn.Linear(32, 16), torch.randn(64, 32), "scale-rows", recipe)
        (edge,) = [m for m in gm.modules() if isinstance(m, Edge)]
        assert len(edge.rows) == 64
        assert scale_rows.PASS.run(gm, ctx) == 0
        assert not len(edge.rows)


def test_its_weights_are_rounded_together(staged):
    x = uneven(1024, 4) @ torch.randn(4, 32)
    gm, ctx = staged(nn.Linear(32, 16), x, "scale-rows", Recipe(balance=False))
    run((scale_rows.PASS, FitProducts((round_weights.METHOD,))), gm, ctx)
    assert edges(gm) == [Rows]
    assert "rounded together" in ctx.report.decisions[0].detail


def shared():
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    return {"l": first, "k": second}


@pytest.mark.parametrize(
    ("why", "forward", "members", "recipe"),
    [
        ("switched off", lambda s, x: s.l(x), {}, Recipe(balance=False, scale_rows=False)),
        ("fixed point has no float scales", lambda s, x: s.l(x), {}, Recipe(balance=False, requant="fixed")),
        ("integers read the result", lambda s, x: s.k(F.relu(s.l(x))), {}, Recipe(balance=False)),
        ("the weight has another reader", lambda s, x: s.l(x) + s.k(x * 2), shared(), Recipe(balance=False)),
        ("rows alike", lambda s, x: s.l(x / x.norm(dim=-1, keepdim=True)), {}, Recipe(balance=False)),
    ],
)
def test_it_keeps_away(staged, model_of, why, forward, members, recipe):
    members = members or {"l": nn.Linear(32, 32), "k": nn.Linear(32, 32)}
    gm, ctx = staged(model_of(forward, **members), uneven(), "scale-rows", recipe)
    assert scale_rows.PASS.run(gm, ctx) == 0, why
    assert Rows not in edges(gm)


def test_attention_keeps_its_integers(staged, model_of):
    """q, k and v are read as integers, so the linears that make them have a static range."""

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (self.q(x), self.k(x), self.v(x)))
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    model = model_of(forward, **{name: nn.Linear(32, 32) for name in ("q", "k", "v", "out")})
    gm, ctx = staged(model, uneven().reshape(8, 32, 32), "scale-rows", Recipe(balance=False))
    assert scale_rows.PASS.run(gm, ctx) == 0


def test_it_pays_and_no_row_depends_on_another():
    model, x = nn.Linear(32, 8).eval(), uneven()
    static = fxq.quantize(model, x, recipe=Recipe(scale_rows=False), on_low_sqnr="ignore")
    qmodel = fxq.quantize(model, x)
    small = torch.arange(len(x)) % 8 != 0

    def noise(q):
        return (q(x) - model(x))[small].square().mean()

    assert noise(qmodel) < noise(static) / 4
    found = [n for n in qmodel.graph.nodes if n.target is qlinear_dynamic]
    assert found
    assert torch.equal(qmodel(x)[3:5], qmodel(x[3:5]))
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()
