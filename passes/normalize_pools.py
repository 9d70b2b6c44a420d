"""normalize_pools: one spelling for what else images and signals go through: pooling, padding, resampling.

nn.MaxPool2d, F.max_pool2d(x, 2)             -> max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
nn.AvgPool2d, F.avg_pool2d(x, 2)             -> avg_pool2d(x, kernel, stride, padding, ceil_mode, ...)
nn.AdaptiveAvgPool2d(1), x.mean((-1, -2))    -> mean(x, (2, 3), keepdim)
nn.AdaptiveAvgPool2d(7)                      -> adaptive_avg_pool2d(x, (7, 7))
nn.ZeroPad2d, nn.ReflectionPad2d, F.pad      -> pad(x, pads, mode, value)
nn.Upsample, F.interpolate                   -> interpolate(x, size, scale_factor, mode, ...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.fx import GraphModule

from fxq.graph import is_tensor
from fxq.pipeline import Context, Numbers
from fxq.rewriting import ModuleRule, Parameter, Rewrite, Rule, Rules
from fxq.spelling import INTERPOLATE, MEAN, PAD, max_pool1d
from fxq.stages import Stage

_AVG_POOLS: tuple[Callable[..., Any], ...] = (torch.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_ADAPTIVE: tuple[Callable[..., Any], ...] = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)


def _wide(value: Any, rank: int) -> tuple[Any, ...]:
    """A setting with one number for each dimension."""
    many = tuple(value) if isinstance(value, tuple | list) else (value,)
    return many * rank if len(many) == 1 else many


def _max_pool(rank: int) -> Rule:
    targets: dict[int, Callable[..., Any]] = {1: max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
    target = targets[rank]

    def wide(value: Any) -> Any:
        return _wide(value, rank)[0] if rank == 1 else _wide(value, rank)

    def rule(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        return_indices: bool = False,
    ) -> Rewrite | None:
        if return_indices:
            return None
        stride = kernel_size if stride in (None, (), []) else stride
        return target, (input, *(wide(v) for v in (kernel_size, stride, padding, dilation)), ceil_mode)

    return rule


def _shape(x: Any) -> tuple[int, ...] | None:
    return x.meta["value"].shape if is_tensor(x) else None


def _avg_pool(rank: int) -> Rule:
    def rule(
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
    ) -> Rewrite:
        stride = kernel_size if stride in (None, (), []) else stride
        sizes = (_wide(value, rank) for value in (kernel_size, stride, padding))
        divisor = () if rank == 1 else (divisor_override,)
        return _AVG_POOLS[rank - 1], (input, *sizes, ceil_mode, count_include_pad, *divisor)

    return rule


def _adaptive(rank: int, means: bool) -> Rule:
    def rule(input: Any, output_size: Any) -> Rewrite | None:
        sizes = _wide(output_size, rank)
        shape = _shape(input)
        if shape is None:
            return None
        if sizes == (1,) * rank and means:
            return MEAN, (input, tuple(range(len(shape) - rank, len(shape))), True)
        return _ADAPTIVE[rank - 1], (input, sizes)

    return rule


def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, axis: Any = None, dtype: Any = None) -> Rewrite | None:
    shape, dims = _shape(input), dim if axis is None else axis
    if not shape or dtype is not None or dims in (None, (), []):
        return None
    dims = dims if isinstance(dims, tuple | list) else (dims,)
    if not all(isinstance(d, int) for d in dims):
        return None
    return MEAN, (input, tuple(sorted(d % len(shape) for d in dims)), keepdim)


def _pad(input: Any, pad: Any, mode: str = "constant", value: Any = None) -> Rewrite | None:
    return (PAD, (input, tuple(pad), mode, value)) if isinstance(pad, tuple | list) else None


def _interpolate(
    input: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Rewrite:
    return INTERPOLATE, (input, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)


def _channel_shuffle(input: Any, groups: int) -> Rewrite:
    return torch.channel_shuffle, (input, groups)


FUNCTIONS: dict[object, Rule] = {
    **dict.fromkeys((F.max_pool1d, torch.max_pool1d), _max_pool(1)),
    **dict.fromkeys((F.max_pool2d, torch.max_pool2d), _max_pool(2)),
    **dict.fromkeys((F.max_pool3d, torch.max_pool3d), _max_pool(3)),
    **{target: _avg_pool(rank) for rank, target in enumerate(_AVG_POOLS, 1)},
    torch.mean: _mean,
    F.pad: _pad,
    F.interpolate: _interpolate,
    torch.channel_shuffle: _channel_shuffle,
}

PADDINGS: dict[str, tuple[type[Any], ...]] = {
    "constant": (nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d),
    "reflect": (nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d),
    "replicate": (nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d),
    "circular": (nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d),
}


def _maximum(rank: int) -> ModuleRule:
    def rule(m: Any, x: Any, _: Parameter) -> Rewrite | None:
        options = m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices
        return _max_pool(rank)(x, *options)

    return rule


def _average(rank: int) -> ModuleRule:
    def rule(m: Any, x: Any, _: Parameter) -> Rewrite | None:
        divisor = getattr(m, "divisor_override", None)
        return _avg_pool(rank)(x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, divisor)

    return rule


def _adapts(rank: int, means: bool) -> ModuleRule:
    return lambda m, x, _: _adaptive(rank, means)(x, m.output_size)


def _pads(mode: str) -> ModuleRule:
    return lambda m, x, _: _pad(x, m.padding, mode, getattr(m, "value", None))


def _upsample(m: Any, x: Any, _: Parameter) -> Rewrite | None:
    return _interpolate(x, m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)


MODULES: dict[type[nn.Module], ModuleRule] = {
    **{kind: _maximum(rank) for rank, kind in enumerate((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), 1)},
    **{kind: _average(rank) for rank, kind in enumerate((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), 1)},
    **{kind: _pads(mode) for mode, kinds in PADDINGS.items() for kind in kinds},
    nn.Upsample: _upsample,
    nn.UpsamplingNearest2d: _upsample,
    nn.UpsamplingBilinear2d: _upsample,
    nn.ChannelShuffle: lambda m, x, _: _channel_shuffle(x, m.groups),
}


def _rules(means: bool) -> Rules:
    functions = {target: _adaptive(rank, means) for rank, target in enumerate(_ADAPTIVE, 1)}
    kinds: tuple[type[nn.Module], ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
    modules = {kind: _adapts(rank, means) for rank, kind in enumerate(kinds, 1)}
    functions[torch.adaptive_avg_pool1d] = functions[F.adaptive_avg_pool1d]
    return Rules({**FUNCTIONS, **functions}, {"mean": _mean}, {**MODULES, **modules})


RULES = {means: _rules(means) for means in (True, False)}


@dataclass(frozen=True)
class NormalizePools:
    """See the module's docstring. means: whether an adaptive pool to one pixel is written as the mean that it is."""

    name: str = "normalize-pools"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME
    means: bool = True

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes rewritten."""
        return RULES[self.means].apply(gm)


PASS = NormalizePools()
APART = NormalizePools(means=False)
"""For torch's engines, which round an adaptive pool in another way than a mean."""
