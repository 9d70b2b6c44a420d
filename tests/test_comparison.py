"""What `fxq.compare` says of a layer: its noise, what is clipped, how much of the range is used; and its picture."""

import json
import math
import pickle
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import fxq
from fxq import pipeline
from fxq.comparison import BINS, FLOAT_ROUNDING, Remedy, Suspect, output_sqnr
from fxq.effects import Effects
from fxq.expansion import expand
from fxq.inputs import as_call
from fxq.paired_runs import PairedRuns
from fxq.pipeline import Context
from fxq.remedies import find_remedies
from fxq.stages import Stage
from passes import PREPARE


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


def test_what_is_clipped_is_counted(model):
    x = torch.randn(64, 16)
    qmodel = fxq.quantize(model, x, recipe=fxq.Recipe(observer="min_max"))
    assert all(layer.spread.clipped == 0 for layer in fxq.compare(model, qmodel, x).layers if layer.spread)
    entry = fxq.compare(model, qmodel, 3 * x).layers[0]
    scale = max(-x.min().item(), x.max().item())
    assert entry.op == "fxq.quantize"
    low, high = entry.spread.range
    expected = ((3 * x < low) | (3 * x > high)).double().mean().item()
    assert expected > 0.02
    assert entry.spread.clipped == pytest.approx(expected, rel=0.1)
    assert entry.spread.high == pytest.approx(3 * x.max().item())
    assert high < 2 * scale


def test_what_a_balanced_border_clips_is_counted(model):
    """Its channels have factors, which are no part of the model."""
    x = torch.randn(256, 16) * torch.tensor([40.0] + [1.0] * 15)
    qmodel = fxq.quantize(model, x)
    inside, outside = (fxq.compare(model, qmodel, factor * x).layers[0] for factor in (1, 4))
    assert inside.op == "fxq.quantize_scaled"
    assert inside.spread.clipped == 0
    assert outside.spread.clipped > 0.02
    assert inside.alone > 30 > outside.alone


def test_how_much_of_the_range_is_used(model):
    x = torch.randn(64, 16)
    qmodel = fxq.quantize(model, x, recipe=fxq.Recipe(observer="min_max", balance=False))
    full, half = (fxq.compare(model, qmodel, factor * x).layers[0].spread.used for factor in (1, 0.5))
    assert full > 0.9
    assert half == pytest.approx(full / 2, abs=0.1)


def test_counts_hold_every_value(model):
    x = torch.randn(64, 16)
    layers = fxq.compare(model, fxq.quantize(model, x), x).layers
    assert [layer.spread is not None for layer in layers] == [True, True, False]
    assert len(layers[1].spread.counts) == BINS
    assert sum(layers[1].spread.counts) == 64 * 32


def test_a_constant_value_has_a_spread(model_of):
    model = model_of(lambda self, x: self.b(torch.relu(self.a(x * 0))), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    x = torch.randn(8, 4)
    comparison = fxq.compare(model, fxq.quantize(model, x), x)
    assert comparison.layers[0].spread.counts[0] == 32


def test_the_table_and_plain_data(model):
    x = torch.randn(64, 16)
    comparison = fxq.compare(model, fxq.quantize(model, x), x)
    header = str(comparison).splitlines()[0]
    assert "clipped" in header and "range used" in header
    assert "% clipped" in str(comparison.layers[0])
    plain = json.loads(json.dumps(comparison.to_dict()))
    assert plain["layers"][0]["spread"]["clipped"] == comparison.layers[0].spread.clipped


def test_the_picture(model, tmp_path):
    x = torch.randn(64, 16)
    comparison = fxq.compare(model, fxq.quantize(model, x), x)
    assert comparison.plot(tmp_path / "noise.svg").read_text().count("</svg>") == 1


def test_the_picture_shows_noise_of_integers_and_names_its_layers(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure").Figure
    figures = []
    monkeypatch.setattr(figure, "savefig", lambda self, path: figures.append(self))
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.LayerNorm(16)).eval()
    x = torch.randn(64, 16)
    comparison = fxq.compare(model, fxq.quantize(model, x), x)
    assert max(layer.alone for layer in comparison.layers) > FLOAT_ROUNDING, "the norm, which rounds floats"
    comparison.plot(tmp_path / "noise.svg")
    depth, *spreads = figures[0].axes
    assert depth.get_ylim()[1] < FLOAT_ROUNDING
    for axes in spreads:
        number, place = axes.get_title().removeprefix("layer ").split(": ")[0], axes.get_title().splitlines()[1]
        assert place in (comparison.layers[int(number)].module, comparison.layers[int(number)].op)


def test_without_matplotlib(model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    comparison = fxq.compare(model, fxq.quantize(model, torch.randn(8, 16)), torch.randn(8, 16))
    with pytest.raises(fxq.InputError, match="pip install"):
        comparison.plot(tmp_path / "noise.svg")


@pytest.fixture
def spoiled():
    """Three linears; the input of the second has a channel so large that min_max leaves little for the others."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Sigmoid(), nn.Linear(32, 4)).eval()
    with torch.no_grad():
        model[2].weight[:, 0] *= 300
    return model


RECIPE = fxq.Recipe(observer="min_max", balance=False, round_weights=None, weight="per_tensor")


def test_remedies_are_tried_and_can_be_pasted(spoiled):
    data = [torch.randn(64, 16) for _ in range(2)]
    qmodel = fxq.quantize(spoiled, data[0], calibration_data=data, recipe=RECIPE, on_low_sqnr="ignore", progress=False)
    found = fxq.compare(spoiled, qmodel, data[0], calibration_data=iter(data), recipe=RECIPE, progress=False)
    assert len(found.suspects) == 3
    without = [suspect.without for suspect in found.suspects]
    assert without == sorted(without, reverse=True)
    assert "without whose own noise" in str(found)
    first = found.suspects[0]
    assert first.before == found.output
    assert first.best.output == max(remedy.output for remedy in first.tried) > first.before + 1
    pasted = eval(first.best.recipe, {"fxq": fxq})  # what the user does with it
    assert replace(pasted, modules={}) == RECIPE
    assert list(pasted.modules) == [first.module]
    again = fxq.quantize(spoiled, data[0], calibration_data=data, recipe=pasted, on_low_sqnr="ignore", progress=False)
    assert again.report.sqnr == pytest.approx(first.best.output)
    assert first.best.recipe in str(found)
    assert json.loads(json.dumps(found.to_dict()))["suspects"][0]["tried"][0]["recipe"].startswith("fxq.Recipe(")


def test_where_float_does_not_help_nothing_else_is_tried(spoiled):
    data = [torch.randn(64, 16)]
    qmodel = fxq.quantize(spoiled, data[0], recipe=RECIPE, on_low_sqnr="ignore", progress=False)
    comparison = fxq.compare(spoiled, qmodel, data[0])
    tried = []

    def attempt(recipe):
        tried.append(recipe.modules)
        (name,) = recipe.modules
        return comparison.output + (5.0 if name == "2" else 0.05)

    def effects(modules):
        return dict.fromkeys(modules, comparison.output + 0.05)

    suspects = find_remedies(comparison, qmodel.report, RECIPE, effects, attempt, 60.0, progress=False)
    assert tried[:3] == [{suspect.module: fxq.FLOAT} for suspect in suspects]
    assert len(tried) > 3 and all(list(modules) == ["2"] for modules in tried[3:])
    for suspect in suspects:
        assert "fxq.FLOAT" in suspect.tried[-1].recipe
        assert (suspect.best is None) == (suspect.module != "2") == (len(suspect.tried) == 1)
    assert sum("none of 1 remedies helps" in str(suspect) for suspect in suspects) == 2


def test_where_only_the_noise_costs_the_output_remedies_are_tried(spoiled):
    """Float hands the rounding of a layer's result on to the layer that reads it; another observer may not."""
    x = torch.randn(64, 16)
    qmodel = fxq.quantize(spoiled, x, recipe=RECIPE, on_low_sqnr="ignore", progress=False)
    comparison = fxq.compare(spoiled, qmodel, x)

    def attempt(recipe):
        ((name, rule),) = recipe.modules.items()
        return comparison.output + (5.0 if name == "2" and rule.observer == "histogram" else 0.0)

    def effects(modules):
        return {module: comparison.output + (6.0 if module == "2" else 0.0) for module in modules}

    suspects = find_remedies(comparison, qmodel.report, RECIPE, effects, attempt, 60.0, progress=False)
    assert suspects[0].module == "2"
    assert "histogram" in suspects[0].best.recipe
    assert [len(suspect.tried) > 1 for suspect in suspects] == [True, False, False]


def runs_of(model, qmodel, x):
    """The runs that `fxq.compare` looks at."""
    gm = fxq.trace(model, x)
    ctx = Context(fxq.Recipe(), (), as_call(x, None))
    pipeline.begin(gm, ctx)
    steps = tuple(step for step in PREPARE if step.gives is Stage.FLOAT)
    return PairedRuns.of(pipeline.run(steps, gm, ctx), expand(qmodel), as_call(x, None), None, qmodel.report.equalized)


def test_with_all_noise_the_run_is_the_quantized_one(spoiled):
    x = torch.randn(64, 16)
    qmodel = fxq.quantize(spoiled, x, recipe=RECIPE, on_low_sqnr="ignore", progress=False)
    effects = Effects(runs_of(spoiled, qmodel, x))
    assert effects.without("no such module") == pytest.approx(fxq.compare(spoiled, qmodel, x).output, abs=1e-3)


def test_the_rounding_of_what_a_layer_reads_is_its_own():
    model = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 8)).eval()
    x = torch.randn(64, 16)
    qmodel = fxq.quantize(model, x)
    assert fxq.compare(model, qmodel, x).output < 50
    assert Effects(runs_of(model, qmodel, x)).without("1") > FLOAT_ROUNDING


def parts_of_it(self, x):
    y = torch.log1p(self.a(x).abs())
    y[:, :8].mul_(5)
    y[:, 8:] = 0.1
    return self.c(self.b(y))


def between_its_readers(self, x):
    y = self.a(x)
    read = self.b(y)
    y.mul_(3)
    y.view(-1).clamp_(max=1.5)
    return self.c(y) + read


def memory_made_elsewhere(self, x):
    y = torch.zeros(len(x), 16)
    y[:, :8] = self.a(x)[:, :8]
    y[:, 8:] = torch.tanh(self.b(x)[:, 8:]) * 7
    return self.c(y)


def what_it_returns(self, x):
    y = self.a(x)
    turned = y.t()
    turned[0].fill_(3.0)
    read = self.c(self.b(y))
    y.add_(read)
    return turned, read


def its_input(self, x):
    x.mul_(self.a(x).sigmoid() * 9)
    return self.c(self.b(x))


def its_buffer(self, x):
    y = self.a(x)
    self.state.lerp_(y.mean(0), 0.5)
    return self.c(self.b((y - self.state) * 9))


@pytest.mark.parametrize(
    "forward", [parts_of_it, between_its_readers, memory_made_elsewhere, what_it_returns, its_input, its_buffer]
)
def test_what_works_in_place_is_followed(forward, model_of):
    """Each layer is held against what it read, and the output without its noise is what it is with it in float."""
    model = model_of(forward, **{name: nn.Linear(16, 16) for name in "abc"}, state=torch.zeros(16))
    x, recipe = torch.randn(64, 16), fxq.Recipe(observer="min_max", balance=False, round_weights=None)
    options = {"on_low_sqnr": "ignore", "progress": False}
    qmodel = fxq.quantize(model, x, recipe=recipe, **options)
    found = fxq.compare(model, qmodel, x, calibration_data=[x], recipe=recipe, seconds=0, progress=False)
    assert found.output == pytest.approx(qmodel.report.sqnr)
    assert Effects(runs_of(model, qmodel, x)).without("no such module") == pytest.approx(found.output, abs=1e-3)
    assert all(min(layer.alone, layer.accumulated) > 25 for layer in found.layers)
    assert len(found.suspects) == 3
    for suspect in found.suspects:
        changed = replace(recipe, modules={suspect.module: fxq.FLOAT})  # where the others still round what they read
        assert suspect.without > fxq.quantize(model, x, recipe=changed, **options).report.sqnr - 4


def test_the_noisiest_layer_is_no_suspect_where_the_output_does_not_need_it(model_of):
    torch.manual_seed(0)
    layers = {name: nn.Linear(16, 16) for name in ("loud", "faint", "a", "b", "c")}
    with torch.no_grad():
        layers["loud"].weight[0] *= 100  # one range for all channels: most of them lose nearly everything

    def forward(self, x):
        faint = self.faint(torch.tanh(self.loud(x)))
        return self.c(torch.relu(self.b(torch.relu(self.a(x))))) + 1e-3 * faint

    model, x = model_of(forward, **layers), torch.randn(64, 16)
    recipe = fxq.Recipe(observer="min_max", balance=False, weight="per_tensor", judge_costs=False)
    qmodel = fxq.quantize(model, x, recipe=recipe, progress=False)
    found = fxq.compare(model, qmodel, x, calibration_data=[x], recipe=recipe, seconds=0, progress=False)
    assert found.worst(1)[0].module == "loud"
    assert {suspect.module for suspect in found.suspects} == {"a", "b", "c"}
    assert all(suspect.without > found.output for suspect in found.suspects)


def test_remedies_end_in_time(spoiled):
    x = torch.randn(64, 16)
    qmodel = fxq.quantize(spoiled, x, on_low_sqnr="ignore", progress=False)
    found = fxq.compare(spoiled, qmodel, x, calibration_data=[x], seconds=0, progress=False)
    assert [suspect.tried for suspect in found.suspects] == [()] * 3
    assert "for lack of time" in str(found)


def test_remedies_need_the_recipe(spoiled):
    """All of it, rules included, from a file as well: the error shows what to paste."""
    x, options = torch.randn(64, 16), {"on_low_sqnr": "ignore", "progress": False}
    own = fxq.Recipe(modules={"0": fxq.FLOAT})
    for recipe in (fxq.Recipe("w8a8-dynamic"), own):
        qmodel = pickle.loads(pickle.dumps(fxq.quantize(spoiled, x, recipe=recipe, **options)))
        told = re.escape(f"was quantized by {recipe.code}, and recipe is fxq.Recipe()")
        with pytest.raises(fxq.InputError, match=told):
            fxq.compare(spoiled, qmodel, x, calibration_data=[x])
    assert fxq.compare(spoiled, qmodel, x, calibration_data=[x], recipe=own, seconds=0, progress=False).suspects


def test_of_equal_remedies_the_first_is_taken():
    def suspect(*outputs):
        return Suspect("a", 10.0, 20.0, 26.0, tuple(Remedy(str(i), output) for i, output in enumerate(outputs)))

    assert suspect(20.05, 19.0).best is None
    assert "in float it leaves the output at 19.0 dB" in str(suspect(20.05, 19.0))
    assert "without its own noise the output would be at 26.0 dB" in str(suspect(25.0))
    assert suspect(25.0, 30.0, 30.05).best.recipe == "1"
    assert suspect(25.0, float("inf")).best.recipe == "1"
    assert suspect().best is None


@pytest.mark.parametrize("order", [1, -1])
def test_an_output_of_nan_is_the_worst(order):
    x, wrong = torch.ones(2), torch.tensor([1.0, math.nan])
    assert math.isnan(output_sqnr([x, x][::order], [x + 0.1, wrong][::order]))


def counting(self, x):
    self.count.add_(1)
    return self.linear(x) * self.count


def test_what_a_call_modifies_is_as_it_was(model_of):
    """Whatever looks at a model runs it, and each run of this one counts."""
    x = torch.randn(8, 4)
    model = model_of(counting, linear=nn.Linear(4, 4), count=torch.zeros(()))
    with pytest.warns(fxq.AccuracyWarning):
        qmodel = fxq.quantize(model, x, min_sqnr=200)
    assert fxq.compare(model, qmodel, x).output > 30
    fxq.profile(qmodel, x)
    assert qmodel.count == model.count == 0


def test_values_that_are_written_over_later(model_of):
    """In the memory of a linear, through its parts: its noise is that of what it gave."""

    def forward(self, x):
        return torch.cat([part.relu_() for part in self.linear(x).chunk(2, -1)], -1)

    x = torch.randn(64, 8)
    model = model_of(forward, linear=nn.Linear(8, 8))
    (layer,) = (each for each in fxq.compare(model, fxq.quantize(model, x), x).layers if each.module == "linear")
    assert layer.alone > 30


def test_calibration_data_that_is_one_tensor(spoiled):
    x = torch.randn(16, 16)
    qmodel = fxq.quantize(spoiled, x, recipe=RECIPE, on_low_sqnr="ignore", progress=False)
    with pytest.raises(fxq.InputError, match="calibration_data is one tensor"):
        fxq.compare(spoiled, qmodel, x, calibration_data=x, recipe=RECIPE)


def test_an_expanded_model_knows_what_a_call_modifies(model_of):
    def forward(self, x):
        self.calls += 1
        return self.l(x) * self.calls

    x = torch.randn(4, 6)
    qmodel = fxq.quantize(model_of(forward, l=nn.Linear(6, 6), calls=torch.zeros(())), x, progress=False)
    expanded = expand(qmodel)
    assert expanded.calls is qmodel.calls
    fxq.profile(expanded, x)
    assert qmodel.calls == 0
    expanded(x)
    assert qmodel.calls == 1


@pytest.mark.parametrize("recipe", ["w8a8", "w8a8-dynamic"])
def test_another_model_is_told_by_its_shapes(recipe):
    def of(*widths):
        return nn.Sequential(nn.Linear(*widths[:2]), nn.ReLU(), nn.Linear(*widths[1:])).eval()

    x = torch.randn(8, 16)
    recipe = fxq.Recipe(recipe, judge_costs=False)
    qmodel = fxq.quantize(of(16, 32, 8), x, recipe=recipe, progress=False)
    both = r"has the shape \[8, {}\] in the float model and \[8, {}\] in the quantized one; compare it with the model"
    for other, place, shapes in (((16, 24, 8), r"0 \(%.*\)", (24, 32)), ((16, 32, 10), r"2 \(%.*\)", (10, 8))):
        with pytest.raises(fxq.InputError, match=rf"^{place} {both.format(*shapes)}"):
            fxq.compare(of(*other), qmodel, x)
    with pytest.raises(fxq.InputError, match=r"0 \(%.*\) of the quantized model fails.*\[8, 12\].*; compare it with"):
        fxq.compare(of(12, 32, 8), qmodel, torch.randn(8, 12))


def routed(self, x):
    chosen, y = self.gate(x).argmax(-1), torch.zeros_like(x)
    for i, expert in enumerate((self.a, self.b)):
        y[chosen == i] = expert(x[chosen == i])
    return y


@pytest.mark.filterwarnings("ignore::fxq.AccuracyWarning")
@pytest.mark.parametrize("forward", [routed, lambda self, x: self.b(self.a(x)[self.gate(x)[:, 0] > 0])])
def test_rounding_may_change_sizes_that_values_decide_on(forward, model_of):
    model = model_of(forward, gate=nn.Linear(8, 2), a=nn.Linear(8, 8), b=nn.Linear(8, 8))
    x = torch.randn(1000, 8)
    recipe = fxq.Recipe(observer="min_max", weight="per_tensor", balance=False, judge_costs=False)
    qmodel = fxq.quantize(model, x, recipe=recipe, progress=False)
    found = fxq.compare(model, qmodel, x)
    assert any(math.isnan(layer.accumulated) for layer in found.layers)
    assert all(layer.alone > 10 for layer in found.layers)


@pytest.mark.parametrize("keep", [False, True])
def test_a_pool_keeps_what_a_mean_drops(keep, model_of):
    def forward(self, x):
        return self.b(torch.relu(self.a(x)).mean((2, 3), keepdim=keep).flatten(1))

    model, x = model_of(forward, a=nn.Conv2d(3, 8, 3), b=nn.Linear(8, 4)), torch.randn(8, 3, 6, 6)
    recipe = fxq.Recipe(judge_costs=False)
    found = fxq.compare(model, fxq.quantize(model, x, recipe=recipe, progress=False), x)
    assert [layer.op for layer in found.layers][2:3] == ["fxq.qadaptive_avg_pool"]
    assert all(min(layer.alone, layer.accumulated) > 25 for layer in found.layers)


def test_another_output_is_told_by_its_shape():
    x = torch.randn(8, 16)
    float_last = fxq.Recipe(modules={"1": fxq.FLOAT})
    qmodel = fxq.quantize(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8)).eval(), x, recipe=float_last)
    with pytest.raises(fxq.InputError, match=r"^the output has the shape \[8, 4\] in the float model and \[8, 8\] in"):
        fxq.compare(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 4)).eval(), qmodel, x)


def test_a_model_with_other_arguments_is_told_by_them(model_of):
    x = torch.randn(8, 16)
    one = model_of(lambda self, x: self.a(x), a=nn.Linear(16, 8))
    two = model_of(lambda self, x, y: self.a(x + y), a=nn.Linear(16, 8))
    name, asked = (
        type(one).__name__,
        r"{}, and not the quantized model, whose arguments are \({}\): .*; compare it with",
    )
    for model, made, given, arguments in ((one, two, x, "x, y"), (two, one, (x, x), "x")):
        qmodel = fxq.quantize(made, (x, x) if made is two else x, progress=False)
        with pytest.raises(fxq.InputError, match=rf"^fxq.compare: the inputs fit {asked.format(name, arguments)}"):
            fxq.compare(model, qmodel, given)


def test_another_kind_of_input_is_told_in_a_line(model_of):
    x = torch.randn(8, 16)
    qmodel = fxq.quantize(nn.Sequential(nn.Linear(16, 8)).eval(), x, progress=False)
    with pytest.raises(fxq.InputError, match=r"^fxq.compare: .* found type 'dict'.; compare it with the model"):
        fxq.compare(model_of(lambda self, x: self.a(x["a"]), a=nn.Linear(16, 8)), qmodel, ({"a": x},))


def test_another_structure_of_outputs_is_told(model_of):
    x = torch.randn(8, 16)
    qmodel = fxq.quantize(model_of(lambda self, x: {"a": self.a(x)}, a=nn.Linear(16, 8)), x, progress=False)
    plain = model_of(lambda self, x: self.a(x), a=nn.Linear(16, 8))
    with pytest.raises(fxq.InputError, match=r"^the output is \* in the float model and \{'a': \*\} in the quantized"):
        fxq.compare(plain, qmodel, x)


def test_inputs_without_numbers_are_refused(model):
    qmodel = fxq.quantize(model, torch.randn(8, 16), progress=False)
    with pytest.raises(
        fxq.InputError, match=r"the inputs hold no numbers to compare \(shape \[0, 16\]\); give a batch"
    ):
        fxq.compare(model, qmodel, torch.randn(0, 16))
