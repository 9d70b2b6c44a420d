"""Recipes: names, globs, families, precedence, and what is said about a wrong name."""

import pytest
import torch

import fxq
from fxq.errors import RecipeError
from fxq.recipe import FLOAT, Recipe, Rule, covers

PATHS = [
    "",
    "encoder",
    "encoder.0",
    "encoder.0.fc1",
    "encoder.0.fc2",
    "encoder.1",
    "encoder.1.fc1",
    "encoder.10.fc1",
    "head",
]
FAMILIES = ["linear", "add", "clamp", "carry"]


@pytest.mark.parametrize(
    ("pattern", "path", "wanted"),
    [
        ("head", "head", True),
        ("head", "head.fc", True),
        ("head", "header", False),
        ("head", "model.head", False),
        ("encoder.*.fc1", "encoder.0.fc1", True),
        ("encoder.*.fc1", "encoder.0.fc1.inner", True),
        ("encoder.*.fc1", "encoder.0.fc2", False),
        ("encoder.1", "encoder.10", False),
        ("encoder.?", "encoder.1.fc1", True),
        ("encoder.[01]", "encoder.1", True),
        ("*", "anything.at.all", True),
        ("*", "", True),
        ("", "", True),
        ("", "head", True),
        ("Head", "head", False),
    ],
)
def test_covers(pattern, path, wanted):
    assert covers(pattern, path) is wanted


def test_defaults():
    assert Recipe().rule_for("head", "linear") == Rule("w8a8", "histogram", "per_channel")
    assert Recipe(observer="min_max", weight="per_tensor").rule_for("", "add") == Rule("w8a8", "min_max", "per_tensor")
    assert Recipe.of("w8a8") == Recipe()
    recipe = Recipe(observer="percentile")
    assert Recipe.of(recipe) is recipe


def test_the_last_rule_that_speaks_wins():
    recipe = Recipe(
        modules={"encoder": FLOAT, "encoder.*.fc1": Rule(scheme="w8a8"), "encoder.1.*": Rule(observer="min_max")}
    )
    assert recipe.rule_for("encoder.0.fc2", "linear").scheme == "float"
    assert recipe.rule_for("encoder.0.fc1", "linear").scheme == "w8a8"
    assert recipe.rule_for("encoder.1.fc1", "linear") == Rule("w8a8", "min_max", "per_channel")
    assert recipe.rule_for("head", "linear").scheme == "w8a8"


def test_modules_win_over_families():
    recipe = Recipe(
        modules={"head": Rule(scheme="w8a8", weight="per_tensor")}, ops={"linear": FLOAT, "*": Rule(observer="min_max")}
    )
    assert recipe.rule_for("head", "linear") == Rule("w8a8", "min_max", "per_tensor")
    assert recipe.rule_for("body", "linear") == Rule("float", "min_max", "per_channel")
    assert recipe.rule_for("body", "add") == Rule("w8a8", "min_max", "per_channel")


def test_a_rule_that_is_silent_leaves_settings_as_they_are():
    assert Rule().over(Rule("w8a8", "min_max", "per_tensor")) == Rule("w8a8", "min_max", "per_tensor")
    assert FLOAT.over(Rule("w8a8", "min_max", "per_tensor")) == Rule("float", "min_max", "per_tensor")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe("w8a9"), r"unknown recipe 'w8a9'; there are w8a8"),
        (lambda: Recipe(observer="minmax"), r"unknown observer 'minmax'; there are min_max, moving_average"),
        (lambda: Rule(observer="best"), r"unknown observer 'best'"),
        (lambda: Rule(weight="per_row"), r"unknown weight granularity 'per_row'; there are 'per_channel' and"),
        (lambda: Recipe(weight=8), r"unknown weight granularity 8"),
        (lambda: Recipe(modules={"head": False}), r"the rule for 'head' is False; give fxq.FLOAT or fxq.Rule"),
        (lambda: Recipe(ops={"add": "float"}), r"the rule for 'add' is 'float'"),
        (lambda: Recipe(modules={torch.nn.ReLU(): FLOAT}), r"a rule is for a ReLU; name a module by its path"),
        (lambda: Recipe(round_weights=True), r"unknown round_weights True; there are 'feedback', 'adaround' and None"),
        (lambda: Recipe.of("int4"), r"unknown recipe 'int4'"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(RecipeError, match=message):
        make()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (Recipe(modules={"hed": FLOAT}), r"module 'hed' matches nothing in the model; did you mean head\?"),
        (Recipe(modules={"encoder.0.fc3": FLOAT}), r"did you mean .*encoder\.0\.fc1"),
        (Recipe(modules={"decoder.*.query": FLOAT}), r"matches nothing"),
        (Recipe(modules={"zzz": FLOAT}), r"its modules are encoder, encoder\.0"),
        (Recipe(ops={"conv": FLOAT}), r"op family 'conv' does not exist; there are add, carry, clamp, linear"),
    ],
)
def test_names_that_match_nothing(recipe, message):
    with pytest.raises(RecipeError, match=message):
        recipe.check_names(PATHS, FAMILIES)


def test_names_that_match():
    Recipe(modules={"": FLOAT, "encoder.*.fc1": FLOAT, "head": FLOAT}, ops={"lin*": FLOAT}).check_names(PATHS, FAMILIES)


class Twice(torch.nn.Module):
    """One linear under two names."""

    def __init__(self):
        super().__init__()
        self.a = torch.nn.Sequential(torch.nn.Linear(8, 8))
        self.b = self.a
        self.last = torch.nn.Linear(8, 8)

    def forward(self, x):
        return self.last(self.b(self.a(x).relu()))


@pytest.mark.parametrize("name", ["a", "b", "b.0", "a.*", "b.*"])
def test_a_rule_for_a_shared_module_holds_under_each_of_its_paths(name):
    qmodel = fxq.quantize(Twice().eval(), torch.randn(16, 8), recipe=Recipe(modules={name: FLOAT}))
    assert [d.form for d in qmodel.report.decisions if d.op == "linear"] == ["float", "float", "int8"]


def test_of_two_rules_for_a_shared_module_the_last_given_wins():
    rules = {"b": FLOAT, "a": Rule(scheme="w8a8")}
    qmodel = fxq.quantize(Twice().eval(), torch.randn(16, 8), recipe=Recipe(modules=rules))
    assert qmodel.report.int8_share == 1


def test_a_layer_that_the_recipe_keeps_float_may_hold_nan():
    model = Twice().eval()
    model.last.weight.data[0, 0] = torch.nan
    with pytest.raises(fxq.CalibrationError, match=r"last\.weight holds NaN"):
        fxq.quantize(model, torch.randn(16, 8))
    qmodel = fxq.quantize(model, torch.randn(16, 8), recipe=Recipe(modules={"last": FLOAT}), on_low_sqnr="ignore")
    assert qmodel.report.int8_share > 0.5


@pytest.mark.parametrize(
    "recipe",
    [
        fxq.Recipe(),
        fxq.Recipe("w8a8-dynamic", judge_costs=False),
        fxq.Recipe(
            observer="min_max",
            modules={"a.*": fxq.FLOAT, 'b"': fxq.Rule("w8a32", weight="per_tensor")},
            ops={"add": fxq.FLOAT},
        ),
    ],
)
def test_code_evaluates_to_the_recipe(recipe):
    assert eval(recipe.code) == recipe


@pytest.mark.parametrize("name", ["modules", "ops"])
def test_rules_go_by_name(name):
    with pytest.raises(fxq.RecipeError, match=rf"{name} is \['0'\]; give rules by name"):
        fxq.Recipe(**{name: ["0"]})


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a32", "w8a16"])
def test_fixed_point_needs_integers_between_layers(scheme):
    with pytest.raises(fxq.RecipeError, match=f"requant='fixed' .* not '{scheme}'"):
        fxq.Recipe(scheme, requant="fixed")
    fxq.Recipe(scheme, requant="fixed", modules={"body": fxq.Rule("w8a8")})
