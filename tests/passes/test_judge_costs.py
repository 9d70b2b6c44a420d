"""judge_costs: what takes longer in int8 than in float stays float, and only that, with both predictions."""

import dataclasses

import pytest
import torch
from torch import nn

import fxq
from fxq.decisions import Reason
from fxq.pipeline import run
from passes import PREPARE
from passes.judge_costs import JudgeCosts

JUDGE = JudgeCosts.run  # conftest replaces it
X = torch.randn(32, 16)


@pytest.fixture
def prices(monkeypatch, tmp_path):
    """`prices(f)`: from then on the operation with the key `k` takes `f(k)` us; returns the keys asked for."""
    fxq.kernels.info()
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path))

    def install(price):
        asked = []

        def of(self, key, measure):
            asked.append(key)
            return 1e-6 * price(key)

        monkeypatch.setattr("fxq.costs.Costs.of", of)
        monkeypatch.setattr(JudgeCosts, "run", JUDGE)
        return asked

    return install


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8), nn.Softmax(-1), nn.Linear(8, 4)).eval()


def is_integer(key):
    return key.startswith("fxq.")


def slow_integers(key):
    return 10 if is_integer(key) else 1


def quantize(model, x=X, recipe="w8a8", **options):
    return fxq.quantize(model, x, recipe=recipe, on_low_sqnr="ignore", progress=False, **options)


def forms(qmodel):
    return {decision.node: (decision.form, decision.reason) for decision in qmodel.report.decisions}


def test_what_loses_stays_float_with_both_predictions(model, prices):
    prices(slow_integers)
    qmodel = quantize(model)
    assert qmodel.report.int8_share == 0
    assert torch.equal(qmodel(X), model(X))
    products = [d for d in qmodel.report.decisions if d.macs]
    assert {d.reason for d in products} == {Reason.UNPROFITABLE}
    # a chain of its two linears and their quantize, in float the two and a relu
    assert products[0].detail == "predicted 10.0 us in int8 with its borders, 3.0 us in float"
    text = str(qmodel.report)
    assert "UNPROFITABLE: predicted" in text
    with pytest.raises(fxq.GoldenError, match=r"quantize with Recipe\(judge_costs=False\) what is float for its time"):
        fxq.golden(qmodel)
    assert "stay float for their time on this machine: 4; Recipe(judge_costs=False)" in text


def test_what_gains_becomes_int8(model, prices):
    asked = prices(lambda key: 1 if is_integer(key) else 10)
    assert quantize(model).report.int8_share == 1
    assert not any(key.startswith("softmax") for key in asked)  # it is the same in both


def test_one_island_by_itself(model, prices):
    prices(lambda key: 10 if is_integer(key) and "[32, 8]" in key else 5)
    found = forms(quantize(model))
    assert [form for form, _ in found.values()] == ["int8", "int8", "int8", "float", "float"]
    assert list(found.values())[-1] == ("float", Reason.UNPROFITABLE)


@pytest.mark.parametrize("ours", [1, 30])
def test_an_activation_with_a_weight_keeps_it(prices, ours):
    """The trial in integers leaves the modules that it does not call any more as they are."""
    prices(lambda key: ours if is_integer(key) else 10)
    model = nn.Sequential(nn.Linear(16, 16), nn.PReLU(), nn.Linear(16, 16)).eval()
    assert quantize(model).report.int8_share == (ours == 1)


def test_borders_count(prices):
    layer = nn.Conv2d(3, 4, 3).eval()
    image = torch.randn(2, 3, 8, 8)
    prices(lambda key: 3 if key.startswith("fxq.quantize") else 2 if is_integer(key) else 4)
    assert quantize(layer, image).report.decisions[0].detail.startswith("predicted 5.0 us in int8 with its borders")
    prices(lambda key: 1 if key.startswith("fxq.quantize") else 2 if is_integer(key) else 4)
    assert quantize(layer, image).report.int8_share == 1


def test_an_island_goes_as_a_whole(model_of, prices):

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        return self.c(a + b)

    model = model_of(forward, a=nn.Linear(16, 16), b=nn.Linear(16, 16), c=nn.Linear(16, 16))
    prices(slow_integers)
    assert {decision.form for decision in quantize(model).report.decisions} == {"float"}


def test_small_losses_are_borne(model, prices):
    prices(lambda key: 1.005 if is_integer(key) and "[32, 8]" in key else 1)
    assert quantize(model).report.int8_share == 1


def test_the_switch_and_what_is_not_judged(model, prices):
    asked = prices(slow_integers)
    assert quantize(model, recipe=fxq.Recipe(judge_costs=False)).report.int8_share == 1
    assert quantize(model, recipe=fxq.Recipe(reproducible=True)).report.int8_share == 1
    assert quantize(model, recipe=fxq.Recipe(requant="fixed")).report.int8_share == 1
    assert not asked
    weights = quantize(model, recipe="w8a32").report
    assert [d.form for d in weights.decisions if d.macs] == ["weight"] * 3


def test_dynamic_layers_are_judged(model, prices):
    prices(slow_integers)
    assert quantize(model, recipe="w8a8-dynamic").report.int8_share == 0


def test_strict_names_it_and_nothing_warns(model, prices):
    prices(slow_integers)
    with pytest.raises(fxq.QuantizationError, match=r"stay float:\n.*UNPROFITABLE  predicted"):
        quantize(model, strict=True)


def test_a_second_run_changes_nothing(model, prices, staged):
    prices(slow_integers)
    gm, ctx = staged(model, X, "observe")
    judge = next(step for step in PREPARE if step.name == "judge-costs")
    before, code = list(ctx.report.decisions), gm.code
    run((judge,), gm, ctx)
    assert judge.run(gm, ctx) == 0
    assert (ctx.report.decisions, gm.code) == (before, code)


def test_the_clock_is_read_once(model, monkeypatch, tmp_path):
    fxq.kernels.info()
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path))
    monkeypatch.setattr(JudgeCosts, "run", JUDGE)
    first = quantize(model)
    monkeypatch.setattr("fxq.profiling._price", lambda *_: pytest.fail("measured again"))
    assert forms(quantize(model)) == forms(first)


def test_a_folder_that_cannot_be_written_is_told_of(model, monkeypatch, tmp_path):
    fxq.kernels.info()

    def refuse(*args, **kwargs):
        raise PermissionError("read-only file system")

    monkeypatch.setattr("fxq.costs.tempfile.NamedTemporaryFile", refuse)
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path))
    monkeypatch.setattr("fxq.profiling._price", lambda gm, call, keys: dict.fromkeys(keys.values(), 1e-6))
    monkeypatch.setattr(JudgeCosts, "run", JUDGE)
    assert any("measured anew each time: cannot write" in note for note in quantize(model).report.notes)


def test_portable_kernels_are_not_judged(model, prices, monkeypatch):
    asked = prices(slow_integers)
    info = fxq.kernels.info()
    monkeypatch.setattr("fxq.kernels.info", lambda: dataclasses.replace(info, isa="portable"))
    assert quantize(model).report.int8_share == 1
    assert not asked


def test_progress_and_time_are_shown(prices, model, capsys):
    prices(slow_integers)
    report = fxq.report(fxq.quantize(model, torch.randn(8, 16), progress=True))
    assert "timing operations" in capsys.readouterr().err
    assert report.seconds["judge-costs"][0] > 0
    assert "judge-costs: " in str(report)
    fxq.quantize(model, torch.randn(8, 16), progress=False)
    assert capsys.readouterr().err == ""
