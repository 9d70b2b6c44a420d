"""What the model's code asks of tensors, answered: facts are noted for a guard, sizes and numbers become symbols."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from fxq.tracing.builder import Builder
from fxq.tracing.graph_functions import guard
from fxq.tracing.spelling import RANK
from fxq.tracing.symbols import Source, SymbolicFloat, SymbolicInt, is_symbol
from fxq.tracing.values import concrete

BY_SIZE = "by_size"
"""In the `meta` of a guard: True where Python took one of two ways by the size of a tensor."""


class Questions(Builder):
    """A graph under construction that knows what was asked: `asked` facts, `symbols` by what they stand for."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root)
        self.asked: dict[str, str] = {}
        self.symbols: dict[Any, Any] = {}
        self.decided: set[fx.Node] = set()

    def varies(self, tensor: torch.Tensor) -> bool:
        """Tell whether a tensor depends on the inputs."""
        return self.node_of(tensor) in self.varying

    def ask(self, name: str, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        """Answer a question about rank or dtype, and note that the answer was relied on."""
        self.asked.setdefault("rank" if name in RANK else "dtype", self.line())
        return self.execute(function, args, {})

    def sizes(self, tensor: torch.Tensor) -> torch.Size:
        """Return a tensor's shape, as symbols."""
        self.asked.setdefault("rank", self.line())
        node = self.node_of(tensor)
        with self.working():
            shape = tuple(tensor.shape)
        return torch.Size([self.size(node, dim, extent) for dim, extent in enumerate(shape)])

    def size(self, node: fx.Node, dim: int, extent: int) -> Any:
        """Return one size, as a symbol."""
        key = ("size", node, dim)
        if key not in self.symbols:
            size = self.create("call_method", "size", (node, dim), pure=True)
            self.symbols[key] = self.symbol(extent, size, f"{self.text(node)}.shape[{dim}]", Source.SIZE)
        return self.symbols[key]

    def number(
        self,
        name: str,
        value: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        source: Source,
        getter: Callable[..., Any] | None = None,
    ) -> Any:
        """Return what a method or property of a tensor gives, as symbols."""
        text = f"{self.text(self.node_of(args[0]))}.{name}{'' if getter else '()'}"
        if getter is None:
            node = self.create("call_method", name, self.arg(args), self.arg(kwargs), pure=True)
        else:
            node = self.create("call_function", getter, (self.node_of(args[0]), name), pure=True)
        if isinstance(value, tuple):
            return tuple(
                self.symbol(
                    item, self.create("call_function", operator.getitem, (node, i), pure=True), f"{text}[{i}]", source
                )
                for i, item in enumerate(value)
            )
        if isinstance(value, bool | complex):
            self.refuse(f"reads `{text}` into Python")
        return self.symbol(value, node, text, source)

    def symbol(self, value: Any, node: fx.Node, text: str, source: Source) -> Any:
        """Return a number that knows its node."""
        kind = SymbolicFloat if isinstance(value, float) else SymbolicInt
        return kind(self, value, node, text, source)

    def compute(self, operation: Callable[..., Any], operands: tuple[Any, ...], text: str) -> Any:
        """Record an operation on numbers."""
        args = self.arg(operands)
        key = (operation, tuple((type(arg), arg) for arg in args))
        if key not in self.symbols:
            source = max(
                (operand.source for operand in operands if is_symbol(operand)), key=lambda source: source.value
            )
            value = operation(*concrete(operands))
            node = self.create("call_function", operation, args, pure=True)
            self.symbols[key] = self.symbol(value, node, text, source)
        return self.symbols[key]

    def decide(self, symbol: Any) -> Any:
        """Return a symbol's value to Python, which makes it part of what the graph takes for granted."""
        if symbol.source is Source.DATA:
            self.refuse(f"decides on `{symbol.text}`, which is computed from the values of tensors")
        if symbol.source is Source.OUTSIDE:
            self.refuse(f"decides on `{symbol.text}`, which is another number at each call", final=True)
        if symbol.fx_node not in self.decided:
            self.decided.add(symbol.fx_node)
            line = self.line() or "the model"
            message = f"{line} decided that `{symbol.text}` is {symbol.value!r} on the example inputs"
            node = self.create("call_function", guard, (symbol.fx_node, symbol.value, message))
            if symbol.source is Source.SIZE and isinstance(symbol.value, bool):
                node.meta[BY_SIZE] = True
        return symbol.value
