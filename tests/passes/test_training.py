"""make_trainable and end_training: there and back, to the graph that calibration would have had."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxq
from fxq.pipeline import run
from fxq.recipe import Recipe
from passes import end_training, make_trainable

X = torch.randn(16, 8)
NO_BALANCE = Recipe(balance=False)


def norm(n):
    norm = nn.BatchNorm1d(n)
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2)
    return norm


@pytest.fixture
def texts(text, staged):
    """A model's graph as it trains, as it is after training, and as calibration has it."""

    def make(model, x=X):
        gm = fxq.prepare_qat(model, x, recipe=NO_BALANCE).eval()
        training = text(gm)
        run((end_training.PASS,), gm, gm.meta["fxq"])
        observed, _ = staged(model, x, "end-training")
        return training, text(gm), text(observed)

    return make


def test_there_and_back(texts):
    model = nn.Sequential(nn.Linear(8, 6), norm(6), nn.ReLU(), nn.Dropout(), nn.Linear(6, 4), norm(4), norm(4))
    training, after, observed = texts(model)
    assert training == (
        "%0 = observers.input_1_0(input)\n"
        "%1 = 1(%0, 0.weight, 0.bias)\n"
        "%2 = relu(%1)\n"
        "%3 = observers._2_relu_1(%2)\n"
        "%4 = dropouts._3(%3)\n"
        "%5 = 5(%4, 4.weight, 4.bias)\n"
        "%6 = 6(%5)\n"
        "return %6"
    )
    assert after == (
        "%0 = observers.input_1_0(input)\n"
        "%1 = 1.fake_quantize(0.weight_folded)\n"
        "%2 = linear(%0, %1, 0.bias_folded)\n"
        "%3 = relu(%2)\n"
        "%4 = observers._2_relu_1(%3)\n"
        "%5 = 5.fake_quantize(4.weight_folded)\n"
        "%6 = linear(%4, %5, 4.bias_folded)\n"
        "%7 = batch_norm(%6, 6.running_mean, 6.running_var, 6.weight, 6.bias, False, 0.1, 1e-05)\n"
        "return %7"
    )
    assert observed.count("linear(") == 2  # the same, but for the norm behind a norm, which calibration folds too


def test_without_norms_the_graph_is_that_of_calibration(texts):
    training, after, observed = texts(nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)))
    assert training == after == observed


def test_parts_and_transposes_of_parameters_are_read_through_them(texts, model_of):
    w = nn.Parameter(torch.randn(8, 8))
    model = model_of(lambda s, x: F.linear(F.relu(x @ s.w), s.v[2:6]), w=w, v=nn.Parameter(torch.randn(8, 8)))
    training, after, observed = texts(model)
    assert training.count("as_strided(w, (8, 8), (1, 8), 0)") == 1
    assert training.count("as_strided(v, (4, 8), (8, 1), 16)") == 1
    assert "as_strided" not in after
    assert after.count("linear") == observed.count("linear") == 2


def test_a_dropout_between_a_float_island_and_a_product(texts):
    """Its observer moves before it: what the product reads in eval mode."""
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Dropout(0.9), nn.Linear(6, 4))
    training, after, _ = texts(model)
    lines = training.splitlines()
    at = next(i for i, line in enumerate(lines) if "dropouts" in line)
    assert "observers" in lines[at - 1]
    assert lines[at - 2].endswith("= 1(%2)")  # the tanh
    assert "dropouts" not in after


def test_one_observer_of_several_stays_behind_its_dropout(texts, model_of):
    model = model_of(lambda s, x: (s.a(y := s.d(torch.tanh(x))), y), a=nn.Linear(8, 4), d=nn.Dropout())
    training, _, _ = texts(model)
    lines = training.splitlines()
    at = next(i for i, line in enumerate(lines) if "dropouts" in line)
    assert any("observers" in line for line in lines[at:])


def test_a_norm_that_two_calls_share_is_not_folded(texts, model_of):
    model = model_of(lambda s, x: s.n(s.a(x)) + s.n(s.b(x)), a=nn.Linear(8, 4), b=nn.Linear(8, 4), n=norm(4))
    training, after, _ = texts(model)
    assert training.count("= n(") == 2
    assert after.count("batch_norm(") == 2


def test_a_graph_that_was_not_trained_stays_as_it_is(staged):
    gm, ctx = staged(nn.Sequential(nn.Linear(8, 6), norm(6), nn.Dropout(), nn.Linear(6, 4)), X, "end-training")
    assert end_training.PASS.run(gm, ctx) == 0


def test_nothing_is_left_of_the_folded_constants():
    gm = fxq.prepare_qat(nn.Sequential(nn.Linear(8, 6), norm(6)), X)
    assert not any("folded" in name for name in gm.state_dict())
    assert make_trainable.PASS.run(gm.eval(), gm.meta["fxq"]) == 0
