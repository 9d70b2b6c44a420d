"""What moves numbers in a golden model, in NumPy: rows of `golden_ops` with the arguments of torch's functions."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from fxq.numerics import Array

_MODES = {"reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def _sizes(shape: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape


def _flatten(input: Array, start_dim: int = 0, end_dim: int = -1) -> Array:
    shape = input.shape or (1,)
    start, end = start_dim % len(shape), end_dim % len(shape)
    return input.reshape(*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :])


def _unflatten(input: Array, dim: int, sizes: tuple[int, ...]) -> Array:
    dim %= input.ndim
    known = math.prod(size for size in sizes if size != -1)
    whole = (input.shape[dim] // known if size == -1 else size for size in sizes)
    return input.reshape(*input.shape[:dim], *whole, *input.shape[dim + 1 :])


def _squeeze(input: Array, dim: int | tuple[int, ...] | None = None) -> Array:
    dims = range(input.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    ones = tuple(d % input.ndim for d in dims if input.ndim and input.shape[d] == 1)
    return np.squeeze(input, ones)


def _permute(input: Array, *dims: Any) -> Array:
    return np.transpose(input, _sizes(dims))


def _narrow(input: Array, dim: int, start: int, length: int) -> Array:
    start += input.shape[dim] if start < 0 else 0
    if start + length > input.shape[dim]:
        raise IndexError(f"narrow({dim}, {start}, {length}) reaches beyond the size {input.shape[dim]}")
    return _slice(input, dim, start, start + length)


def _slice(x: Array, dim: int, start: int, stop: int) -> Array:
    index: list[slice] = [slice(None)] * x.ndim
    index[dim] = slice(start, stop)
    return x[tuple(index)]


def _split(tensor: Array, split_size_or_sections: int | tuple[int, ...], dim: int = 0) -> tuple[Array, ...]:
    total, sections = tensor.shape[dim], split_size_or_sections
    if isinstance(sections, int):
        sections = tuple(min(sections, total - start) for start in range(0, total, sections)) or (0,)
    if sum(sections) != total:
        raise ValueError(f"split sizes {list(sections)} do not add up to the size {total}")
    stops = itertools.accumulate(sections)
    return tuple(_slice(tensor, dim, stop - size, stop) for size, stop in zip(sections, stops, strict=True))


def _chunk(input: Array, chunks: int, dim: int = 0) -> tuple[Array, ...]:
    return _split(input, max(1, -(-input.shape[dim] // chunks)), dim)


def _tensor_split(input: Array, indices_or_sections: int | tuple[int, ...], dim: int = 0) -> tuple[Array, ...]:
    return tuple(np.array_split(input, indices_or_sections, dim))


def _unbind(input: Array, dim: int = 0) -> tuple[Array, ...]:
    return tuple(np.moveaxis(input, dim, 0))


def _expand(input: Array, *size: Any) -> Array:
    size = _sizes(size)
    known = (1,) * (len(size) - input.ndim) + input.shape
    return np.broadcast_to(input, tuple(k if s == -1 else s for s, k in zip(size, known, strict=True)))


def _pixel_shuffle(input: Array, upscale_factor: int) -> Array:
    *lead, c, h, w = input.shape
    r, n = upscale_factor, len(lead)
    blocks = input.reshape(*lead, c // (r * r), r, r, h, w)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return blocks.transpose(order).reshape(*lead, c // (r * r), h * r, w * r)


def _pixel_unshuffle(input: Array, downscale_factor: int) -> Array:
    *lead, c, h, w = input.shape
    r, n = downscale_factor, len(lead)
    blocks = input.reshape(*lead, c, h // r, r, w // r, r)
    order = (*range(n), n, n + 2, n + 4, n + 1, n + 3)
    return blocks.transpose(order).reshape(*lead, c * r * r, h // r, w // r)


def _pad(input: Array, pad: Sequence[int], mode: str = "constant", value: Any = None) -> Array:
    """torch's pad: `pad` holds two numbers per dimension, the last dimension first; a negative one cuts off."""
    widths = [(0, 0)] * input.ndim
    for i in range(len(pad) // 2):
        before, after = pad[2 * i : 2 * i + 2]
        axis = input.ndim - 1 - i
        size = input.shape[axis]
        input = np.take(input, range(max(-before, 0), size - max(-after, 0)), axis)
        widths[axis] = (max(before, 0), max(after, 0))
    if mode == "constant":
        return np.pad(input, widths, constant_values=value or 0)
    options: Any = {"mode": _MODES[mode]}
    return np.pad(input, widths, **options)


def _channel_shuffle(input: Array, groups: int) -> Array:
    """Channel g * C / groups + i goes to i * groups + g."""
    split = input.reshape(input.shape[0], groups, input.shape[1] // groups, *input.shape[2:])
    return np.swapaxes(split, 1, 2).reshape(input.shape)


MOVES: dict[str, Callable[..., Any]] = {
    "pad": _pad,
    "channel_shuffle": _channel_shuffle,
    "reshape": lambda input, shape: np.reshape(input, shape),
    "flatten": _flatten,
    "unflatten": _unflatten,
    "squeeze": _squeeze,
    "unsqueeze": lambda input, dim: np.expand_dims(input, dim),
    "transpose": lambda input, dim0, dim1: np.swapaxes(input, dim0, dim1),
    "permute": _permute,
    "movedim": lambda input, source, destination: np.moveaxis(input, source, destination),
    "narrow": _narrow,
    "select": lambda input, dim, index: np.take(input, index, dim),
    "flip": lambda input, *dims: np.flip(input, _sizes(dims)),
    "tile": lambda input, *dims: np.tile(input, _sizes(dims)),
    "expand": _expand,
    "pixel_shuffle": _pixel_shuffle,
    "pixel_unshuffle": _pixel_unshuffle,
    "cat": lambda tensors, dim=0: np.concatenate(tensors, dim),
    "stack": lambda tensors, dim=0: np.stack(tensors, dim),
    "split": _split,
    "chunk": _chunk,
    "tensor_split": _tensor_split,
    "unbind": _unbind,
    "getitem": operator.getitem,
}
"""By the name of torch's function; those that give several arrays give a tuple."""
