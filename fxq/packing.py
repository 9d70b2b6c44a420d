"""Packed weights (`fxq.numerics.pack`) as constants of a graph, and back."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule

from fxq import numerics
from fxq.graph import set_constant


def unpack(packed: Tensor, n: int, k: int) -> Tensor:
    """The int8 weight [n, k] of a packed one; raises ValueError where the sizes do not belong together."""
    if packed.dim() != 1 or packed.numel() != numerics.packed_size(n, k):
        raise ValueError(
            f"fxq: a packed weight of shape {list(packed.shape)} is not one of [{n}, {k}], which takes "
            f"{numerics.packed_size(n, k)} bytes"
        )
    k4 = -(-k // 4)
    full = n // numerics.PANEL * numerics.PANEL
    blocks = []
    for width, part in (
        (numerics.PANEL, packed[: full * k4 * 4]),
        (-(-(n - full) // 16) * 16, packed[full * k4 * 4 : len(packed) - -k % 4]),
    ):
        if width and part.numel():
            blocks.append(part.reshape(-1, k4, width, 4).permute(0, 2, 1, 3).reshape(-1, k4 * 4))
    return torch.cat(blocks)[:n, :k] if blocks else packed.new_zeros(n, k)


def packed_constant(gm: GraphModule, weight_path: str, w: numerics.I8) -> str:
    """The path of the packed form of the int8 weight at `weight_path`, made once for all calls that share it."""
    return shared_constant(gm, sibling(weight_path, "weight_packed"), torch.from_numpy(numerics.pack(w)))


def shared_constant(gm: GraphModule, path: str, tensor: Tensor) -> str:
    """`set_constant`, unless an equal tensor stands at `path` already."""
    owner, _, name = path.rpartition(".")
    known = getattr(gm.get_submodule(owner), name, None)
    same = isinstance(known, Tensor) and known.dtype == tensor.dtype and torch.equal(known, tensor)
    return path if same else set_constant(gm, path, tensor)


def sibling(weight_path: str, name: str) -> str:
    """The path of a derived constant beside a weight: `fc1.weight_int8` -> `fc1.bias_i32`, `w_int8` -> `w_bias_i32`."""
    owner, _, leaf = weight_path.removesuffix("_int8").rpartition(".")
    if leaf != "weight":
        name = f"{leaf}_{name.removeprefix('weight_')}"
    return f"{owner}.{name}" if owner else name
