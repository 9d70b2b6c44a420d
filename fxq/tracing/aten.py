"""ATen's operators as functions and methods: aten.linear is F.linear, aten.view is x.view(), aten.item is x.item(), ...

What `torch.export` captures, and what a model calls of `torch.ops.aten`, gets the spelling that every model has.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{name: getattr(torch, name) for name in (
        "add", "addmm", "bmm", "cat", "chunk", "clamp", "clamp_max", "clamp_min", "dropout", "einsum", "flatten",
        "flip", "layer_norm", "matmul", "mm", "movedim", "mul", "narrow", "permute", "relu", "reshape", "select",
        "sigmoid", "softmax", "split", "squeeze", "stack", "sub", "t", "tanh", "tile", "transpose", "unbind",
        "unflatten", "unsqueeze", "avg_pool1d", "channel_shuffle", "conv1d", "conv2d", "conv3d", "mean",
    )},
    **{name: getattr(F, name) for name in (
        "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "avg_pool2d", "avg_pool3d",
        "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "hardsigmoid", "hardswish", "leaky_relu", "pad",
        "gelu", "hardtanh", "linear", "pixel_shuffle", "pixel_unshuffle", "relu6", "scaled_dot_product_attention",
        "silu",
    )},
    "split_with_sizes": torch.split,
    "_unsafe_view": torch.reshape,
    "max_pool1d": torch.max_pool1d,
    "max_pool2d": torch.max_pool2d,
    "max_pool3d": torch.max_pool3d,
}  # fmt: skip
"""Operators that a function spells, with the same operands; torch's functions are made from the operators' schemas."""
_UPSAMPLES = {
    **{f"upsample_nearest{rank}d": "nearest" for rank in (1, 2, 3)},
    "upsample_bilinear2d": "bilinear",
}
_METHODS = {"view", "expand", "contiguous", "masked_fill", "detach"}
_NUMBERS: dict[str, Callable[..., Any]] = {
    "item": operator.methodcaller("item"),
    "_local_scalar_dense": operator.methodcaller("item"),
    "sym_numel": operator.methodcaller("numel"),
    "sym_size": lambda x, *dim: x.size(*dim),
    "sym_stride": lambda x, *dim: x.stride(*dim),
    "sym_storage_offset": operator.methodcaller("storage_offset"),
}
"""Operators that read a number from a tensor."""


def function_of(target: torch._ops.OpOverload) -> Callable[..., Any] | None:
    """A function of the operator's arguments that a user might have written; None where ATen alone has it."""
    name = target.overloadpacket.__name__
    if target.namespace != "aten" or target._overloadname == "out":
        return None
    if name in _UPSAMPLES:
        return _upsampling(_UPSAMPLES[name]) if target._overloadname == "vec" else None
    if name in _METHODS:
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    return _OWN.get(name) or _NUMBERS.get(name) or _FUNCTIONS.get(name)


def _slice(x: Tensor, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    return x[(*(slice(None) for _ in range(dim % x.dim())), slice(start, end, step))]


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, momentum: float, eps: float, _: bool
) -> Tensor:
    return F.batch_norm(x, mean, variance, weight, bias, training, momentum, eps)


def _eval_batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, momentum: float, eps: float
) -> tuple[Tensor, None, None]:
    return F.batch_norm(x, mean, variance, weight, bias, False, momentum, eps), None, None


def _clone(x: Tensor, *, memory_format: torch.memory_format | None = None) -> Tensor:
    if memory_format is torch.contiguous_format:
        return x.contiguous()
    return x.clone() if memory_format is None else x.clone(memory_format=memory_format)


def _upsampling(mode: str) -> Callable[..., Tensor]:
    def upsample(x: Tensor, size: Any, *rest: Any) -> Tensor:
        *align_corners, factors = rest
        return F.interpolate(x, size, factors, mode, *align_corners)

    return upsample


_OWN: dict[str, Callable[..., Any]] = {
    "slice": _slice,
    "batch_norm": _batch_norm,
    "_native_batch_norm_legit_no_training": _eval_batch_norm,
    "clone": _clone,
}
"""Operators whose arguments have another order than the user's."""
