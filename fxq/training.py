"""From a float model to one that trains with the rounding of int8."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from fxq import leaves as inside
from fxq import tracing
from fxq.api import Examples, calibrate, dump_folder, resolve
from fxq.batch_norm import BatchNorm
from fxq.checks import check_leaves, check_model
from fxq.errors import InputError, RecipeError
from fxq.fake_quantize import FakeQuantize
from fxq.family import Family
from fxq.inputs import as_call
from fxq.ops import FAMILIES
from fxq.pipeline import Context, Pass
from fxq.recipe import Recipe
from passes import PREPARE_QAT


@torch.inference_mode(False)
def prepare_qat(
    model: nn.Module,
    example_inputs: Examples,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    recipe: str | Recipe = "w8a8",
    families: tuple[Family, ...] = FAMILIES,
    passes: tuple[Pass, ...] | None = None,
    leaves: tuple[type[nn.Module] | str, ...] = (),
    frontend: tracing.Frontend = "auto",
    dump: str | Path | None = None,
    check: bool = False,
) -> GraphModule:
    """A graph in training mode that computes with the rounding of int8: train it, then `convert` it.

    Its parameters are copies of the user's, under the user's names; the user's model is not touched. Values are fake
    quantized (`fxq.fake_quantize`), gradients pass straight through; batch norms behind products are folded as they
    will be (`fxq.batch_norm`); dropout and batch norm follow train() and eval(). The examples give the first ranges;
    `calibrate` gives better ones. From then on the ranges follow the training data until `freeze_observers`, or, with
    `Recipe(learn_steps=True)`, the step sizes are parameters. What the user's own code does in training mode only
    (`if self.training`) is not in the graph. Arguments and errors as in `prepare`.
    """
    recipe = Recipe.of(recipe)
    if recipe.scheme != "w8a8":
        raise RecipeError(f"fxq.prepare_qat trains for the recipe 'w8a8', not {recipe.scheme!r}")
    if recipe.reproducible:
        raise RecipeError("reproducible=True is for what calibration decides; training follows the machine it runs on")
    call = as_call(example_inputs, example_kwargs)
    check_model(model, call)
    check_leaves(model, leaves)
    resolved = resolve(recipe, model, families)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model is in training mode", tracing.TracingWarning)
        gm = tracing.trace(model, call.args, call.kwargs, leaves=leaves, frontend=frontend)
    ctx = Context(resolved, families, call.clone(), check=check, dump=dump_folder(dump))
    ctx.report.recipe, ctx.report.recipe_code = recipe.title, recipe.code
    gm = inside.prepare_graph(gm, ctx, PREPARE_QAT if passes is None else passes)
    return calibrate(gm, [call.args or call.kwargs], progress=False).train()


def freeze_observers(model: nn.Module, after: int = 0) -> None:
    """From `after` more training steps on, the ranges in a model of `prepare_qat` stand still; in a wrapper as well.

    A step is a forward in training mode. The schedule is part of the `state_dict`. Raises `InputError`.
    """
    _freeze(model, FakeQuantize, after, "fxq.freeze_observers")


def freeze_batch_norm(model: nn.Module, after: int = 0) -> None:
    """From `after` more training steps on, the statistics of batch norms stand still, and are what is normalised by.

    Their weights and biases train on. Otherwise as `freeze_observers`.
    """
    _freeze(model, BatchNorm, after, "fxq.freeze_batch_norm")


def _freeze(model: nn.Module, kind: type[FakeQuantize | BatchNorm], after: int, what: str) -> None:
    if not any(isinstance(m, GraphModule) and isinstance(m.meta.get("fxq"), Context) for m in model.modules()):
        raise InputError(f"{what} takes what fxq.prepare_qat returns, not {type(model).__name__}")
    if after < 0:
        raise InputError(f"{what}: after is {after}; it counts steps from now on")
    for module in model.modules():
        if isinstance(module, kind):
            module.freeze(after)
