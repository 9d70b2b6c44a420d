"""The integer op families, one file each: equation, torch op, fake implementation, pattern and lowering together.

A further family is one more file and one more entry here; `fxq.quantize(..., families=...)` takes a user's own.
"""

from fxq.family import Family
from fxq.ops import (
    activation,
    add,
    add_engine,
    attention,
    block,
    carry,
    cat,
    chain,
    clamp,
    conv,
    conv_transpose,
    dropout,
    embedding,
    feed_forward,
    fixed_point,
    gate,
    images,
    linear,
    linear_dynamic,
    linear_dynamic_engine,
    linear_weight_only,
    linears,
    lookup,
    mul,
    norm,
    pool,
    quantize_engine,
    quantize_scaled,
    requantize,
    upsample,
)

WITHOUT_FAMILY = (
    activation,
    add_engine,
    block,
    cat,
    chain,
    feed_forward,
    fixed_point,
    gate,
    images,
    linear_dynamic_engine,
    linears,
    quantize_engine,
)
"""Ops that passes put together from those of families; imported here so that a file that holds them finds them."""

FAMILIES: tuple[Family, ...] = (
    linear.FAMILY,
    linear_dynamic.FAMILY,
    linear_weight_only.FAMILY,
    embedding.FAMILY,
    norm.FAMILY,
    attention.FAMILY,
    conv.FAMILY,
    conv_transpose.FAMILY,
    lookup.FAMILY,
    add.FAMILY,
    mul.FAMILY,
    pool.FAMILY,
    upsample.FAMILY,
    clamp.FAMILY,
    carry.FAMILY,
    dropout.FAMILY,
    requantize.FAMILY,
    quantize_scaled.FAMILY,
)
