"""What an op family is: the one interface between the integer ops and the passes that put them into a graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch.fx import GraphModule, Node

from fxq.decisions import Reason
from fxq.qtypes import Scheme

Kind = Literal["product", "pointwise", "carry"]


@dataclass(frozen=True)
class Claim:
    """A float operation that a family can run on integers.

    kind: "product" reads uint8 and may give uint8 or float32 (linear); "pointwise" reads uint8 and gives uint8 with a
    range of its own (add); "carry" passes integers on with the range that they have (reshape, max-pool, relu).
    inputs: the operands that become uint8; weight: the constant operand that becomes int8. schemes: in which schemes of
    a recipe the family can run it. inner: operations between the inputs and this one that count as one with it.
    to_float: whether a "pointwise" one can give float32 as well.
    """

    kind: Kind
    inputs: tuple[Node, ...]
    weight: Node | None = None
    schemes: tuple[Scheme, ...] = ("w8a8",)
    inner: tuple[Node, ...] = ()
    to_float: bool = False


@dataclass(frozen=True)
class Refusal:
    """A float operation that a family knows and cannot run on integers."""

    reason: Reason
    detail: str = ""


class Family(Protocol):
    """The same op read several ways; see `fxq/ops/linear.py` for the fullest one.

    name: what recipes and reports call it. A family that subclasses this one writes what it has more of than nothing.
    """

    @property
    def name(self) -> str: ...

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """What the family makes of a node of the normalised float graph; None where it is not its op."""
        return None

    def fuse_clamp(self, gm: GraphModule, clamp: Node) -> bool:
        """QDQ stage: swallow the clamp at `clamp`, where its operand is this family's; whether it did."""
        return False

    def lower(self, gm: GraphModule, node: Node, notes: list[str]) -> bool:
        """QDQ to INTEGER: rewrite the tree that ends at `node`; whether it did."""
        return False
