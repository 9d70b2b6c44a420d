"""fuse_images: a convolutional network, or what of it runs on integers, becomes one call.

    quantize_channels_last -> qconv -> qmax_pool -> qconv_add -> ...        ->  qimages([x], [weights, ...], program)

A run of operations whose constants stay what they are. Between two operations lie otherwise some 3 us of Python and
torch's dispatcher, a tenth of a small network's time, and memory that goes back to the system and comes again page by
page. What stood there is kept in `meta["inside"]`: text, picture, `compare` and `golden` still show every layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.graph import Value, call, common_module, is_tensor, line_of, target_name
from fxq.ops.images import MOST_DIMENSIONS, STEPS, Word, encode, qimages
from fxq.pipeline import Context, Numbers
from fxq.runs import Run, put, runs
from fxq.stages import Stage
from fxq.tracing.origin import Origin

LEAST = 6
"""Operations that are worth a call of their own."""


@dataclass(frozen=True)
class FuseImages:
    """See the module's docstring."""

    name: str = "fuse-images"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of runs."""
        found = runs(gm, _kind, LEAST)
        for run in found:
            _fuse(gm, run)
        return len(found)


def _kind(node: Node) -> bool | None:
    """True for what may stand in a program, else None."""
    name = target_name(node.target).removeprefix("fxq.")
    if node.target is torch.flatten:
        (source, *dims) = node.args
        known = [type(dim) for dim in dims] == [int, int] and isinstance(source, Node) and bool(_kind(source))
    else:
        known = isinstance(node.target, torch._ops.OpOverload) and name in STEPS
    if not known or node.op != "call_function" or node.kwargs or "aliases" in node.meta:
        return None
    return True if all(map(_is_plain, (node, *node.all_input_nodes))) else None


def _is_plain(node: Node) -> bool:
    """Whether `node` is a tensor that a program can read; its memory nobody modifies."""
    if not is_tensor(node) or "aliases" in node.meta:
        return False
    value: Value = node.meta["value"]
    return node.op == "get_attr" or (
        len(value.shape) <= MOST_DIMENSIONS and value.dtype in (torch.uint8, torch.float32)
    )


def _fuse(gm: GraphModule, run: Run) -> None:
    inputs: list[Node] = []
    constants: list[Node] = []
    for node in run.members:
        for operand in node.all_input_nodes:
            into = constants if operand.op == "get_attr" else inputs
            if operand not in run.members and operand not in into:
                into.append(operand)
    words = {node: Word(f"v{i}") for i, node in enumerate([*inputs, *run.members])}
    words |= {node: Word(f"c{i}") for i, node in enumerate(constants)}

    def argument(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return [argument(item) for item in value]
        return words[value] if isinstance(value, Node) else value

    steps = [(target_name(n.target).rpartition(".")[2], argument(_all_arguments(n))) for n in run.members]
    results = [len(inputs) + run.members.index(node) for node in run.results()]
    last = run.members[-1]
    with gm.graph.inserting_after(last):
        fused = call(gm, qimages, (inputs, constants, encode(steps, results)), last)
    fused.meta["origin"] = Origin(common_module(run.members), line_of(run.members[0]))
    put(gm, run, fused)


def _all_arguments(node: Node) -> tuple[Any, ...]:
    """With those that were left to their defaults."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    return (*node.args, *(argument.default_value for argument in node.target._schema.arguments[len(node.args) :]))


PASS = FuseImages()
