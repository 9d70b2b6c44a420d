"""dropout: in a graph that is to be trained, one module whatever its spelling was; integers pass through it.

dropout(x) = x in eval mode, and where training has ended there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, submodule

FUNCTIONS: dict[object, Callable[..., Tensor]] = {
    nn.Dropout: F.dropout,
    nn.Dropout1d: F.dropout1d,
    nn.Dropout2d: F.dropout2d,
    nn.Dropout3d: F.dropout3d,
    nn.AlphaDropout: F.alpha_dropout,
    nn.FeatureAlphaDropout: F.feature_alpha_dropout,
    F.dropout: F.dropout,
    torch.dropout: F.dropout,
    F.dropout1d: F.dropout1d,
    F.dropout2d: F.dropout2d,
    F.dropout3d: F.dropout3d,
    F.alpha_dropout: F.alpha_dropout,
    F.feature_alpha_dropout: F.feature_alpha_dropout,
}
"""What each module or function of torch's calls a dropout."""

DROPOUT = "dropout"
"""In the `meta` of an attention: the part of its weights that training drops."""


class Dropout(nn.Module):
    """`function(x, p)` in training mode."""

    def __init__(self, function: Callable[..., Tensor], p: float) -> None:
        super().__init__()
        self.function = function
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """x with parts of it zeroed and the rest scaled up, or x itself."""
        return self.function(x, self.p, True) if self.training else x

    def extra_repr(self) -> str:
        return f"{self.function.__name__}, p={self.p}"


@dataclass(frozen=True)
class DropoutFamily(Family):
    """The dropouts that `passes.keep_dropout` leaves."""

    name: str = "dropout"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """Any `Dropout` of a float32 tensor."""
        if node.op != "call_module" or not isinstance(submodule(gm, node), Dropout):
            return None
        (x,) = node.args
        return Claim("carry", (x,)) if is_float_tensor(x) and isinstance(x, Node) else None


FAMILY = DropoutFamily()
