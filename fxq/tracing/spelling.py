"""What a call is called: which torch functions ask a tensor for what, and how a call is written in the graph."""

from __future__ import annotations

import operator
import types
from collections.abc import Callable
from enum import Enum
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from fxq.tracing.graph_functions import mutate

Spelling = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""A node's op, target, args and kwargs."""

RANK = {"dim", "ndimension", "ndim"}
DTYPE = {"dtype", "is_floating_point", "is_complex", "is_signed", "element_size", "itemsize"}
SIZES = {"numel", "nelement", "nbytes", "stride", "storage_offset"}
VALUES = {
    "__bool__", "__int__", "__float__", "__index__", "__complex__", "__contains__", "__array__", "__dlpack__", "item",
    "tolist", "numpy", "equal", "allclose", "is_nonzero", "data_ptr",
}  # fmt: skip
COUNTED = {"unbind", "chunk", "split", "split_with_sizes", "tensor_split", "hsplit", "vsplit", "dsplit"}
"""How many tensors these return depends on sizes."""
RANDOM = {"bernoulli", "multinomial", "normal", "poisson", "uniform", "exponential"}
SILENT = {
    "_set_grad_enabled", "__repr__", "__str__", "__format__", "__hash__", "__dir__", "register_hook", "retain_grad",
}  # fmt: skip
"""Done while tracing, and no part of what the model computes."""
LITERALS = (*fx.node.base_types, torch.layout, Enum, types.NoneType, types.EllipsisType)
"""What fx takes among a node's arguments as it is."""

_UNARY = {
    "neg": operator.neg, "abs": operator.abs, "__invert__": operator.invert, "bitwise_not": operator.invert,
}  # fmt: skip
_BINARY = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "pow": operator.pow,
    "true_divide": operator.truediv, "__floordiv__": operator.floordiv, "floor_divide": operator.floordiv,
    "remainder": operator.mod, "matmul": operator.matmul, "__getitem__": operator.getitem,
    "__and__": operator.and_, "__or__": operator.or_, "__xor__": operator.xor,
    "eq": operator.eq, "__eq__": operator.eq, "ne": operator.ne, "__ne__": operator.ne,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_REFLECTED = {
    "__rsub__": operator.sub, "__rdiv__": operator.truediv, "__rtruediv__": operator.truediv, "__rmod__": operator.mod,
    "__rpow__": operator.pow, "__rfloordiv__": operator.floordiv, "__rmatmul__": operator.matmul,
}  # fmt: skip
_CONTAINERS = {
    "AdaptiveLogSoftmaxWithLoss", "Container", "Module", "ModuleDict", "ModuleList", "MultiheadAttention",
    "ParameterDict", "ParameterList", "Sequential", "Transformer", "TransformerDecoder", "TransformerDecoderLayer",
    "TransformerEncoder", "TransformerEncoderLayer",
}  # fmt: skip


def is_leaf(module: nn.Module, path: str, leaves: tuple[type[nn.Module] | str, ...]) -> bool:
    """Tell whether a module stays one call: torch's own with a plain meaning, scripted, or listed by the user.

    One whose `forward` was replaced on the object does what that says.
    """
    if not path:
        return False  # A graph of a single call of the whole model would be of no use.
    if any(fnmatchcase(path, leaf) if isinstance(leaf, str) else isinstance(module, leaf) for leaf in leaves):
        return True
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kind = type(module)
    plain = kind.__module__.startswith("torch.nn.modules.") and kind.__name__ not in _CONTAINERS
    hooked = module._forward_hooks or module._forward_pre_hooks
    return plain and not hooked and "forward" not in module.__dict__


def spelling(function: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Spelling:
    """Write a call as `torch.fx.symbolic_trace` would: an operator, a method or a function."""
    method = isinstance(function, types.MethodDescriptorType | types.WrapperDescriptorType)
    if not method and getattr(function, "__module__", "") != "torch._tensor":
        return "call_function", function, args, kwargs
    if name == "__setitem__":
        return "call_function", mutate, (args[0], name, *args[1:]), kwargs
    if name in _REFLECTED and len(args) == 2:
        return "call_function", _REFLECTED[name], args[::-1], {}
    operators: dict[str, Callable[..., Any]] = {1: _UNARY, 2: _BINARY}.get(len(args), {})  # type: ignore[assignment]
    if name in operators and not kwargs:
        return "call_function", operators[name], args, {}
    return "call_method", name, args, kwargs


def opened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a Python function of torch that does not offer itself to `__torch_function__`, but what it calls."""
    assert isinstance(function, types.FunctionType)
    scope = {**function.__globals__, "has_torch_function": lambda tensors: False}
    return types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__)
