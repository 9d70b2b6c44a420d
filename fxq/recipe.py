"""What the user wants: a scheme, an observer, and rules for parts of the model."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Literal, get_args

from fxq.errors import RecipeError
from fxq.observers import OBSERVERS
from fxq.qtypes import SCHEMES, Granularity, Scheme

Requant = Literal["float", "fixed"]
RequantRounding = Literal["single", "tflite"]
Outputs = Literal["float32", "uint8"]
BiasCorrection = Literal["empirical", "analytic"]
WeightRounding = Literal["feedback", "adaround"]


@dataclass(frozen=True)
class Rule:
    """How a part of the model departs from the rest; None leaves a setting as it is.

    scheme: one of `SCHEMES` (see `Recipe`). observer: of the activations that its operations produce, or read where a
    float island produces them. weight: "per_channel" or "per_tensor" scales.
    """

    scheme: Scheme | None = None
    observer: str | None = None
    weight: Granularity | None = None

    def __post_init__(self) -> None:
        if self.scheme is not None and self.scheme not in SCHEMES:
            raise RecipeError(f"unknown scheme {self.scheme!r}; there are {', '.join(SCHEMES)}")
        if self.observer is not None and self.observer not in OBSERVERS:
            raise RecipeError(f"unknown observer {self.observer!r}; there are {', '.join(OBSERVERS)}")
        if self.weight not in (None, "per_channel", "per_tensor"):
            raise RecipeError(f"unknown weight granularity {self.weight!r}; there are 'per_channel' and 'per_tensor'")

    def over(self, other: Rule) -> Rule:
        """This rule, completed by `other` where it leaves a setting open."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}
        return replace(other, **given)

    @property
    def code(self) -> str:
        """The rule as Python text."""
        return "fxq.FLOAT" if self == FLOAT else f"fxq.Rule({_given(self)})"


def _given(settings: Rule | Recipe) -> str:
    """The settings that are not the default, as arguments."""
    texts = []
    for f in fields(settings):
        value = getattr(settings, f.name)
        if isinstance(value, Mapping):
            if value:
                rules = ", ".join(f"{name!r}: {rule.code}" for name, rule in value.items())
                texts.append(f"{f.name}={{{rules}}}")
        elif value != f.default:
            texts.append(f"{f.name}={value!r}")
    return ", ".join(texts)


FLOAT = Rule(scheme="float")
"""The rule that keeps a part of the model float."""


@dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    scheme: "w8a8", int8 weights and activations whose scales are found by calibration; "w8a8-dynamic", activations with
    a scale for each row, found as the model runs; "w8a32", float32 activations beside int8 weights; "w8a16", the same
    with bfloat16 or float16 activations; "float", as it is. observer, weight: with scheme the defaults of `Rule`.
    equalize: whether the channels of a value between two products are brought to like ranges, where that lowers the
    second's error.
    balance: whether ranges and channels between float islands and products are chosen by the products' error (observer
    "histogram" only).
    scale_rows: whether each row of what such a product reads gets a scale of its own where one for all is hopeless.
    round_weights: how the weights of a product are rounded together, so that their errors cancel: "feedback", where
    each takes over the errors of those before it (GPTQ); "adaround", where each goes up or down as an optimizer finds
    best, which takes three to thirty times as long; None rounds each to its nearest.
    judge_costs: whether what would be slower in int8 on this machine, at the shapes of the examples, stays float. False
    makes a model that does not depend on a clock.
    judge_tables: whether embedding tables stay float where rounding them makes more noise in the output than all the
    rest. False keeps them int8, a quarter of the memory.
    reproducible: whether the same inputs give the same model on every machine, byte for byte: what decides is computed
    in float64, which takes up to three times as long, and judge_costs has no say.
    correct_bias: how the mean error of each output channel goes into the biases: "empirical", as the integer network
    shows it on calibration data; "analytic", what rounding the weights does to the mean input; None leaves them.
    learn_steps: whether `fxq.prepare_qat` makes the step sizes parameters (LSQ), instead of following the ranges.
    requant: how a sum becomes the next layer's uint8: "float" multiplies in float32, "fixed" by an integer multiplier
    and a shift, for hardware without floats. rounding, of "fixed": "single" rounds once, ties towards plus infinity;
    "tflite" twice, as TFLite and gemmlowp do by default (an add rounds once under both).
    outputs: what the model returns for its float32 tensors: "float32", or "uint8", quantized as all integers are, with
    scale and zero point in `QuantizedModule.output_qparams` (None for what cannot be: other dtypes, and the values in
    a `torch.return_types.max` and the like).
    modules: rules by module path; a path covers everything below it, and may be a glob ("encoder.*.query").
    ops: rules by op family ("linear", "add"). Where several rules speak, the last given wins; modules win over ops.

        Recipe(modules={"head": FLOAT, "blocks.*.fc1": Rule(weight="per_tensor")}, ops={"add": FLOAT})
    """

    scheme: Scheme = "w8a8"
    observer: str = "histogram"
    weight: Granularity = "per_channel"
    equalize: bool = False
    balance: bool = True
    scale_rows: bool = True
    round_weights: WeightRounding | None = "feedback"
    judge_costs: bool = True
    judge_tables: bool = True
    reproducible: bool = False
    correct_bias: BiasCorrection | None = "empirical"
    learn_steps: bool = False
    requant: Requant = "float"
    rounding: RequantRounding = "single"
    outputs: Outputs = "float32"
    modules: Mapping[str, Rule] = field(default_factory=dict)
    ops: Mapping[str, Rule] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.scheme not in SCHEMES:
            raise RecipeError(f"unknown recipe {self.scheme!r}; there are {', '.join(SCHEMES)}")
        Rule(observer=self.observer, weight=self.weight)
        if self.requant not in get_args(Requant):
            raise RecipeError(f"unknown requant {self.requant!r}; there are {', '.join(get_args(Requant))}")
        if self.rounding not in get_args(RequantRounding):
            raise RecipeError(f"unknown rounding {self.rounding!r}; there are {', '.join(get_args(RequantRounding))}")
        if self.rounding != "single" and self.requant != "fixed":
            raise RecipeError(f"rounding={self.rounding!r} is a rounding of integers; give requant='fixed' with it")
        if self.outputs not in get_args(Outputs):
            raise RecipeError(f"unknown outputs {self.outputs!r}; there are {', '.join(get_args(Outputs))}")
        if self.correct_bias not in (None, *get_args(BiasCorrection)):
            kinds = ", ".join(map(repr, get_args(BiasCorrection)))
            raise RecipeError(f"unknown correct_bias {self.correct_bias!r}; there are {kinds} and None")
        if self.round_weights not in (None, *get_args(WeightRounding)):
            kinds = ", ".join(map(repr, get_args(WeightRounding)))
            raise RecipeError(f"unknown round_weights {self.round_weights!r}; there are {kinds} and None")
        for what, rules in (("modules", self.modules), ("ops", self.ops)):
            if not isinstance(rules, Mapping):
                raise RecipeError(f"{what} is {rules!r}; give rules by name, as {what}={{'head': fxq.FLOAT}}")
        for name, rule in [*self.modules.items(), *self.ops.items()]:
            if not isinstance(name, str):
                raise RecipeError(
                    f"a rule is for a {type(name).__name__}; name a module by its path, an op by its family"
                )
            if not isinstance(rule, Rule):
                raise RecipeError(f"the rule for {name!r} is {rule!r}; give fxq.FLOAT or fxq.Rule(...)")
        if self.requant == "fixed" and "w8a8" not in self.schemes:
            raise RecipeError(f"requant='fixed' is for integers between layers: the scheme 'w8a8', not {self.scheme!r}")
        if self.outputs == "uint8" and "w8a8" not in self.schemes:
            raise RecipeError(
                f"outputs='uint8' needs scales found by calibration: the scheme 'w8a8', not {self.scheme!r}"
            )

    @property
    def title(self) -> str:
        """What reports call it: the scheme, how it requantizes where that is not in float, integer outputs."""
        requant = "" if self.requant == "float" else f", requant fixed, rounding {self.rounding}"
        return f"{self.scheme}{requant}{', outputs uint8' if self.outputs == 'uint8' else ''}"

    @property
    def code(self) -> str:
        """The recipe as Python text, to be evaluated beside `import fxq`."""
        return f"fxq.Recipe({_given(self)})"

    @classmethod
    def of(cls, recipe: str | Recipe) -> Recipe:
        """A recipe from its name, or the recipe itself."""
        return recipe if isinstance(recipe, Recipe) else cls(recipe)  # type: ignore[arg-type]

    @property
    def schemes(self) -> frozenset[Scheme]:
        """The schemes that it names for any part of a model."""
        rules = (*self.modules.values(), *self.ops.values())
        return frozenset({self.scheme, *(rule.scheme for rule in rules if rule.scheme is not None)})

    def rule_for(self, module: str, op: str) -> Rule:
        """The settings of an operation of family `op` in the module at path `module`, all filled in."""
        rule = Rule(self.scheme, self.observer, self.weight)
        for name, given in self.ops.items():
            if fnmatch.fnmatchcase(op, name):
                rule = given.over(rule)
        for pattern, given in self.modules.items():
            if covers(pattern, module):
                rule = given.over(rule)
        return rule

    def with_all_names(self, modules: Iterable[tuple[str, object]]) -> Recipe:
        """The recipe whose rules for a shared module hold under whichever of its paths they name it.

        modules: every path with its module; the first path of a module is the one that graphs know it by.
        """
        first: dict[int, str] = {}
        others = [(path, known) for path, module in modules if (known := first.setdefault(id(module), path)) != path]
        rules: dict[str, Rule] = {}
        for pattern, rule in self.modules.items():
            for name in (pattern, *(known for path, known in others if covers(pattern, path))):
                rules.pop(name, None)  # the last given wins
                rules[name] = rule
        return replace(self, modules=rules)

    def check_names(self, modules: Iterable[str], families: Iterable[str]) -> None:
        """Raise `RecipeError` when a rule names a module or op family that is not there."""
        paths, ops = sorted(set(modules)), sorted(set(families))
        for pattern in self.modules:
            if not any(covers(pattern, path) for path in paths):
                near = difflib.get_close_matches(pattern, paths, n=3, cutoff=0.5)
                named = [path for path in paths if path][:12]
                hint = f"did you mean {', '.join(near)}?" if near else f"its modules are {', '.join(named)}"
                raise RecipeError(f"the recipe's module {pattern!r} matches nothing in the model; {hint}")
        for name in self.ops:
            if not any(fnmatch.fnmatchcase(op, name) for op in ops):
                raise RecipeError(f"the recipe's op family {name!r} does not exist; there are {', '.join(ops)}")


def covers(pattern: str, path: str) -> bool:
    """Whether `pattern` (a path or glob) names the module at `path` or one that contains it."""
    if pattern == "":
        return True
    parts = path.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))
