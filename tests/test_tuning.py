"""fxq.tune: the fastest mix that keeps a metric, what it reports, and what stops it."""

import json
import math

import pytest
import torch
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.tuning import Sensitivity, Trial, _moves

X = torch.randn(64, 16)
DATA = [torch.randn(64, 16) for _ in range(2)]


@pytest.fixture(autouse=True)
def _costs(tmp_path, monkeypatch):
    """Every operation costs what its name says, so that nothing here depends on a clock."""
    fxq.kernels.info()
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fxq.costs._time", lambda run, between: 1e-6)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4)).eval()


@pytest.fixture
def fidelity(model):
    """A metric: how near a model is to the float one, in dB, at most 100."""
    with torch.no_grad():
        expected = model(X)

    def metric(candidate):
        with torch.no_grad():
            return min(100.0, output_sqnr(expected, candidate(X)))

    return metric


def tune(model, metric, tolerance, **options):
    return fxq.tune(model, X, DATA, metric, tolerance, schemes=("w8a8",), progress=False, **options)


def test_all_int8_where_the_metric_allows(model, fidelity):
    found = tune(model, fidelity, 80)
    assert {rule.scheme for rule in found.recipe.modules.values()} == {"w8a8"}
    assert found.complete
    assert found.metric == fidelity(found.model) >= found.limit == 20
    assert found.model.report.int8_share == 1


def test_all_float_where_nothing_else_keeps_the_metric(model, fidelity):
    found = tune(model, fidelity, 0)
    assert {rule.scheme for rule in found.recipe.modules.values()} == {"float"}
    assert found.metric == 100


def test_a_mix_in_between_and_its_table(model, fidelity):
    everything = tune(model, fidelity, 80)
    found = tune(model, fidelity, 100 - everything.metric - 1)  # a dB more than all int8 reaches
    schemes = [rule.scheme for rule in found.recipe.modules.values()]
    assert "float" in schemes
    assert found.metric >= found.limit
    assert [s.module for s in found.sensitivities] == ["0", "2", "4"]
    assert all(s.loss > 0 for s in found.sensitivities)
    text = str(found)
    assert "metric lost" in text and "limit" in text
    assert json.loads(json.dumps(found.to_dict()))["complete"] is True
    again = fxq.quantize(model, X, calibration_data=DATA, recipe=found.recipe, on_low_sqnr="ignore", progress=False)
    assert torch.equal(again(X), found.model(X))


def test_the_front_holds_what_no_other_beats(model, fidelity):
    found = tune(model, fidelity, 80)
    front = found.pareto()
    for trial in front:
        assert not any(t.seconds <= trial.seconds and t.metric > trial.metric for t in found.trials)
    seconds = [trial.seconds for trial in front]
    assert seconds == sorted(seconds)


def test_an_interrupted_run_goes_on_from_its_file(model, fidelity, tmp_path):
    file = tmp_path / "trials.json"
    calls = []

    def interrupted(candidate):
        calls.append(candidate)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return fidelity(candidate)

    with pytest.raises(KeyboardInterrupt):
        tune(model, interrupted, 5, file=file)
    kept = len(json.loads(file.read_text())["trials"])
    assert kept == 2  # the first of the three calls was the float model's
    resumed = tune(model, fidelity, 5, file=file)
    whole = tune(model, fidelity, 5)
    assert resumed.trials == whole.trials
    assert resumed.recipe == whole.recipe


def test_a_file_of_another_model(model, fidelity, tmp_path):
    tune(model, fidelity, 80, file=tmp_path / "trials.json")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(fxq.FileError, match="another model"):
        tune(model, fidelity, 80, file=tmp_path / "trials.json")


def test_a_damaged_file(model, fidelity, tmp_path):
    (tmp_path / "trials.json").write_text("{")
    with pytest.raises(fxq.FileError, match=r"trials\.json is not a file of trials"):
        tune(model, fidelity, 80, file=tmp_path / "trials.json")


@pytest.mark.parametrize("tolerance", [-1, math.nan])
def test_a_tolerance_that_float_itself_fails(model, fidelity, tolerance):
    with pytest.raises(fxq.InputError, match="must be 0 or more"):
        tune(model, fidelity, tolerance)


def test_a_metric_that_is_not_a_number(model):
    with pytest.raises(fxq.TuningError, match="the metric is nan on the float model") as caught:
        tune(model, lambda candidate: math.nan, 1)
    assert caught.value.found is None


def test_a_metric_that_raises_loses_nothing(model, fidelity):
    calls = []

    def metric(candidate):
        calls.append(candidate)
        if len(calls) == 4:
            raise RuntimeError("out of images")
        return fidelity(candidate)

    with pytest.raises(fxq.TuningError, match=r"raises RuntimeError on the mix .*out of images") as caught:
        tune(model, metric, 80)
    assert not caught.value.found.complete
    assert len(caught.value.found.trials) == 2


def test_a_spent_budget_gives_the_best_so_far_and_says_so(model, fidelity, monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr("fxq.tuning.time.monotonic", lambda: next(now))
    found = tune(model, fidelity, 0, budget=3)
    assert not found.complete
    assert found.metric >= found.limit
    assert "the budget ended the search" in str(found)


def test_a_budget_for_nothing(model, fidelity):
    with pytest.raises(fxq.TuningError, match="before the first trial"):
        tune(model, fidelity, 80, budget=0)


def test_nothing_to_tune(fidelity):
    with pytest.raises(fxq.InputError, match="nothing to tune"):
        fxq.tune(nn.ReLU().eval(), X, DATA, lambda candidate: 0.0, 1, progress=False)


def test_the_model_stays_as_it_was(model, fidelity, fingerprint):
    before = fingerprint(model)
    tune(model, fidelity, 10)
    assert fingerprint(model) == before


def test_moves_regain_the_most_per_second_first_and_end_in_float():
    options = {
        "a": [Sensitivity("a", "float", 0, 0), Sensitivity("a", "w8a8", 1, 10), Sensitivity("a", "w8a32", 0.1, 6)],
        "b": [Sensitivity("b", "float", 0, 0), Sensitivity("b", "w8a8", 8, 10)],
    }
    start = {name: max(choices, key=lambda s: s.gain) for name, choices in options.items()}
    moves = [(s.module, s.scheme) for s in _moves(start, options)]
    assert moves == [("b", "float"), ("a", "w8a32"), ("a", "float")]


def test_the_plot(model, fidelity, tmp_path):
    assert tune(model, fidelity, 80).plot(tmp_path / "front.png").stat().st_size > 1000


def test_trials_compare_by_value():
    assert Trial({"a": "float"}, 1.0, 2.0) == Trial({"a": "float"}, 1.0, 2.0)
