"""fuse_blocks: what stands between the embedding and the head of a transformer becomes one call.

    qlinears(x, ...) -> qattention -> qlinear_float -> norm_and_quantize -> ...        ->  qblock([x, ...], ...)

A run of operations on rows [B, T, width], whose constants stay what they are; masks come in from outside. At 16 tokens
a quarter of a call is spent between operations, in Python, in torch's dispatcher and on tensors that nobody sees. What
stood there is kept in `meta["inside"]`, constants first: text, picture, `compare` and `golden` still show every layer.

The constants of all blocks lie in one tensor, and nowhere else: an operation whose constant is read outside of blocks
as well stays outside, and nothing is fused in one of several graphs on the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.expansion import Link
from fxq.graph import (
    SHARED,
    Value,
    call,
    common_module,
    constant,
    erase_unread,
    get_attr,
    is_tensor,
    line_of,
    set_constant,
    submodule,
    target_name,
)
from fxq.ops import block
from fxq.ops.block import STEPS, Constant, Step, Written, qblock
from fxq.pipeline import Context, Numbers
from fxq.runs import Run, put, runs
from fxq.shapes import Shape, shapes
from fxq.spelling import GETITEM
from fxq.stages import Stage
from fxq.tracing.origin import Origin

LEAST = 3
"""Operations that are worth a call of their own."""


@dataclass(frozen=True)
class FuseBlocks:
    """See the module's docstring."""

    name: str = "fuse-blocks"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of blocks."""
        if gm.meta.get(SHARED):
            return 0
        found = _runs(gm)
        if found:
            held = {path: node for run in found for path, node in _constants(run).items()}
            tensor, places = block.gather(constant(gm, node) for node in held.values())
            owner = common_module([node for run in found for node in run.members])
            path = set_constant(gm, f"{owner}.constants".lstrip("."), tensor)
            for run in found:
                _fuse(gm, run, path, dict(zip(held, places, strict=True)))
            erase_unread(gm)
        return len(found)


def _runs(gm: GraphModule) -> list[Run]:
    """What becomes a block each: runs whose constants nobody else reads."""
    known, apart = shapes(gm), set[Node]()

    def lead(node: Node) -> Shape | None:
        return None if node in apart else _lead(node, known)

    while True:
        found = runs(gm, lead, LEAST)
        sharing = _sharing(gm, {node for run in found for node in run.members})
        if not sharing:
            return found
        apart.update(sharing)


def _sharing(gm: GraphModule, steps: set[Node]) -> set[Node]:
    """Those of `steps` that read a constant which anything but `steps` reads too."""
    readers: dict[int, set[Node]] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr" and is_tensor(node):
            readers.setdefault(id(constant(gm, node)), set()).update(node.users)
        elif node.op == "call_module":
            for tensor in submodule(gm, node).state_dict(keep_vars=True).values():
                readers.setdefault(id(tensor), set()).add(node)
    return {step for read in readers.values() if not read <= steps for step in read & steps}


def _lead(node: Node, known: dict[Node, Any]) -> Shape | None:
    """[B, T] of a step's rows, which all that it reads share; None for what cannot be a step."""
    name = target_name(node.target).removeprefix("fxq.")
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or name not in STEPS:
        return None
    if node.kwargs or "aliases" in node.meta:
        return None
    args = block.all_arguments(name, node.args)
    if name == "qattention":
        if not args[-1]:
            return None
        args = (*args[:3], *args[4:])
    operands = [n for arg in args for n in (arg if isinstance(arg, list | tuple) else [arg]) if isinstance(n, Node)]
    rows = [operand for operand in operands if operand.op != "get_attr"]
    if not all(is_tensor(operand) and len(known[operand]) == 3 for operand in rows):
        return None
    if any("aliases" in operand.meta for operand in operands):
        return None  # the model writes to it
    addend = {"qlinear_float": 4, "qlinear_act": 5, "qfeed_forward": 9}.get(name)
    if addend is not None and args[addend] is not None and args[addend].op == "get_attr":
        return None  # one row for all
    leads = {known[operand][:2] for operand in rows}
    return leads.pop() if len(leads) == 1 else None


def _mask(node: Node) -> Any:
    return node.args[3] if target_name(node.target) == "fxq.qattention" else None


def _constants(found: Run) -> dict[str, Node]:
    """By its path each constant of a run."""
    return {
        str(operand.target): operand
        for node in found.members
        for operand in node.all_input_nodes
        if operand.op == "get_attr" and operand is not _mask(node)
    }


def _fuse(gm: GraphModule, found: Run, constants: str, places: dict[str, block.Place]) -> None:
    """constants: the path of the tensor in which those of all blocks lie; places: of each, by its own path."""
    _unify_parts(found)
    members = set(found.members)
    masks: list[Node] = []
    rows: list[Node] = []
    for node in found.members:
        for operand in node.all_input_nodes:
            into = masks if operand is _mask(node) else rows
            if operand not in members and operand not in into and (into is masks or operand.op != "get_attr"):
                into.append(operand)
    results = found.results()
    held = _constants(found)
    program = _program(found.members, rows, masks, {path: places[path] for path in held}, results)

    last = found.members[-1]
    widths = [(-1 if n.meta["value"].dtype == torch.float32 else 1) * n.meta["value"].shape[-1] for n in results]
    with gm.graph.inserting_after(last):
        first = next(node for node in found.members if node.target is not GETITEM)
        origin = Origin(common_module(found.members), line_of(first))
        own = get_attr(gm, set_constant(gm, f"{origin.module}.program".lstrip("."), program), last)
        own.meta["origin"] = origin
    with gm.graph.inserting_after(own):
        shared = get_attr(gm, constants, own)
    with gm.graph.inserting_after(shared):
        fused = call(gm, qblock, ([*rows, *masks], own, shared, widths), own)
    links = tuple(Link.of(node) for node in held.values())
    put(gm, found, fused)
    fused.meta["inside"] = (*links, *fused.meta["inside"])


def _unify_parts(found: Run) -> None:
    """Let each part of a step be taken once."""
    taken: dict[Any, Node] = {}
    for node in list(found.members):
        if node.target is GETITEM and taken.setdefault(node.args, node) is not node:
            node.replace_all_uses_with(taken[node.args])
            found.members.remove(node)
            node.graph.erase_node(node)


def _program(
    members: list[Node], rows: list[Node], masks: list[Node], constants: dict[str, block.Place], results: list[Node]
) -> torch.Tensor:
    numbers = {node: i for i, node in enumerate([*rows, *masks, *members])}
    paths = list(constants)

    def argument(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [argument(item) for item in value]
        if not isinstance(value, Node):
            return value
        return block.Value(numbers[value]) if value in numbers else Constant(paths.index(str(value.target)))

    def written(node: Node) -> Written:
        value: Value = node.meta["value"]
        shown = results.index(node) if node in results else None
        return Written(value.shape[-1], value.dtype == torch.float32, shown)

    steps = []
    for node in members:
        if node.target is GETITEM:
            steps.append(Step("part", (argument(node.args[0]), node.args[1])))
            continue
        name = target_name(node.target).removeprefix("fxq.")
        value = node.meta["value"]
        if isinstance(value, Value):
            writes = [written(node)]
        else:
            parts = {user.args[1]: user for user in node.users}
            writes = [
                written(parts[i]) if i in parts else Written(v.shape[-1], v.dtype == torch.float32)
                for i, v in enumerate(value)
            ]
        steps.append(Step(name, tuple(map(argument, block.all_arguments(name, node.args))), tuple(writes)))
    return block.encode(steps, len(rows), len(masks), list(constants.values()))


PASS = FuseBlocks()
