"""normalize_pointwise: one spelling for relu, clamp, add and mul.

nn.ReLU, F.relu, x.relu(), clamp(min=0)      -> relu(x)
nn.ReLU6, F.hardtanh, x.clamp(a, b)          -> clamp(x, a, b)
a + b, a.add(b), operator.add                -> add(a, b)
a * b, a.mul(b), torch.multiply              -> mul(a, b)
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from fxq.graph import is_float_tensor, is_tensor
from fxq.pipeline import Context, Numbers
from fxq.rewriting import ModuleRule, Rewrite, Rule, Rules
from fxq.spelling import ADD, CLAMP, MUL, RELU
from fxq.stages import Stage


def _relu(input: Any, inplace: bool = False) -> Rewrite:
    return RELU, (input,)


def _relu6(input: Any, inplace: bool = False) -> Rewrite:
    return CLAMP, (input, 0.0, 6.0)


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Rewrite:
    return CLAMP, (input, min_val, max_val)


def _clamp(input: Any, min: Any = None, max: Any = None) -> Rewrite:
    if isinstance(min, int | float) and min == 0 and max is None and is_float_tensor(input):
        return RELU, (input,)
    return CLAMP, (input, min, max)


def _clamp_min(input: Any, min: Any) -> Rewrite:
    return _clamp(input, min)


def _clamp_max(input: Any, max: Any) -> Rewrite:
    return _clamp(input, None, max)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Rewrite | None:
    if alpha != 1 or not is_tensor(input):
        return None
    return ADD, (input, other)


def _mul(input: Any, other: Any) -> Rewrite | None:
    return (MUL, (input, other)) if is_tensor(input) else None


FUNCTIONS: dict[object, Rule] = {
    torch.relu: _relu,
    F.relu: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    torch.clamp: _clamp,
    torch.clip: _clamp,
    torch.clamp_min: _clamp_min,
    torch.clamp_max: _clamp_max,
    torch.add: _add,
    operator.add: _add,
    torch.mul: _mul,
    torch.multiply: _mul,
    operator.mul: _mul,
}

METHODS: dict[str, Rule] = {
    "relu": _relu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "add": _add,
    "__add__": _add,
    "__radd__": _add,
    "mul": _mul,
    "multiply": _mul,
    "__mul__": _mul,
    "__rmul__": _mul,
}

MODULES: dict[type[nn.Module], ModuleRule] = {
    nn.ReLU: lambda m, x, _: _relu(x),
    nn.ReLU6: lambda m, x, _: _relu6(x),
    nn.Hardtanh: lambda m, x, _: _hardtanh(x, m.min_val, m.max_val),
}

RULES = Rules(FUNCTIONS, METHODS, MODULES)


@dataclass(frozen=True)
class NormalizePointwise:
    """See the module's docstring."""

    name: str = "normalize-pointwise"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes rewritten."""
        return RULES.apply(gm)


PASS = NormalizePointwise()
