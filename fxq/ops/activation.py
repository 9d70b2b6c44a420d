"""activation: gelu, silu, tanh or sigmoid in the epilogue of a linear.

    v   = f32(acc + bias_i32) * f32(s_x * s_w[n]) [+ addend]                    as in `qlinear_float`
    qlinear_act            y   = act(v)                                          -> float32
    qlinear_act_quantize   q_y = quantize(act(v) [* factor[n]], s_y, z_y)        -> uint8

act is made of polynomials in plain float32 steps, without fused multiply-adds, so that every instruction set and NumPy
agree bit for bit; its error against float64 stands in the docstrings of `fxq.numerics.gelu`, `gelu_tanh`, `silu`,
`tanh` and `sigmoid`, and is tested. NumPy truth: `fxq.numerics.qlinear_act`, `qlinear_act_quantize`.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq import kernels, numerics
from fxq.graph import submodule

_FUNCTIONS = {F.gelu: "gelu", F.silu: "silu", torch.tanh: "tanh", F.tanh: "tanh", torch.sigmoid: "sigmoid"}
_FUNCTIONS |= {F.sigmoid: "sigmoid", F.hardsigmoid: "hardsigmoid", F.hardswish: "hardswish"}
_METHODS = {"tanh": "tanh", "sigmoid": "sigmoid"}
_MODULES = {nn.SiLU: "silu", nn.Tanh: "tanh", nn.Sigmoid: "sigmoid", nn.Hardsigmoid: "hardsigmoid"}
_MODULES |= {nn.Hardswish: "hardswish"}


def activation_of(gm: GraphModule, node: Node) -> str | None:
    """Which of `numerics.ACTIVATIONS` a float node computes; None where it is another operation."""
    if node.op == "call_module":
        module = submodule(gm, node)
        if type(module) is nn.GELU:
            return "gelu_tanh" if module.approximate == "tanh" else "gelu"
        return _MODULES.get(type(module))
    if node.op == "call_method":
        return _METHODS.get(str(node.target))
    if node.op != "call_function":
        return None
    name = _FUNCTIONS.get(node.target)  # type: ignore[arg-type]
    return "gelu_tanh" if name == "gelu" and node.kwargs.get("approximate") == "tanh" else name


def _qlinear_act(
    x: Tensor, weight: Tensor, bias: Tensor, multiplier: Tensor, activation: str, addend: Tensor | None = None
) -> Tensor:
    if activation not in numerics.ACTIVATIONS:
        raise ValueError(f"fxq: unknown activation {activation!r}; there are {', '.join(numerics.ACTIVATIONS)}")
    y = kernels.portable("qlinear_float")(x, weight, bias, multiplier, addend)
    return torch.from_numpy(np.ascontiguousarray(numerics.ACTIVATIONS[activation](y.numpy())))


def _qlinear_act_quantize(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    multiplier: Tensor,
    activation: str,
    scale: float,
    zero_point: int,
    factor: Tensor | None = None,
) -> Tensor:
    y = _qlinear_act(x, weight, bias, multiplier, activation)
    if factor is not None:
        if factor.shape != bias.shape:
            raise ValueError(
                f"fxq::qlinear_act_quantize: factor has shape {list(factor.shape)}, bias {list(bias.shape)}"
            )
        y = y * factor
    quantized: Tensor = kernels.portable("quantize")(y, scale, zero_point)
    return quantized


_OPERANDS = "Tensor x, Tensor weight, Tensor bias, Tensor multiplier, str activation"

qlinear_act = kernels.define(
    f"qlinear_act({_OPERANDS}, Tensor? addend=None) -> Tensor",
    _qlinear_act,
    lambda x, weight, bias, multiplier, activation, addend=None: torch.ops.fxq.qlinear_float(
        x, weight, bias, multiplier, addend
    ),
)
qlinear_act_quantize = kernels.define(
    f"qlinear_act_quantize({_OPERANDS}, float scale, int zero_point, Tensor? factor=None) -> Tensor",
    _qlinear_act_quantize,
    lambda x, weight, bias, multiplier, activation, scale, zero_point, factor=None: x.new_empty(
        *x.shape[:-1], bias.shape[0]
    ),
)
