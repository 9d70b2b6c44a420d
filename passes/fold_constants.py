"""fold_constants: what parameters and buffers alone decide is computed once.

    F.linear(x, w[8:16]), F.linear(x, w * scale), x @ torch.cat([a, b])  -> linear(x, w_folded), ...

A view of a constant stays in its memory. A transposition stays in the graph, since normalize_linears reads it. What is
larger than the constants that it is made of is computed at each call, as the model has it. What is computed here is
computed in float64 and rounded, so that it is the same on every machine. `TRAINABLE` folds views alone, through which
gradients reach the parameters.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from fxq.double import Double
from fxq.graph import Value, bypass, constant, get_attr, memory_of, set_constant
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage

RANDOM = frozenset({"bernoulli", "multinomial", "normal", "poisson"})
TRANSPOSITIONS = frozenset({torch.t, torch.transpose, torch.permute, "t", "transpose", "permute"})


@dataclass(frozen=True)
class FoldConstants:
    """See the module's docstring."""

    views_only: bool = False
    name: str = "fold-constants"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of values that became constants."""
        known: dict[Node, Any] = {}
        for node in gm.graph.nodes:
            if node.op == "get_attr" and "aliases" not in node.meta:
                known[node] = constant(gm, node).detach()
            elif _is_computable(node, known):
                known[node] = _compute(node, known)
        wanted = [node for node in known if _is_wanted(node, known) and (not self.views_only or _is_view(node, known))]
        return sum(_fold(gm, node, known[node]) for node in wanted)


def _is_computable(node: Node, known: dict[Node, Any]) -> bool:
    """Whether `node` is a function of known values, and the same at each call."""
    inputs = node.all_input_nodes
    if node.op not in ("call_function", "call_method") or "aliases" in node.meta or node.is_impure():
        return False
    name = str(getattr(node.target, "__name__", node.target))
    random = name.startswith("rand") or "dropout" in name or name in RANDOM
    in_place = name.endswith("_") and not name.endswith("__")
    return bool(inputs) and not random and not in_place and all(source in known for source in inputs)


def _compute(node: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
    function = getattr(args[0], node.target) if isinstance(node.target, str) else node.target
    with torch.no_grad(), Double():
        value = function(*(args[1:] if isinstance(node.target, str) else args), **kwargs)
    return _rounded(value, node.meta["value"])


def _rounded(value: Any, described: Any) -> Any:
    """`value`, its tensors in the dtypes that the graph has for them."""
    if isinstance(described, Value):
        return value.to(described.dtype)
    if isinstance(described, tuple | list):
        return type(value)(map(_rounded, value, described))
    return value


def _is_transposition(node: Node) -> bool:
    return node.target in TRANSPOSITIONS or (node.target is getattr and node.args[1] in ("T", "mT"))


def _is_wanted(node: Node, known: dict[Node, Any]) -> bool:
    """Whether the value is a tensor, of no more numbers than it is made of, that something unknown reads."""
    value = known[node]
    if node.op == "get_attr" or not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    if _is_transposition(node):
        return False
    return _is_read(node, known) and value.numel() <= sum(known[source].numel() for source in _sources(node))


def _is_view(node: Node, known: dict[Node, Any]) -> bool:
    return any(memory_of(known[source]) == memory_of(known[node]) for source in _sources(node))


def _is_read(node: Node, known: dict[Node, Any]) -> bool:
    """Whether something that is not known reads `node`, or a transposition of it."""
    return any(user not in known or (_is_transposition(user) and _is_read(user, known)) for user in node.users)


def _sources(node: Node) -> set[Node]:
    """The constants that `node` is made of."""
    found, open_nodes = {node}, [node]
    while open_nodes:
        new = set(open_nodes.pop().all_input_nodes) - found
        found |= new
        open_nodes += new
    return {source for source in found if source.op == "get_attr"}


def _fold(gm: GraphModule, node: Node, value: Tensor) -> int:
    (source, *_) = sorted(_sources(node), key=operator.attrgetter("_sort_key"))
    path = set_constant(gm, f"{source.target}_folded", value)
    with gm.graph.inserting_before(node):
        bypass(gm, node, get_attr(gm, path, node))
    return 1


PASS = FoldConstants()
TRAINABLE = FoldConstants(views_only=True)
