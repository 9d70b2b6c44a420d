"""remove_identities: what hands back its operand's numbers goes: dropout, identity, contiguous, detach, to.

So does what nobody reads, as attention weights that a library computes for those who ask for them.
`contiguous` stays in a graph that looks at the order of numbers in memory (`as_strided`, a `view` of modified memory).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from fxq.graph import bypass, erase_unread, is_tensor, submodule
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage

MODULES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
DROPOUTS = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
)
STRIDED = frozenset(
    {torch.as_strided, *("as_strided", "data_ptr", "is_contiguous", "storage_offset", "stride", "view", "view_as")}
)
CONVERSIONS = ("float", "to", "type", "type_as")


@dataclass(frozen=True)
class RemoveIdentities:
    """See the module's docstring."""

    name: str = "remove-identities"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes that went."""
        strided = any(node.target in STRIDED for node in gm.graph.nodes)
        found = [
            node
            for node in gm.graph.nodes
            if "aliases" not in node.meta
            and isinstance(_operand(node), Node)
            and (_is_identity(gm, node) or (node.op == "call_method" and node.target == "contiguous" and not strided))
        ]
        for node in found:
            source = _operand(node)
            assert isinstance(source, Node)
            bypass(gm, node, source)
        return len(found) + erase_unread(gm)


def _operand(node: Node) -> Argument:
    return next(iter((*node.args, *node.kwargs.values())), None)


def _is_identity(gm: GraphModule, node: Node) -> bool:
    """Whether `node` returns its first operand's numbers, whatever they are."""
    if node.op == "call_module":
        module = submodule(gm, node)
        return type(module) in MODULES and (isinstance(module, nn.Identity) or module.training is False)
    if node.op == "call_method" and node.target == "detach":
        return True
    if node.op == "call_method" and node.target in CONVERSIONS and is_tensor(node):
        source = node.args[0]
        return is_tensor(source) and isinstance(source, Node) and source.meta["value"] == node.meta["value"]
    if node.op == "call_function" and node.target in DROPOUTS:
        named = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
        return named.get("training", named.get("train", True)) is False or bool(named.get("p") == 0)
    return False


PASS = RemoveIdentities()
