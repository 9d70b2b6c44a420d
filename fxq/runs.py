"""Runs: operations of a graph that follow one another and can be put into one call, with what stands between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

from torch.fx import GraphModule, Node

from fxq.expansion import Link
from fxq.graph import call, is_tensor
from fxq.spelling import GETITEM


@dataclass
class Run:
    """Operations of one kind, in order; behind: what reads them, directly or not, between them, and is no part."""

    kind: Hashable
    members: list[Node] = field(default_factory=list)
    behind: list[Node] = field(default_factory=list)

    def results(self) -> list[Node]:
        """The members that others read."""
        members = set(self.members)
        return [node for node in self.members if is_tensor(node) and not members.issuperset(node.users)]

    def links(self) -> tuple[Link, ...]:
        """Of each member, and of what it runs."""
        return tuple(link for node in self.members for link in (Link.of(node), *node.meta.get("inside", ())))


def runs(gm: GraphModule, kind: Callable[[Node], Hashable | None], least: int) -> list[Run]:
    """The runs of at least `least` operations of one `kind`, None for what is no part of any.

    Each is as long as it gets: what can be computed before or behind it parts no run.
    """
    found: list[Run] = []
    for node in gm.graph.nodes:
        open_run = found[-1] if found else None
        own = kind(node)
        if open_run is not None:
            members, behind = open_run.members, open_run.behind
            is_part = takes_part(node) and node.args[0] in members
            if (is_part or own == open_run.kind) and not set(behind).intersection(node.all_input_nodes):
                members.append(node)
                continue
            if {*members, *behind}.intersection(node.all_input_nodes):
                behind.append(node)
        if own is not None and node.op != "output":
            found.append(Run(own, [node]))
    return [run for run in found if _pays(run, least)]


def takes_part(node: Node) -> bool:
    """Whether `node` takes one of the several results of an operation."""
    return node.target is GETITEM and isinstance(node.args[0], Node) and not is_tensor(node.args[0])


def _pays(run: Run, least: int) -> bool:
    members = set(run.members)
    steps = [node for node in run.members if node.target is not GETITEM]
    if any(not is_tensor(node) and not members.issuperset(node.users) for node in steps):
        return False  # it is taken apart somewhere else
    return len(steps) >= least and not any("aliases" in node.meta for node in run.behind)


def put(gm: GraphModule, run: Run, fused: Node) -> None:
    """Let `fused`, which stands behind the last member and gives the results of `run`, do its work."""
    members, results = set(run.members), run.results()
    fused.meta.pop("source", None)
    fused.meta["value"] = [node.meta["value"] for node in results]
    fused.meta["inside"] = run.links()
    anchor = fused
    for i, node in enumerate(results):
        with gm.graph.inserting_after(anchor):
            anchor = call(gm, GETITEM, (fused, i), node, node.meta.get("qparams"))
        node.replace_all_uses_with(anchor, lambda user: user not in members)
    order: dict[Any, int] = {node: i for i, node in enumerate(gm.graph.nodes)}
    for node in run.behind:
        if order[node] < order[fused]:
            anchor.append(node)
            anchor = node
    for node in reversed(run.members):
        gm.graph.erase_node(node)
