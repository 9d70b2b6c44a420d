"""What a model's code reads from elsewhere than its inputs: clocks, and the random numbers of Python and NumPy.

While a model is traced, such functions give the user's code a symbol. Nothing becomes of one that is printed or left
alone. Where a tensor is computed with it, or Python decides on it, the trace is refused: the graph would hold the
number of this one call for good. Gradients, copies of modules and seeds are refused as they are asked for. NumPy's
product of sizes, which would decide on each, is Python's.
"""

from __future__ import annotations

import copy
import math
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from fxq.errors import TraceError
from fxq.tracing.origin import Origin, is_internal
from fxq.tracing.recorder import Recorder
from fxq.tracing.symbols import Source, is_symbol

NUMBER = "outside"
"""In the `meta` of a node: the text of the call that gave its number."""
_CLOCKS = ("time", "perf_counter", "monotonic", "process_time", "thread_time")
_FOUND: dict[str, tuple[Any, tuple[str, ...]]] = {
    "time": (time, (*_CLOCKS, *(f"{name}_ns" for name in _CLOCKS))),
    "random": (random, ("random", "uniform", "randint", "randrange", "gauss", "normalvariate", "betavariate")),
    "np.random": (np.random, ("rand", "random", "random_sample", "uniform", "normal", "randn", "randint")),
}
_NUMBERS: list[tuple[Callable[..., Any], str]] = [
    (getattr(module, name), f"{place}.{name}()")
    for place, (module, names) in _FOUND.items()
    for name in names
    if hasattr(module, name)
]
"""As they are when no other thread traces."""
_SEEDS: tuple[tuple[dict[str, Any], str], ...] = tuple(
    (vars(scope), name) for name in ("manual_seed", "seed", "set_rng_state") for scope in (torch, torch.random)
)
"""Where torch has what sets the state of its random numbers."""
_PRODUCT, _COPY, _GRADIENTS = np.prod, copy.deepcopy, (torch.autograd.grad, torch.autograd.backward)
StandIn = tuple[dict[str, Any], str, Callable[..., Any]]
"""Where a function is known by which name, and what is to be there."""


def stand_ins(recorder: Recorder) -> Iterator[StandIn]:
    """For each such function, under the names that the modules of the model's own code have for it as well."""
    found: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
        *((function, partial(_number, recorder, function, text)) for function, text in _NUMBERS),
        *((function, partial(_gradient, recorder, function)) for function in _GRADIENTS),
        *((scope[name], partial(_seed, recorder, scope[name])) for scope, name in _SEEDS),
        (_COPY, partial(_copy, recorder, _COPY)),
        (_PRODUCT, _product),
    ]
    for scope, name in _SEEDS:
        yield scope, name, partial(_seed, recorder, scope[name])
    own = {type(module).__module__ for module in recorder.root.modules()}
    scopes = [vars(module) for module in (time, random, np.random, np, copy, torch.autograd)]
    scopes += [vars(sys.modules[name]) for name in own if name in sys.modules and not name.startswith("torch.")]
    for scope in scopes:
        for name, value in list(scope.items()):
            for function, stand_in in found:
                if value is function or (callable(value) and _same_method(value, function)):
                    yield scope, name, stand_in


def _same_method(value: Any, function: Any) -> bool:
    """Whether both are one method of one object, as each of `random`'s functions is."""
    owner = getattr(function, "__self__", None)
    return isinstance(owner, random.Random) and getattr(value, "__self__", None) is owner and value == function


def check(recorder: Recorder) -> None:
    """Raise `TraceError` where such a number has become a part of the graph."""
    for node in recorder.graph.nodes:
        if NUMBER in node.meta:
            origin: Origin = node.meta["origin"]
            what = f"{origin.line or 'the model'} computes with `{node.meta[NUMBER]}`, another number at each call"
            raise TraceError(what, "give it to the model as an input", origin.module, final=True)


def _is_users(recorder: Recorder) -> bool:
    """Whether the model's own code is calling, from two frames up."""
    idle = recorder.busy or recorder.thread != threading.get_ident()
    return not idle and not is_internal(sys._getframe(2).f_code.co_filename)


def _number(recorder: Recorder, function: Callable[..., Any], text: str, *args: Any, **kwargs: Any) -> Any:
    value = function(*args, **kwargs)
    if not _is_users(recorder):
        return value
    if not isinstance(value, int | float):
        recorder.refuse(f"draws numbers from `{text}`, others at each call", final=True)
    node = recorder.create("call_function", function, pure=True)
    node.meta[NUMBER] = text
    return recorder.symbol(value, node, text, Source.OUTSIDE)


def _product(numbers: Any, *args: Any, **kwargs: Any) -> Any:
    several = isinstance(numbers, tuple | list) and any(map(is_symbol, numbers))
    return math.prod(numbers) if several and not args and not kwargs else _PRODUCT(numbers, *args, **kwargs)


def _copy(recorder: Recorder, function: Callable[..., Any], x: Any, *args: Any) -> Any:
    if isinstance(x, nn.Module) and _is_users(recorder):
        recorder.refuse("copies a module as it runs (copy.deepcopy); copy it once, in __init__", final=True)
    return function(x, *args)


def _seed(recorder: Recorder, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if _is_users(recorder):
        recorder.refuse("seeds torch's random numbers, which a graph does not", final=True)
    return function(*args, **kwargs)


def _gradient(recorder: Recorder, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not recorder.busy and recorder.thread == threading.get_ident():
        recorder.refuse("computes a gradient (torch.autograd), which a graph of the forward alone cannot", final=True)
    return function(*args, **kwargs)
