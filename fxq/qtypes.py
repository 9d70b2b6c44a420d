"""The vocabulary of quantization: parameters, places and specs. Plain data, no torch.

An activation is ``torch.uint8`` with an affine mapping, a weight ``torch.int8`` and symmetric, a bias ``torch.int32``:

    x ~ scale * (q - zero_point)                                                                                    (1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

ACT_QMIN, ACT_QMAX = 0, 255
WEIGHT_QMIN, WEIGHT_QMAX = -127, 127
INT32_MIN, INT32_MAX = -(2**31), 2**31 - 1

MAX_K = (2**31 - 1) // (ACT_QMAX * WEIGHT_QMAX)
"""The longest dot product that cannot leave int32: 255 * 127 * K < 2**31, so K <= 66311."""

SCALE_FLOOR = 2.0**-60
"""The smallest scale: products of two scales and their reciprocals stay normal float32 numbers."""

Granularity = Literal["per_tensor", "per_channel"]
Scheme = Literal["w8a8", "w8a8-dynamic", "w8a32", "w8a16", "float"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
"""How a part of a model is quantized: bits of weights and activations; `fxq.Recipe` explains them."""


@dataclass(frozen=True)
class QParams:
    """How one activation tensor is quantized.

    scale: real units per step, > 0, finite, exactly representable in float32. zero_point: the integer that stands for
    0.0, in 0..255.
    """

    scale: float
    zero_point: int

    def __post_init__(self) -> None:
        assert math.isfinite(self.scale) and self.scale >= SCALE_FLOOR, self.scale
        assert ACT_QMIN <= self.zero_point <= ACT_QMAX, self.zero_point


@dataclass(frozen=True)
class QuantSpec:
    """A value with a range of its own, found by an observer named `observer`."""

    observer: str


@dataclass(frozen=True)
class SharedSpec:
    """A value that has the parameters of the value `owner` (a node name): through reshape, slice, max-pool, cat."""

    owner: str


@dataclass(frozen=True)
class WeightSpec:
    """A constant operand, symmetric int8, one scale per output channel (axis 0) or one in all."""

    granularity: Granularity


@dataclass(frozen=True)
class RowSpec:
    """A value each of whose rows finds its scale and zero point when the model runs."""


Spec = QuantSpec | SharedSpec | WeightSpec | RowSpec
