"""What can be quantized: the model and the examples that a user gives, or an error with the remedy."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from fxq.errors import InputError
from fxq.inputs import Call, check_finite, check_kind
from fxq.nn import QuantizedLinear
from fxq.pipeline import Context
from fxq.quantized import QuantizedModule
from fxq.stages import is_integer_op

_NARROW = (torch.bfloat16, torch.float16)
_WRAPPED = ("module", "_orig_mod")
"""Where DataParallel and torch.compile hold the model that they wrap."""


def is_narrow(model: nn.Module, call: Call) -> bool:
    """Whether there is any bfloat16 or float16 in a model and its inputs."""
    tensors = (*model.parameters(), *model.buffers(), *(tensor for _, tensor in call.tensors()))
    return any(tensor.dtype in _NARROW for tensor in tensors)


def check_float(model: nn.Module) -> None:
    """Raise `InputError` for a model that fxq has prepared or quantized already, or a part of which it has."""
    for path, module in model.named_modules():
        what = f"module {path!r}" if path else "the model"
        expanded = isinstance(module, GraphModule) and any(map(is_integer_op, module.graph.nodes))
        if expanded or isinstance(module, QuantizedModule):
            raise InputError(f"{what} is already quantized by fxq; quantize the float model it came from")
        if isinstance(module, GraphModule) and isinstance(module.meta.get("fxq"), Context):
            raise InputError(f"{what} is already prepared by fxq; go on with fxq.calibrate and fxq.convert")


def check_model(model: nn.Module, call: Call, *, narrow: bool = False) -> None:
    """Raise `InputError` for what cannot be quantized.

    narrow: whether the recipe has a scheme for bfloat16 and float16.
    """
    if not isinstance(model, nn.Module):
        raise InputError(f"the model is a {type(model).__name__}; fxq needs a torch.nn.Module")
    check_float(model)
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            kind = type(module).__name__
            raise InputError(f"module {path!r} is a {kind}, quantized already; quantize the model with its nn.Linear")
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError("the model is a ScriptModule, whose code cannot be traced; quantize the nn.Module behind it")
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if isinstance(tensor, UninitializedParameter | UninitializedBuffer):
            raise InputError(
                f"parameter {name} has no shape yet (a lazy module); call the model once, model(*example_inputs), and "
                "quantize it then"
            )
        if tensor.device.type != "cpu":
            remedy = "load its weights first" if tensor.device.type == "meta" else "move it with model.cpu()"
            raise InputError(f"parameter {name} is on the device {tensor.device}; fxq runs on CPUs: {remedy}")
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, *(_NARROW if narrow else ())):
            other = ', or use recipe="w8a16"' if tensor.dtype in _NARROW else ""
            raise InputError(
                f"parameter {name} has dtype {tensor.dtype}; fxq quantizes float32: convert it with .float(){other}"
            )
    if not call.args and not call.kwargs:
        raise InputError("example_inputs is empty; give a tensor, a tuple of positional or a dict of keyword arguments")
    for name, tensor in call.tensors():
        check_kind(name, tensor)
        if tensor.device.type != "cpu":
            raise InputError(f"{name} is on the device {tensor.device}, the model on cpu; move it with .cpu()")
        if tensor.dtype == torch.float64 or (tensor.dtype in _NARROW and not narrow):
            raise InputError(f"{name} has dtype {tensor.dtype}, the model is float32; convert it with .float()")
    check_finite(call, "example_inputs")


def check_leaves(model: nn.Module, leaves: Collection[object]) -> None:
    """Raise `InputError` for leaves that are neither classes nor paths, or paths that name no module."""
    if isinstance(leaves, str):
        raise InputError(f"leaves is {leaves!r}; give a tuple: leaves=({leaves!r},)")
    paths = [path for path, _ in model.named_modules(remove_duplicate=False) if path]
    bare = [".".join(part for part in path.split(".") if part not in _WRAPPED) for path in paths]
    for leaf in leaves:
        if isinstance(leaf, str) and not any(fnmatchcase(path, leaf) for path in (*paths, *bare)):
            raise InputError(f"no module is named by the leaf {leaf!r}; the model's are {', '.join(paths[:12])}")
        if not isinstance(leaf, str | type):
            raise InputError(f"a leaf is a {type(leaf).__name__}; name it by its class, or by its path in the model")
