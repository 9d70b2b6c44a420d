"""balance: the same numbers in float, less noise in integers, and weights with other readers left as they are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.observers import Edge, Fixed, WeightObserver
from fxq.pipeline import run
from fxq.recipe import Recipe
from passes import balance


def outliers(rows=64, width=32):
    """Rows with a few channels far larger than the rest, as behind a transformer's norm."""
    x = torch.randn(rows, width)
    x[:, :3] *= 60
    return x


def observers(gm):
    return [m for m in gm.modules() if isinstance(m, Edge | Fixed)]


def test_large_channels_are_divided_out(staged):
    x = outliers()
    gm, ctx = staged(nn.Linear(32, 16), x, "balance", Recipe())
    expected = gm(x)
    run((balance.PASS,), gm, ctx)  # check=True holds it to the same bits
    assert ctx.timings[-1][1] == 1
    assert torch.equal(gm(x), expected)
    (factor,) = [t for name, t in gm.named_buffers() if name.endswith("_factors")]
    assert factor[:3].max() < factor[3:].min()
    assert torch.equal(torch.exp2(torch.log2(factor).round()), factor), "powers of two"
    assert [type(m) for m in observers(gm)] == [Fixed]
    assert balance.PASS.run(gm, ctx) == 0, "idempotent"
    (decision,) = ctx.report.decisions
    assert decision.detail.startswith("balanced: ")


def test_a_single_large_channel_alone_is_lowered(staged):
    x = torch.rand(256, 64)
    x[:, 7] *= 24
    gm, ctx = staged(nn.Linear(64, 16), x, "balance", Recipe())
    run((balance.PASS,), gm, ctx)
    (factor,) = [t for name, t in gm.named_buffers() if name.endswith("_factors")]
    assert factor[7] <= 0.25
    assert (factor[torch.arange(64) != 7] == 1).all()
    (settled,) = observers(gm)
    assert settled.high >= (x * factor).max(), "nothing is clipped"


def test_it_pays_and_can_be_switched_off():
    x = torch.randn(64, 32)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.Softplus(), nn.Linear(32, 8)).eval()
    model[0].weight.data[:3] *= 60
    model[1].weight.data[:, :3] /= 60
    plain = fxq.quantize(model, x, recipe=Recipe(balance=False), on_low_sqnr="ignore")
    balanced = fxq.quantize(model, x)
    assert fxq.report(balanced).sqnr > fxq.report(plain).sqnr + 6
    assert "factors" not in plain.code
    assert "factors" in balanced.code


def test_ranges_that_few_rows_have_shown_reach_further():
    few, many = torch.randn(24, 32), torch.randn(2000, 32)
    channels = torch.randn(32).exp2()
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32)).eval()
    model[0].weight.data *= channels
    model[1].weight.data /= channels
    recipes = (Recipe(balance=on, judge_costs=False) for on in (True, False))
    balanced, plain = (sqnr(model(many), fxq.quantize(model, few, recipe=recipe)(many)) for recipe in recipes)
    assert balanced > plain + 0.5


def test_a_weight_with_another_reader_keeps_its_values(staged, model_of):
    first, second = nn.Linear(32, 32), nn.Linear(32, 32)
    second.weight = first.weight
    model = model_of(lambda s, x: s.l(x) + s.k(F.softplus(x)), l=first, k=second)
    gm, ctx = staged(model, outliers(), "balance", Recipe())
    run((balance.PASS,), gm, ctx)
    assert not [name for name, _ in gm.named_buffers() if "factors" in name]
    assert [type(m) for m in observers(gm)] == [Fixed, Fixed], "the ranges are chosen all the same"


def test_readers_of_one_edge_share_the_factors(staged, model_of):
    model = model_of(lambda s, x: (s.q(x), s.k(x)), q=nn.Linear(32, 16), k=nn.Linear(32, 8))
    gm, ctx = staged(model, outliers(), "balance", Recipe())
    run((balance.PASS,), gm, ctx)
    (factors,) = [t for name, t in gm.named_buffers() if name.endswith("_factors")]
    weights = [m for m in gm.modules() if isinstance(m, WeightObserver)]
    assert len(weights) == 2 and all(weight.factors is factors for weight in weights)


def test_other_observers_are_left_alone(staged):
    gm, ctx = staged(nn.Linear(32, 16), outliers(), "balance", Recipe(observer="min_max"))
    run((balance.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 0


@pytest.mark.parametrize("spoil", ["channel", "weight", "all"])
def test_dead_channels(spoil):
    x, model = outliers(), nn.Linear(32, 16).eval()
    if spoil == "weight":
        model.weight.data[:, 5] = 0
    elif spoil == "channel":
        x[:, 5] = 0
    else:
        x.zero_()
    qmodel = fxq.quantize(model, x)
    assert torch.isfinite(qmodel(x)).all()
    assert fxq.report(qmodel).sqnr > 25


def test_statistics_travel_in_a_state_dict():
    first, second = Edge("x"), Edge("x")
    first(torch.randn(300, 4))
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.rows, first.rows)
    assert torch.equal(second.channel_high, first.channel_high)
    assert len(first.rows) == Edge.from_batch


def test_saved_and_golden(tmp_path):
    x = outliers()
    qmodel = fxq.quantize(nn.Linear(32, 16).eval(), x)
    fxq.save(qmodel, tmp_path / "m.fxq")
    assert torch.equal(fxq.load(tmp_path / "m.fxq")(x), qmodel(x))
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()
