"""Observers taken away again, from values that turned out to be better off as floats."""

from __future__ import annotations

from collections.abc import Iterable

from torch.fx import GraphModule, Node

from fxq.graph import bypass, is_size, submodule
from fxq.observers import Observer
from fxq.spelling import CAT, GETITEM, MOVES, SPLITS


def release(gm: GraphModule, readers: Iterable[Node]) -> None:
    """Take away the observers whose values only `readers` read, directly or through moves."""
    released = set(readers)
    for node in reversed(list(gm.graph.nodes)):
        users = [user for user in node.users if not is_size(user)]
        if not users or not released.issuperset(users):
            continue
        if node.op == "call_module" and isinstance(submodule(gm, node), Observer):
            bypass(gm, node, node.args[0])
        elif node.target in MOVES | SPLITS | CAT | {GETITEM}:
            released.add(node)
