"""chain: a run of linears as one op, which keeps a few rows in the cache through all of them.

    q_0     = x, or quantize(x, scale, zero_point) where the chain begins with float32
    q_i+1   = qlinear(q_i, weight_i, bias_i, multiplier_i, zero_point_i, low_i, high_i)                    uint8
    result  = q_n (`qchain`), or qlinear_float(q_n-1, ...) of the last layer (`qchain_float`)

x: uint8 or float32 [..., K]; the result: [..., N]. Bit for bit what the ops would give one by one, for a fraction of
their calls. NumPy truth: `reference`.

The layers are one uint8 tensor, the program, of shape [N, ...], so that the shape of the result can be told without
reading it. Its bytes, little endian, each section at a multiple of 64:

    header    magic "fxqchain", version, layers, size; from_float, to_float, scale, zero_point
    table     per layer: the offsets of weight, bias and multiplier; K, N, zero_point, low, high
    sections  per layer: packed weight (`fxq.numerics.pack`), int32 bias, float32 multiplier
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fxq import kernels, numerics
from fxq.qtypes import ACT_QMAX, ACT_QMIN, QParams

_MAGIC, _VERSION = b"fxqchain", 1
_HEADER = struct.Struct("<8sIIQIIfi24x")
_LAYER = struct.Struct("<QQQIIiii20x")
_ALIGNMENT = 64


@dataclass(frozen=True, eq=False)
class Layer:
    """The operands of one `qlinear`: packed int8 weight of [N, in_features], int32 bias [N], float32 multiplier [N]."""

    weight: Tensor
    in_features: int
    bias: Tensor
    multiplier: Tensor
    zero_point: int = 0
    low: int = ACT_QMIN
    high: int = ACT_QMAX

    def __post_init__(self) -> None:
        n, k = self.out_features, self.in_features
        assert n > 0, self.bias.shape
        assert k > 0, k
        assert self.weight.shape == (numerics.packed_size(n, k),), (self.weight.shape, n, k)
        assert self.multiplier.shape == (n,), (self.multiplier.shape, n)
        assert ACT_QMIN <= self.low <= self.high <= ACT_QMAX, (self.low, self.high)

    @property
    def out_features(self) -> int:
        """N."""
        return self.bias.numel()


@dataclass(frozen=True, eq=False)
class Chain:
    """Linears, each reading what the one before gives.

    quantize: how a float32 input becomes uint8, None where it is uint8; to_float: the last layer gives float32, and its
    zero_point, low and high mean nothing.
    """

    layers: tuple[Layer, ...]
    quantize: QParams | None
    to_float: bool

    def __post_init__(self) -> None:
        assert self.layers
        for before, after in zip(self.layers, self.layers[1:], strict=False):
            assert before.out_features == after.in_features, (before.out_features, after.in_features)


def encode(chain: Chain) -> Tensor:
    """The program of `chain`: uint8 [N, bytes], N the features of its result."""
    size = _HEADER.size + _LAYER.size * len(chain.layers)
    table: list[bytes] = []
    sections: list[numerics.I8] = []
    for layer in chain.layers:
        offsets = []
        for tensor, dtype in ((layer.weight, torch.int8), (layer.bias, torch.int32), (layer.multiplier, torch.float32)):
            assert tensor.dtype == dtype, (tensor.dtype, dtype)
            content = tensor.detach().contiguous().view(torch.int8).numpy()
            offsets.append(size)
            sections += (content, np.zeros(-len(content) % _ALIGNMENT, np.int8))
            size += sum(map(len, sections[-2:]))
        table.append(
            _LAYER.pack(*offsets, layer.in_features, layer.out_features, layer.zero_point, layer.low, layer.high)
        )
    scale, zero_point = (chain.quantize.scale, chain.quantize.zero_point) if chain.quantize else (1.0, 0)
    front = chain.quantize is not None
    header = _HEADER.pack(_MAGIC, _VERSION, len(chain.layers), size, front, chain.to_float, scale, zero_point)
    rows = chain.layers[-1].out_features
    begin = np.frombuffer(b"".join((header, *table)), np.int8)
    program = numerics.in_lines([begin, *sections, np.zeros(-size % rows, np.int8)])
    return torch.from_numpy(program).view(torch.uint8).view(rows, -1)


def decode(program: Tensor) -> Chain:
    """The chain that `encode` wrote, its tensors views of the program; raises ValueError where it is damaged."""
    flat = program.contiguous().view(-1)
    if flat.numel() < _HEADER.size:
        raise ValueError(f"fxq: a chain program of {flat.numel()} bytes is shorter than its header")
    magic, version, count, size, front, to_float, scale, zero_point = _HEADER.unpack(_bytes(flat[: _HEADER.size]))
    if magic != _MAGIC or version != _VERSION:
        raise ValueError(f"fxq: a chain program begins {magic!r}, version {version}; expected {_MAGIC!r}, {_VERSION}")
    if size > flat.numel() or _HEADER.size + count * _LAYER.size > size:
        raise ValueError(f"fxq: a chain program of {count} layers and {size} bytes is cut off at {flat.numel()}")
    layers: list[Layer] = []
    for i in range(count):
        start = _HEADER.size + i * _LAYER.size
        weight, bias, multiplier, k, n, zero, low, high = _LAYER.unpack(_bytes(flat[start : start + _LAYER.size]))
        follows = n > 0 and k > 0 and (i == 0 or k == layers[-1].out_features)
        in_range = ACT_QMIN <= zero <= ACT_QMAX and ACT_QMIN <= low <= high <= ACT_QMAX
        end = max(weight + numerics.packed_size(n, k), bias + 4 * n, multiplier + 4 * n)
        if not (follows and in_range and end <= size):
            raise ValueError(f"fxq: layer {i} of a chain program of {size} bytes is damaged: [{n}, {k}], {low}..{high}")
        layers.append(
            Layer(
                flat[weight : weight + numerics.packed_size(n, k)].view(torch.int8),
                k,
                flat[bias : bias + 4 * n].view(torch.int32),
                flat[multiplier : multiplier + 4 * n].view(torch.float32),
                zero,
                low,
                high,
            )
        )
    return Chain(tuple(layers), QParams(scale, zero_point) if front else None, bool(to_float))


def reference(chain: Chain, x: numerics.Array) -> numerics.Array:
    """The NumPy truth: x uint8 or float32 [..., K], as the chain begins."""
    q: numerics.Array = x
    if chain.quantize is not None:
        q = numerics.quantize(x.astype(np.float32), chain.quantize.scale, chain.quantize.zero_point)
    for layer in chain.layers:
        w = numerics.unpack(layer.weight.numpy(), layer.out_features, layer.in_features)
        operands = (q.astype(np.uint8), w, layer.bias.numpy(), layer.multiplier.numpy())
        if chain.to_float and layer is chain.layers[-1]:
            return numerics.qlinear_float(*operands)
        q = numerics.qlinear(*operands, layer.zero_point, layer.low, layer.high)
    return q


def _bytes(flat: Tensor) -> bytes:
    return flat.numpy().tobytes()


def _run(op: str, x: Tensor, program: Tensor, to_float: bool) -> Tensor:
    """Layer by layer, through the portable ops."""
    chain = decode(program)
    n = chain.layers[-1].out_features
    if program.dim() != 2 or program.shape[0] != n or chain.to_float != to_float:
        raise ValueError(f"fxq::{op}: program {list(program.shape)} gives [..., {n}], float32: {chain.to_float}")
    if chain.quantize is not None:
        x = kernels.portable("quantize")(x, chain.quantize.scale, chain.quantize.zero_point)
    for layer in chain.layers:
        operands = (x, layer.weight, layer.bias, layer.multiplier)
        if to_float and layer is chain.layers[-1]:
            x = kernels.portable("qlinear_float")(*operands)
        else:
            x = kernels.portable("qlinear")(*operands, layer.zero_point, layer.low, layer.high)
    return x


qchain = kernels.define(
    "qchain(Tensor x, Tensor program) -> Tensor",
    lambda x, program: _run("qchain", x, program, to_float=False),
    lambda x, program: x.new_empty(*x.shape[:-1], program.shape[0], dtype=torch.uint8),
)
qchain_float = kernels.define(
    "qchain_float(Tensor x, Tensor program) -> Tensor",
    lambda x, program: _run("qchain_float", x, program, to_float=True),
    lambda x, program: x.new_empty(*x.shape[:-1], program.shape[0], dtype=torch.float32),
)
