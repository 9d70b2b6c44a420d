"""What the convolutions of a golden model compute, in NumPy: functions for rows of `golden_ops`.

Operands come in the order of the torch ops, whose weights are packed.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fxq import numerics
from fxq.numerics import I8, I32, U8, Array

Ints = Sequence[int]
Unpacked = tuple[I8, Any]
"""A weight [N, C / groups, *kernel], and how it goes over the input: a `numerics.Conv` or `numerics.ConvTranspose`."""


def _conv(x: U8, weight: I8, n: int, window: str, z_x: int) -> Unpacked:
    own = numerics.Window.parse(window)
    geometry = n, x.shape[1] // own.groups, own.kernel, own.dilation, own.groups
    if weight.shape != (numerics.packed_conv_size(*geometry),):
        raise ValueError(f"its input has {x.shape[1]} channels, which is not what its weight takes")
    conv = numerics.Conv(own.stride, own.padding, own.dilation, own.groups, z_x)
    return numerics.unpack_conv(weight, *geometry), conv


def _transposed(x: U8, weight: I8, n: int, window: str, z_x: int) -> Unpacked:
    own = numerics.Window.parse(window)
    geometry = n, x.shape[1] // own.groups, own.kernel, own.stride, own.padding, own.dilation, own.groups
    if weight.shape != (numerics.packed_transposed_size(*geometry),):
        raise ValueError(f"its input has {x.shape[1]} channels, which is not what its weight takes")
    conv = numerics.ConvTranspose(own.stride, own.padding, own.output_padding, own.dilation, own.groups, z_x)
    return numerics.unpack_transposed(weight, *geometry), conv


@dataclass(frozen=True)
class Convolution:
    """A function of `numerics` on a packed weight, with the operands of the torch op.

    Those are x, weight, bias, `scales` of [N] (a multiplier, in fixed point a shift, too), window, z_x, and the rest.
    """

    function: Callable[..., Array]
    scales: int = 1
    unpack: Callable[..., Unpacked] = _conv

    @property
    def __signature__(self) -> inspect.Signature:
        """The operands by the names of the torch op: of the function's, `conv` is window and z_x there."""
        signature = inspect.signature(self.function)
        parameters, place = list(signature.parameters.values()), 3 + self.scales
        x, weight, window, z_x = (
            inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            for name in ("x", "weight", "window", "z_x")
        )
        own = [x, weight, *parameters[2:place], window, z_x, *parameters[place + 1 :]]
        return signature.replace(parameters=own)

    def __call__(self, x: U8, weight: I8, bias: I32, *operands: Any, **named: Any) -> Array:
        scales, rest = operands[: self.scales], operands[self.scales + 2 :]
        w, conv = self._unpacked(x, weight, operands)
        return self.function(x, w, bias, *scales, conv, *rest, **named)

    def weight(self, x: U8, weight: I8, bias: I32, *operands: Any, **named: object) -> I8:
        """The weight [N, C / groups, *kernel]."""
        return self._unpacked(x, weight, operands)[0]

    def parts(self, x: U8, weight: I8, bias: I32, *operands: Any, **named: object) -> dict[str, Array]:
        """What lies inside: the input, the integer sums, and those with the folded bias, one for all or each phase."""
        w, conv = self._unpacked(x, weight, operands)
        if self.unpack is _transposed:
            return {"x_q": x, "acc+bias": conv.sums(x, w, bias)}
        acc = conv.accumulate(x, w)
        return {"x_q": x, "acc": acc, "acc+bias": acc + bias.reshape(-1, *[1] * (x.ndim - 2))}

    def _unpacked(self, x: U8, weight: I8, operands: Sequence[Any]) -> Unpacked:
        window, z_x = operands[self.scales : self.scales + 2]
        return self.unpack(x, weight, len(operands[0]), window, z_x)


@dataclass(frozen=True)
class ActivatedConvolution(Convolution):
    """A convolution whose operands behind the window and z_x are an activation, by name, and how to quantize it."""

    def parts(self, x: U8, weight: I8, bias: I32, *operands: Any, **named: object) -> dict[str, Array]:
        """What lies inside, and the float32 result of the activation."""
        w, conv = self._unpacked(x, weight, operands)
        y = numerics.qconv_float(x, w, bias, operands[0], conv)
        act = numerics.ACTIVATIONS[operands[self.scales + 2]](y)
        return {**super().parts(x, weight, bias, *operands), "act": act}


CONVOLUTIONS = {
    "fxq.qconv": Convolution(numerics.qconv),
    "fxq.qconv_fixed": Convolution(numerics.qconv_fixed, 2),
    "fxq.qconv_float": Convolution(numerics.qconv_float),
    "fxq.qconv_act_quantize": ActivatedConvolution(numerics.qconv_act_quantize),
    "fxq.qconv_add": Convolution(numerics.qconv_add),
    "fxq.qconv_transpose": Convolution(numerics.qconv_transpose, 1, _transposed),
    "fxq.qconv_transpose_fixed": Convolution(numerics.qconv_transpose_fixed, 2, _transposed),
    "fxq.qconv_transpose_float": Convolution(numerics.qconv_transpose_float, 1, _transposed),
}
