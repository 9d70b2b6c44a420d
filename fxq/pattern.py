"""Patterns: small trees that find a place in a graph, or say which node is the reason that they do not.

    Op({F.linear}, Any("x"), Const("w"), Any("b"))     matches a linear with a constant weight

A failed match is a value, `Miss(reason, node, detail)`, so that a refusal can be reported and a test can assert it.
Graphs are normalised before anything is matched: operands are positional, each operation has one spelling.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any as AnyValue

from torch.fx import Node


class Cause(enum.Enum):
    """Why a pattern does not match."""

    OTHER_OP = "other op"
    ARITY = "other number of operands"
    SHARED_INTERMEDIATE = "an inner value has other users"
    NOT_CONSTANT = "operand is not a constant"
    OTHER_VALUE = "operand has another value"


@dataclass(frozen=True)
class Match:
    """A place where a pattern holds: `root` and the values bound by name."""

    root: Node
    bound: dict[str, AnyValue] = field(default_factory=dict)

    def __getitem__(self, name: str) -> AnyValue:
        return self.bound[name]

    def node(self, name: str) -> Node:
        """The node bound to `name`."""
        node = self.bound[name]
        assert isinstance(node, Node), (name, node)
        return node


@dataclass(frozen=True)
class Miss:
    """Why and at which node a pattern does not match."""

    cause: Cause
    node: object
    detail: str = ""


class Pattern:
    """A tree of what is wanted."""

    def match(self, node: object) -> Match | Miss:
        """Match the tree whose outermost operation is `node`."""
        bound: dict[str, AnyValue] = {}
        miss = self._match(node, bound, inner=False)
        if miss is not None:
            return miss
        assert isinstance(node, Node)
        return Match(node, bound)

    def _match(self, value: object, bound: dict[str, AnyValue], *, inner: bool) -> Miss | None:
        raise NotImplementedError


@dataclass(frozen=True)
class Any(Pattern):
    """Any operand at all, bound to `name`; the same name twice must be the same value."""

    name: str

    def _match(self, value: object, bound: dict[str, AnyValue], *, inner: bool) -> Miss | None:
        if self.name in bound and bound[self.name] is not value and bound[self.name] != value:
            return Miss(Cause.OTHER_VALUE, value, f"{self.name} is {bound[self.name]} elsewhere")
        bound[self.name] = value
        return None


@dataclass(frozen=True)
class Const(Pattern):
    """A parameter or buffer (a get_attr node), bound to `name`."""

    name: str

    def _match(self, value: object, bound: dict[str, AnyValue], *, inner: bool) -> Miss | None:
        if not (isinstance(value, Node) and value.op == "get_attr"):
            return Miss(Cause.NOT_CONSTANT, value, self.name)
        bound[self.name] = value
        return None


class OneOf(Pattern):
    """The first of `patterns` that matches, which is not gone back on; where none does, the miss is the last one's."""

    def __init__(self, first: Pattern, *others: Pattern) -> None:
        self.patterns = first, *others

    def _match(self, value: object, bound: dict[str, AnyValue], *, inner: bool) -> Miss | None:
        miss = None
        for pattern in self.patterns:
            own = dict(bound)
            miss = pattern._match(value, own, inner=inner)
            if miss is None:
                bound.update(own)
                return None
        return miss


class Op(Pattern):
    """A call of one of `targets` with operands that match `operands`, bound to `name` where given.

    An inner operation must have one user, since a rewrite swallows it; `shared=True` is for operations that a rewrite
    leaves standing (a dequantize that others read as well).
    """

    def __init__(
        self, targets: Iterable[object], *operands: Pattern, name: str | None = None, shared: bool = False
    ) -> None:
        self.targets = frozenset(targets)
        self.operands = operands
        self.name = name
        self.shared = shared

    def _match(self, value: object, bound: dict[str, AnyValue], *, inner: bool) -> Miss | None:
        if not isinstance(value, Node) or value.op == "placeholder" or value.target not in self.targets:
            return Miss(Cause.OTHER_OP, value)
        if inner and not self.shared and len(value.users) != 1:
            return Miss(Cause.SHARED_INTERMEDIATE, value, f"{len(value.users)} users")
        if value.kwargs or len(value.args) != len(self.operands):
            return Miss(Cause.ARITY, value, f"{len(value.args)} operands, expected {len(self.operands)}")
        for pattern, operand in zip(self.operands, value.args, strict=True):
            miss = pattern._match(operand, bound, inner=True)
            if miss is not None:
                return miss
        if self.name is not None:
            bound[self.name] = value
        return None
