"""What a graph returns: its tensors, and the scale and zero point of those that are quantized uint8.

Under `Recipe(outputs="uint8")` the integers of the last operation are the model's output: no float32 is made of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from fxq.graph import Value
from fxq.qdq import dequantize
from fxq.qtypes import QParams
from fxq.tracing.values import map_tensors


def is_exit(node: Node) -> bool:
    """Whether `node` is a graph's output, or the call that makes an object of the user's types for it."""
    return node.op == "output" or (isinstance(node.target, type) and bool(node.users) and all(map(is_exit, node.users)))


def returned(graph: Graph) -> list[Node]:
    """For each tensor that a graph returns, in the order of its output, the node that gives it."""

    def found(value: Any) -> Iterator[Node]:
        if isinstance(value, Node):
            if is_exit(value):
                yield from found((value.args, value.kwargs))
            elif isinstance(value.meta.get("value"), tuple | list):
                yield from (value for part in value.meta["value"] if isinstance(part, Value))
            elif isinstance(value.meta.get("value"), Value):
                yield value
        elif isinstance(value, tuple | list):
            for item in value:
                yield from found(item)
        elif isinstance(value, dict):
            for item in value.values():
                yield from found(item)

    return list(found(graph.output_node().args))


def output_qparams(graph: Graph) -> list[QParams | None]:
    """For each tensor that a graph returns, in order: its scale and zero point, None where it is not quantized."""
    known = (node.meta.get("qparams") for node in returned(graph))
    return [None if qparams is None else QParams(*qparams) for qparams in known]


def dequantized(outputs: Any, qparams: list[QParams | None]) -> Any:
    """`outputs` of a graph with `output_qparams`, in their structure, in float32 what is quantized."""
    rest = iter(qparams)

    def real(tensor: Tensor) -> Tensor:
        q = next(rest)
        if q is None:
            return tensor
        x: Tensor = dequantize(tensor, q.scale, q.zero_point)
        return x

    return map_tensors(outputs, real) if any(qparams) else outputs
