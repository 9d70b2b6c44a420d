"""Float graphs run in float64, so that what is decided by their numbers is the same on every machine.

In float32, sums and functions differ by 1e-7 between instruction sets and numbers of threads, and what lies near the
border of two integers, ranges or choices falls to the one side or the other. In float64 they differ by 1e-15.

A float32 tensor stays one until something computes with it, so that parameters are in memory once more for one
operation at a time. Code that cannot be traced runs as it is, in float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket
from torch.fx import GraphModule
from torch.overrides import TorchFunctionMode

from fxq.graph import Interpreter, bind
from fxq.inputs import Call
from fxq.observers import Observer, Rows, WeightObserver

_WIDE: Mapping[torch.dtype, torch.dtype] = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_NARROW: Mapping[torch.dtype, torch.dtype] = {wide: narrow for narrow, wide in _WIDE.items()}
_DTYPE = vars(torch._C.TensorBase)["dtype"].__get__
_RENAMED: Mapping[Any, Callable[..., Any]] = {Tensor.float: Tensor.double}
_CONVS = frozenset({torch.conv1d, torch.conv2d, torch.conv3d})
AT_ONCE = 1 << 18
"""Numbers that a convolution multiplies by at a time: they stay in a cache."""
_MOVES = frozenset(
    {
        *("__get__", "__getitem__", "__len__", "__iter__", "__bool__", "__hash__", "__repr__", "__contains__"),
        *("size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "data_ptr"),
        *("is_contiguous", "is_complex", "is_floating_point", "is_tensor", "item", "tolist", "requires_grad_"),
        *("view", "reshape", "expand", "expand_as", "view_as", "broadcast_to", "as_strided", "t", "transpose"),
        *("adjoint", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "flatten", "unflatten", "ravel"),
        *("squeeze", "unsqueeze", "narrow", "select", "split", "chunk", "unbind", "tensor_split", "unfold"),
        *("diagonal", "detach", "contiguous", "clone", "cat", "stack", "repeat", "tile", "flip", "roll"),
        *("embedding", "index_select", "gather"),
    }
)
"""By name, what computes no new numbers: a view of a parameter lies in its memory, a table is not copied for a row."""


def widened(value: Any) -> Any:
    """A float32 tensor, or the dtype, as float64; in lists and tuples as well. Anything else is itself."""
    return _converted(value, _WIDE)


def narrowed(value: Any) -> Any:
    """A float64 tensor, or the dtype, as float32; otherwise like `widened`."""
    return _converted(value, _NARROW)


def _converted(value: Any, dtypes: Mapping[torch.dtype, torch.dtype]) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtypes[value.dtype]) if value.dtype in dtypes else value
    if isinstance(value, torch.dtype):
        return dtypes.get(value, value)
    if type(value) in (tuple, list):
        return type(value)(_converted(item, dtypes) for item in value)
    return value


class Double(TorchFunctionMode):
    """While it is entered, what torch computes of float32 it computes in float64; code that asks still finds float32.

    Operators that are not torch's own get and give float32.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func` on wider arguments; a float32 tensor that it changes in place is changed."""
        kwargs = kwargs or {}
        name, _, _ = func.__name__.partition(".")
        if name == "view" and any(isinstance(value, torch.dtype) for value in (*args[1:], *kwargs.values())):
            return func(*(x if isinstance(x, torch.dtype) else narrowed(x) for x in args), **kwargs)  # bits of float32
        if name in _MOVES:
            result = func(*args, **kwargs)
            return narrowed(result) if name == "__get__" and func == _DTYPE else result
        if isinstance(func, OpOverload | OpOverloadPacket) and not str(func).startswith("aten."):
            return func(*narrowed(args), **{key: narrowed(value) for key, value in kwargs.items()})
        wide = widened(args)
        if func in _CONVS and _is_plain(wide):
            return _convolved(*wide[:6])
        result = widened(_RENAMED.get(func, func)(*wide, **{key: widened(value) for key, value in kwargs.items()}))
        in_place = name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace")
        if in_place and isinstance(args[0], Tensor) and args[0] is not wide[0]:
            return args[0].copy_(wide[0])
        return result


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether a convolution has a batch, one number for each setting and dimension, and no groups."""
    return len(args) == 7 and args[0].dim() == args[1].dim() and isinstance(args[4], tuple | list) and args[6] == 1


def _convolved(
    x: Tensor,
    w: Tensor,
    b: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """The convolution of x [B, C, *spatial] with w [N, C, *kernel], by its windows, some rows of places at a time.

    In float64 torch writes down all windows of an image first, and takes two to four times as long.
    """
    rank = len(stride)
    view = F.pad(x, [width for size in reversed(padding) for width in (size, size)])
    for i in range(rank):
        span = (w.shape[2 + i] - 1) * dilation[i] + 1
        view = view.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
    places = view.shape[2 : 2 + rank]
    y = x.new_empty(len(x), len(w), *places)
    rows = max(1, AT_ONCE // (w[0].numel() * places[1:].numel()))
    order = (0, *range(1 + rank, 1 + 2 * rank), *range(1, 1 + rank))
    for image, result in zip(view, y, strict=True):
        for windows, part in zip(torch.split(image, rows, 1), torch.split(result, rows, 1), strict=True):
            columns = windows.permute(order).reshape(w[0].numel(), -1)
            part.copy_((w.flatten(1) @ columns).reshape(part.shape))
    return y if b is None else y.add_(b.reshape(-1, *[1] * rank))


class Runner(Interpreter):
    """Runs a graph as it is, or `double`: float32 inputs and constants are what they are, results float64.

    Observers see float64 then; a module that is not torch's own gets float32.
    """

    def __init__(self, gm: GraphModule, double: bool) -> None:
        super().__init__(gm)
        self.double = double
        self.mode: contextlib.AbstractContextManager[object] = Double() if double else contextlib.nullcontext()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        with self.mode:
            return super().call_function(target, args, kwargs)

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        with self.mode:
            return super().call_method(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        module = self.fetch_attr(target)
        if isinstance(module, Observer | Rows | WeightObserver):
            return self.observe(module, args[0])
        if type(module).__module__.startswith("torch.nn."):
            with self.mode:
                return module(*args, **kwargs)
        if self.double:
            args, kwargs = narrowed(args), {key: narrowed(value) for key, value in kwargs.items()}
        return module(*args, **kwargs)

    def observe(self, module: Observer | Rows | WeightObserver, x: Tensor) -> Tensor:
        """What `module` makes of `x`, which inputs and constants have come to as they are."""
        wide = self.double and not isinstance(module, WeightObserver)  # a weight is widened where it is multiplied by
        y: Tensor = module(widened(x) if wide else x)
        return y


def run(gm: GraphModule, call: Call, double: bool) -> Any:
    """What `gm` gives for the arguments of `call`, which it may change, as it is or in float64.

    Raises what the model raises, TypeError where the call does not fit it.
    """
    if double:
        return Runner(gm, double).run(*bind(gm, call.args, call.kwargs))
    return gm.forward(*call.args, **call.kwargs)
