"""The user's call signature as placeholders, and the example inputs as values that the recorder knows."""

from __future__ import annotations

import copy
import inspect
import keyword
import operator
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import fx, nn

from fxq.errors import InputError, TraceError
from fxq.tracing.graph_functions import guard, set_signature, structure
from fxq.tracing.recorder import Recorder
from fxq.tracing.symbols import Source

_ABSENT = inspect.Parameter.empty
_FIXED = (bool, str, bytes, complex, torch.dtype, torch.device, torch.layout, torch.memory_format, Enum)
_MEANT = ("torch", "inf", "nan")
"""What torch.fx writes as it is into a graph's code, which any pass may come to need."""


@dataclass(frozen=True)
class Argument:
    """One parameter of the traced forward."""

    name: str
    kind: inspect._ParameterKind
    default: Any
    given: bool
    value: Any


def bind(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Argument]:
    """Match the examples with `forward`; `*args` and `**kwargs` become one parameter for each value given."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise InputError(
            f"the example inputs do not fit {type(model).__name__}.forward{signature}: {error}; "
            "give the arguments of one call"
        ) from error
    arguments = []
    taken = {*signature.parameters, *kwargs}
    for name, parameter in signature.parameters.items():
        given = name in bound.arguments
        value = bound.arguments.get(name, parameter.default)
        if parameter.kind is parameter.VAR_POSITIONAL:
            spread = list(value) if given else []
            while any(f"{name}_{i}" in taken for i in range(len(spread))):
                name += "_"
            named = ((f"{name}_{i}", item) for i, item in enumerate(spread))
            arguments += [Argument(each, parameter.POSITIONAL_OR_KEYWORD, _ABSENT, True, v) for each, v in named]
        elif parameter.kind is parameter.VAR_KEYWORD:
            named = ((_identifier(key, name), item) for key, item in (value.items() if given else ()))
            arguments += [Argument(key, parameter.KEYWORD_ONLY, _ABSENT, True, v) for key, v in named]
        else:
            arguments.append(Argument(name, parameter.kind, parameter.default, given, value))
    return arguments


def _identifier(key: str, name: str) -> str:
    """`key`, under which `**name` holds an argument, where code can have it as a parameter."""
    if not key.isidentifier() or keyword.iskeyword(key):
        raise InputError(f"argument {key!r} of `**{name}` has a name that no code can have; call it otherwise")
    return key


def check(arguments: list[Argument]) -> None:
    """Raise `TraceError` for what a graph cannot take apart, before a call could change it."""
    for argument in arguments:
        if argument.name in _MEANT:
            raise TraceError(
                f"argument `{argument.name}` has the name of what a graph's code means by it", "give it another name"
            )
        if argument.given:
            _check(argument.value, argument.name)


def _check(value: Any, text: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            _check(item, f"{text}[{key!r}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            _check(getattr(value, field.name), f"{text}.{field.name}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _check(item, f"{text}[{i}]")
    elif isinstance(value, torch.Tensor):
        if torch._C._functorch.is_functorch_wrapped_tensor(value):
            raise TraceError(f"argument `{text}` comes from torch.func (vmap, grad), which a graph cannot hold")
    elif value is not None and not isinstance(value, (*_FIXED, int, float)):
        raise TraceError(
            f"argument `{text}` is a {type(value).__name__}, which a graph cannot take apart; "
            "pass its tensors in a list, tuple, dict or dataclass, or leave it out"
        )


def place(recorder: Recorder, arguments: list[Argument]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Create the placeholders and the guards on them; return what to call the model with."""
    nodes = []
    for argument in arguments:
        default = () if argument.default is _ABSENT else (_literal(argument.default),)
        nodes.append(recorder.placeholder(argument.name, default))
    set_signature(recorder.graph, [argument.kind for argument in arguments])
    known = []
    for argument, node in zip(arguments, nodes, strict=True):
        known.append(argument)
        if not argument.given:
            default = _literal(argument.default)
            recorder.create(
                "call_function",
                guard,
                (node, default, f"the example inputs left argument `{argument.name}` at {default!r}"),
            )
            continue
        known[-1] = replace(argument, value=_known(recorder, argument.value, node, argument.name))
    return spread(known)


def spread(arguments: list[Argument]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments given as `place` hands them to the model."""
    args: list[Any] = []
    kwargs: dict[str, Any] = {}
    for position, argument in enumerate(arguments):
        if argument.given:
            if argument.kind is inspect.Parameter.KEYWORD_ONLY or len(args) < position:
                kwargs[argument.name] = argument.value
            else:
                args.append(argument.value)
    return tuple(args), kwargs


def _literal(default: Any) -> Any:
    """A default that code can spell; for any other, None, which the guard then insists on."""
    return default if type(default) in (int, float, bool, str, type(None), torch.dtype) else None


def _known(recorder: Recorder, value: Any, node: fx.Node, text: str) -> Any:
    """Return the value for the model to compute on, its tensors and numbers known to the recorder by their nodes."""
    if isinstance(value, list | tuple | dict) or (is_dataclass(value) and not isinstance(value, type)):
        shape = recorder.create("call_function", structure, (node,))
        expected = structure(value)
        recorder.create(
            "call_function", guard, (shape, expected, f"argument `{text}` was {expected} in the example inputs")
        )
    return _leaves(recorder, value, node, text)


def _leaves(recorder: Recorder, value: Any, node: fx.Node, text: str) -> Any:
    def part(operation: Callable[..., Any], key: Any, item: Any, suffix: str) -> Any:
        child = recorder.create("call_function", operation, (node, key), pure=True)
        return _leaves(recorder, item, child, text + suffix)

    recorder.texts[node] = text
    recorder.varying.add(node)
    if isinstance(value, torch.Tensor):
        return recorder.input(value.detach().clone(), node)
    if value is None or isinstance(value, _FIXED):
        recorder.create("call_function", guard, (node, value, f"argument `{text}` was {value!r} in the example inputs"))
        return value
    if isinstance(value, int | float):
        return recorder.symbol(value, node, text, Source.ARGUMENT)
    if isinstance(value, dict):
        copied: Any = copy.copy(value)
        for key, item in value.items():
            copied[key] = part(operator.getitem, key, item, f"[{key!r}]")
        return copied
    if is_dataclass(value) and not isinstance(value, type):
        copied = copy.copy(value)
        for field in fields(value):
            item = getattr(value, field.name)
            object.__setattr__(copied, field.name, part(getattr, field.name, item, f".{field.name}"))
        return copied
    items = [part(operator.getitem, i, item, f"[{i}]") for i, item in enumerate(value)]
    return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
