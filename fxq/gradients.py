"""Gradients that there are none of: who asks for them gets an error, where torch would leave them None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.errors import InputError


class _NoGradient(torch.autograd.Function):
    """The same numbers; `what` has no gradients, and says so when it is asked for them."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, cause: Tensor, what: str) -> Tensor:
        ctx.what = what
        return output.detach().view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise InputError(f"{ctx.what} has no gradients; train with fxq.prepare_qat, or call it on x.detach()")


def refuse_gradients(outputs: Any, cause: Tensor, what: str = "an integer model") -> Any:
    """`outputs`, of a call of `what` that `cause` wants a gradient of."""

    def refuse(output: Tensor) -> Tensor:
        refused: Tensor = _NoGradient.apply(output, cause, what)  # type: ignore[no-untyped-call]
        return refused if output.is_floating_point() else output

    return pytree.tree_map_only(Tensor, refuse, outputs)
