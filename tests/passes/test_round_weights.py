"""round_weights: weights on the grid of their scales, less noise in the product, and what is left alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.observers import FixedScales, WeightObserver
from fxq.pipeline import run
from fxq.recipe import Recipe
from passes import round_weights
from passes.round_weights import compensated


def related(rows=512, width=48, rank=12):
    """Rows whose channels have much in common, as in a network."""
    return torch.randn(rows, rank) @ torch.randn(rank, width) + 0.05 * torch.randn(rows, width)


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_the_weights_lie_on_the_grid_and_the_product_gains(granularity):
    x, w = related(), torch.randn(16, 48)
    observer = WeightObserver("w", granularity)
    scales = observer.scales_of(w)
    found = compensated(w, scales, x)
    steps = found / (scales[:, None] if len(scales) > 1 else scales)
    assert (steps - steps.round()).abs().max() < 1e-4
    assert steps.abs().max() < 127.01
    nearest = (w / (scales[:, None] if len(scales) > 1 else scales)).round() * scales.reshape(-1, 1)
    assert sqnr(x @ w.t(), x @ found.t()) > sqnr(x @ w.t(), x @ nearest.t()) + 3


def test_no_input_no_change():
    w = torch.randn(4, 8)
    scales = WeightObserver("w", "per_channel").scales_of(w)
    assert torch.equal(compensated(w, scales, torch.zeros(5, 8)), w)


def test_the_pass(staged):
    x, model = related(), nn.Linear(48, 16)
    gm, ctx = staged(model, x, "round-weights", Recipe())
    run((round_weights.PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    assert [m.scales.shape for m in gm.modules() if isinstance(m, FixedScales)] == [(16,)]
    assert "rounded together: " in ctx.report.decisions[0].detail
    assert round_weights.PASS.run(gm, ctx) == 0


def test_it_pays_and_can_be_switched_off(tmp_path):
    x, unseen = related(768).split([512, 256])
    model = nn.Linear(48, 16).eval()
    plain = fxq.quantize(model, x, recipe=Recipe(round_weights=False))
    qmodel = fxq.quantize(model, x)
    alone = fxq.quantize(model, x, recipe=Recipe(balance=False))
    assert "rounded" not in str(fxq.report(plain))
    for better in (qmodel, alone):
        assert sqnr(model(unseen), better(unseen)) > sqnr(model(unseen), plain(unseen)) + 0.3
        assert "rounded together" in str(fxq.report(better))
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()


def test_a_weight_with_another_reader_is_left_alone(staged, model_of):
    first, second = nn.Linear(48, 48), nn.Linear(48, 48)
    second.weight = first.weight
    model = model_of(lambda s, x: s.l(x) + s.k(F.softplus(x)), l=first, k=second)
    gm, ctx = staged(model, related(), "round-weights", Recipe())
    assert round_weights.PASS.run(gm, ctx) == 0


def test_no_gain_no_change(staged):
    gm, ctx = staged(nn.Linear(48, 16), torch.eye(48).repeat(4, 1), "round-weights", Recipe())
    assert round_weights.PASS.run(gm, ctx) == 0


def test_a_product_too_long_for_the_matrices_is_left_alone(staged, monkeypatch):
    monkeypatch.setattr(round_weights, "MAX_K", 47)
    gm, ctx = staged(nn.Linear(48, 16), related(), "round-weights", Recipe())
    assert round_weights.PASS.run(gm, ctx) == 0
