"""Linear layers with int8 weights, to be used in a model by hand or through `fxq.swap_linears`.

Each takes the place of a `torch.nn.Linear`: the same sizes, the same shapes, for inference. Their buffers are a normal
`state_dict`: load it into a layer that was made the same way.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from fxq import numerics
from fxq.errors import InputError
from fxq.gradients import refuse_gradients, refuse_tangents
from fxq.observers import KeepsDtypes, WeightObserver
from fxq.ops.linear_dynamic import qlinear_dynamic
from fxq.ops.linear_weight_only import linear_weight_only
from fxq.qdq import integers_of
from fxq.qtypes import MAX_K

_REMEDIES = {
    torch.float32: '; recipe "w8a32" takes float32',
    **dict.fromkeys((torch.bfloat16, torch.float16), '; recipe "w8a16" takes bfloat16 and float16'),
}
"""Who else takes such activations."""


class QuantizedLinear(KeepsDtypes):
    """What the layers share. Buffers: weight_packed int8, weight_scale float32 [N], bias float32 [N] or None.

    path: where `fxq.swap_linears` put the layer, for messages; "" for one that was put there by hand.
    """

    scheme: ClassVar[str]
    dtypes: ClassVar[tuple[torch.dtype, ...]]
    weight_packed: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    path: str = ""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        packed = torch.zeros(numerics.packed_size(out_features, in_features), dtype=torch.int8)
        self.register_buffer("weight_packed", packed)
        self.register_buffer("weight_scale", torch.ones(out_features))
        self.register_buffer("bias", torch.zeros(out_features) if bias else None)

    @classmethod
    def from_float(cls, linear: nn.Linear) -> Self:
        """The layer that computes what `linear` does, whose weight is rounded to int8 with a scale per output channel.

        Raises `InputError` for anything but a linear, for a weight of another dtype than its activations will have, or
        one that is not finite.
        """
        if not isinstance(linear, nn.Linear):
            raise InputError(f"{cls.__name__}.from_float takes an nn.Linear, not a {type(linear).__name__}")
        w, b = linear.weight.detach(), None if linear.bias is None else linear.bias.detach()
        if w.dtype not in cls.dtypes or w.device.type != "cpu":
            names = " or ".join(str(dtype) for dtype in cls.dtypes)
            raise InputError(f"{cls.__name__} takes a weight of {names} on the CPU, not of {w.dtype} on {w.device}")
        if not bool(torch.isfinite(w).all()) or (b is not None and not bool(torch.isfinite(b).all())):
            raise InputError(f"{cls.__name__}: the weight or bias holds NaN or infinity; repair the checkpoint")
        layer = cls(linear.in_features, linear.out_features, b is not None)
        integers, scales = integers_of(WeightObserver("weight", "per_channel"), w)
        layer.weight_scale.copy_(scales)
        layer._take(integers)
        if layer.bias is not None and b is not None:
            layer.bias.copy_(b)
        return layer.train(linear.training)

    def _take(self, q_w: Tensor) -> None:
        self.weight_packed.copy_(torch.from_numpy(numerics.pack(q_w.numpy())))

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features], of one of the `dtypes`; returns [..., out_features] of the same. There is no gradient.

        Raises `InputError`, in the backward of who asks for one as well.
        """
        if x.dtype not in self.dtypes:
            names = " or ".join(str(dtype) for dtype in self.dtypes)
            raise InputError(
                f"{self._title} takes activations of {names}, not of {x.dtype}; convert them with "
                f"x.to({self.dtypes[0]}){_REMEDIES.get(x.dtype, '')}"
            )
        if x.dim() == 0 or x.shape[-1] != self.in_features:
            raise InputError(f"{self._title} takes [..., {self.in_features}], not {list(x.shape)}")
        refuse_tangents(x, lambda _: self._title)
        y = self._product(x, self._buffers)
        if x.requires_grad and torch.is_grad_enabled():
            refused: Tensor = refuse_gradients(y, x, self._title)
            return refused
        return y

    @property
    def _title(self) -> str:
        return f"{self.path} ({type(self).__name__})" if self.path else type(self).__name__

    def _product(self, x: Tensor, held: Mapping[str, Tensor | None]) -> Tensor:
        """held: the buffers by name, each of which would take half a microsecond as an attribute of a module."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class W8A32Linear(QuantizedLinear):
    """int8 weights beside float32 activations (`fxq.ops.linear_weight_only`)."""

    scheme = "w8a32"
    dtypes = (torch.float32,)

    def _product(self, x: Tensor, held: Mapping[str, Tensor | None]) -> Tensor:
        y: Tensor = linear_weight_only(x, held["weight_packed"], held["weight_scale"], held["bias"])
        return y


class W8A16Linear(QuantizedLinear):
    """int8 weights beside bfloat16 or float16 activations, summed in float32 (`fxq.ops.linear_weight_only`)."""

    scheme = "w8a16"
    dtypes = (torch.bfloat16, torch.float16)

    def _product(self, x: Tensor, held: Mapping[str, Tensor | None]) -> Tensor:
        y: Tensor = linear_weight_only(x, held["weight_packed"], held["weight_scale"], held["bias"])
        return y


class W8A8Linear(QuantizedLinear):
    """int8 weights and activations, which are quantized row by row as they come (`fxq.ops.linear_dynamic`)."""

    scheme = "w8a8-dynamic"
    dtypes = (torch.float32,)
    column_sums: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        if in_features > MAX_K:
            raise InputError(f"W8A8Linear: in_features = {in_features} exceeds {MAX_K} (255 * 127 * K < 2**31)")
        super().__init__(in_features, out_features, bias)
        self.register_buffer("column_sums", torch.zeros(out_features, dtype=torch.int32))

    def _take(self, q_w: Tensor) -> None:
        super()._take(q_w)
        self.column_sums.copy_(q_w.sum(1, dtype=torch.int32))

    def _product(self, x: Tensor, held: Mapping[str, Tensor | None]) -> Tensor:
        weight, sums, scale = held["weight_packed"], held["column_sums"], held["weight_scale"]
        y: Tensor = qlinear_dynamic(x, weight, sums, scale, held["bias"])
        return y


LAYERS: dict[str, type[QuantizedLinear]] = {layer.scheme: layer for layer in (W8A32Linear, W8A16Linear, W8A8Linear)}
"""By the scheme of a recipe."""
