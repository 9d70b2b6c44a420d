"""A clamp behind an operation: how it becomes a part of it, and how it comes out again.

A relu is the clamp (0, None); a bound that is None is none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any as AnyValue

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import call, replace
from fxq.pattern import Any, Miss, OneOf, Op, Pattern
from fxq.spelling import CLAMP, RELU, float_bounds

Bounds = tuple[float | None, float | None]


def clamped(y: Tensor, low: float | None, high: float | None) -> Tensor:
    """clamp(y, low, high) in float, by the op that the model called."""
    return torch.relu(y) if (low, high) == (0.0, None) else torch.clamp(y, low, high)


def clamp_of(pattern: Pattern) -> OneOf:
    """A relu or clamp, bound to `clamp`, of what `pattern` matches."""
    return OneOf(Op({RELU}, pattern, name="clamp"), Op({CLAMP}, pattern, Any("low"), Any("high"), name="clamp"))


def fuse_clamp(gm: GraphModule, clamp: Node, pattern: Pattern, target: Callable[..., AnyValue]) -> bool:
    """clamp(op(...), low, high) -> target(..., low, high) where `clamp` matches `pattern`; whether it did."""
    bounds = float_bounds(clamp)
    if isinstance(pattern.match(clamp), Miss) or bounds is None:
        return False
    op = clamp.args[0]
    assert isinstance(op, Node)
    replace(gm, clamp, target, (*op.args, *bounds), like=op)
    return True


def clamp_behind(gm: GraphModule, y: Node, bounds: Bounds) -> None:
    """Put a clamp behind `y`, for all who read it."""
    if bounds == (None, None):
        return
    with gm.graph.inserting_after(y):
        clamp = call(gm, CLAMP, (y, *bounds), y)
    y.replace_all_uses_with(clamp, delete_user_cb=lambda user: user is not clamp)
