"""normalize: one spelling for every operation, so that each pattern is written once.

    nn.Linear, F.linear(weight=...), addmm, x @ w.t()      -> linear(x, weight, bias)
    nn.ReLU, F.relu_, x.relu(), clamp(min=0)               -> relu(x)
    nn.ReLU6, F.hardtanh, x.clamp_(a, b)                   -> clamp(x, a, b)
    x.view(2, -1), nn.Flatten, x.t(), nn.MaxPool2d, ...    -> one function each, operands positional
    dropout, identity, contiguous, detach                  -> gone

A rule is a function with the signature of the spelling that it reads; it returns the target and operands to write. An
in-place spelling becomes its out-of-place one where nobody can see the difference.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.graph import (
    Value,
    bypass,
    constant,
    get_attr,
    is_call,
    is_float_tensor,
    is_tensor,
    mutations,
    replace,
    set_constant,
    submodule,
)
from fxq.pipeline import Context, Numbers
from fxq.spelling import (
    ADD,
    BATCH_NORM,
    CLAMP,
    LINEAR,
    RELU,
    max_pool1d,
)
from fxq.stages import Stage

Rewrite = tuple[Callable[..., Any], tuple[Any, ...]]
Rule = Callable[..., Rewrite | None]


def _linear(input: Any, weight: Any, bias: Any = None) -> Rewrite:
    return LINEAR, (input, weight, bias)


def _relu(input: Any, inplace: bool = False) -> Rewrite:
    return RELU, (input,)


def _relu6(input: Any, inplace: bool = False) -> Rewrite:
    return CLAMP, (input, 0.0, 6.0)


def _hardtanh(input: Any, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False) -> Rewrite:
    return CLAMP, (input, min_val, max_val)


def _clamp(input: Any, min: Any = None, max: Any = None) -> Rewrite:
    if isinstance(min, int | float) and min == 0 and max is None and is_float_tensor(input):
        return RELU, (input,)
    return CLAMP, (input, min, max)


def _clamp_min(input: Any, min: Any) -> Rewrite:
    return _clamp(input, min)


def _clamp_max(input: Any, max: Any) -> Rewrite:
    return _clamp(input, None, max)


def _add(input: Any, other: Any, *, alpha: Any = 1) -> Rewrite | None:
    if alpha != 1 or not is_tensor(input):
        return None
    return ADD, (input, other)


def _add_(input: Any, other: Any, *, alpha: Any = 1) -> Rewrite | None:
    """In place the result keeps the dtype of `input`, whatever is added to it."""
    same = not is_tensor(other) or other.meta["value"].dtype == input.meta["value"].dtype
    return _add(input, other, alpha=alpha) if same else None


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
    return (torch.transpose, (input, 0, 1)) if is_tensor(input) and _rank(input) == 2 else None


def _permute(input: Any, *dims: Any, **named: Any) -> Rewrite:
    return torch.permute, (input, _spread(named.get("dims", dims)))


def _getattr(input: Any, name: str) -> Rewrite | None:
    if not is_tensor(input) or name not in ("T", "mT") or _rank(input) < 2:
        return None
    if name == "mT":
        return torch.transpose, (input, -2, -1)
    return torch.permute, (input, tuple(reversed(range(_rank(input)))))


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


def _matmul(input: Any, other: Any) -> tuple[Any, Any, Any]:
    return None, input, other


def _mm(input: Any, mat2: Any) -> tuple[Any, Any, Any]:
    return None, input, mat2


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: Any = 1, alpha: Any = 1) -> tuple[Any, Any, Any] | None:
    return (input, mat1, mat2) if (beta, alpha) == (1, 1) else None


def _pool(rank: int) -> Rule:
    targets: dict[int, Callable[..., Any]] = {1: max_pool1d, 2: torch.max_pool2d, 3: torch.max_pool3d}
    target = targets[rank]

    def wide(value: Any) -> Any:
        many = tuple(value) if isinstance(value, tuple | list) else (value,) * rank
        return many[0] if rank == 1 else many * (rank if len(many) == 1 else 1)

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


def _batch_norm(
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Rewrite | None:
    if training or running_mean is None or running_var is None:
        return None
    return BATCH_NORM, (input, running_mean, running_var, weight, bias, False, momentum, eps)


FUNCTIONS: dict[Callable[..., Any], Rule] = {
    F.linear: _linear,
    torch.relu: _relu,
    torch.relu_: _relu,
    F.relu: _relu,
    F.relu_: _relu,
    F.relu6: _relu6,
    F.hardtanh: _hardtanh,
    F.hardtanh_: _hardtanh,
    torch.clamp: _clamp,
    torch.clamp_: _clamp,
    torch.clip: _clamp,
    torch.clip_: _clamp,
    torch.clamp_min: _clamp_min,
    torch.clamp_min_: _clamp_min,
    torch.clamp_max: _clamp_max,
    torch.clamp_max_: _clamp_max,
    torch.add: _add,
    operator.add: _add,
    operator.iadd: _add_,
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
    F.max_pool1d: _pool(1),
    F.max_pool2d: _pool(2),
    F.max_pool3d: _pool(3),
    torch.max_pool1d: _pool(1),
    torch.max_pool2d: _pool(2),
    torch.max_pool3d: _pool(3),
    F.batch_norm: _batch_norm,
}

METHODS: dict[str, Rule] = {
    "relu": _relu,
    "relu_": _relu,
    "clamp": _clamp,
    "clamp_": _clamp,
    "clip": _clamp,
    "clip_": _clamp,
    "clamp_min": _clamp_min,
    "clamp_min_": _clamp_min,
    "clamp_max": _clamp_max,
    "clamp_max_": _clamp_max,
    "add": _add,
    "add_": _add_,
    "__add__": _add,
    "__radd__": _add,
    "__iadd__": _add_,
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

MODULES: dict[type[nn.Module], Callable[[Any, Any], Rewrite | None]] = {
    nn.ReLU: lambda m, x: _relu(x),
    nn.ReLU6: lambda m, x: _relu6(x),
    nn.Hardtanh: lambda m, x: _hardtanh(x, m.min_val, m.max_val),
    nn.Flatten: lambda m, x: _flatten(x, m.start_dim, m.end_dim),
    nn.Unflatten: lambda m, x: _unflatten(x, m.dim, m.unflattened_size),
    nn.PixelShuffle: lambda m, x: _pixel_shuffle(x, m.upscale_factor),
    nn.PixelUnshuffle: lambda m, x: _pixel_unshuffle(x, m.downscale_factor),
    nn.MaxPool1d: lambda m, x: _pool(1)(x, *_pool_of(m)),
    nn.MaxPool2d: lambda m, x: _pool(2)(x, *_pool_of(m)),
    nn.MaxPool3d: lambda m, x: _pool(3)(x, *_pool_of(m)),
}

IDENTITIES = (
    nn.Identity,
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
DROPOUTS = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
)
PRODUCTS: dict[object, Callable[..., tuple[Any, Any, Any] | None]] = {
    operator.matmul: _matmul,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.addmm: _addmm,
    "matmul": _matmul,
    "__matmul__": _matmul,
    "mm": _mm,
    "addmm": _addmm,
}
"""Products of matrices: each gives (bias, x, w)."""
PARTS = frozenset(
    {
        *(operator.getitem, torch.chunk, torch.split, torch.unbind, torch.narrow, torch.select),
        *("chunk", "split", "unbind", "narrow", "select"),
    }
)
"""What takes parts of a tensor, as functions and as methods."""
IN_PLACE_ONLY = frozenset({operator.iadd, *(name for name in METHODS if name.endswith("_") and name[0] != "_")})


def _pool_of(m: Any) -> tuple[Any, ...]:
    return m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices


def _rank(node: Node) -> int:
    value = node.meta["value"]
    assert isinstance(value, Value)
    return len(value.shape)


@dataclass(frozen=True)
class Normalize:
    """See the module's docstring."""

    name: str = "normalize"
    takes: Stage = Stage.FLOAT
    gives: Stage = Stage.FLOAT
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Rewrite each node once, in order; nodes whose memory others modify are left as they are and marked."""
        examples = ctx.examples.clone()
        mutated = mutations(gm, examples.args, examples.kwargs)
        changes = sum(_functionalize(gm, node, held) for node, held in mutated.items())
        changes += sum(_part_of_constant(gm, node) for node in list(gm.graph.nodes) if not node._erased)
        for node in list(gm.graph.nodes):
            if not node._erased and ("aliases" not in node.meta or _is_linear(gm, node)):
                changes += _normalize(gm, node)
        return changes


def _is_linear(gm: GraphModule, node: Node) -> bool:
    """Whether `node` is a linear: its result is memory of its own, however it is spelled."""
    return node.target is LINEAR or (node.op == "call_module" and type(submodule(gm, node)) is nn.Linear)


def _normalize(gm: GraphModule, node: Node) -> int:
    """Write `node` in its one spelling; the number of changes."""
    if _is_identity(gm, node):
        source = node.args[0] if node.args else next(iter(node.kwargs.values()))
        assert isinstance(source, Node)
        bypass(gm, node, source)
        return 1
    if node.op == "call_module":
        return _inline(gm, node)
    if node.op not in ("call_function", "call_method"):
        return 0
    if node.target in PRODUCTS:
        return _linear_from_product(gm, node)
    rule = FUNCTIONS.get(node.target) if node.op == "call_function" else METHODS.get(str(node.target))  # type: ignore[arg-type]
    if rule is None or not (is_tensor(node) or isinstance(node.meta.get("value"), tuple | list)):
        return 0
    rewrite = rule(*node.args, **node.kwargs)
    return _write(gm, node, rewrite)


def _write(gm: GraphModule, node: Node, rewrite: Rewrite | None) -> int:
    if rewrite is None or (node.op == "call_function" and (node.target, node.args) == rewrite and not node.kwargs):
        return 0
    aliases = {key: node.meta[key] for key in ("aliases",) if key in node.meta}
    replace(gm, node, *rewrite).meta.update(aliases)
    return 1


def _is_identity(gm: GraphModule, node: Node) -> bool:
    """Whether `node` returns its first operand's numbers, whatever they are."""
    if node.op == "call_module":
        module = submodule(gm, node)
        return type(module) in IDENTITIES and (isinstance(module, nn.Identity) or module.training is False)
    if node.op == "call_method" and node.target in ("contiguous", "detach"):
        return True
    if node.op == "call_method" and node.target in ("float", "to", "type", "type_as") and is_tensor(node):
        source = node.args[0]
        return is_tensor(source) and isinstance(source, Node) and source.meta["value"] == node.meta["value"]
    if node.op == "call_function" and node.target in DROPOUTS:
        named = {**dict(zip(("input", "p", "training"), node.args, strict=False)), **node.kwargs}
        return named.get("training", named.get("train", True)) is False or bool(named.get("p") == 0)
    return False


def _inline(gm: GraphModule, node: Node) -> int:
    """A torch.nn module as the function that it stands for; its parameters become get_attr nodes."""
    module, path = submodule(gm, node), str(node.target)
    x = node.args[0] if node.args else node.kwargs.get("input")

    def parameter(name: str) -> Node | None:
        if getattr(module, name, None) is None:
            return None
        with gm.graph.inserting_before(node):
            return get_attr(gm, f"{path}.{name}", node)

    if type(module) is nn.Linear:
        return _write(gm, node, _linear(x, parameter("weight"), parameter("bias")))
    if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        assert isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
        if module.training or module.running_mean is None:
            return 0
        mean, var, gamma, beta = map(parameter, ("running_mean", "running_var", "weight", "bias"))
        momentum = 0.0 if module.momentum is None else module.momentum
        return _write(gm, node, _batch_norm(x, mean, var, gamma, beta, False, momentum, module.eps))
    if type(module) is nn.Embedding and module.max_norm is None:
        options = module.padding_idx, None, module.norm_type, module.scale_grad_by_freq, module.sparse
        return _write(gm, node, (F.embedding, (x, parameter("weight"), *options)))
    rule = MODULES.get(type(module))
    return 0 if rule is None else _write(gm, node, rule(module, x))


def _linear_from_product(gm: GraphModule, node: Node) -> int:
    """x @ w, mm and addmm with a constant two-dimensional w [K, N] are a linear with the weight w.t() [N, K].

    The transposed weight is a view, so the same BLAS call computes the same bits.
    """
    operands = PRODUCTS[node.target](*node.args, **node.kwargs)
    if operands is None:
        return 0
    bias, x, w = operands
    path = _transposed(gm, w) if isinstance(w, Node) else None
    if path is None or not (bias is None or _is_bias(gm, bias, columns=w)):
        return 0
    with gm.graph.inserting_before(node):
        weight = get_attr(gm, path, node)
    replace(gm, node, LINEAR, (x, weight, bias))
    return 1


def _is_bias(gm: GraphModule, bias: object, columns: object) -> bool:
    """Whether `bias` is a constant with one number for each column of the matrix `columns`."""
    assert isinstance(columns, Node)
    width = columns.meta["value"].shape[-1]
    return isinstance(bias, Node) and bias.op == "get_attr" and constant(gm, bias).shape == (width,)


def _transposed(gm: GraphModule, w: Node) -> str | None:
    """The path of a constant that is the transpose of `w`; None where `w` is not a constant matrix."""
    swapped = w.target in (torch.transpose, torch.permute)
    source = w.args[0] if swapped else w
    if not isinstance(source, Node) or source.op != "get_attr" or _rank(source) != 2 or "aliases" in source.meta:
        return None
    if swapped:
        swaps = w.args[1:] in ((0, 1), (1, 0), (-2, -1), (-1, -2), ((1, 0),), ((-1, -2),))
        return str(source.target) if swaps else None
    path, tensor = f"{w.target}_t", constant(gm, w).detach().t()
    owner, _, name = path.rpartition(".")
    known = getattr(gm.get_submodule(owner), name, None)
    if isinstance(known, Tensor) and known.data_ptr() == tensor.data_ptr() and known.stride() == tensor.stride():
        return path
    return set_constant(gm, path, tensor)


def _part_of_constant(gm: GraphModule, node: Node) -> int:
    """w[8:16] or w.chunk(3)[1] of a constant becomes a constant of its own, in the memory of the whole."""
    part = _part(gm, node)
    if not isinstance(part, Tensor) or node.op == "get_attr":
        return 0
    whole = node
    while whole.op != "get_attr":
        whole = whole.all_input_nodes[0]
    path = set_constant(gm, f"{whole.target}_part", part.detach())
    with gm.graph.inserting_before(node):
        bypass(gm, node, get_attr(gm, path, node))
    return 1


def _part(gm: GraphModule, node: Node) -> Any:
    """The value of a constant, of parts of it, or of one of them; None where `node` is something else."""
    if "aliases" in node.meta:
        return None
    if node.op == "get_attr":
        return constant(gm, node)
    if not is_call(node) or node.target not in PARTS or len(node.all_input_nodes) != 1:
        return None
    whole = _part(gm, node.all_input_nodes[0])
    if whole is None or not node.args or node.args[0] is not node.all_input_nodes[0]:
        return None
    function = getattr(torch.Tensor, node.target) if isinstance(node.target, str) else node.target
    return function(whole, *node.args[1:], **node.kwargs)


def _functionalize(gm: GraphModule, node: Node, held: tuple[Node, ...]) -> int:
    """Rewire later readers of an in-place operation's operand to its result, or mark all that shares the memory.

    Safe where the operand is a tensor that the graph computed, and no other alias of it is read later.
    """
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    target = node.args[0] if node.args else None
    others = [n for n in held if n is not target]
    later = [user for n in others for user in n.users if order[user] > order[node]]
    in_place = node.target in IN_PLACE_ONLY or _has_rule(gm, node)
    if in_place and isinstance(target, Node) and not later and all(_computed(n) for n in held):
        return len(target.replace_all_uses_with(node, delete_user_cb=lambda user: order[user] > order[node]))
    for n in (*held, node):
        n.meta["aliases"] = node.name
    return 0


def _has_rule(gm: GraphModule, node: Node) -> bool:
    """Whether normalize writes `node` out of place."""
    if node.op == "call_module":
        return type(submodule(gm, node)) in (nn.ReLU, nn.ReLU6, nn.Hardtanh)
    return node.op == "call_function" and node.target in (
        F.relu,
        F.relu_,
        torch.relu_,
        F.relu6,
        F.hardtanh,
        F.hardtanh_,
        torch.clamp_,
        torch.clip_,
        torch.clamp_min_,
        torch.clamp_max_,
    )


def _computed(node: Node) -> bool:
    return node.op not in ("placeholder", "get_attr")


PASS = Normalize()
