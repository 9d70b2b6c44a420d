"""Rules: how a pass that gives operations one spelling reads the others.

A rule is a function with the signature of the spelling that it reads; it returns the target and operands to write, or
None where that spelling stays. A call with other arguments stays as well. A rule for a module gets the module, its
input, and a function that makes a get_attr node of a parameter or buffer of it (None where the module has none of that
name).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import get_attr, is_tensor, replace, submodule

Rewrite = tuple[Callable[..., Any], tuple[Any, ...]]
Rule = Callable[..., Rewrite | None]
Parameter = Callable[[str], Node | None]
ModuleRule = Callable[[Any, Any, Parameter], Rewrite | None]


@dataclass(frozen=True)
class Rules:
    """The spellings that one pass reads: functions, methods by name, modules by exact type.

    own_memory: whether all that the rules write has memory of its own; else nodes whose memory others modify (marked
    "aliases") keep their spelling, since a view may become a copy.
    """

    functions: Mapping[Any, Rule] = field(default_factory=dict)
    methods: Mapping[str, Rule] = field(default_factory=dict)
    modules: Mapping[type[nn.Module], ModuleRule] = field(default_factory=dict)
    own_memory: bool = False

    def apply(self, gm: GraphModule) -> int:
        """Rewrite each node once, in order; the number of changes."""
        nodes = [node for node in gm.graph.nodes if self.own_memory or "aliases" not in node.meta]
        return sum(self._rewrite(gm, node) for node in nodes if not node._erased)

    def _rewrite(self, gm: GraphModule, node: Node) -> int:
        rewrite = self._read_module(gm, node) if node.op == "call_module" else self._read_call(node)
        if rewrite is None or (node.op == "call_function" and (node.target, node.args) == rewrite and not node.kwargs):
            return 0
        aliases = {key: node.meta[key] for key in ("aliases",) if key in node.meta}
        replace(gm, node, *rewrite).meta.update(aliases)
        return 1

    def _read_call(self, node: Node) -> Rewrite | None:
        if not (is_tensor(node) or isinstance(node.meta.get("value"), tuple | list)):
            return None
        rules: Mapping[Any, Rule] = {"call_function": self.functions, "call_method": self.methods}.get(node.op, {})
        rule = rules.get(node.target)
        return None if rule is None or not fits(rule, node) else rule(*node.args, **node.kwargs)

    def _read_module(self, gm: GraphModule, node: Node) -> Rewrite | None:
        module = submodule(gm, node)
        rule = self.modules.get(type(module))

        def parameter(name: str) -> Node | None:
            if getattr(module, name, None) is None:
                return None
            with gm.graph.inserting_before(node):
                return get_attr(gm, f"{node.target}.{name}", node)

        x = node.args[0] if node.args else node.kwargs.get("input")
        return None if rule is None else rule(module, x, parameter)


def fits(rule: Callable[..., Any], node: Node) -> bool:
    """Whether a call has only arguments that `rule` knows (not `out=`, say)."""
    try:
        inspect.signature(rule).bind(*node.args, **node.kwargs)
    except TypeError:
        return False
    return True


def rank(node: Node) -> int:
    """The number of dimensions of a tensor."""
    return len(node.meta["value"].shape)


def swaps_matrix(node: Node) -> bool:
    """Whether `node`, as normalize_moves spells it, is the transposition of a matrix."""
    if node.target is torch.transpose:
        return rank(node) == 2 and {int(dim) % 2 for dim in node.args[1:] if isinstance(dim, int)} == {0, 1}
    return node.target is torch.permute and node.args[1] in ((1, 0), (-1, -2), (1, -2), (-1, 0))
