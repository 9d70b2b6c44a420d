"""What torch.ao has quantized, read as plain data: modules that compute the same in float stand in for its own.

A stand-in keeps integers, scales and zero points, takes and gives float32 on the grid of these, and stays one call when
it is traced; `passes.import_quantized` makes quantize/dequantize pairs and products of it. What lies between, the
user's own code, never notices.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.ao.nn.intrinsic.quantized as nniq
import torch.ao.nn.intrinsic.quantized.dynamic as nniqd
import torch.ao.nn.quantized as nnq
import torch.ao.nn.quantized.dynamic as nnqd
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.batch_norm import column
from fxq.errors import QuantizationError
from fxq.qdq import dequantize, fake_quantize_rows, quantize

SUPPORTED = (
    "Quantize, DeQuantize, Linear and LinearReLU (dynamic ones, too), Conv1d to 3d, ConvReLU1d to 3d, ReLU6, Dropout, "
    "QFunctional (add, add_relu, mul, cat)"
)

_CONVS = {nnq.Conv1d, nnq.Conv2d, nnq.Conv3d}
_CONV_RELUS = {nniq.ConvReLU1d, nniq.ConvReLU2d, nniq.ConvReLU3d}


class StandIn(nn.Module):
    """A quantized module of torch's; `scale` and `zero_point` are those of its result."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.scale = float(scale)
        self.zero_point = int(zero_point)

    def on_grid(self, x: Tensor) -> Tensor:
        """x rounded to what the result can be."""
        rounded: Tensor = dequantize(quantize(x, self.scale, self.zero_point), self.scale, self.zero_point)
        return rounded


class Quantize(StandIn):
    """From float to integers."""

    def forward(self, x: Tensor) -> Tensor:
        """x: float32, any shape."""
        return self.on_grid(x)


class DeQuantize(StandIn):
    """Back to float: what reads the result may be any operation."""

    def __init__(self) -> None:
        super().__init__(1.0, 0)

    def forward(self, x: Tensor) -> Tensor:
        """The same numbers."""
        return x


class Product(StandIn):
    """A linear or convolution, with its relu where it has one: function(x, weight, bias, *settings).

    weight: q_w - z_w, int16 [N, ...]; scales: float64 [N]; bias: float32 [N] or None; affine: whether a z_w is not 0.
    """

    weight: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        scale: float,
        zero_point: int,
        relu: bool,
        function: Callable[..., Tensor] = F.linear,
        settings: tuple[Any, ...] = (),
    ) -> None:
        super().__init__(scale, zero_point)
        self.function = function
        self.settings = settings
        integers, scales = _integers(weight)
        self.affine = not torch.equal(integers, weight.int_repr().to(integers.dtype))
        self.register_buffer("weight", integers)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.relu = relu

    @property
    def groups(self) -> int:
        """Of a convolution; 1 of a linear."""
        return int(self.settings[-1]) if self.settings else 1

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 on the grid of its producer."""
        weight = self.weight * column(self.scales.float(), self.weight.dim())
        y = self.function(x, weight, self.bias, *self.settings)
        return self.on_grid(torch.relu(y) if self.relu else y)


class DynamicProduct(Product):
    """A linear between float tensors, which quantizes its input as the model runs; with its relu where it has one.

    reduce_range: whether torch's engines divide the range of the input into 127 steps instead of 255.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, relu: bool, reduce_range: bool) -> None:
        super().__init__(weight, bias, 1.0, 0, relu)
        if weight.qscheme() is not torch.per_tensor_affine:
            self.scales = self.scales.float().double()  # as the engines keep those of channels
        self.reduce_range = reduce_range

    def forward(self, x: Tensor) -> Tensor:
        """x: float32 [..., K]; each row has a range of its own here."""
        y = self.function(fake_quantize_rows(x), self.weight * self.scales.float()[:, None], self.bias)
        return torch.relu(y) if self.relu else y


class Binary(StandIn):
    """add, mul or cat with a range of its own, and a relu where there is one."""

    def __init__(self, function: Callable[..., Tensor], scale: float, zero_point: int, relu: bool = False) -> None:
        super().__init__(scale, zero_point)
        self.function = function
        self.relu = relu

    def forward(self, *operands: Any) -> Tensor:
        """Two tensors, or a list of them and a dimension."""
        y = self.function(*operands)
        return self.on_grid(torch.relu(y) if self.relu else y)


class Functional(nn.Module):
    """A QFunctional: its methods, each a `Binary`."""

    def __init__(self, scale: float, zero_point: int) -> None:
        super().__init__()
        self.calls = nn.ModuleDict(
            {
                "add": Binary(torch.add, scale, zero_point),
                "add_relu": Binary(torch.add, scale, zero_point, relu=True),
                "mul": Binary(torch.mul, scale, zero_point),
                "cat": Binary(torch.cat, scale, zero_point),
            }
        )

    def add(self, x: Tensor, y: Tensor) -> Any:
        """x + y."""
        return self.calls["add"](x, y)

    def add_relu(self, x: Tensor, y: Tensor) -> Any:
        """relu(x + y)."""
        return self.calls["add_relu"](x, y)

    def mul(self, x: Tensor, y: Tensor) -> Any:
        """x * y."""
        return self.calls["mul"](x, y)

    def cat(self, x: list[Tensor], dim: int = 0) -> Any:
        """The tensors in `x` one behind the other."""
        return self.calls["cat"](x, dim)

    def __getattr__(self, name: str) -> Any:
        if name in ("add_scalar", "mul_scalar", "matmul"):
            raise QuantizationError(f"fxq.from_torch: QFunctional.{name} is not supported; it takes {SUPPORTED}")
        return super().__getattr__(name)


def stand_ins(model: nn.Module) -> nn.Module:
    """A copy of `model` in which stand-ins are in the place of what torch has quantized.

    Raises `QuantizationError` naming every module that has none, by path.
    """
    memo: dict[int, Any] = {}
    refused = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*quantized tensor creation functions")
        for path, module in model.named_modules():
            if _is_torch_ao(module):
                found = _stand_in(module)
                if isinstance(found, str):
                    refused.append(f"  {path or '(root)'}: {found}")
                else:
                    memo[id(module)] = found
        if not memo and not refused and not any(map(_calls_quantized, model.modules())):
            refused.append("  it holds no quantized module; fxq.quantize takes float models")
        if refused:
            raise QuantizationError(
                "fxq.from_torch cannot import these modules:\n" + "\n".join(refused) + f"\nit takes {SUPPORTED}"
            )
        root = memo.get(id(model))
        own = nn.Sequential(root) if root is not None else copy.deepcopy(model, memo)
    if isinstance(own, GraphModule):
        _call_stand_ins(own)
    return own


def _is_torch_ao(module: nn.Module) -> bool:
    home = type(module).__module__
    return home.startswith(("torch.ao.nn.", "torch.ao.quantization.")) and not _inside_known(type(module).__name__)


def _calls_quantized(module: nn.Module) -> bool:
    """Whether the code of a graph quantizes, or calls operators on quantized tensors."""
    return isinstance(module, GraphModule) and any("quantize" in str(node.target) for node in module.graph.nodes)


def _inside_known(name: str) -> bool:
    """What holds the weight of a quantized linear, and is read with it."""
    return name == "LinearPackedParams"


def _stand_in(module: Any) -> nn.Module | str:
    """What stands in for one module, or why nothing does."""
    kind = type(module)
    if kind is nnq.Quantize:
        if module.dtype != torch.quint8:
            return f"Quantize to {module.dtype}; activations must be torch.quint8"
        return Quantize(float(module.scale), int(module.zero_point))
    if kind is nnq.DeQuantize:
        return DeQuantize()
    if kind in (nnqd.Linear, nniqd.LinearReLU):
        weight = module.weight()
        if weight.dtype is not torch.qint8:
            return f"its weight is {module._packed_params.dtype}; weights must be torch.qint8"
        relu = kind is nniqd.LinearReLU
        return DynamicProduct(weight, module.bias(), relu, relu or (module.version or 0) >= 4)
    if kind in (nnq.Linear, nniq.LinearReLU, *_CONVS, *_CONV_RELUS):
        if getattr(module, "padding_mode", "zeros") != "zeros":
            return f"it pads with {module.padding_mode!r}"
        try:
            weight = module.weight()
        except RuntimeError as error:
            return f"torch does not give its weight away ({error}); convert the model for another engine"
        if weight.dtype is not torch.qint8:
            return f"its weight is {weight.dtype}; weights must be torch.qint8"
        if weight.qscheme() not in (torch.per_tensor_affine, torch.per_channel_affine):
            return f"its weight has the scheme {weight.qscheme()}"
        relu = kind in (nniq.LinearReLU, *_CONV_RELUS)
        rest = _convolution(module) if kind in _CONVS | _CONV_RELUS else ()
        return Product(weight, module.bias(), module.scale, module.zero_point, relu, *rest)
    if kind is nnq.ReLU6:
        return nn.ReLU6()
    if kind is nnq.QFunctional:
        return Functional(module.scale, module.zero_point)
    if kind is nnq.Dropout:
        return nn.Identity()
    if kind.__module__ == nnqd.Linear.__module__ or "dynamic" in kind.__module__:
        return f"{kind.__name__} is quantized dynamically, which only linears are here; quantize its float model"
    if ".qat." in kind.__module__ or "fake_quantize" in kind.__module__ or "observer" in kind.__module__:
        return f"{kind.__name__} is not converted yet; run torch's convert first, or train with fxq.prepare_qat"
    return f"{kind.__name__} has no form here"


def _convolution(module: Any) -> tuple[Callable[..., Tensor], tuple[Any, ...]]:
    """The function of a convolution and its settings, one number for each spatial dimension."""
    rank = module.weight().dim() - 2

    def wide(value: Any) -> tuple[int, ...]:
        return tuple(value) if isinstance(value, tuple | list) else (value,) * rank

    function = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[rank]
    settings = (*map(wide, (module.stride, module.padding, module.dilation)), module.groups)
    return function, settings


def _integers(weight: Tensor) -> tuple[Tensor, Tensor]:
    """q_w - z_w as int16 [N, ...], and one float64 scale per output channel."""
    q = weight.int_repr().to(torch.int16)
    if weight.qscheme() is torch.per_tensor_affine:
        return q - weight.q_zero_point(), torch.full((len(q),), weight.q_scale(), dtype=torch.float64)
    zero_points = weight.q_per_channel_zero_points().to(torch.int16)
    return q - column(zero_points, q.dim()), weight.q_per_channel_scales().to(torch.float64)


# The FX workflow writes functions into its graph where the eager one has modules.


def _call_stand_ins(gm: GraphModule) -> None:
    """Let the graph of torch's FX workflow call stand-ins for its quantized functions."""
    for node in list(gm.graph.nodes):
        if node.op != "call_function":
            continue
        with gm.graph.inserting_before(node):
            for count, (operands, module) in enumerate(_function(gm, node)):
                path = f"{node.name}_stand_in{count or ''}"
                gm.add_submodule(path, module)
                call = gm.graph.call_module(path, operands)
                node.replace_all_uses_with(call)
                gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.recompile()


def _function(gm: GraphModule, node: Node) -> Iterator[tuple[tuple[Any, ...], nn.Module]]:
    """The operands and the stand-in of a call of a quantized function; nothing for other calls."""
    ops = torch.ops.quantized
    if node.target is torch.quantize_per_tensor:
        x, scale, zero_point, dtype = (*node.args, *node.kwargs.values())
        if dtype is not torch.quint8:
            raise QuantizationError(f"fxq.from_torch: %{node.name} quantizes to {dtype}; it takes torch.quint8")
        yield (x,), Quantize(float(_value(gm, scale)), int(_value(gm, zero_point)))
    elif node.target in (ops.linear, ops.linear_relu):
        x, packed, scale, zero_point = node.args
        weight, bias = _value(gm, packed).unpack()
        relu = node.target is ops.linear_relu
        yield (x,), Product(weight, bias, _value(gm, scale), _value(gm, zero_point), relu)
    elif node.target in (ops.linear_dynamic, ops.linear_relu_dynamic):
        x, packed, *reduce_range = (*node.args, *node.kwargs.values())
        weight, bias = _value(gm, packed).unpack()
        yield (x,), DynamicProduct(weight, bias, node.target is ops.linear_relu_dynamic, any(reduce_range))
    elif node.target in (ops.add, ops.add_relu, ops.mul) and len(node.args) == 4:
        a, b, scale, zero_point = node.args
        function, relu = (torch.mul if node.target is ops.mul else torch.add), node.target is ops.add_relu
        yield (a, b), Binary(function, _value(gm, scale), _value(gm, zero_point), relu)
    elif node.target is ops.cat:
        pieces, dim, scale, zero_point = (*node.args, *node.kwargs.values())
        yield (pieces, dim), Binary(torch.cat, _value(gm, scale), _value(gm, zero_point))
    elif str(node.target).startswith("quantized."):
        raise QuantizationError(f"fxq.from_torch: %{node.name} calls {node.target}; it takes {SUPPORTED}")


def _value(gm: GraphModule, operand: Any) -> Any:
    if not isinstance(operand, Node):
        return operand
    owner, _, name = str(operand.target).rpartition(".")
    return getattr(gm.get_submodule(owner), name)
