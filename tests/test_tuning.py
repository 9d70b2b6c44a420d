"""fxq.tune: the fastest mix that keeps a metric, what it reports, and what stops it."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

import fxq
from fxq.comparison import output_sqnr
from fxq.costs import costs_path
from fxq.tuning import Sensitivity, Trial, _moves

X = torch.randn(64, 16)
DATA = [torch.randn(64, 16) for _ in range(2)]


@pytest.fixture(autouse=True)
def _costs(tmp_path, monkeypatch):
    """Every operation costs what its name says, so that nothing here depends on a clock."""
    fxq.kernels.info()
    monkeypatch.setenv("FXQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("fxq.profiling._price", lambda gm, call, keys: dict.fromkeys(keys.values(), 1e-6))


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


def test_layers_that_gain_together_what_none_gains_alone(model, monkeypatch):
    """Borders cost more than a layer gains: by itself each is slower than float, all of them are the fastest mix."""

    def integers(gm):
        return sum(d.form == "int8" and bool(d.macs) for d in gm.report.decisions) if hasattr(gm, "report") else 0

    seconds = {0: 10.0, 1: 12.0, 2: 7.0, 3: 5.0}
    monkeypatch.setattr("fxq.tuning._Run._predict", lambda self, gm: seconds[integers(gm)])
    found = tune(model, lambda candidate: float(integers(candidate) < 3), 0.5)
    assert all(s.gain < 0 for s in found.sensitivities)
    assert found.complete
    assert found.seconds == 7.0


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


def test_an_interrupted_write_leaves_the_file_whole(model, fidelity, tmp_path, monkeypatch):
    file = tmp_path / "trials.json"
    write = Path.write_text

    def half(self, text, **options):
        if len(json.loads(text)["trials"]) < 3:
            return write(self, text, **options)
        write(self, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            tune(model, fidelity, 5, file=file)
    assert len(json.loads(file.read_text())["trials"]) == 2
    assert tune(model, fidelity, 5, file=file).trials == tune(model, fidelity, 5).trials
    assert [path.name for path in tmp_path.glob("*json*")] == ["trials.json"]


def test_a_file_of_another_model(model, fidelity, tmp_path):
    tune(model, fidelity, 80, file=tmp_path / "trials.json")
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    with pytest.raises(fxq.FileError, match="another model"):
        tune(model, fidelity, 80, file=tmp_path / "trials.json")


NO_TRIAL = '{"fingerprint": "", "trials": [{"mix": {}, "metric": "high", "seconds": 1.0}]}'


NO_NUMBER = NO_TRIAL.replace('"high"', "NaN")


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"fingerprint": "", "trials": [3]}', NO_TRIAL, NO_NUMBER])
def test_a_damaged_file(model, fidelity, tmp_path, text):
    (tmp_path / "trials.json").write_text(text)
    with pytest.raises(fxq.FileError, match=r"trials\.json is not a file of trials"):
        tune(model, fidelity, 80, file=tmp_path / "trials.json")


def test_a_file_whose_trials_are_of_other_layers(model, fidelity, tmp_path):
    tune(model, fidelity, 80, file=tmp_path / "trials.json")
    plain = json.loads((tmp_path / "trials.json").read_text())
    plain["trials"].append({"mix": {"0": "w8a8"}, "metric": 1e9, "seconds": 0.0})
    (tmp_path / "trials.json").write_text(json.dumps(plain))
    with pytest.raises(fxq.FileError, match="holds trials of other layers than 0, "):
        tune(model, fidelity, 80, file=tmp_path / "trials.json")


@pytest.mark.parametrize("tolerance", [-1, math.nan, "1", None])
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


NONE = fxq.Report()


class Block(nn.Module):
    """A product of its own behind one of a module in it."""

    def __init__(self):
        super().__init__()
        self.fc, self.w = nn.Linear(16, 16), nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        return torch.tanh(torch.tanh(self.fc(x)) @ self.w)


class Nested(nn.Module):
    """Products in the root, in a block, and in a module of the block."""

    def __init__(self):
        super().__init__()
        self.block, self.w = Block(), nn.Parameter(torch.randn(16, 16) / 4)

    def forward(self, x):
        return torch.nn.functional.linear(self.block(x), self.w)


@pytest.mark.parametrize("chosen", ["", "block", "block.fc"])
def test_a_module_and_what_is_in_it_have_schemes_of_their_own(chosen):
    model = Nested().eval()

    def metric(candidate):
        report = getattr(candidate, "report", None)
        int8 = [] if report is None else [d.module for d in report.decisions if d.macs and d.form == "int8"]
        return 0 if set(int8) - {chosen} else 1

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fxq.tuning._Run._predict", lambda self, gm: 1.0 - 0.1 * getattr(gm, "report", NONE).int8_share)
        found = tune(model, metric, 0)
    assert {s.module for s in found.sensitivities} == {"", "block", "block.fc"}
    assert [d.module for d in found.model.report.decisions if d.macs and d.form == "int8"] == [chosen]


def test_the_recipes_own_rules_stay(model, fidelity):
    recipe = fxq.Recipe(modules={"2": fxq.FLOAT, "4": fxq.Rule(observer="min_max")})
    found = tune(model, fidelity, 80, recipe=recipe)
    assert [s.module for s in found.sensitivities] == ["0", "4"]
    assert found.recipe.rule_for("2", "linear").scheme == "float"
    assert found.recipe.rule_for("4", "linear").observer == "min_max"


def test_only_schemes_that_a_layer_has_are_tried():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, 4)).eval()
    x = torch.randn(2, 3, 8, 8)
    found = fxq.tune(model, x, [x], lambda candidate: 1.0, 0, schemes=("w8a8", "w8a8-dynamic"), progress=False)
    assert [(s.module, s.scheme) for s in found.sensitivities] == [("0", "w8a8"), ("2", "w8a8"), ("2", "w8a8-dynamic")]


def test_a_graph_that_is_below_the_limit_even_in_float(model):
    with pytest.raises(fxq.TuningError, match="with all layers float the metric is 0, below the limit 1") as caught:
        tune(model, lambda candidate: float(candidate is model), 0)
    assert caught.value.found is None


def test_a_metric_that_raises_while_nothing_is_found_says_what_it_raised(model, fidelity, tmp_path):
    file = tmp_path / "trials.json"
    tune(model, fidelity, 80, file=file)
    with pytest.raises(fxq.TuningError, match="the metric is nan on the float model") as caught:
        tune(model, lambda candidate: math.nan, 80, file=file)
    assert caught.value.found is None


def test_an_unknown_scheme_costs_nothing(model):
    with pytest.raises(fxq.RecipeError, match="unknown scheme 'w4a4'"):
        fxq.tune(model, X, DATA, lambda candidate: pytest.fail("called"), 1, schemes=("w4a4",))


def test_a_file_that_cannot_be_written(model, fidelity, tmp_path):
    with pytest.raises(fxq.FileError, match="cannot write the trials to"):
        tune(model, fidelity, 80, file=tmp_path / "none" / "trials.json")


def test_costs_are_kept_when_the_metric_raises(model):
    calls = []

    def metric(candidate):
        calls.append(candidate)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        tune(model, metric, 1)
    assert costs_path().exists()


def test_costs_are_on_disk_before_the_next_trial(model, fidelity):
    """So that a run which is killed and goes on from its file predicts as one that was not."""
    there = []

    def metric(candidate):
        there.append(costs_path().exists() and len(json.loads(costs_path().read_text())["seconds"]))
        return fidelity(candidate)

    tune(model, metric, 80)
    assert there[0] is False  # the float model itself is first
    assert all(there[1:])
    assert there[1:] == sorted(there[1:])
    assert there[-1] > there[1]


def test_a_file_of_other_leaves(model, fidelity, tmp_path):
    tune(model, fidelity, 80, file=tmp_path / "trials.json")
    with pytest.raises(fxq.FileError, match="belongs to another"):
        tune(model, fidelity, 80, file=tmp_path / "trials.json", leaves=("1",))


@pytest.mark.parametrize("tolerance", [0.0, 1.0])
def test_a_metric_that_never_changes_gives_the_fastest(model, tolerance):
    found = tune(model, lambda candidate: 0.5, tolerance)
    assert found.complete
    assert found.seconds == min(trial.seconds for trial in found.trials)
    assert all(s.loss == 0 for s in found.sensitivities)


def test_a_model_of_one_layer():
    model = nn.Linear(16, 4).eval()
    found = tune(model, lambda candidate: 1.0, 0.0)
    assert list(found.recipe.modules) == [""]
    assert "(root)" in str(found)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"metric": None}, "metric is None; it must be a function"),
        ({"budget": -1}, "budget is -1; it must be seconds, 0 or more"),
        ({"budget": float("nan")}, "budget is nan"),
        ({"schemes": "w8a8"}, "schemes is 'w8a8'; it must be a tuple"),
        ({"budget": "1"}, "budget is 1; it must be seconds, 0 or more"),
        ({"schemes": ()}, "it must be a tuple of the schemes"),
        ({"schemes": iter(["w8a8"])}, "it must be a tuple of the schemes"),
        ({"schemes": 5}, "it must be a tuple of the schemes"),
    ],
)
def test_what_cannot_be_searched_by_is_refused_at_once(model, fidelity, given, message):
    with pytest.raises(fxq.InputError, match=message):
        fxq.tune(model, X, DATA, given.pop("metric", fidelity), 1.0, **given)
