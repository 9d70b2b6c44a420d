"""normalize_convolutions: one spelling for what convolutional networks are made of.

nn.MaxPool2d, F.max_pool2d(x, 2)             -> max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
nn.BatchNorm2d, F.batch_norm(weight=...)     -> batch_norm(x, mean, var, weight, bias, False, momentum, eps)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from fxq.pipeline import Context, Numbers
from fxq.rewriting import ModuleRule, Parameter, Rewrite, Rule, Rules
from fxq.spelling import BATCH_NORM, max_pool1d
from fxq.stages import Stage


def _pool(rank: int) -> Rule:
    targets: dict[int, Callable[..., Any]] = {1: max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
    target = targets[rank]

    def wide(value: Any) -> Any:
        many = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
        return many[0] if rank == 1 else many * (rank if len(many) == 1 else 1)

    def rule(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Rewrite | None:
        if return_indices:
            return None
        stride = kernel_size if stride in (None, (), []) else stride
        return target, (input, *(wide(v) for v in (kernel_size, stride, padding, dilation)), ceil_mode)

    return rule


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


def _max_pool(m: Any, x: Any, _: Parameter) -> Rewrite | None:
    options = m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
    return _pool({nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}[type(m)])(x, *options)


def _batch_norm_module(m: Any, x: Any, parameter: Parameter) -> Rewrite | None:
    if m.training or m.running_mean is None:
        return None
    mean, var, gamma, beta = map(parameter, ("running_mean", "running_var", "weight", "bias"))
    momentum = 0.0 if m.momentum is None else m.momentum
    return BATCH_NORM, (x, mean, var, gamma, beta, False, momentum, m.eps)


FUNCTIONS: dict[object, Rule] = {
    F.max_pool1d: _pool(1),
    F.max_pool2d: _pool(2),
    F.max_pool3d: _pool(3),
    torch.max_pool1d: _pool(1),
    torch.max_pool2d: _pool(2),
    torch.max_pool3d: _pool(3),
    F.batch_norm: _batch_norm,
}

MODULES: dict[type[nn.Module], ModuleRule] = {
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _max_pool),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _batch_norm_module),
}

RULES = Rules(FUNCTIONS, modules=MODULES)


@dataclass(frozen=True)
class NormalizeConvolutions:
    """See the module's docstring."""

    name: str = "normalize-convolutions"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes rewritten."""
        return RULES.apply(gm)


PASS = NormalizeConvolutions()
