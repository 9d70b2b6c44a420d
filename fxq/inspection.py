"""What a quantized model is like: its report, its noise, its times, its integers in NumPy."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxq import leaves as inside
from fxq import pipeline, tracing
from fxq.api import Examples, quantize
from fxq.calls import PerCall
from fxq.checks import check_model
from fxq.comparison import ANOTHER_MODEL, Comparison
from fxq.costs import Costs
from fxq.decisions import Reason, Report
from fxq.effects import effects_of
from fxq.encoding import encode
from fxq.errors import FileError, FxqError, GoldenError, InputError
from fxq.expansion import expand
from fxq.golden_model import GoldenModel
from fxq.golden_program import build
from fxq.graph import Interpreter, NodeError, bind, mutations, place_of, propagate, target_name
from fxq.inputs import Call, as_call
from fxq.noise import compare_runs
from fxq.paired_runs import PairedRuns
from fxq.pipeline import Context
from fxq.profiling import Profile, measure
from fxq.quantized import QuantizedModule
from fxq.recipe import Recipe
from fxq.remedies import find_remedies
from fxq.stages import Stage
from passes import PREPARE
from passes.judge_costs import FOR_TIME


def report(qmodel: nn.Module) -> Report:
    """What runs int8 in a quantized or prepared model, what stayed float, and why; prints as a table."""
    if isinstance(qmodel, QuantizedModule):
        return qmodel.report
    if isinstance(qmodel, GraphModule) and isinstance(qmodel.meta.get("fxq"), Context):
        return cast(Context, qmodel.meta["fxq"]).report
    raise InputError(f"fxq.report: {type(qmodel).__name__} was not made by fxq.quantize, prepare or convert")


@torch.inference_mode(False)
def compare(
    model: nn.Module,
    qmodel: GraphModule,
    inputs: Examples,
    *,
    kwargs: Mapping[str, Any] | None = None,
    leaves: tuple[type[nn.Module] | str, ...] = (),
    calibration_data: Iterable[Any] | None = None,
    recipe: str | Recipe = "w8a8",
    seconds: float = 60.0,
    progress: bool | None = None,
) -> Comparison:
    """Each integer layer's SQNR in dB against the float model: with exact inputs (alone), and as it runs (accumulated).

    The layers inside leaves come last, as their module is called first.

    calibration_data, recipe: what `quantize` was given; with them, remedies are tried for the three layers without
    whose own noise the output gains most, each by quantizing the model anew, and the best stands in the result as a
    recipe to paste. seconds: after which no further one is tried. Raises `InputError` where `qmodel` was not made of
    `model`, or by another recipe.
    """
    call = as_call(inputs, kwargs)
    if not isinstance(qmodel, QuantizedModule):
        raise InputError(f"fxq.compare takes what fxq.quantize returns, not a {type(qmodel).__name__}")
    schemes = {qmodel.report.recipe, *(decision.scheme for decision in qmodel.report.decisions)}
    check_model(model, call, narrow="w8a16" in schemes)
    shapes = [list(tensor.shape) for _, tensor in call.tensors()]
    if shapes and all(0 in shape for shape in shapes):
        given = ", ".join(map(str, shapes))
        raise InputError(f"fxq.compare: the inputs hold no numbers to compare (shape {given}); give a batch of some")
    base, made_by = Recipe.of(recipe), qmodel.report.recipe_code or qmodel.report.recipe
    if calibration_data is not None and base.code != made_by:
        what = f"qmodel was quantized by {made_by}, and recipe is {base.code}"
        raise InputError(f"fxq.compare: {what}; remedies are tried on top of the recipe of qmodel: give that one")
    runs = _runs_of(model, qmodel, call, call, leaves)
    result = compare_runs(runs)
    for own in _inside_leaves(model, qmodel, call, leaves):
        result.layers.extend(compare_runs(own).layers)
    if calibration_data is None:
        return result
    data = list(calibration_data) if isinstance(calibration_data, Iterator) else calibration_data

    def attempt(changed: Recipe) -> float:
        again = quantize(
            model,
            inputs,
            example_kwargs=kwargs,
            calibration_data=data,
            recipe=changed,
            on_low_sqnr="ignore",
            leaves=leaves,
            progress=False,
        )
        return cast(float, again.report.sqnr)

    effects = functools.partial(effects_of, runs)
    return replace(result, suspects=find_remedies(result, qmodel.report, base, effects, attempt, seconds, progress))


def _runs_of(
    float_model: nn.Module, made: QuantizedModule, exact: Call, reached: Call, leaves: tuple[type[nn.Module] | str, ...]
) -> PairedRuns:
    """The float model on the call `exact`, and what was made of it on `reached`; raises `InputError` where it was not.

    leaves: as in `quantize`.
    """
    gm = tracing.trace(float_model, exact.args, exact.kwargs, leaves=leaves, frontend=_frontend_of(made))
    ctx = Context(Recipe(), (), exact.clone())
    pipeline.begin(gm, ctx)
    integers, own = expand(made), reached.clone()
    try:
        propagate(integers, own.args, own.kwargs)
    except NodeError as failure:
        if isinstance(failure.__cause__, FxqError):
            raise failure.__cause__ from None
        what = f"{place_of(failure.node)} of the quantized model fails where the float model does not"
        why = str(failure.__cause__).partition("\n")[0]  # torch goes on to print tensors
        raise InputError(f"fxq.compare: {what}: {why}; {ANOTHER_MODEL}") from failure.__cause__
    except TypeError as error:
        name, known = type(float_model).__name__, ", ".join(inspect.signature(made.forward).parameters)
        what = f"the inputs fit {name}, and not the quantized model, whose arguments are ({known})"
        raise InputError(f"fxq.compare: {what}: {error}; {ANOTHER_MODEL}") from error
    same_numbers = tuple(step for step in PREPARE if step.gives is Stage.FLOAT)
    return PairedRuns.of(pipeline.run(same_numbers, gm, ctx), integers, exact, reached, made.report.equalized)


def _inside_leaves(
    model: nn.Module, qmodel: QuantizedModule, call: Call, leaves: tuple[type[nn.Module] | str, ...]
) -> Iterator[PairedRuns]:
    """Of what is quantized inside leaves, each module on the first call of its own that reaches it."""
    inner = {path: module for path, module in qmodel.named_modules() if path and isinstance(module, QuantizedModule)}
    if not inner:
        return
    plain = {path: _place(qmodel, path) for path in inner}
    evaluated = copy.deepcopy(model).eval()
    exact = inside.calls_of(evaluated, {name for name, _ in plain.values()}, call)
    reached = inside.calls_of(copy.deepcopy(qmodel), list(inner), call)
    for path, (name, turn) in plain.items():
        if reached[path] and len(exact[name]) > turn:
            module = evaluated.get_submodule(name)
            yield _runs_of(module, inner[path], exact[name][turn], reached[path][0], leaves)


def _place(qmodel: QuantizedModule, path: str) -> tuple[str, int]:
    """Where in the user's model the module stands that is integers at `path`, and which of its calls that is for."""
    owner, _, name = path.rpartition(".")
    several = bool(owner) and isinstance(qmodel.get_submodule(owner), PerCall)
    outer, turn = (owner, int(name)) if several else (path, 0)
    return outer.removeprefix(f"{tracing.WHOLE}."), turn


@torch.inference_mode(False)
def profile(gm: GraphModule, inputs: Examples, *, kwargs: Mapping[str, Any] | None = None) -> Profile:
    """The microseconds of every operation of a graph on these inputs, measured beside predicted.

    gm: what `fxq.quantize`, `prepare` or `trace` returns. What the file of costs (`fxq.costs`) did not know is measured
    and added to it. Threads: `torch.get_num_threads()`.
    """
    if not isinstance(gm, GraphModule):
        raise InputError(f"fxq.profile takes what fxq.quantize or fxq.trace returns, not a {type(gm).__name__}")
    call, costs = as_call(inputs, kwargs), Costs()
    result = measure(gm, call, costs)
    costs.save()
    return result


def golden(
    qmodel: nn.Module,
    *,
    islands: Literal["refuse", "torch"] = "refuse",
    ops: Mapping[str, Callable[..., Any]] | None = None,
) -> GoldenModel:
    """A NumPy program of a quantized model, with the same bits and every intermediate integer: `GoldenModel`.

    islands: what to do about float operations whose bits NumPy cannot promise (softmax outside of attention, group
    norm, a linear kept float): "refuse" raises `GoldenError`, which lists them; "torch" takes their values from
    `qmodel`, run on the same call, and computes all the rest. ops: NumPy functions for ops of the user's own families,
    by name (`mylib.myop`).
    """
    if not isinstance(qmodel, QuantizedModule):
        raise InputError(f"fxq.golden takes what fxq.quantize returns, not a {type(qmodel).__name__}")
    flat = QuantizedModule.of(expand(qmodel), qmodel.report)
    try:
        plain = encode(flat)
    except FileError as error:
        raise GoldenError(f"the model cannot be written down as a program: {error}") from error
    held = {name: value for name, value in plain["constants"].items() if isinstance(value, Tensor)}
    for name, value in held.items():
        if value.dtype == torch.bfloat16:
            raise GoldenError(f"{name} is bfloat16, which NumPy does not have; quantize in float32")
    constants = {name: value.numpy() for name, value in held.items()}
    named = zip(flat.graph.nodes, plain["nodes"], strict=True)
    types = {entry["target"]: node.target for node, entry in named if isinstance(node.target, type)}
    program = build(plain, constants, types, ops or ())
    names = {step.name for step in program.steps if not step.op}

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = pytree.tree_map_only(np.ndarray, lambda array: torch.from_numpy(array.copy("K")), (args, kwargs))
        changed = [
            f"{place_of(node)}: {target_name(node.target)}"
            for node, held in mutations(flat, *call).items()
            if any(reader.name not in names for holder in held for reader in holder.users)
        ]
        if changed:
            raise GoldenError(
                f"{', '.join(changed)} works in place, which a golden model cannot; write it out of place"
            )
        interpreter = Interpreter(flat, garbage_collect_values=False)
        with torch.no_grad():
            interpreter.run(*bind(flat, *call))
        found = {node.name: value for node, value in interpreter.env.items() if node.name in names}
        return dict(pytree.tree_map_only(Tensor, lambda tensor: tensor.numpy(), found))

    given = record if islands == "torch" else None
    if any(d.reason is Reason.UNPROFITABLE and FOR_TIME in d.detail for d in qmodel.report.decisions):
        remedy = "quantize with Recipe(judge_costs=False) what is float for its time on this machine only"
        return GoldenModel(program, ops=ops, types=types, record=given, remedy=remedy)
    return GoldenModel(program, ops=ops, types=types, record=given)


def _frontend_of(made: QuantizedModule) -> tracing.Frontend:
    """The front end that captured the model: the same gives the same names again."""
    served = made.report.frontend
    return "export" if served.startswith("torch.export") else "leaf" if served == tracing.AS_LEAF else "trace"
