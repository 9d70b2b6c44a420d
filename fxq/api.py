"""From a float model to integers: each public function is a few steps over the layers below."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping, Sized
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxq import drawing, dump, pipeline, tracing
from fxq import leaves as inside
from fxq.checks import check_leaves, check_model, is_narrow
from fxq.comparison import output_sqnr
from fxq.decisions import Reason, Report
from fxq.double import run
from fxq.errors import CalibrationError, FxqError, InputError, QuantizationError, RecipeError
from fxq.expansion import expand
from fxq.fake_quantize import FakeQuantize, WeightFakeQuantize
from fxq.family import Family
from fxq.graph import STATE, constant, is_tensor, restored, unchanged
from fxq.inputs import Call, as_call, calibration_calls, check_finite
from fxq.memory import give_back
from fxq.noise import compare_graphs
from fxq.observers import Observer, forget_rows, learning, paused
from fxq.ops import FAMILIES
from fxq.pipeline import Context, Pass
from fxq.quantized import QuantizedModule
from fxq.randomness import Randomness
from fxq.recipe import Recipe
from fxq.sampling import sample_of
from fxq.stages import Stage
from fxq.tracing.sharing import aliases, own, tensors_of
from passes import CONVERT, PREPARE

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
OnLowSqnr = Literal["warn", "error", "ignore"]
MIN_SQNR = 15.0
"""dB; below it `quantize` warns: one part in six of the output's amplitude is noise, and a layer is likely ruined."""


class AccuracyWarning(UserWarning):
    """The int8 model is further from the float model than it should be."""


class KeptFloatWarning(UserWarning):
    """Multiply-accumulates that could weigh stay float without the user having asked for it."""


def trace(
    model: nn.Module,
    example_inputs: Examples,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    leaves: tuple[type[nn.Module] | str, ...] = (),
    frontend: tracing.Frontend = "auto",
) -> GraphModule:
    """The float graph of `model` alone, checked against eager on the examples.

    leaves: module classes or paths that are not looked into. frontend: "trace" records the model's own code, "export"
    what `torch.export` makes of it; "auto" tries the second where the first fails. "leaf" leaves the model's code as
    it is, and what becomes int8 are the modules that it calls. Raises `InputError`, `TraceError`, and `VerifyError`
    where code that cannot be traced raises.
    """
    call = as_call(example_inputs, example_kwargs)
    check_model(model, call)
    check_leaves(model, leaves)
    gm = tracing.trace(model, call.args, call.kwargs, leaves=leaves, frontend=frontend)
    pipeline.begin(gm, Context(Recipe(), (), call))  # dtypes and shapes, for texts and pictures
    return gm


@torch.inference_mode(False)
def prepare(
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
    progress: bool | None = None,
) -> GraphModule:
    """A float graph with observers, ready to be calibrated; the first of three steps that `quantize` takes at once.

    The user's model is not touched. families, passes: what `fxq.ops` and `passes` hold, or more of it.
    check: every pass is held to the numbers that it promises on the examples. progress: as in `calibrate`.
    Raises `InputError`, `RecipeError`, `TraceError`, `CalibrationError` (weights that are not finite).
    """
    return _prepare(
        model,
        as_call(example_inputs, example_kwargs),
        Recipe.of(recipe),
        families,
        passes,
        leaves,
        frontend,
        dump,
        check,
        progress,
    )


def _prepare(
    model: nn.Module,
    call: Call,
    recipe: Recipe,
    families: tuple[Family, ...],
    passes: tuple[Pass, ...] | None,
    leaves: tuple[type[nn.Module] | str, ...],
    frontend: tracing.Frontend,
    dump: str | Path | None,
    check: bool,
    progress: bool | None,
    share: bool = False,
) -> GraphModule:
    """See `prepare`. share: whether the graph may share the memory of the model's parameters and buffers."""
    if recipe.learn_steps:
        raise RecipeError("learn_steps=True asks for training; use fxq.prepare_qat")
    check_model(model, call, narrow="w8a16" in recipe.schemes)
    check_leaves(model, leaves)
    if recipe.schemes <= {"w8a16", "float"} and recipe.scheme == "w8a16" and not is_narrow(model, call):
        raise InputError(
            "the recipe w8a16 takes bfloat16 or float16 activations, and the model is float32: convert model and "
            "inputs with .to(torch.bfloat16), or use the recipe w8a32"
        )
    resolved = resolve(recipe, model, families)
    folder = dump_folder(dump)
    gm = tracing.trace(model, call.args, call.kwargs, leaves=leaves, frontend=frontend, share=share)
    give_back()
    ctx = Context(resolved, families, call.clone(), check=check, dump=folder, progress=progress)
    ctx.report.recipe, ctx.report.recipe_code = recipe.title, recipe.code
    gm = inside.prepare(gm, ctx, PREPARE if passes is None else passes, leaves)
    give_back()
    return gm


@torch.inference_mode(False)
def calibrate(prepared: GraphModule, data: Iterable[Any], *, progress: bool | None = None) -> GraphModule:
    """Run calibration data through a prepared model; its observers learn. Returns the same object.

    data: an iterable of batches like the example inputs (labels may follow). May be called more than once.
    progress: a bar on stderr; by default once it takes longer than two seconds.
    Raises `CalibrationError` naming the batch and the layer for NaN or infinity, and for empty data.
    """
    ctx = _context(prepared, Stage.OBSERVED, "fxq.calibrate")
    examples, ctx.progress = ctx.examples, progress
    sample = sample_of(prepared)
    bar = tqdm(
        calibration_calls(data, examples),
        desc="calibrating",
        unit="batch",
        delay=0 if progress else 2,
        disable=progress is False,
        total=len(data) if isinstance(data, Sized) else None,
        leave=False,
    )
    count, own = 0, Randomness()
    with torch.no_grad(), restored(prepared), learning(prepared), bar:
        for count, call in enumerate(bar, 1):
            check_finite(call, f"calibration batch {count - 1}")
            if sample is not None:
                sample.offer(call)
            try:
                with own:  # not what the data draw
                    run(prepared, call.clone(), double=ctx.recipe.reproducible)
            except FxqError as error:
                raise type(error)(f"calibration batch {count - 1}: {error}") from None
            except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
                raise InputError(
                    f"calibration batch {count - 1}: the model fails on it: {error}; each must be like example_inputs"
                ) from error
    if not count:
        raise CalibrationError("calibration_data is empty: give at least one batch like the example inputs")
    give_back()
    return prepared


@torch.inference_mode(False)
def convert(prepared: GraphModule, *, passes: tuple[Pass, ...] | None = None) -> QuantizedModule:
    """Turn a calibrated model into integers. `prepared` stays as it is.

    Raises `CalibrationError` naming the first value that no data has reached, or a parameter that training has made
    NaN or infinite.
    """
    return _convert(prepared, passes)


def _convert(prepared: GraphModule, passes: tuple[Pass, ...] | None, last: bool = False) -> QuantizedModule:
    """See `convert`. last: `prepared` is to be converted once; it keeps no samples."""
    _context(prepared, Stage.OBSERVED, "fxq.convert")
    trained = [module for module in prepared.modules() if isinstance(module, FakeQuantize | WeightFakeQuantize)]
    for name, parameter in prepared.named_parameters() if trained else ():
        if not bool(torch.isfinite(parameter).all()):
            raise CalibrationError(
                f"parameter {name} holds NaN or infinity: the training has diverged; convert an earlier checkpoint, or "
                "train with a smaller learning rate"
            )
    changing = {id(tensor) for module in trained for tensor in tensors_of(module)}  # those write to theirs
    shared = not prepared.meta.get(STATE)
    kept = (t for t in tensors_of(prepared) if shared and id(t) not in changing)
    gm = copy.deepcopy(prepared, aliases(kept)).eval()
    if last:
        forget_rows(prepared)
    ctx = cast(Context, gm.meta["fxq"])
    result = inside.convert(gm, CONVERT if passes is None else passes)
    own(result, tensors_of(prepared))
    if ctx.dump is not None:
        ctx.dump.write_text("report.txt", str(ctx.report))
    return result


def quantize(
    model: nn.Module,
    example_inputs: Examples,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    calibration_data: Iterable[Any] | None = None,
    recipe: str | Recipe = "w8a8",
    strict: bool = False,
    min_sqnr: float = MIN_SQNR,
    on_low_sqnr: OnLowSqnr = "warn",
    families: tuple[Family, ...] = FAMILIES,
    passes: tuple[tuple[Pass, ...], tuple[Pass, ...]] | None = None,
    leaves: tuple[type[nn.Module] | str, ...] = (),
    frontend: tracing.Frontend = "auto",
    dump: str | Path | None = None,
    check: bool = False,
    progress: bool | None = None,
) -> QuantizedModule:
    """An int8 GraphModule of `model`, with the same signature; the model itself is not touched.

    example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments (example_kwargs for models
    that take both). calibration_data: an iterable of the same; by default the examples alone. recipe: the name of a
    scheme or a `Recipe`. strict: an operation with multiply-accumulates that stays float unasked is an error, all of
    them in one; under `requant="fixed"` any float arithmetic between quantized inputs and dequantized outputs is.
    min_sqnr: in dB, what the output on the examples must reach against the float model; on_low_sqnr: what else.
    passes: the passes before and after calibration, by default `passes.PREPARE` and `passes.CONVERT`.
    leaves: module classes or paths not to look into. frontend: as in `trace`. dump: a folder for texts, diffs and
    pictures after each pass. check: every pass is held to its numbers contract. Raises subclasses of `FxqError`.
    """
    if on_low_sqnr not in get_args(OnLowSqnr):
        raise InputError(f"unknown on_low_sqnr {on_low_sqnr!r}; there are {', '.join(get_args(OnLowSqnr))}")
    before, after = passes if passes is not None else (None, None)
    call = as_call(example_inputs, example_kwargs)
    with torch.inference_mode(False):
        wanted = Recipe.of(recipe)
        prepared = _prepare(model, call, wanted, families, before, leaves, frontend, dump, check, progress, share=True)
    ctx = cast(Context, prepared.meta["fxq"])
    _refuse(ctx.report, strict)
    data = [(ctx.examples.args or ctx.examples.kwargs)] if calibration_data is None else calibration_data
    calibrate(prepared, data, progress=progress)
    with torch.inference_mode(False):
        result = _convert(prepared, after, last=True)
    if strict and result.report.float_steps:
        lines = "\n".join(f"  {step}" for step in result.report.float_steps)
        raise QuantizationError(
            f"strict=True and requant='fixed', but {len(result.report.float_steps)} operations between the model's "
            f"edges compute in float:\n{lines}"
        )
    _judge(prepared, result, ctx.examples, min_sqnr, on_low_sqnr)
    if ctx.dump is not None:
        ctx.dump.write_text("report.txt", str(result.report))
    return result


def _context(prepared: object, stage: Stage, what: str) -> Context:
    """What is known of `prepared`, which the function `what` was given; raises `InputError` where it cannot go on."""
    ctx = prepared.meta.get("fxq") if isinstance(prepared, GraphModule) else None
    if isinstance(prepared, GraphModule) and isinstance(ctx, Context) and ctx.stage is stage:
        for node in filter(is_tensor, prepared.graph.find_nodes(op="get_attr")):
            before, now = node.meta["value"].dtype, constant(prepared, node).dtype
            if before != now:
                raise InputError(
                    f"{what}: {node.target} is {now}, and was {before} when the model was prepared; convert it back"
                )
        return ctx
    if isinstance(prepared, GraphModule) and any(isinstance(m, Observer | FakeQuantize) for m in prepared.modules()):
        raise InputError(
            f"{what}: a pickle keeps the numbers of a prepared model, and not what fxq knows of it; prepare the float "
            "model once more, and give that one the numbers: prepared.load_state_dict(pickled.state_dict())"
        )
    raise InputError(f"{what} takes what fxq.prepare returns, not {type(prepared).__name__}")


def dump_folder(path: str | Path | None) -> dump.Folder | None:
    """Where the steps of a pipeline are written; None where they are not."""
    return None if path is None else dump.Folder(path, drawing.draw_step)


def resolve(recipe: Recipe, model: nn.Module, families: tuple[Family, ...]) -> Recipe:
    """The recipe, its names checked, for all paths of shared modules of `model`; raises `RecipeError`."""
    named = list(model.named_modules(remove_duplicate=False))
    recipe.check_names((name for name, _ in named), (family.name for family in families))
    return recipe.with_all_names(named)


def _refuse(report: Report, strict: bool) -> None:
    refusals = report.refusals()
    if not refusals:
        return
    lines = "\n".join(f"  {refusal}" for refusal in refusals)
    if strict:
        raise QuantizationError(
            f"strict=True, and {len(refusals)} operations with multiply-accumulates stay float:\n{lines}"
        )
    known = [refusal for refusal in refusals if refusal.op == "linear" and refusal.reason is not Reason.UNPROFITABLE]
    if known:
        lines = "\n".join(f"  {refusal}" for refusal in known)
        warnings.warn(f"{len(known)} linear operations stay float:\n{lines}", KeptFloatWarning, stacklevel=4)


def _judge(prepared: GraphModule, result: QuantizedModule, examples: Call, limit: float, action: str) -> None:
    """Compare on the examples; the prepared graph computes what the float model does."""
    a, b = examples.clone(), examples.clone()
    with torch.no_grad(), unchanged(prepared), paused(prepared):
        expected = prepared(*a.args, **a.kwargs)
    with torch.no_grad(), unchanged(result):  # it draws the same random numbers
        actual = result.dequantize(result(*b.args, **b.kwargs))
    if pytree.tree_structure(expected) != pytree.tree_structure(actual):
        raise QuantizationError("the quantized model returns another structure than the float model")
    result.report.sqnr = output_sqnr(expected, actual)
    if result.report.sqnr >= limit or action == "ignore":
        return
    worst = compare_graphs(prepared, expand(result), examples, equalized=result.report.equalized).worst(3)
    lines = "\n".join(f"  {layer}" for layer in worst)
    text = (
        f"the int8 output has {result.report.sqnr:.1f} dB SQNR against float on the examples, below {limit:.1f} dB; "
        f"the worst layers:\n{lines}\n"
        "keep them float with Recipe(modules={...: fxq.FLOAT}), give more calibration data, or try another observer"
    )
    if action == "error":
        raise QuantizationError(text)
    warnings.warn(text, AccuracyWarning, stacklevel=3)
