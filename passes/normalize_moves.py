"""normalize_moves: one spelling for what puts the same numbers into another order, shape or tensor.

x.view(2, -1), nn.Flatten, x.t(), x.permute(1, 0), torch.concat, x.chunk(2), nn.PixelShuffle, ...
                                                     -> one function each of `fxq.spelling`, operands positional
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule, Node

from fxq.graph import is_tensor
from fxq.pipeline import Context, Numbers
from fxq.rewriting import ModuleRule, Rewrite, Rule, Rules, rank
from fxq.stages import Stage


def _reshape(input: Any, *shape: Any, **named: Any) -> Rewrite | None:
    sizes = named.get("shape", named.get("size", shape))
    if len(sizes) == 1 and isinstance(sizes[0], tuple | list | torch.Size):
        sizes = sizes[0]
    if len(sizes) == 1 and _is_size(sizes[0]):
        sizes = sizes[0]
        return torch.reshape, (input, sizes)
    if any(isinstance(size, torch.dtype) for size in sizes):
        return None
    return torch.reshape, (input, tuple(sizes))


def _is_size(value: object) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("value"), torch.Size | tuple | list)


def _flatten(input: Any, start_dim: int = 0, end_dim: int = -1) -> Rewrite:
    return torch.flatten, (input, start_dim, end_dim)


def _unflatten(input: Any, dim: int, sizes: Any) -> Rewrite:
    return torch.unflatten, (input, dim, sizes)


def _squeeze(input: Any, dim: Any = None) -> Rewrite:
    return torch.squeeze, ((input,) if dim is None else (input, dim))


def _unsqueeze(input: Any, dim: int) -> Rewrite:
    return torch.unsqueeze, (input, dim)


def _transpose(input: Any, dim0: int, dim1: int) -> Rewrite:
    return torch.transpose, (input, dim0, dim1)


def _t(input: Any) -> Rewrite | None:
    return (torch.transpose, (input, 0, 1)) if is_tensor(input) and rank(input) == 2 else None


def _permute(input: Any, *dims: Any, **named: Any) -> Rewrite:
    return torch.permute, (input, _spread(named.get("dims", dims)))


def _getattr(input: Any, name: str) -> Rewrite | None:
    if not is_tensor(input) or name not in ("T", "mT") or rank(input) < 2:
        return None
    if name == "mT":
        return torch.transpose, (input, -2, -1)
    return torch.permute, (input, tuple(reversed(range(rank(input)))))


def _cat(tensors: Any, dim: int = 0, *, axis: int | None = None) -> Rewrite:
    return torch.cat, (tensors, dim if axis is None else axis)


def _stack(tensors: Any, dim: int = 0) -> Rewrite:
    return torch.stack, (tensors, dim)


def _split(tensor: Any, split_size_or_sections: Any = None, dim: int = 0, *, split_size: Any = None) -> Rewrite:
    return torch.split, (tensor, split_size if split_size_or_sections is None else split_size_or_sections, dim)


def _chunk(input: Any, chunks: int, dim: int = 0) -> Rewrite:
    return torch.chunk, (input, chunks, dim)


def _unbind(input: Any, dim: int = 0) -> Rewrite:
    return torch.unbind, (input, dim)


def _select(input: Any, dim: int, index: Any) -> Rewrite:
    return torch.select, (input, dim, index)


def _narrow(input: Any, dim: int, start: Any, length: Any) -> Rewrite:
    return torch.narrow, (input, dim, start, length)


def _movedim(input: Any, source: Any, destination: Any) -> Rewrite:
    return torch.movedim, (input, source, destination)


def _flip(input: Any, *dims: Any, **named: Any) -> Rewrite:
    return torch.flip, (input, _spread(named.get("dims", dims)))


def _tile(input: Any, *dims: Any, **named: Any) -> Rewrite:
    return torch.tile, (input, _spread(named.get("dims", dims)))


def _spread(values: Any) -> tuple[Any, ...]:
    """f(x, 0, 1) and f(x, (0, 1)) mean the same; so do f(x, dims=1) and f(x, dims=(1,))."""
    if not isinstance(values, tuple | list):
        return (values,)
    return tuple(values[0]) if len(values) == 1 and isinstance(values[0], tuple | list) else tuple(values)


def _tensor_split(input: Any, indices_or_sections: Any = None, dim: int = 0, **named: Any) -> Rewrite:
    where = named.get("indices", named.get("sections", indices_or_sections))
    return torch.tensor_split, (input, where, dim)


def _pixel_shuffle(input: Any, upscale_factor: int) -> Rewrite:
    return F.pixel_shuffle, (input, upscale_factor)


def _pixel_unshuffle(input: Any, downscale_factor: int) -> Rewrite:
    return F.pixel_unshuffle, (input, downscale_factor)


FUNCTIONS: dict[object, Rule] = {
    torch.reshape: _reshape,
    torch.flatten: _flatten,
    torch.unflatten: _unflatten,
    torch.squeeze: _squeeze,
    torch.unsqueeze: _unsqueeze,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    torch.swapdims: _transpose,
    torch.t: _t,
    torch.permute: _permute,
    getattr: _getattr,
    torch.cat: _cat,
    torch.concat: _cat,
    torch.concatenate: _cat,
    torch.stack: _stack,
    torch.split: _split,
    torch.chunk: _chunk,
    torch.unbind: _unbind,
    torch.select: _select,
    torch.narrow: _narrow,
    torch.movedim: _movedim,
    torch.moveaxis: _movedim,
    torch.flip: _flip,
    torch.tile: _tile,
    torch.tensor_split: _tensor_split,
    F.pixel_shuffle: _pixel_shuffle,
    F.pixel_unshuffle: _pixel_unshuffle,
}

METHODS: dict[str, Rule] = {
    "view": _reshape,
    "reshape": _reshape,
    "flatten": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": _unsqueeze,
    "transpose": _transpose,
    "swapaxes": _transpose,
    "swapdims": _transpose,
    "t": _t,
    "permute": _permute,
    "split": _split,
    "chunk": _chunk,
    "unbind": _unbind,
    "select": _select,
    "narrow": _narrow,
    "movedim": _movedim,
    "moveaxis": _movedim,
    "flip": _flip,
    "tile": _tile,
    "tensor_split": _tensor_split,
}

MODULES: dict[type[nn.Module], ModuleRule] = {
    nn.Flatten: lambda m, x, _: _flatten(x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda m, x, _: _unflatten(x, m.dim, m.unflattened_size),
    nn.PixelShuffle: lambda m, x, _: _pixel_shuffle(x, m.upscale_factor),
    nn.PixelUnshuffle: lambda m, x, _: _pixel_unshuffle(x, m.downscale_factor),
}

RULES = Rules(FUNCTIONS, METHODS, MODULES)


@dataclass(frozen=True)
class NormalizeMoves:
    """See the module's docstring."""

    name: str = "normalize-moves"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes rewritten."""
        return RULES.apply(gm)


PASS = NormalizeMoves()
