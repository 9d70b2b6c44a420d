"""images: a run of operations on images as one call: a convolutional network, or what of it runs on integers.

    values  = inputs, then one more for each line of the program: op(*args), args values, constants and numbers
    results = those of the values that someone reads behind the run

Bit for bit what the ops would give one by one, without a call and a tensor for each. What only the run itself reads
lies in one piece of memory, which a thread keeps from call to call and in which each value takes the place of those
that nobody reads any more. `fxq.expansion.expand` takes it apart again. NumPy truth: that of the ops.

The program is text: the numbers of the results, then a line for each operation, its name and all its arguments.

     2
    quantize_channels_last v0. 0.033 126
    qconv v1. c0 c1 c2 '3x3 stride 2 pad 1' 126 0 0 255

v1 is a value and c1 a constant; v1. is a value that no later line reads.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fxq import kernels

STEPS = frozenset(
    {"flatten", "quantize", "quantize_channels_last", "dequantize", "requantize", "qadd", "qmul", "qgate", "qcat"}
    | {"qconv", "qconv_float", "qconv_act_quantize", "qconv_add", "qconv_transpose", "qconv_transpose_float"}
    | {"qmax_pool", "qavg_pool", "qadaptive_avg_pool", "qupsample_nearest", "qupsample_bilinear"}
    | {"lookup", "lookup_channels", "qlinear", "qlinear_float", "qlinear_act", "qlinear_act_quantize"}
    | {"qconv_fixed", "qconv_transpose_fixed", "qlinear_fixed", "qadd_fixed", "qmul_fixed", "requantize_fixed"}
    | {"qavg_pool_fixed", "qadaptive_avg_pool_fixed", "qupsample_bilinear_fixed"}
)
"""What may stand in a program: ops of fxq's, and torch.flatten."""
MOST_DIMENSIONS = 8
_WORD = re.compile(r"'[^']*'|[\[\]]|[^ \[\]]+")


class Word(str):
    """A value or a constant in a program, `v1` or `c1`; any other text is an argument."""


def encode(steps: Sequence[tuple[str, Sequence[Any]]], results: Sequence[int]) -> str:
    """The program of `steps`, an op and its arguments each."""
    read = {f"v{i}" for i in results}
    lines: list[str] = []
    for op, args in reversed(steps):
        words = [_word(arg, read) for arg in args]
        read |= {word.removesuffix(".") for arg in words for word in _WORD.findall(arg)}
        lines.append(" ".join([op, *words]))
    return "\n".join(["".join(f" {i}" for i in results), *reversed(lines), ""])


def _word(argument: Any, read: set[str]) -> str:
    if isinstance(argument, Word):
        return argument if argument in read or argument.startswith("c") else f"{argument}."
    if isinstance(argument, list | tuple):
        return f"[{' '.join(_word(item, read) for item in argument)}]"
    if isinstance(argument, str):
        assert not set("'\n").intersection(argument), argument
        return f"'{argument}'"
    assert argument is None or isinstance(argument, bool | int | float), argument
    return repr(argument)


def walk(
    program: str, inputs: Sequence[Any], constants: Sequence[Any], call: Callable[[str, list[Any]], Any]
) -> list[Any]:
    """The results of a program whose operations are done by `call`, from an op and its arguments.

    Raises ValueError where the program is damaged.
    """
    first, *lines = program.splitlines()
    values = list(inputs)

    def argument(word: str, rest: Iterator[str]) -> Any:
        if word == "[":
            items = []
            while (item := next(rest)) != "]":
                items.append(argument(item, rest))
            return items
        if word[0] in "vc":
            return (values if word[0] == "v" else constants)[int(word[1:].removesuffix("."))]
        if word[0] == "'":
            return word[1:-1]
        if word in _NAMED:
            return _NAMED[word]
        return int(word) if word.lstrip("-").isdecimal() else float(word)

    try:
        for line in lines:
            op, *words = _WORD.findall(line)
            rest = iter(words)
            if op not in STEPS:
                raise ValueError(f"it calls {op!r}")
            values.append(call(op, [argument(word, rest) for word in rest]))
        return [values[int(i)] for i in first.split()]
    except (ValueError, IndexError, StopIteration) as error:
        raise ValueError(f"fxq::qimages: the program is damaged: {error}") from error


_NAMED = {"None": None, "True": True, "False": False}


def target(op: str) -> Callable[..., Any]:
    """What a line calls."""
    if op == "flatten":
        return torch.flatten
    found = getattr(torch.ops.fxq, op).default
    assert isinstance(found, torch._ops.OpOverload)
    return found


def _portable(op: str, args: list[Any]) -> Any:
    return torch.flatten(*args).clone() if op == "flatten" else kernels.portable(op)(*args)


def _fake(op: str, args: list[Any]) -> Any:
    return torch.flatten(*args).clone() if op == "flatten" else target(op)(*args)


def _qimages(inputs: list[Tensor], constants: list[Tensor], program: str) -> list[Tensor]:
    return walk(program, inputs, constants, _portable)


qimages = kernels.define(
    "qimages(Tensor[] inputs, Tensor[] constants, str program) -> Tensor[]",
    _qimages,
    lambda inputs, constants, program: walk(program, inputs, constants, _fake),
)
