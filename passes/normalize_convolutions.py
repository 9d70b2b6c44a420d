"""normalize_convolutions: one spelling for convolutions and batch norms, in 1, 2 or 3 spatial dimensions.

nn.Conv2d, F.conv2d(stride=2), padding="same"  -> conv2d(x, weight, bias, (2, 2), padding, dilation, groups)
nn.Conv2d(..., padding_mode="reflect")         -> conv2d(pad(x, pads, "reflect", None), ...)
nn.ConvTranspose2d, F.conv_transpose2d         -> conv_transpose(...), its weight with the output channels first
nn.BatchNorm2d, F.batch_norm(weight=...)       -> batch_norm(x, mean, var, weight, bias, False, momentum, eps)

An input without a batch gets one: unsqueeze, convolution, squeeze.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import Value, call, constant, get_attr, is_tensor, replace, set_constant, submodule
from fxq.pipeline import Context, Numbers
from fxq.rewriting import Parameter, Rewrite, Rules
from fxq.spelling import BATCH_NORM, CONV_TRANSPOSE, PAD, swap_channels
from fxq.stages import Stage

_CONVS: tuple[Callable[..., Any], ...] = (torch.conv1d, torch.conv2d, torch.conv3d)
_TRANSPOSES: tuple[Callable[..., Any], ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_CONV_MODULES: dict[type[Any], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSE_MODULES: dict[type[Any], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}


@dataclass(frozen=True)
class NormalizeConvolutions:
    """See the module's docstring."""

    name: str = "normalize-convolutions"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes rewritten. A convolution's result is memory of its own, however it is spelled."""
        return RULES.apply(gm) + sum(_convolution(gm, node) for node in list(gm.graph.nodes))


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Rewrite | None:
    if training or running_mean is None or running_var is None:
        return None
    return BATCH_NORM, (input, running_mean, running_var, weight, bias, False, momentum, eps)


def _batch_norm_module(m: Any, x: Any, parameter: Parameter) -> Rewrite | None:
    if m.training or m.running_mean is None:
        return None
    mean, var, gamma, beta = map(parameter, ("running_mean", "running_var", "weight", "bias"))
    momentum = 0.0 if m.momentum is None else m.momentum
    return BATCH_NORM, (x, mean, var, gamma, beta, False, momentum, m.eps)


RULES = Rules(
    {F.batch_norm: _batch_norm},
    modules=dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm_module),
)


def _convolution(gm: GraphModule, node: Node) -> int:
    if node.op == "call_module":
        return _inline(gm, node)
    if node.op != "call_function" or not is_tensor(node):
        return 0
    args: Any = node.args
    named: Any = node.kwargs
    if node.target in _CONVS:
        return _write_conv(gm, node, _CONVS.index(node.target) + 1, *_conv(*args, **named))
    if node.target in _TRANSPOSES:
        operands = _conv_transpose(*args, **named)
        return _write_transpose(gm, node, _TRANSPOSES.index(node.target) + 1, *operands)
    return 0


def _inline(gm: GraphModule, node: Node) -> int:
    """A torch.nn module as the function that it stands for."""
    module: Any = submodule(gm, node)
    path = str(node.target)
    x = node.args[0] if node.args else node.kwargs.get("input")
    if type(module) in _CONV_MODULES:
        weight, bias = _parameters(gm, node, module, path)
        rank, padding = _CONV_MODULES[type(module)], module.padding
        if module.padding_mode != "zeros":
            pads = tuple(module._reversed_padding_repeated_twice)
            with gm.graph.inserting_before(node):
                x, padding = _call(gm, PAD, (x, pads, module.padding_mode, None), node), 0
        return _write_conv(gm, node, rank, x, weight, bias, module.stride, padding, module.dilation, module.groups)
    if type(module) in _TRANSPOSE_MODULES and len(node.args) == 1 and node.kwargs.get("output_size") is None:
        weight, bias = _parameters(gm, node, module, path)
        operands = x, weight, bias, module.stride, module.padding, module.output_padding, module.groups, module.dilation
        return _write_transpose(gm, node, _TRANSPOSE_MODULES[type(module)], *operands)
    return 0


def _parameters(gm: GraphModule, node: Node, module: Any, path: str) -> tuple[Node, Node | None]:
    with gm.graph.inserting_before(node):
        weight = get_attr(gm, f"{path}.weight", node)
        return weight, (None if module.bias is None else get_attr(gm, f"{path}.bias", node))


def _conv(
    input: Any, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, dilation, groups


def _conv_transpose(
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> tuple[Any, ...]:
    return input, weight, bias, stride, padding, output_padding, groups, dilation


def _write_conv(
    gm: GraphModule,
    node: Node,
    rank: int,
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    groups: int,
) -> int:
    """As a convolution with numbers for its padding; what "same" pads on one side only goes in front."""
    dilation = _wide(dilation, rank)
    if padding == "valid":
        padding = 0
    if padding == "same":
        spans = [d * (k - 1) for d, k in zip(dilation, weight.meta["value"].shape[2:], strict=True)]
        padding = tuple(span // 2 for span in spans)
        if any(span % 2 for span in spans):
            pads = tuple(p for span in reversed(spans) for p in (0, span % 2))
            with gm.graph.inserting_before(node):
                x = _call(gm, PAD, (x, pads, "constant", None), node)
    operands = weight, bias, _wide(stride, rank), _wide(padding, rank), dilation, groups
    return _write_batched(gm, node, rank, _CONVS[rank - 1], x, operands)


def _write_transpose(gm: GraphModule, node: Node, rank: int, x: Any, weight: Any, bias: Any, *settings: Any) -> int:
    """With the weight as a constant of its own, output channels first; a computed weight stays as it is."""
    if weight.op != "get_attr" or "aliases" in weight.meta:
        return 0
    stride, padding, output_padding, groups, dilation = settings
    path = f"{weight.target}_swapped"
    owner, _, name = path.rpartition(".")
    swapped = swap_channels(constant(gm, weight).detach(), groups)
    known = getattr(gm.get_submodule(owner), name, None)
    if not isinstance(known, torch.Tensor) or not torch.equal(known, swapped):
        path = set_constant(gm, path, swapped)
    with gm.graph.inserting_before(node):
        weight = get_attr(gm, path, node)
    wide = _wide(stride, rank), _wide(padding, rank), _wide(output_padding, rank), groups, _wide(dilation, rank)
    return _write_batched(gm, node, rank, CONV_TRANSPOSE, x, (weight, bias, *wide))


def _write_batched(
    gm: GraphModule, node: Node, rank: int, target: Callable[..., Any], x: Any, operands: tuple[Any, ...]
) -> int:
    if len(node.meta["value"].shape) == rank + 2:
        if (node.op, node.target, node.args) == ("call_function", target, (x, *operands)) and not node.kwargs:
            return 0
        replace(gm, node, target, (x, *operands))
        return 1
    with gm.graph.inserting_before(node):
        batch = _call(gm, torch.unsqueeze, (x, 0), node)
        y = _call(gm, target, (batch, *operands), node)
    replace(gm, node, torch.squeeze, (y, 0))
    return 1


def _call(gm: GraphModule, target: Callable[..., Any], args: tuple[Any, ...], like: Node) -> Node:
    """A step on the way to the value of `like`, which is not that value."""
    node = call(gm, target, args, like)
    node.meta.pop("value", None)
    x = args[0]
    if isinstance(x, Node) and is_tensor(x):
        node.meta["value"] = Value(x.meta["value"].dtype, ())  # its shape is recorded after the pass
    return node


def _wide(value: Any, rank: int) -> tuple[Any, ...]:
    """A setting with one number for each dimension."""
    many = tuple(value) if isinstance(value, tuple | list) else (value,)
    return many * rank if len(many) == 1 else many


PASS = NormalizeConvolutions()
