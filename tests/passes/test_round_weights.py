"""round_weights: weights on the grid of their scales, less noise in the product, and what is left alone."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.comparison import sqnr
from fxq.decisions import Report
from fxq.observers import RoundedWeight, WeightObserver
from fxq.pipeline import run
from fxq.recipe import Recipe
from fxq.reconstruction import reconstructed
from fxq.simulation import Simulation, calibrated_products, rows_of
from fxq.tracing.sharing import tensors_of
from passes import correct_bias, round_weights
from passes.fit_products import FitProducts
from passes.round_weights import compensated, damped_hessian

PASS = FitProducts((round_weights.METHOD,))
BOTH = (round_weights.METHOD, correct_bias.METHOD)


def related(rows=512, width=48, rank=12):
    """Rows whose channels have much in common, as in a network."""
    return torch.randn(rows, rank) @ torch.randn(rank, width) + 0.05 * torch.randn(rows, width)


@pytest.fixture(params=[compensated, reconstructed], ids=["feedback", "adaround"])
def method(request):
    return request.param


@pytest.mark.parametrize("groups", [1, 3])
def test_the_weights_lie_on_the_grid_and_the_product_gains(groups, method):
    x, w = torch.stack([related() for _ in range(groups)]), torch.randn(groups, 16, 48)
    scales = WeightObserver("w", "per_channel").scales_of(w.reshape(-1, 48)).reshape(groups, 16)
    hessian = damped_hessian(x)
    integers = method(w, scales, hessian)
    assert integers.dtype == torch.int8 and integers.min() >= -127
    found = integers * scales[:, :, None]
    nearest = (w / scales[:, :, None]).round() * scales[:, :, None]
    assert sqnr(x @ w.mT, x @ found.mT) > sqnr(x @ w.mT, x @ nearest.mT) + 3
    for i in range(groups):
        alone = method(w[i : i + 1], scales[i : i + 1], hessian[i : i + 1])
        assert (alone[0] != integers[i]).float().mean() < 0.01, "groups do not mix"


@pytest.mark.parametrize("exponent", [-120, -70, 0, 70, 110])
def test_how_large_the_inputs_are_changes_nothing(exponent, method):
    """Their squares are no float32 numbers."""
    x, w = related()[None], torch.randn(1, 16, 48)
    scales = WeightObserver("w", "per_channel").scales_of(w[0])[None]
    scaled = torch.ldexp(x, torch.tensor(exponent))
    assert torch.equal(method(w, scales, damped_hessian(scaled)), method(w, scales, damped_hessian(x)))


def test_no_input_nearest_weights(method):
    w = torch.randn(1, 4, 8)
    scales = WeightObserver("w", "per_channel").scales_of(w[0])[None]
    found = method(w, scales, damped_hessian(torch.zeros(1, 5, 8)))
    assert torch.equal(found.float(), (w / scales[..., None]).round())


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.Linear(6, 4), (5, 7, 6)),
        (lambda: nn.Conv2d(4, 6, (3, 2), (2, 1), (1, 0), (1, 2)), (5, 4, 9, 8)),
        (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=2), (5, 4, 6, 6)),
        (lambda: nn.Conv1d(4, 4, 3, groups=4), (5, 4, 12)),
        (lambda: nn.Conv3d(2, 3, 2), (3, 2, 4, 4, 4)),
    ],
    ids=["linear", "conv2d", "groups", "depthwise", "conv3d"],
)
def test_windows_times_weights_are_the_product(staged, make, shape, monkeypatch):
    """All of them, in order, since more rows are asked for than there are."""
    monkeypatch.setattr(round_weights, "ROWS", 10**6)
    model, x = make(), torch.randn(shape)
    gm, ctx = staged(model, x, "fit-products", Recipe(balance=False))
    simulation, (node,) = Simulation(gm, ctx), calibrated_products(gm, ctx.recipe)
    w = model.weight.detach()
    for _ in simulation.stops({node}, ""):
        exact, _ = round_weights._windows(node, w, simulation)
    y = (exact @ round_weights._grouped(node, w).mT).transpose(0, 1).flatten(1) + model.bias
    assert torch.allclose(y, rows_of(node, model(x)), atol=1e-5)


def images(count):
    """Images that are smooth, so that the values in a window have much in common."""
    return F.interpolate(torch.randn(count, 8, 5, 5), size=12, mode="bilinear")


def test_convolutions():
    model, data, unseen = nn.Conv2d(8, 8, 3).eval(), [images(8) for _ in range(4)], images(16)
    plain, qmodel = (
        fxq.quantize(model, data[0], calibration_data=data, recipe=Recipe(round_weights=rounded, observer="min_max"))
        for rounded in (None, "feedback")
    )
    assert "rounded together" in str(fxq.report(qmodel))
    assert sqnr(model(unseen), qmodel(unseen)) > sqnr(model(unseen), plain(unseen)) + 0.1
    assert (fxq.golden(qmodel)(unseen.numpy()) == qmodel(unseen).numpy()).all()


def test_adaround_takes_neighbours_only():
    """Each weight goes down or up, and the same run gives the same."""
    x, w = related()[None], torch.randn(1, 16, 48)
    scales = WeightObserver("w", "per_channel").scales_of(w[0])[None]
    first, second = (reconstructed(w, scales, damped_hessian(x)) for _ in range(2))
    assert torch.equal(first, second)
    assert (first - w / scales[:, :, None]).abs().max() < 1.001


def test_adaround_by_recipe():
    x, unseen = related(768).split([512, 256])
    model = nn.Sequential(nn.Linear(48, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    plain, qmodel = (fxq.quantize(model, x, recipe=Recipe(round_weights=how)) for how in (None, "adaround"))
    assert "rounded by reconstruction: " in str(fxq.report(qmodel))
    assert "rounded together" not in str(fxq.report(qmodel))
    assert sqnr(model(unseen), qmodel(unseen)) > sqnr(model(unseen), plain(unseen)) + 0.2
    assert (fxq.golden(qmodel)(x.numpy()) == qmodel(x).numpy()).all()


def test_products_between_integers(monkeypatch):
    monkeypatch.setattr(round_weights, "LEAST_GAIN", 0.1)
    model = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    qmodel = fxq.quantize(model, related())
    details = [d.detail for d in fxq.report(qmodel).decisions if d.op == "linear"]
    assert sum("rounded together" in detail for detail in details) >= 2


def test_an_output_that_would_lose_keeps_all_weights(staged, text, monkeypatch):
    gm, ctx = staged(nn.Linear(48, 16), related(), "fit-products", Recipe())
    before = text(gm)
    monkeypatch.setattr(Simulation, "_gain", lambda self, output: -1.0)
    assert PASS.run(gm, ctx) == 0
    assert text(gm) == before
    assert not any(isinstance(m, RoundedWeight) for m in gm.modules())
    assert "the output would lose 1.00 dB" in ctx.report.notes[0]


@pytest.mark.parametrize("model", [nn.ConvTranspose2d(4, 4, 2), nn.Conv2d(4, 4, 1, groups=4)])
def test_what_has_nothing_to_cancel_is_left_alone(staged, model):
    gm, ctx = staged(model, torch.randn(8, 4, 6, 6), "fit-products", Recipe())
    assert PASS.run(gm, ctx) == 0


def test_the_pass(staged):
    x, model = related(), nn.Linear(48, 16)
    gm, ctx = staged(model, x, "fit-products", Recipe())
    run((PASS,), gm, ctx)
    assert ctx.timings[-1][1] == 1
    assert [m.scales.shape for m in gm.modules() if isinstance(m, RoundedWeight)] == [(16,)]
    assert "rounded together: " in ctx.report.decisions[0].detail
    assert PASS.run(gm, ctx) == 0


def test_in_float_the_network_is_as_it_was(staged):
    """And no second float weight is held: integers, scales and factors are."""
    x, model = related(), nn.Sequential(nn.Linear(48, 48), nn.Softplus(), nn.Linear(48, 16))
    gm, ctx = staged(model, x, "fit-products", Recipe())
    expected, known = gm(x), {t.data_ptr() for t in tensors_of(gm)}
    assert PASS.run(gm, ctx)
    assert torch.equal(gm(x), expected)
    assert {t.dtype for t in tensors_of(gm) if t.data_ptr() not in known and t.dim() > 1} == {torch.int8}


def test_the_last_method_is_taken_back_first(staged, monkeypatch):
    monkeypatch.setattr(correct_bias, "LEAST_GAIN", -100.0)
    both = FitProducts(BOTH)
    gains = iter((-1.0, 0.5))
    monkeypatch.setattr(Simulation, "_gain", lambda self, outputs: next(gains))
    gm, ctx = staged(nn.Linear(48, 16), related(), "fit-products", Recipe())
    assert both.run(gm, ctx) == 1
    assert [note.split(":")[0] for note in ctx.report.notes] == ["correct-bias"]
    assert any(isinstance(m, RoundedWeight) for m in gm.modules())
    assert not any("corrected" in str(node.target) for node in gm.graph.nodes)


@pytest.mark.parametrize("last", [0.5, -1.0])
def test_where_all_is_taken_back_the_last_method_is_tried_by_itself(staged, text, monkeypatch, last):
    """It was fitted to what the first had made of the products."""
    monkeypatch.setattr(correct_bias, "LEAST_GAIN", -100.0)
    both = FitProducts(BOTH)
    gains = iter((-1.0, -2.0, last))
    monkeypatch.setattr(Simulation, "_gain", lambda self, outputs: next(gains))
    gm, ctx = staged(nn.Linear(48, 16), related(), "fit-products", Recipe())
    before = text(gm)
    assert both.run(gm, ctx) == (last > 0)
    assert not any(isinstance(m, RoundedWeight) for m in gm.modules())
    assert (text(gm) != before) == (last > 0) == ("corrected" in text(gm))
    assert ("correct-bias" in ctx.report.seconds) == (last > 0)
    refused = ["round-weights"] if last > 0 else ["correct-bias", "round-weights"]
    assert sorted(note.split(":")[0] for note in ctx.report.notes) == refused


def test_what_was_fitted_beside_a_method_that_goes_is_fitted_again(staged, monkeypatch):
    """To what the products before give without it."""
    correct = correct_bias._correct
    monkeypatch.setattr(correct_bias, "LEAST_GAIN", -100.0)
    monkeypatch.setattr(correct_bias, "_correct", lambda gm, product, shift: correct(gm, product, shift - 2))
    model, x = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 16)), related() + 3
    found = []
    for methods, gains in (((round_weights.METHOD,), [0.5]), (BOTH, [-1.0, 0.5]), (BOTH, [0.5])):
        left = iter(gains)
        monkeypatch.setattr(Simulation, "_gain", lambda self, outputs, left=left: next(left))
        gm, ctx = staged(copy.deepcopy(model), x, "fit-products", Recipe())
        assert FitProducts(methods).run(gm, ctx)
        found.append([module.integers for module in gm.modules() if isinstance(module, RoundedWeight)])
    alone, again, beside = found
    assert len(alone) == len(again) == 2 and all(map(torch.equal, alone, again))
    assert len(beside) == 1, "behind such a bias the second does not gain"


def test_what_has_lost_is_not_tried_twice(staged, monkeypatch):
    """Where the biases did not change, the weights have been tried by themselves."""
    runs = []
    monkeypatch.setattr(correct_bias, "LEAST_GAIN", 100.0)
    monkeypatch.setattr(Simulation, "_gain", lambda self, outputs: runs.append(self) or -1.0)
    gm, ctx = staged(nn.Linear(48, 16), related(), "fit-products", Recipe())
    assert FitProducts(BOTH).run(gm, ctx) == 0
    assert len(runs) == 2, "with both, and with the biases alone"


def test_without_changes_the_network_runs_once(staged, monkeypatch):
    runs = []
    monkeypatch.setattr(round_weights, "LEAST_GAIN", 100.0)
    monkeypatch.setattr(correct_bias, "LEAST_GAIN", 100.0)
    monkeypatch.setattr(Simulation, "_judge", lambda self, output: runs.append(output))
    gm, ctx = staged(nn.Linear(48, 16), related(), "fit-products", Recipe())
    assert FitProducts(BOTH).run(gm, ctx) == 0
    assert len(runs) == 1


def test_times_and_progress_are_shown(capsys):
    model, x = nn.Sequential(nn.Linear(48, 48), nn.Softplus(), nn.Linear(48, 16)).eval(), related()
    qmodel = fxq.quantize(model, x, progress=True)
    bars = capsys.readouterr().err
    assert all(what in bars for what in ("balancing", "scaling rows", "fitting weights and biases"))
    count, seconds = qmodel.report.seconds["round-weights"]
    assert count and seconds > 0
    changes = "1 change" if count == 1 else f"{count} changes"
    assert f"round-weights: {changes} in {seconds:.2f} s" in str(qmodel.report)
    assert Report.from_dict(json.loads(json.dumps(qmodel.report.to_dict()))).seconds == qmodel.report.seconds


def test_it_pays_and_can_be_switched_off(tmp_path):
    x, unseen = related(768).split([512, 256])
    model = nn.Linear(48, 16).eval()
    plain = fxq.quantize(model, x, recipe=Recipe(round_weights=None))
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
    gm, ctx = staged(model, related(), "fit-products", Recipe())
    assert PASS.run(gm, ctx) == 0


def test_no_gain_no_change(staged):
    gm, ctx = staged(nn.Linear(48, 16), torch.eye(48).repeat(4, 1), "fit-products", Recipe())
    assert PASS.run(gm, ctx) == 0


def test_a_product_too_long_for_the_matrices_is_left_alone(staged, monkeypatch):
    monkeypatch.setattr(round_weights, "MAX_K", 47)
    gm, ctx = staged(nn.Linear(48, 16), related(), "fit-products", Recipe())
    assert PASS.run(gm, ctx) == 0
