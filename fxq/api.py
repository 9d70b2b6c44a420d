"""The public functions: each is a few steps over the layers below."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils import _pytree as pytree
from tqdm import tqdm

from fxq import drawing, dump, numerics, pipeline, tracing
from fxq import leaves as inside
from fxq.batch_norm import BatchNorm
from fxq.comparison import Comparison, compare_graphs, output_sqnr
from fxq.costs import Costs
from fxq.decisions import Reason, Report
from fxq.engine import Engine
from fxq.errors import CalibrationError, FileError, FxqError, GoldenError, InputError, QuantizationError, RecipeError
from fxq.expansion import expand
from fxq.fake_quantize import FakeQuantize
from fxq.family import Family
from fxq.golden_model import GoldenModel, build
from fxq.graph import bind, find_state, mutations, place_of, propagate, target_name, unchanged
from fxq.inputs import Call, as_call, calibration_calls, check_finite
from fxq.observers import learning, paused, sample_of
from fxq.ops import FAMILIES, carry, clamp, linear
from fxq.pipeline import Context, Pass
from fxq.profiling import Profile, measure
from fxq.quantized import QuantizedModule, encode, weight_bytes
from fxq.recipe import Recipe
from fxq.remedies import find_remedies
from fxq.stages import Stage
from fxq.torch_quantized import StandIn, stand_ins
from fxq.tracing.values import tensors

Examples = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
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
    it is, and what becomes int8 are the modules that it calls. Raises `InputError`, `TraceError`.
    """
    call = as_call(example_inputs, example_kwargs)
    _check_model(model, call)
    gm = tracing.trace(model, call.args, call.kwargs, leaves=leaves, frontend=frontend)
    own = call.clone()
    find_state(gm, own.args, own.kwargs)
    propagate(gm, own.args, own.kwargs)  # dtypes and shapes, for texts and pictures
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
) -> GraphModule:
    """A float graph with observers, ready to be calibrated; the first of three steps that `quantize` takes at once.

    The user's model is not touched. families, passes: what `fxq.ops` and `passes` hold, or more of it.
    check: every pass is held to the numbers that it promises on the examples.
    Raises `InputError`, `RecipeError`, `TraceError`, `CalibrationError` (weights that are not finite).
    """
    from passes import PREPARE

    recipe = Recipe.of(recipe)
    if recipe.learn_steps:
        raise RecipeError("learn_steps=True asks for training; use fxq.prepare_qat")
    call = as_call(example_inputs, example_kwargs)
    _check_model(model, call, narrow="w8a16" in recipe.schemes)
    if recipe.schemes <= {"w8a16", "float"} and recipe.scheme == "w8a16" and not _is_narrow(model, call):
        raise InputError(
            "the recipe w8a16 takes bfloat16 or float16 activations, and the model is float32: convert model and "
            "inputs with .to(torch.bfloat16), or use the recipe w8a32"
        )
    recipe = _resolve(recipe, model, families)
    folder = _folder(dump)
    gm = tracing.trace(model, call.args, call.kwargs, leaves=leaves, frontend=frontend)
    ctx = Context(recipe, families, call.clone(), check=check, dump=folder)
    ctx.report.recipe = recipe.title
    return inside.prepare(gm, ctx, PREPARE if passes is None else passes, leaves)


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
    from passes import PREPARE_QAT

    recipe = Recipe.of(recipe)
    if recipe.scheme != "w8a8":
        raise RecipeError(f"fxq.prepare_qat trains for the recipe 'w8a8', not {recipe.scheme!r}")
    call = as_call(example_inputs, example_kwargs)
    _check_model(model, call)
    recipe = _resolve(recipe, model, families)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the model is in training mode", tracing.TracingWarning)
        gm = tracing.trace(model, call.args, call.kwargs, leaves=leaves, frontend=frontend)
    ctx = Context(recipe, families, call.clone(), check=check, dump=_folder(dump))
    ctx.report.recipe = recipe.scheme
    gm = inside.prepare_graph(gm, ctx, PREPARE_QAT if passes is None else passes)
    return calibrate(gm, [call.args or call.kwargs], progress=False).train()


@torch.inference_mode(False)
def from_torch(
    model: nn.Module,
    example_inputs: Examples,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    exact: Literal["fbgemm", "onednn", "qnnpack"] | None = None,
    frontend: tracing.Frontend = "auto",
    dump: str | Path | None = None,
    check: bool = False,
) -> QuantizedModule:
    """An int8 GraphModule of a model that torch.ao has quantized, by its eager or FX workflow or `quantize_dynamic`.

    Scales, zero points and integer weights (with zero points, too) are taken over. exact: the engine whose roundings
    are reproduced bit for bit, that of `torch.backends.quantized.engine` when the model was converted ("x86" computes
    as "fbgemm"); None computes as docs/numerics.md has it. The report says how many outputs on the examples differ from
    torch's. example_inputs and the other arguments: as in `quantize`. The model is not touched.
    Raises `QuantizationError` naming the modules that have no form here, `InputError`, `TraceError`.
    """
    from passes import IMPORT, IMPORT_EXACT

    if exact not in (None, *numerics.ENGINES):
        raise InputError(
            f"fxq.from_torch: exact is {exact!r}; there are None, {', '.join(map(repr, numerics.ENGINES))}"
        )
    call = as_call(example_inputs, example_kwargs)
    _check_model(model, call)
    own = stand_ins(model)
    gm = tracing.trace(own.eval(), call.args, call.kwargs, leaves=(StandIn,), frontend=frontend)
    families = FAMILIES if exact is None else (Engine(exact), linear.FAMILY, clamp.FAMILY, carry.FAMILY)
    ctx = Context(Recipe(), families, call.clone(), check=check, dump=_folder(dump))
    ctx.report.recipe = "torch's own" if exact is None else f"torch's own, as {exact} computes it"
    gm = inside.prepare_graph(gm, ctx, IMPORT if exact is None else IMPORT_EXACT)
    result = QuantizedModule.of(gm, ctx.report)
    result.report.weight_bytes = (weight_bytes(own), weight_bytes(result))
    result.report.notes.append(_differences(model, result, call))
    return result


def _differences(model: nn.Module, result: QuantizedModule, call: Call) -> str:
    """How the outputs on the examples differ from those of torch's engine."""
    mine, theirs = call.clone(), call.clone()
    engine = torch.backends.quantized.engine
    with torch.no_grad(), unchanged(result):
        try:
            outputs = model(*theirs.args, **theirs.kwargs), result(*mine.args, **mine.kwargs)
        except Exception as error:
            raise InputError(
                f"fxq.from_torch: torch's {engine} cannot run the model on the examples: {error}"
            ) from error
    pairs = list(zip(*map(tensors, outputs), strict=True))
    total = sum(a.numel() for a, _ in pairs)
    differences = torch.cat([(a.double() - b.double()).abs().flatten() for a, b in pairs])
    different = int((differences != 0).sum())
    if not different:
        return f"all {total} outputs on the examples are those of torch's {engine}"
    most = f"by {differences.max():.3g} at most"
    return f"{different} of {total} outputs on the examples differ from those of torch's {engine}, {most}"


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
    count = 0
    with torch.no_grad(), unchanged(prepared), learning(prepared), bar:
        for count, call in enumerate(bar, 1):
            check_finite(call, f"calibration batch {count - 1}")
            if sample is not None:
                sample.offer(call)
            own = call.clone()
            try:
                prepared.forward(*own.args, **own.kwargs)
            except FxqError as error:
                raise type(error)(f"calibration batch {count - 1}: {error}") from None
            except (RuntimeError, TypeError, AttributeError, ValueError, IndexError) as error:
                raise InputError(
                    f"calibration batch {count - 1}: the model fails on it: {error}; each must be like example_inputs"
                ) from error
    if not count:
        raise CalibrationError("calibration_data is empty: give at least one batch like the example inputs")
    return prepared


@torch.inference_mode(False)
def convert(prepared: GraphModule, *, passes: tuple[Pass, ...] | None = None) -> QuantizedModule:
    """Turn a calibrated model into integers. `prepared` stays as it is.

    Raises `CalibrationError` naming the first value that no data has reached.
    """
    from passes import CONVERT

    _context(prepared, Stage.OBSERVED, "fxq.convert")
    gm = copy.deepcopy(prepared).eval()
    ctx = cast(Context, gm.meta["fxq"])
    result = inside.convert(gm, CONVERT if passes is None else passes)
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
    on_low_sqnr: Literal["warn", "error", "ignore"] = "warn",
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
    before, after = passes if passes is not None else (None, None)
    prepared = prepare(
        model,
        example_inputs,
        example_kwargs=example_kwargs,
        recipe=recipe,
        families=families,
        passes=before,
        leaves=leaves,
        frontend=frontend,
        dump=dump,
        check=check,
    )
    ctx = cast(Context, prepared.meta["fxq"])
    _refuse(ctx.report, strict)
    data = [(ctx.examples.args or ctx.examples.kwargs)] if calibration_data is None else calibration_data
    calibrate(prepared, data, progress=progress)
    result = convert(prepared, passes=after)
    if strict and result.report.float_steps:
        lines = "\n".join(f"  {step}" for step in result.report.float_steps)
        raise QuantizationError(
            f"strict=True and requant='fixed', but {len(result.report.float_steps)} operations between the model's "
            f"edges compute in float:\n{lines}"
        )
    _judge(prepared, result, ctx.examples, min_sqnr, on_low_sqnr)
    if ctx.dump is not None:
        ctx.dump.write_text("report.txt", str(report(result)))
    return result


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

    calibration_data, recipe: what `quantize` was given; with them, remedies for the three layers that lose most are
    tried, each by quantizing the model anew, and the best stands in the result as a recipe to paste. seconds: after
    which no further one is tried. Raises `InputError` where `qmodel` was not made of `model`, or by another recipe.
    """
    from passes import PREPARE

    call = as_call(inputs, kwargs)
    if not isinstance(qmodel, QuantizedModule):
        raise InputError(f"fxq.compare takes what fxq.quantize returns, not a {type(qmodel).__name__}")
    _check_model(model, call, narrow=any(decision.scheme == "w8a16" for decision in qmodel.report.decisions))
    same_numbers = tuple(step for step in PREPARE if step.gives is Stage.FLOAT)

    def against(float_model: nn.Module, made: QuantizedModule, exact: Call, reached: Call) -> Comparison:
        gm = tracing.trace(float_model, exact.args, exact.kwargs, leaves=leaves, frontend=_frontend_of(made))
        ctx = Context(Recipe(), (), exact.clone())
        pipeline.begin(gm, ctx)
        return compare_graphs(pipeline.run(same_numbers, gm, ctx), expand(made), exact, reached)

    result = against(model, qmodel, call, call)
    inner = {path: module for path, module in qmodel.named_modules() if path and isinstance(module, QuantizedModule)}
    if inner:
        plain = {path: path.removeprefix(f"{tracing.WHOLE}.") for path in inner}
        evaluated = copy.deepcopy(model).eval()
        exact = inside.first_calls(evaluated, list(plain.values()), call)
        reached = inside.first_calls(copy.deepcopy(qmodel), list(inner), call)
        for path in [path for path in inner if path in reached and plain[path] in exact]:
            module = evaluated.get_submodule(plain[path])
            result.layers.extend(against(module, inner[path], exact[plain[path]], reached[path]).layers)
    if calibration_data is None:
        return result
    base, data = Recipe.of(recipe), list(calibration_data)
    if base.title != qmodel.report.recipe:
        raise InputError(f"fxq.compare: qmodel was quantized by {qmodel.report.recipe!r}, recipe is {base.title!r}")

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

    return replace(result, suspects=find_remedies(result, qmodel.report, base, attempt, seconds, progress))


@torch.inference_mode(False)
def profile(gm: GraphModule, inputs: Examples, *, kwargs: Mapping[str, Any] | None = None) -> Profile:
    """The microseconds of every operation of a graph on these inputs, measured in place beside predicted alone.

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

    islands: what to do about float operations whose bits NumPy cannot promise (softmax, layer norm, a linear kept
    float): "refuse" raises `GoldenError`, which lists them; "torch" takes their values from `qmodel`, run on the same
    call, and computes all the rest. ops: NumPy functions for ops of the user's own families, by name (`mylib.myop`).
    """
    if not isinstance(qmodel, QuantizedModule):
        raise InputError(f"fxq.golden takes what fxq.quantize returns, not a {type(qmodel).__name__}")
    flat = QuantizedModule.of(expand(qmodel), qmodel.report)
    try:
        plain = encode(flat)
    except FileError as error:
        raise GoldenError(f"the model cannot be written down as a program: {error}") from error
    constants = {name: value.numpy() for name, value in plain["constants"].items() if isinstance(value, Tensor)}
    named = zip(flat.graph.nodes, plain["nodes"], strict=True)
    types = {entry["target"]: node.target for node, entry in named if isinstance(node.target, type)}
    program = build(plain, constants, types, ops or ())
    names = {step.name for step in program.steps if not step.op}

    def record(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = pytree.tree_map_only(np.ndarray, lambda array: torch.from_numpy(array.copy()), (args, kwargs))
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

    return GoldenModel(program, ops=ops, types=types, record=record if islands == "torch" else None)


def _frontend_of(made: QuantizedModule) -> tracing.Frontend:
    """The front end that captured the model: the same gives the same names again."""
    served = made.report.frontend
    return "export" if served.startswith("torch.export") else "leaf" if served == tracing.AS_LEAF else "trace"


def _context(prepared: nn.Module, stage: Stage, what: str) -> Context:
    ctx = prepared.meta.get("fxq") if isinstance(prepared, GraphModule) else None
    if not isinstance(ctx, Context) or ctx.stage is not stage:
        raise InputError(f"{what} takes what fxq.prepare returns, not {type(prepared).__name__}")
    return ctx


def _folder(path: str | Path | None) -> dump.Folder | None:
    return None if path is None else dump.Folder(path, drawing.draw_step)


def _resolve(recipe: Recipe, model: nn.Module, families: tuple[Family, ...]) -> Recipe:
    """The recipe, its names checked, for all paths of shared modules."""
    named = list(model.named_modules(remove_duplicate=False))
    recipe.check_names((name for name, _ in named), (family.name for family in families))
    return recipe.with_all_names(named)


_NARROW = (torch.bfloat16, torch.float16)


def _is_narrow(model: nn.Module, call: Call) -> bool:
    tensors = (*model.parameters(), *model.buffers(), *(tensor for _, tensor in call.tensors()))
    return any(tensor.dtype in _NARROW for tensor in tensors)


def _check_model(model: nn.Module, call: Call, *, narrow: bool = False) -> None:
    """narrow: whether the recipe has a scheme for bfloat16 and float16."""
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; fxq needs a torch.nn.Module")
    if isinstance(model, QuantizedModule):
        raise InputError("the model is already quantized by fxq; quantize the float model it came from")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is a ScriptModule, whose code cannot be traced; quantize the nn.Module behind it")
    if isinstance(model, GraphModule) and isinstance(model.meta.get("fxq"), Context):
        raise InputError("the model is already prepared by fxq; go on with fxq.calibrate and fxq.convert")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InputError(
                f"parameter {name} has no shape yet (a lazy module); call the model once, model(*example_inputs), and "
                "quantize it then"
            )
        if tensor.device.type != "cpu":
            remedy = "load its weights first" if tensor.device.type == "meta" else "move it with model.cpu()"
            raise InputError(f"parameter {name} is on the device {tensor.device}; fxq runs on CPUs: {remedy}")
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, *(_NARROW if narrow else ())):
            other = ', or use recipe="w8a16"' if tensor.dtype in _NARROW else ""
            raise InputError(
                f"parameter {name} has dtype {tensor.dtype}; fxq quantizes float32: convert it with .float(){other}"
            )
    if not call.args and not call.kwargs:
        raise InputError("example_inputs is empty; give a tensor, a tuple of positional or a dict of keyword arguments")
    for name, tensor in call.tensors():
        if tensor.device.type != "cpu":
            raise InputError(f"{name} is on the device {tensor.device}, the model on cpu; move it with .cpu()")
        if tensor.dtype == torch.float64 or (tensor.dtype in _NARROW and not narrow):
            raise InputError(f"{name} has dtype {tensor.dtype}, the model is float32; convert it with .float()")
    check_finite(call, "example_inputs")


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
    with torch.no_grad(), unchanged(prepared), unchanged(result), paused(prepared):
        a, b = examples.clone(), examples.clone()
        expected, actual = prepared(*a.args, **a.kwargs), result.dequantize(result(*b.args, **b.kwargs))
    if pytree.tree_structure(expected) != pytree.tree_structure(actual):
        raise QuantizationError("the quantized model returns another structure than the float model")
    result.report.sqnr = output_sqnr(expected, actual)
    if result.report.sqnr >= limit or action == "ignore":
        return
    worst = compare_graphs(prepared, expand(result), examples).worst(3)
    lines = "\n".join(f"  {layer}" for layer in worst)
    text = (
        f"the int8 output has {result.report.sqnr:.1f} dB SQNR against float on the examples, below {limit:.1f} dB; "
        f"the worst layers:\n{lines}\n"
        "keep them float with Recipe(modules={...: fxq.FLOAT}), give more calibration data, or try another observer"
    )
    if action == "error":
        raise QuantizationError(text)
    warnings.warn(text, AccuracyWarning, stacklevel=3)
