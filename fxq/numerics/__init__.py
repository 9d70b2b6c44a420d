"""The contract, in NumPy: every kernel, every backend and the golden model return these bits. Imports no torch.

Notation: `q_x` integer, `s_x` scale, `z_x` zero point, `acc` the int32 dot product. `rne` rounds half to even; `f32`
rounds to the nearest float32. Each function's docstring is its equation; docs/numerics.md derives them.
"""

from fxq.numerics.activations import ACTIVATIONS, gelu, gelu_tanh, relu, sigmoid, silu, tanh
from fxq.numerics.affine import (
    F32,
    I8,
    I32,
    U8,
    Array,
    activation_qparams,
    dequantize,
    dequantize_weight,
    f32,
    qadd,
    quantize,
    quantize_scaled,
    quantize_weight,
    requantize,
    round_clamp,
    weight_scales,
)
from fxq.numerics.linear import (
    accumulate,
    accumulator_bounds,
    dequantize_multiplier,
    fits_int32,
    fold_bias,
    qlinear,
    qlinear_act,
    qlinear_act_quantize,
    qlinear_float,
    requantize_multiplier,
)
from fxq.numerics.packing import PANEL, pack, packed_size, panel_widths, unpack

__all__ = [
    "ACTIVATIONS",
    "F32",
    "I8",
    "I32",
    "PANEL",
    "U8",
    "Array",
    "accumulate",
    "accumulator_bounds",
    "activation_qparams",
    "dequantize",
    "dequantize_multiplier",
    "dequantize_weight",
    "f32",
    "fits_int32",
    "fold_bias",
    "gelu",
    "gelu_tanh",
    "pack",
    "packed_size",
    "panel_widths",
    "qadd",
    "qlinear",
    "qlinear_act",
    "qlinear_act_quantize",
    "qlinear_float",
    "quantize",
    "quantize_scaled",
    "quantize_weight",
    "relu",
    "requantize",
    "requantize_multiplier",
    "round_clamp",
    "sigmoid",
    "silu",
    "tanh",
    "unpack",
    "weight_scales",
]
