"""Replace the linears of a model by those of `fxq.nn`, without tracing it."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from fxq.checks import check_float
from fxq.decisions import Decision, Form, Reason, Report
from fxq.errors import InputError, RecipeError
from fxq.nn import LAYERS, QuantizedLinear
from fxq.quantized import weight_bytes
from fxq.recipe import Recipe

_FORMS: dict[str, Form] = {"w8a8-dynamic": "int8", "w8a16": "weight", "w8a32": "weight"}
READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
"""Modules of torch's that read the weights of their linears instead of calling them."""


def swap_linears(model: nn.Module, recipe: str | Recipe = "w8a32") -> tuple[nn.Module, Report]:
    """A copy of `model` with int8 weights in its linears, and what became of each of them; `model` stays as it is.

    recipe: "w8a32", "w8a16", "w8a8-dynamic", or a `Recipe` of these and "float", whose `modules` are full paths or
    globs. Linears that share a weight go on sharing it. A linear that is not plain (a subclass with a forward of its
    own, hooks, parametrizations, a parent that reads its weight) is left alone, with the reason in the report; so is a
    layer of `fxq.nn`.
    Raises `RecipeError` for a recipe that needs calibration data or names no module of the model, and `InputError` for
    weights that do not fit the scheme, and a model that fxq has quantized or prepared.
    """
    recipe = Recipe.of(recipe)
    if "w8a8" in recipe.schemes:
        raise RecipeError("swap_linears has no calibration data for w8a8: use w8a8-dynamic here, or fxq.quantize")
    check_float(model)
    recipe.check_names((name for name, _ in model.named_modules()), ("linear",))
    swapped = copy.deepcopy(model)
    report = Report(recipe=recipe.scheme, frontend="fxq.swap_linears", weight_bytes=(weight_bytes(model), 0))
    modules = swapped.named_modules(remove_duplicate=False)
    linears = [(path, m) for path, m in modules if isinstance(m, nn.Linear | QuantizedLinear)]
    made: dict[nn.Linear, QuantizedLinear] = {}
    packed: dict[tuple[int, str], QuantizedLinear] = {}
    for path, linear in linears:
        if isinstance(linear, QuantizedLinear):
            form, detail = _FORMS[linear.scheme], "it had int8 weights before; swap the float model for another scheme"
            report.decisions.append(
                Decision(path, path, "", type(linear).__name__, form, None, detail, 0, linear.scheme)
            )
            continue
        scheme = recipe.rule_for(path, "linear").scheme
        assert scheme is not None
        refusal = _refusal(swapped, path, linear)
        if scheme == "float" or refusal:
            reason = Reason.USER_EXCLUDED if scheme == "float" else Reason.LEAF_MODULE
            detail = "" if scheme == "float" else refusal
            report.decisions.append(Decision(path, path, "", type(linear).__name__, "float", reason, detail))
            continue
        if linear not in made:
            try:
                made[linear] = LAYERS[scheme].from_float(linear)
            except InputError as error:
                raise InputError(f"{path or 'the model itself'}: {error}") from None
            made[linear].path = path
            first = packed.setdefault((id(linear.weight), scheme), made[linear])
            for name in ("weight_packed", "weight_scale", "column_sums"):
                if hasattr(first, name):
                    setattr(made[linear], name, getattr(first, name))
        report.decisions.append(Decision(path, path, "", "Linear", _FORMS[scheme], scheme=scheme))
        if not path:
            swapped = made[linear]
        else:
            swapped.set_submodule(path, made[linear])
    report.weight_bytes = (report.weight_bytes[0], weight_bytes(swapped))
    return swapped, report


def _refusal(model: nn.Module, path: str, linear: nn.Linear) -> str:
    """Why a linear cannot be replaced; "" where it can."""
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return f"{type(linear).__name__} has a forward of its own"
    if parametrize.is_parametrized(linear):
        return "its weight is parametrized; remove the parametrization first"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks:
        return "it has hooks"
    parent = model.get_submodule(path.rpartition(".")[0]) if path else None
    if isinstance(linear, NonDynamicallyQuantizableLinear) or isinstance(parent, READERS):
        return f"{type(parent).__name__} reads its weight"
    return ""
