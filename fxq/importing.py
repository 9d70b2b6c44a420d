"""Models that torch.ao has quantized."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from fxq import leaves as inside
from fxq import numerics, tracing
from fxq.api import Examples, dump_folder
from fxq.checks import check_model
from fxq.engine import Engine
from fxq.errors import InputError
from fxq.graph import unchanged
from fxq.inputs import Call, as_call
from fxq.ops import FAMILIES, carry, clamp, conv, linear, pool
from fxq.pipeline import Context
from fxq.quantized import QuantizedModule, weight_bytes
from fxq.recipe import Recipe, Requant, RequantRounding
from fxq.torch_quantized import StandIn, stand_ins
from fxq.tracing.values import tensors
from passes import IMPORT, IMPORT_EXACT


@torch.inference_mode(False)
def from_torch(
    model: nn.Module,
    example_inputs: Examples,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    exact: Literal["fbgemm", "onednn", "qnnpack"] | None = None,
    requant: Requant = "float",
    rounding: RequantRounding = "single",
    frontend: tracing.Frontend = "auto",
    dump: str | Path | None = None,
    check: bool = False,
) -> QuantizedModule:
    """An int8 GraphModule of a model that torch.ao has quantized, by its eager or FX workflow or `quantize_dynamic`.

    Scales, zero points and integer weights (with zero points, too) are taken over. exact: the engine whose roundings
    are reproduced bit for bit, that of `torch.backends.quantized.engine` when the model was converted ("x86" computes
    as "fbgemm"); docs/numerics.md has its rules, and what it refuses. None computes as fxq does. requant, rounding: as
    in `Recipe`; "fixed" is integers alone, which no engine of torch's computes. The report says how
    many outputs on the examples differ from torch's. example_inputs and the other arguments: as in `quantize`. The
    model is not touched.
    Raises `QuantizationError` naming the modules that have no form here, `InputError`, `TraceError`.
    """
    if exact not in (None, *numerics.ENGINES):
        raise InputError(
            f"fxq.from_torch: exact is {exact!r}; there are None, {', '.join(map(repr, numerics.ENGINES))}"
        )
    recipe = Recipe(requant=requant, rounding=rounding)
    if exact is not None and requant == "fixed":
        raise InputError(f"fxq.from_torch: {exact} multiplies by floats; give requant='fixed' without exact")
    call = as_call(example_inputs, example_kwargs)
    check_model(model, call)
    own = stand_ins(model)
    gm = tracing.trace(own.eval(), call.args, call.kwargs, leaves=(StandIn,), frontend=frontend)
    own_families = linear.FAMILY, conv.FAMILY, pool.FAMILY, clamp.FAMILY, carry.FAMILY
    families = FAMILIES if exact is None else (Engine(exact), *own_families)
    ctx = Context(recipe, families, call.clone(), check=check, dump=dump_folder(dump))
    fixed = recipe.title.removeprefix(recipe.scheme)
    ctx.report.recipe = f"torch's own{fixed}" if exact is None else f"torch's own, as {exact} computes it"
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
            expected = model(*theirs.args, **theirs.kwargs)
        except Exception as error:
            raise InputError(
                f"fxq.from_torch: torch's {engine} cannot run the model on the examples: {error}"
            ) from error
        outputs = expected, result(*mine.args, **mine.kwargs)
    pairs = list(zip(*map(tensors, outputs), strict=True))
    if any(tensor.is_quantized for tensor in tensors(expected)):
        raise InputError("fxq.from_torch: the model returns a quantized tensor; let it end with torch's DeQuantStub")
    total = sum(a.numel() for a, _ in pairs)
    differences = torch.cat([(a.double() - b.double()).abs().flatten() for a, b in pairs])
    different = int((differences != 0).sum())
    if not different:
        return f"all {total} outputs on the examples are those of torch's {engine}"
    most = f"by {differences.max():.3g} at most"
    return f"{different} of {total} outputs on the examples differ from those of torch's {engine}, {most}"
