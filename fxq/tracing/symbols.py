"""Numbers that may differ at call time: a size, an argument, a value read from a tensor or from outside the model.

A symbol is a `torch.SymInt` or `torch.SymFloat`, so torch's argument parsers let it pass untouched to the recorder, and
says that it is an `int` or a `float` to `isinstance`. Arithmetic on it is recorded. What Python decides on it (a
comparison, an index, a loop count) is answered from its value on the examples and kept as a guard; a number read from a
tensor, or from outside (a clock), refuses to decide.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn, Protocol

import numpy as np
import torch
from torch import fx

from fxq.tracing.graph_functions import power, rounded, whole

LONGEST_TEXT = 120
"""Characters of an expression in messages."""


class Source(Enum):
    """Why a number may differ at call time; the later of two sources wins when numbers combine."""

    SIZE = 1
    ARGUMENT = 2
    DATA = 3
    OUTSIDE = 4


class Recording(Protocol):
    """What a symbol asks of the recorder."""

    def compute(self, operation: Callable[..., Any], operands: tuple[Any, ...], text: str) -> Any:
        """Record an operation on numbers and return its result as a symbol."""

    def decide(self, symbol: Any) -> Any:
        """Return the value of a symbol, and keep it as a guard."""

    def refuse(self, what: str, final: bool = False) -> NoReturn:
        """Raise `TraceError` about the user's line."""


class Symbol:
    """A number's value on the examples, the node that computes it, and how the user wrote it."""

    def __init__(self, recording: Recording, value: Any, fx_node: fx.Node, text: str, source: Source) -> None:
        self.recording, self.value, self.fx_node, self.source = recording, value, fx_node, source
        # A number computed from itself again and again would double its text each time: its node names it then.
        self.text = text if len(text) <= LONGEST_TEXT else fx_node.name

    @property
    def node(self) -> Any:
        """What torch reads from a SymInt in the few places where no recorder can stand in between."""
        self.recording.refuse(f"hands `{self.text}` to code that tracing cannot follow, such as torch.func.vmap")

    def __int__(self) -> int:
        if isinstance(self.value, int):
            return int(self.recording.decide(self))
        return int(self.recording.decide(self.recording.compute(whole, (self,), f"int({self.text})")))

    def __index__(self) -> int:
        return operator.index(self.recording.decide(self))

    def __float__(self) -> float:
        return float(self.recording.decide(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return np.array(self.recording.decide(self), dtype)

    def __bool__(self) -> bool:
        return bool(operator.ne(self, 0))

    def __hash__(self) -> int:
        return hash(self.recording.decide(self))

    def __round__(self, digits: int | None = None) -> Any:
        return self.recording.compute(rounded, (self, digits), f"round({self.text})")

    def __divmod__(self, other: Any) -> tuple[Any, Any]:
        return self // other, self % other

    def __repr__(self) -> str:
        return repr(self.value)

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return format(self.value, spec)

    def __deepcopy__(self, memo: dict[int, Any]) -> Symbol:
        return self

    def __copy__(self) -> Symbol:
        return self


class SymbolicInt(Symbol, torch.SymInt):
    """An int that may differ at call time."""

    __class__ = property(lambda self: int)
    __hash__ = Symbol.__hash__


class SymbolicFloat(Symbol, torch.SymFloat):
    """A float that may differ at call time."""

    __class__ = property(lambda self: float)
    __hash__ = Symbol.__hash__

    def is_integer(self) -> bool:
        """`float.is_integer`, decided on the examples."""
        return bool(operator.mod(self, 1) == 0)


NUMBERS = (int, float, bool, SymbolicInt, SymbolicFloat)


def is_symbol(value: object) -> bool:
    """Tell a symbol from the int or float that it claims to be."""
    return type(value) in (SymbolicInt, SymbolicFloat)


def value_of(number: Any) -> Any:
    """The plain number behind a symbol; anything else as it is."""
    return number.value if is_symbol(number) else number


def _text(number: Any) -> str:
    if not is_symbol(number):
        return repr(number)
    return f"({number.text})" if " " in number.text else str(number.text)


def _define_binary(name: str, sign: str, operation: Callable[[Any, Any], Any], decides: bool) -> None:
    def forward(self: Symbol, other: Any) -> Any:
        if type(other) not in NUMBERS:
            return NotImplemented
        result = self.recording.compute(operation, (self, other), f"{_text(self)} {sign} {_text(other)}")
        return self.recording.decide(result) if decides else result

    def backward(self: Symbol, other: Any) -> Any:
        if type(other) not in NUMBERS:
            return NotImplemented
        return self.recording.compute(operation, (other, self), f"{_text(other)} {sign} {_text(self)}")

    setattr(Symbol, f"__{name}__", forward)
    if not decides:
        setattr(Symbol, f"__r{name}__", backward)


def _define_unary(name: str, operation: Callable[[Any], Any], text: str) -> None:
    def method(self: Symbol) -> Any:
        return self.recording.compute(operation, (self,), text.format(self.text))

    setattr(Symbol, f"__{name}__", method)


for _name, _sign in (
    ("add", "+"), ("sub", "-"), ("mul", "*"), ("truediv", "/"), ("floordiv", "//"), ("mod", "%"),
):  # fmt: skip
    _define_binary(_name, _sign, getattr(operator, _name), decides=False)
_define_binary("pow", "**", power, decides=False)
for _name, _sign in (("eq", "=="), ("ne", "!="), ("lt", "<"), ("le", "<="), ("gt", ">"), ("ge", ">=")):
    _define_binary(_name, _sign, getattr(operator, _name), decides=True)
for _name, _sign in (("and", "&"), ("or", "|"), ("xor", "^"), ("lshift", "<<"), ("rshift", ">>")):
    _define_binary(_name, _sign, getattr(operator, f"{_name}_" if _name in ("and", "or") else _name), decides=False)
for _name, _operation, _template in (
    ("neg", operator.neg, "-{}"), ("pos", operator.pos, "+{}"), ("abs", operator.abs, "abs({})"),
    ("floor", math.floor, "floor({})"), ("ceil", math.ceil, "ceil({})"), ("trunc", math.trunc, "trunc({})"),
):  # fmt: skip
    _define_unary(_name, _operation, _template)
