"""What is inside the values that a model passes around: tensors, symbols, and the names that a module gives them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.immutable_collections import immutable_dict

from fxq.tracing.symbols import is_symbol, value_of


def named_tensors(root: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters and buffers, then other tensors kept as attributes, under every name."""
    yield from root.named_parameters(remove_duplicate=False)
    yield from root.named_buffers(remove_duplicate=False)
    for path, module in root.named_modules():
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor):
                yield f"{path}.{name}" if path else name, value


def version(tensor: torch.Tensor) -> int:
    """Count the in-place changes of a tensor; inference tensors do not count theirs."""
    return -1 if tensor.is_inference() else tensor._version


def storage(tensor: torch.Tensor) -> int:
    """Identify the memory of a tensor, the same for its views; sparse tensors have none of their own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors in a value."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name))


def symbols(value: Any) -> Iterator[Any]:
    """Yield the symbols in a value."""
    if is_symbol(value):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from symbols(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from symbols(item)


def traced(value: Any) -> bool:
    """Tell whether a value holds a tensor or a symbol."""
    if isinstance(value, dict):
        return any(traced(item) for item in value.values())
    if isinstance(value, list | tuple):
        return any(traced(item) for item in value)
    return is_symbol(value) or isinstance(value, torch.Tensor)


def concrete(value: Any) -> Any:
    """Replace symbols by their values, and leave what holds none the very object that it is."""
    if is_symbol(value):
        return value_of(value)
    if isinstance(value, slice):
        return slice(concrete(value.start), concrete(value.stop), concrete(value.step))
    if isinstance(value, dict):
        items = {key: concrete(item) for key, item in value.items()}
        return value if all(items[key] is value[key] for key in value) else items
    if isinstance(value, list | tuple):
        parts = [concrete(item) for item in value]
        if all(part is item for part, item in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def map_tensors(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Rebuild a value with another tensor in place of each."""
    if isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, dict):
        copied: Any = dict(value) if isinstance(value, immutable_dict) else copy.copy(value)
        for key, item in value.items():
            copied[key] = map_tensors(item, function)
        return copied
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for field in fields(value):
            object.__setattr__(copied, field.name, map_tensors(getattr(value, field.name), function))
        return copied
    if isinstance(value, list | tuple):
        parts = [map_tensors(item, function) for item in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    return value


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Return a node and all that it is computed from."""
    found: set[fx.Node] = set()
    ahead = [node]
    while ahead:
        node = ahead.pop()
        if node not in found:
            found.add(node)
            ahead += node.all_input_nodes
    return found
