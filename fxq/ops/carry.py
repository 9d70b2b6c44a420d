"""carry: operations that move numbers and compute none, so that integers pass through them as they are.

    op(dequantize(q, s, z)) = dequantize(op(q), s, z)      reshape, transpose, slice, cat, max-pool, ...

All inputs and the output share one scale and zero point. Max-pooling is a carry because quantization is monotone; its
padding is -inf in float and 0, the smallest uint8, in integers. What `pad` adds is 0.0: the zero point stands for it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from fxq.family import Claim, Family, Refusal
from fxq.graph import is_float_tensor, is_size
from fxq.spelling import CAT, GETITEM, MAX_POOLS, MOVES, SPLITS, is_move


def _holds_slices(index: object) -> bool:
    """Whether `index` is basic indexing (integers, slices, None, ...), which moves numbers and copies none twice."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(
        part is None or part is ... or isinstance(part, int | slice) or (isinstance(part, Node) and is_size(part))
        for part in parts
    )


@dataclass(frozen=True)
class Carry(Family):
    """Everything that only moves numbers; `fold_qdq` carries the integers through."""

    name: str = "carry"

    def claim(self, gm: GraphModule, node: Node) -> Claim | Refusal | None:
        """A move, split, slice, max-pool or cat of float32 tensors."""
        if node.op != "call_function" or node.kwargs or not node.args:
            return None
        if node.target in MOVES | MAX_POOLS | SPLITS and is_move(node):
            return Claim("carry", (node.args[0],)) if is_float_tensor(node.args[0]) else None  # type: ignore[arg-type]
        if node.target in CAT and isinstance(node.args[0], list | tuple):
            pieces = tuple(piece for piece in node.args[0] if isinstance(piece, Node))
            if pieces and all(is_float_tensor(piece) and piece.op != "get_attr" for piece in pieces):
                return Claim("carry", pieces)
            return None
        if node.target is GETITEM and is_float_tensor(node):
            source, index = node.args
            if not isinstance(source, Node):
                return None
            if source.target in SPLITS or (is_float_tensor(source) and _holds_slices(index)):
                return Claim("carry", (source,))
        return None


FAMILY = Carry()
