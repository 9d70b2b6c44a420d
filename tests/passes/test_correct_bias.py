"""correct_bias: products whose integers have a mean error lose it; where that does not pay, nothing changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.fake_quantize import FakeQuantize
from fxq.inputs import Call
from fxq.observers import Percentile
from fxq.pipeline import run
from fxq.recipe import Recipe
from fxq.sampling import Sample
from fxq.simulation import Simulation, calibrated_products, rows_of
from passes import correct_bias
from passes.fit_products import FitProducts

PASS = FitProducts((correct_bias.METHOD,))
PLAIN = {"balance": False, "round_weights": None}


def far_from_zero(rows=512, width=16):
    """Rows whose mean is large beside what varies, so that rounding errors of weights have a mean."""
    return 4 + torch.rand(rows, width)


def biases(gm):
    return {name: tensor for name, tensor in gm.named_buffers() if "bias_corrected" in name}


def mean_error(gm, ctx, expected):
    """Of each channel of the only product, over the examples; expected: what it gives in float."""
    simulation = Simulation(gm, ctx)
    (node,) = calibrated_products(gm, Recipe())
    for _ in simulation.stops({node}, ""):
        (rounded,) = simulation.values(node)[1]
    return rows_of(node, expected - rounded).mean(0)


@pytest.mark.parametrize("how", ["empirical", "analytic"])
def test_the_mean_error_goes(staged, text, how):
    x = far_from_zero()
    gm, ctx = staged(nn.Linear(16, 8), x, "fit-products", Recipe(correct_bias=how, **PLAIN))
    assert text(gm).splitlines()[2] == "%2 = linear(%0, %1, bias)"
    expected = gm(x)
    before = mean_error(gm, ctx, expected)
    run((PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    assert text(gm).splitlines()[2] == "%2 = linear(%0, %1, weight_bias_corrected)"
    assert mean_error(gm, ctx, expected).abs().max() < (1e-5 if how == "empirical" else 0.5 * before.abs().max())
    (decision,) = ctx.report.decisions
    assert decision.detail.startswith("bias corrected: ")
    assert PASS.run(gm, ctx) == 0, "idempotent"


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(4, 8, 3),
        lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False),
        lambda: nn.Conv1d(4, 8, 3, stride=2),
        lambda: nn.ConvTranspose2d(4, 6, 2, 2, groups=2),
    ],
    ids=["conv", "depthwise", "conv1d", "transposed"],
)
def test_both_ways_agree_where_only_weights_err(staged, make):
    """On inputs that integers hold exactly."""
    model = make()
    x = torch.randint(0, 256, (16, 4, *[8] * (model.weight.dim() - 2))).float()
    x[0].fill_(0)
    x[1].fill_(255)
    found = {}
    for how in ("empirical", "analytic"):
        gm, ctx = staged(model, x, "fit-products", Recipe("w8a8", "min_max", correct_bias=how, **PLAIN))
        before = mean_error(gm, ctx, gm(x))
        assert PASS.run(gm, ctx) == 1
        (bias,) = biases(gm).values()
        found[how] = bias - (0 if model.bias is None else model.bias.detach())
        assert (found[how] - before).abs().max() < 0.3 * before.abs().max()
    assert torch.allclose(found["empirical"], before)


def test_it_pays_on_unseen_data_and_can_be_switched_off():
    layers = (nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU())
    model = nn.Sequential(*layers, nn.Conv2d(16, 8, 1)).eval()
    data, unseen = [torch.rand(4, 3, 12, 12) + 1 for _ in range(8)], torch.rand(16, 3, 12, 12) + 1
    reached = {}
    for how in (None, "analytic", "empirical"):
        qmodel = fxq.quantize(model, data[0], calibration_data=data, recipe=Recipe(correct_bias=how, **PLAIN))
        reached[how] = sqnr(model(unseen), qmodel(unseen))
        assert ("bias corrected" in str(fxq.report(qmodel))) == (how is not None)
    assert reached["empirical"] > reached[None] + 0.3
    assert reached["analytic"] > reached[None]


def test_errors_from_above_are_seen(staged):
    """The second product's weight is exact: its error is the first one's, which clipping gives a mean."""
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8, bias=False))
    model[2].weight.data = torch.eye(8)
    x = torch.randn(512, 8)
    gm, ctx = staged(model, x, "fit-products", Recipe(observer="percentile", **PLAIN))
    [module for module in gm.modules() if isinstance(module, Percentile)][1].tail = 0.05
    assert PASS.run(gm, ctx)
    second = biases(gm)["2.weight_bias_corrected"]
    assert second.min() > 0 and second.max() > 1e-3, "what was cut off above is given back"


def test_each_call_of_a_shared_module_gets_a_bias_of_its_own(staged, model_of):
    model = model_of(lambda s, x: s.l(F.relu(s.l(x)) + 3), l=nn.Linear(16, 16))
    gm, ctx = staged(model, far_from_zero(), "fit-products", Recipe(**PLAIN))
    before = model.l.bias.detach().clone()
    assert PASS.run(gm, ctx) == 2
    assert len(biases(gm)) == 2
    assert torch.equal(gm.get_parameter("l.bias"), before)


def test_no_gain_no_change(staged, text):
    """Weights and inputs that integers hold exactly."""
    model = nn.Linear(8, 8, bias=False)
    model.weight.data = 127 * torch.eye(8)
    x = torch.randint(0, 256, (64, 8)).float()
    x[0], x[1] = 0, 255
    gm, ctx = staged(model, x, "fit-products", Recipe(observer="min_max", **PLAIN))
    before = text(gm)
    assert PASS.run(gm, ctx) == 0
    assert text(gm) == before


def test_an_output_that_would_lose_keeps_all_biases(staged, text, monkeypatch):
    gm, ctx = staged(nn.Linear(16, 8), far_from_zero(), "fit-products", Recipe(**PLAIN))
    before = text(gm)
    monkeypatch.setattr(Simulation, "_gain", lambda self, output: -1.0)
    assert PASS.run(gm, ctx) == 0
    assert text(gm) == before
    assert "the output would lose 1.00 dB" in ctx.report.notes[0]
    assert ctx.report.decisions[0].detail == ""


def test_a_single_row_is_no_data(staged):
    gm, ctx = staged(nn.Linear(16, 8), far_from_zero(1), "fit-products", Recipe(**PLAIN))
    assert PASS.run(gm, ctx) == 0


def test_a_trained_model_and_one_with_state_are_left_alone(staged, model_of):
    gm, _ = staged(nn.Linear(16, 8), far_from_zero(), "fit-products")
    gm.add_module("trained", FakeQuantize("x"))
    assert calibrated_products(gm, Recipe()) == []

    def count(self, x):
        self.steps.add_(1)
        return self.l(x) + self.steps

    gm, _ = staged(model_of(count, l=nn.Linear(16, 8), steps=torch.zeros(1)), far_from_zero(), "fit-products")
    assert calibrated_products(gm, Recipe()) == []


def test_other_schemes_are_left_alone(staged):
    for scheme in ("w8a8-dynamic", "w8a32"):
        gm, ctx = staged(nn.Linear(16, 8), far_from_zero(), "fit-products", Recipe(scheme))
        assert PASS.run(gm, ctx) == 0


def test_the_same_bits_twice_and_a_golden_model():
    model, data = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval(), far_from_zero().split(64)
    recipe = Recipe(**PLAIN)
    first, second = (fxq.quantize(model, data[0], calibration_data=data, recipe=recipe) for _ in range(2))
    assert "bias corrected" in str(fxq.report(first))
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])
    assert (fxq.golden(first)(data[1].numpy()) == first(data[1]).numpy()).all()


def test_random_numbers_are_drawn_as_before(staged, model_of):
    gm, ctx = staged(nn.Linear(16, 8), far_from_zero(), "fit-products", Recipe(**PLAIN))
    state = torch.random.get_rng_state()
    PASS.run(gm, ctx)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_sample_is_small_and_drawn_from_all():
    sample, again = Sample(), Sample()
    for i in range(200):
        sample.offer(Call((torch.full((2,), float(i)),)))
        again.offer(Call((torch.full((2,), float(i)),)))
    kept = [call.args[0][0].item() for call in sample.calls]
    assert len(kept) == Sample.most and max(kept) > 100
    assert kept == [call.args[0][0].item() for call in again.calls]
    large = Sample()
    for _ in range(5):
        large.offer(Call((torch.zeros(Sample.most_bytes // 8 + 1, dtype=torch.float64),)))
    assert len(large.calls) == 1


def test_unknown_ways_are_refused():
    with pytest.raises(fxq.RecipeError, match="unknown correct_bias 'magic'; there are 'empirical'"):
        Recipe(correct_bias="magic")
