"""Gradients that there are none of: who asks for them gets an error, where torch would leave out what integers do.

Backwards that is None, or what reaches an input past the integers; forwards (`torch.func.jvp`) tangents without theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxq.errors import InputError
from fxq.tracing.values import tensors

REMEDY = "has no gradients; train with fxq.prepare_qat, or call it on x.detach()"


class _NoGradient(torch.autograd.Function):
    """The same numbers; `what` has no gradients, and says so when it is asked for them."""

    @staticmethod
    def forward(output: Tensor, cause: Tensor, what: str) -> Tensor:
        return output.detach().view_as(output)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        ctx.what = inputs[2]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InputError(f"{ctx.what} {REMEDY}")


def asking(values: Any) -> Tensor | None:
    """The first tensor in `values` that gradients are wanted of."""
    return next((tensor for tensor in tensors(values) if tensor.requires_grad), None)


def refuse_tangents(values: Any, what: Callable[[Tensor], str]) -> None:
    """Raise `InputError` where a tensor in `values`, of which a call is `what`, has a tangent in forward-mode."""
    for tensor in tensors(values) if forward_ad._current_level >= 0 else ():
        if forward_ad.unpack_dual(tensor).tangent is not None:  # type: ignore[no-untyped-call]
            raise InputError(f"{what(tensor)} {REMEDY}")


def refuse_gradients(outputs: Any, cause: Tensor, what: str = "an integer model") -> Any:
    """`outputs`, of a call of `what` that `cause` wants a gradient of."""

    def refuse(output: Tensor) -> Tensor:
        refused: Tensor = _NoGradient.apply(output, cause, what)  # type: ignore[no-untyped-call]
        return refused if output.is_floating_point() else output

    return pytree.tree_map_only(Tensor, refuse, outputs)
