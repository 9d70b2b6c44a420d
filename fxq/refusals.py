"""What an integer model refuses, told in the user's terms: inputs of another dtype, gradients; and what would do."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.errors import InputError
from fxq.graph import Value, place_of
from fxq.inputs import check_kind
from fxq.tracing.values import tensors

_NARROW = (torch.bfloat16, torch.float16)


def wrong_dtype(
    gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], traceback: TracebackType | None, recipe: str
) -> InputError | None:
    """The error for a call of `gm` with tensors of another dtype than the examples had; None where they have the same.

    Or with what is no tensor, or an odd one. traceback: of what failed, whose module is named. recipe: what the model
    was quantized with.
    """
    for parameter, value in _arguments(gm, args, kwargs):
        name, expected = f"input {str(parameter.target)!r}", parameter.meta.get("value")
        if isinstance(value, Tensor):
            check_kind(name, value)
        elif isinstance(expected, Value) and not isinstance(value, int | float | complex):
            shape = f"{expected.dtype} {list(expected.shape)}"
            return InputError(f"{name} is a {type(value).__name__}; give a tensor, which in the examples was {shape}")
    for name, given, expected in _inputs(gm, args, kwargs):
        if given != expected and (given.is_floating_point or expected.is_floating_point):
            node = _failed(gm, traceback)
            place = "" if node is None else f"{place_of(node)}: "
            return InputError(
                f"{place}input {name!r} has dtype {given}; this model was quantized ({recipe}) for {expected}: convert "
                f"the input with .to({expected}){_other(given)}"
            )
    return None


def without_gradients(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any], asking: Tensor) -> str:
    """The input `asking` of a call of `gm`, behind the first operation on its way that has no gradients."""
    for parameter, value in _arguments(gm, args, kwargs):
        if any(tensor is asking for tensor in tensors(value)):
            reached = {parameter}
            for node in gm.graph.nodes:
                if not reached.isdisjoint(node.all_input_nodes):
                    if getattr(node.target, "namespace", "") == "fxq":
                        return f"{place_of(node)}: input {str(parameter.target)!r} of an integer model"
                    reached.add(node)
    return "an integer model"


def _arguments(gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[tuple[Node, Any]]:
    """The parameters of `gm`, each with what a call gives for it; those by position first."""
    parameters = [node for node in gm.graph.nodes if node.op == "placeholder"]
    by_name = ((node, kwargs[str(node.target)]) for node in parameters if str(node.target) in kwargs)
    return [*zip(parameters, args, strict=False), *by_name]


def _other(given: torch.dtype) -> str:
    """The recipe that takes activations of another floating-point type."""
    if given in _NARROW:
        return f', or quantize the model in {given} with recipe="w8a16"'
    if given == torch.float32:
        return ", or quantize the float32 model"
    return ""


def _inputs(
    gm: GraphModule, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, torch.dtype, torch.dtype]]:
    """The tensors of a call by parameter name, each with its dtype and that of the examples.

    What a structure holds is where the graph takes it out.
    """
    held: dict[Node, tuple[str, Any]] = {}
    for node, value in _arguments(gm, args, kwargs):
        held.setdefault(node, (str(node.target), value))
    for node in gm.graph.nodes:
        if node.target in (getattr, operator.getitem) and node.args[0] in held:
            name, structure = held[node.args[0]]
            if not isinstance(structure, Tensor):
                held[node] = name, node.target(structure, *node.args[1:])
    for node, (name, value) in held.items():
        expected = node.meta.get("value")
        if isinstance(value, Tensor | int) and isinstance(expected, Value):
            yield name, torch.as_tensor(value).dtype, expected.dtype


def _failed(gm: GraphModule, traceback: TracebackType | None) -> Node | None:
    """The node of `gm` at whose line the call failed, told from the frame of its generated code."""
    names: list[str] = getattr(type(gm), "line_names", [])
    nodes = {node.name: node for node in gm.graph.nodes}
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename.startswith(f"<fxq {id(gm)}"):
            return nodes.get(names[traceback.tb_lineno - 1])
        traceback = traceback.tb_next
    return None
