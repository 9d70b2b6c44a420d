"""The noise of each layer: what an integer graph computes beside the float graph that it was made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from fxq.comparison import ANOTHER_MODEL, BINS, Comparison, Layer, Spread, output_sqnr, sqnr
from fxq.errors import InputError
from fxq.graph import Value, is_call, line_of, module_of, place_of, target_name
from fxq.inputs import Call
from fxq.outputs import dequantized, output_qparams
from fxq.paired_runs import PairedRuns
from fxq.qdq import dequantize, quantize
from fxq.qtypes import ACT_QMAX, ACT_QMIN
from fxq.spelling import CONVS, GETITEM, LINEAR, RELU
from fxq.stages import is_integer_op
from fxq.tracing import structure
from fxq.tracing.values import tensors

_PRODUCTS = CONVS | {LINEAR}
_SELECTIONS = ("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "bincount")


def compare_graphs(
    reference: GraphModule,
    quantized: GraphModule,
    call: Call,
    reached: Call | None = None,
    equalized: Mapping[str, tuple[int, list[float]]] | None = None,
) -> Comparison:
    """Compare a normalised float graph with the integer graph made of it, on one call.

    Nodes are matched by `meta["source"]`: the float node whose value an integer node stands for; products that torch
    has quantized, whose graph was another, by their module. reached: the call as it reaches the integer graph, where
    that is another. equalized: as in `Report`.
    """
    return compare_runs(PairedRuns.of(reference, quantized, call, reached, equalized))


def compare_runs(runs: PairedRuns) -> Comparison:
    """See `compare_graphs`."""
    expected, actual, qparams, factors = runs.expected, runs.actual, runs.qparams, runs.factors
    by_module = _products_by_module(runs.reference)
    check_shapes = (lambda *_: None) if _is_sized_by_values(runs.reference) else _check_shapes
    layers = []
    for node in runs.quantized.graph.nodes:
        source = node.meta.get("source", "")
        truth = runs.exact(source if source in expected else _float_of(node, by_module), node, node)
        if not (is_call(node) and is_integer_op(node)) or not isinstance(truth, Tensor) or node.target is dequantize:
            continue
        reached = runs.real(node, actual[node])
        check_shapes(place_of(node), [truth], [reached])
        alone = sqnr(truth, runs.real(node, _alone(node, runs)))
        accumulated = sqnr(truth, reached)
        place = module_of(node) or line_of(node)
        spread = None
        if node in qparams and isinstance(actual[node], Tensor) and actual[node].numel():
            spread = _spread(truth, actual[node], factors[node], *qparams[node])
        layers.append(Layer(place, target_name(node.target), node.name, alone, accumulated, spread))
    first, second = (next(n for n in gm.graph.nodes if n.op == "output") for gm in (runs.reference, runs.quantized))
    result = dequantized(actual[second], output_qparams(runs.quantized.graph))
    made, wanted = structure(result), structure(expected[first.name])
    if made != wanted:
        raise InputError(f"the output is {wanted} in the float model and {made} in the quantized one; {ANOTHER_MODEL}")
    check_shapes("the output", list(tensors(expected[first.name])), list(tensors(result)))
    return Comparison(layers, output_sqnr(expected[first.name], result))


def _is_sized_by_values(gm: GraphModule) -> bool:
    """Whether values of tensors decide on the sizes of others, so that a rounding may change them."""

    def selects(node: Node) -> bool:
        indices = node.all_input_nodes[1:] if node.target is GETITEM else []
        masks = (isinstance(v := x.meta.get("value"), Value) and v.dtype in (torch.bool, torch.uint8) for x in indices)
        return any(masks) or target_name(node.target).strip("_") in _SELECTIONS

    return any(map(selects, filter(is_call, gm.graph.nodes)))


def _check_shapes(where: str, truth: list[Tensor], reached: list[Tensor]) -> None:
    """Raise `InputError` where the two models are not of one architecture."""
    if [x.shape for x in truth] != [y.shape for y in reached]:
        shapes = (", ".join(str(list(x.shape)) for x in values) for values in (truth, reached))
        what = "{} in the float model and {} in the quantized one".format(*shapes)
        raise InputError(f"{where} has the shape {what}; {ANOTHER_MODEL}")


def _products_by_module(reference: GraphModule) -> dict[tuple[str, str], str]:
    """For each module with one product alone: the nodes of its value, and of the relu that alone reads it."""
    products = [node for node in reference.graph.nodes if node.target in _PRODUCTS and module_of(node)]
    alone = Counter(map(module_of, products))
    found = {}
    for node in products:
        if alone[module_of(node)] == 1:
            found[module_of(node), "product"] = node.name
            readers = list(node.users)
            if len(readers) == 1 and readers[0].target is RELU:
                found[module_of(node), "relu"] = readers[0].name
    return found


def _float_of(node: Node, products: Mapping[tuple[str, str], str]) -> str:
    """The float node of an integer product, by its module; of its relu where it is clamped at the zero point."""
    if not isinstance(node.target, OpOverload) or not target_name(node.target).startswith(("fxq.qlinear", "fxq.qconv")):
        return ""
    named = {argument.name: value for argument, value in zip(node.target._schema.arguments, node.args, strict=False)}
    product = products.get((module_of(node), "product"), "")
    clamped = "low" in named and named["low"] == named["zero_point"]
    return products.get((module_of(node), "relu"), product) if clamped else product


def _spread(truth: Tensor, q: Tensor, factor: Tensor | None, scale: float, zero_point: int) -> Spread:
    values = (truth if factor is None else truth * factor).double()
    low, high = ((bound - zero_point) * scale for bound in (ACT_QMIN, ACT_QMAX))
    outside = (values < low - scale / 2) | (values > high + scale / 2)
    smallest, largest = (bound.item() for bound in torch.aminmax(values))
    counts = torch.histc(values, BINS, smallest, largest) if smallest < largest else torch.tensor([values.numel()])
    return Spread(
        smallest,
        largest,
        tuple(int(count) for count in counts.tolist()) + (0,) * (BINS - len(counts)),
        (low, high),
        outside.double().mean().item(),
        (int(q.max()) - int(q.min()) + 1) / (ACT_QMAX - ACT_QMIN + 1),
    )


def _alone(node: Node, runs: PairedRuns) -> Any:
    """What `node` computes from the exact float values of its operands."""
    actual, qparams = runs.actual, runs.qparams

    def exact(operand: Node) -> Any:
        truth = runs.exact(operand.meta.get("source", ""), operand, node)
        several = isinstance(actual[operand], tuple | list)  # of which one is that float value
        if isinstance(truth, Tensor) and not several:
            factor = runs.factors[operand]
            scaled = truth if factor is None else truth * factor
            return quantize(scaled, *qparams[operand]) if operand in qparams else truth
        if operand.op == "call_function" and (operand in qparams or several) and callable(operand.target):
            return operand.target(*torch.fx.node.map_arg(operand.args, exact))  # scaled: no float value to compare with
        return actual[operand]

    with torch.no_grad():
        args = torch.fx.node.map_arg(node.args, exact)
        assert callable(node.target)
        return node.target(*args, **node.kwargs)
