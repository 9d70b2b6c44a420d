"""block: a run of operations on the rows of a transformer as one call: its encoder, or what of it runs on integers.

    values  = inputs, then one more for each step: op(*args), args values, constants and numbers
    result  = those of the values that someone reads behind the block

Every value of a step is uint8 or float32 [B, T, width]; so are the inputs, masks excepted. Bit for bit what the ops
would give one by one, without a call, a tensor and memory of its own for each. `fxq.expansion.expand` takes a block
apart again. NumPy truth: that of the ops.

Rows know of one another in attentions only. What stands between two of them is a run: each thread takes its share of
the rows through all of its steps, and waits for no other. What an attention or another run reads lies in the memory of
a slice, a few sequences of a large batch; what a run alone reads lies in the memory of a thread.

The constants are one uint8 tensor, in which each begins at a multiple of 64; several blocks may read one.

The steps are one int64 tensor, the program. It begins with its magic, the number of constants, and of each of them
where it lies: bytes before it, dtype, elements. After steps, inputs that are rows, and bytes for a row in the memory of
a slice and in that of a thread, each step is the number of its op in `STEPS`, its arguments, each after its tag, and
for each thing that it writes where: bytes of a row before it, in the slice's memory and behind that in the thread's, or
-1 - i for result i of the block.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxq import kernels

STEPS = (
    "part",
    "qlinear",
    "qlinear_float",
    "qlinear_act",
    "qlinear_act_quantize",
    "qlinears",
    "qattention",
    "norm",
    "norm_quantize",
    "norm_and_quantize",
    "qfeed_forward",
)
"""What may stand in a block; "part" takes one of the several values of a step: part(value, i)."""

_NAMES = ("gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "relu", "hardsigmoid", "hardswish", "layer_norm", "rms_norm")
_MAGIC = int.from_bytes(b"fxqblock", "little")
_NONE, _INTEGER, _REAL, _NAME, _VALUE, _CONSTANT, _LIST = range(7)
_DTYPES = (torch.int8, torch.int32, torch.float32)
_LINE = 64


@dataclass(frozen=True)
class Value:
    """An argument: the value number `index` of the block, its inputs first."""

    index: int


@dataclass(frozen=True)
class Constant:
    """An argument: the constant number `index` of the block."""

    index: int


@dataclass(frozen=True)
class Place:
    """Where a constant lies among the others: bytes before it, its dtype and elements."""

    begin: int
    dtype: torch.dtype
    count: int

    @property
    def end(self) -> int:
        """Bytes before what follows it."""
        return self.begin + self.count * self.dtype.itemsize

    def of(self, constants: Tensor) -> Tensor:
        """The constant, a view of `constants`; raises ValueError where it does not lie in them."""
        is_bytes = constants.dtype == torch.uint8 and constants.dim() == 1
        if not is_bytes or self.count < 0 or self.begin < 0 or self.begin % _LINE or self.end > constants.numel():
            raise ValueError(
                f"fxq: a block's constants are {constants.dtype}{list(constants.shape)}, and none lies at {self}"
            )
        return constants[self.begin : self.end].view(self.dtype)


@dataclass(frozen=True)
class Written:
    """What a step writes: float32 or uint8 [B, T, width]; result: which of the block's, None for its memory."""

    width: int
    is_float: bool
    result: int | None = None


@dataclass(frozen=True)
class Step:
    """op(*args), all of the op's arguments; nothing is written by a part."""

    op: str
    args: tuple[Any, ...]
    writes: tuple[Written, ...] = ()


def overload(name: str) -> torch._ops.OpOverload:
    """The op of a step that is no part."""
    found = getattr(torch.ops.fxq, name).default
    assert isinstance(found, torch._ops.OpOverload)
    return found


def all_arguments(name: str, args: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of a call as the op takes them, with those that were left to their defaults."""
    arguments = overload(name)._schema.arguments
    given = [
        float(value) if type(value) is int and "float" in str(argument.type) else value
        for value, argument in zip(args, arguments, strict=False)
    ]
    return (*given, *(argument.default_value for argument in arguments[len(args) :]))


def gather(tensors: Iterable[Tensor]) -> tuple[Tensor, list[Place]]:
    """The constants of blocks: one uint8 tensor, and where each of `tensors` lies in it, each once.

    They are views of it from then on. Each gives up its own memory as it is copied, so that there is no second copy of
    all of them.
    """
    known: dict[int, tuple[Tensor, Place]] = {}
    places, end = [], 0
    for tensor in tensors:
        assert tensor.dim() == 1, tensor.shape
        begin = -(-end // _LINE) * _LINE
        _, place = known.setdefault(id(tensor), (tensor, Place(begin, tensor.dtype, tensor.numel())))
        places.append(place)
        end = max(end, place.end)
    constants, end = torch.empty(end, dtype=torch.uint8), 0
    for tensor, place in known.values():
        constants[end : place.begin] = 0
        own, end = place.of(constants), place.end
        tensor.data = own.copy_(tensor.detach())
    return constants, places


def encode(steps: Sequence[Step], inputs: int, masks: int, constants: Sequence[Place]) -> Tensor:
    """The program of `steps`, which read `inputs` rows, after them `masks` masks, and constants that lie there."""
    places, sizes = _places(steps, inputs + masks)
    words = [_MAGIC, len(constants)]
    words += [word for place in constants for word in (place.begin, _DTYPES.index(place.dtype), place.count)]
    words += [len(steps), inputs, *sizes]
    for i, step in enumerate(steps):
        words.append(STEPS.index(step.op))
        for argument in step.args:
            words += _words(argument)
        words += [place if w.result is None else -1 - w.result for w, place in zip(step.writes, places[i], strict=True)]
    return torch.tensor(words, dtype=torch.int64)


def _words(argument: Any) -> list[int]:
    match argument:
        case None:
            return [_NONE, 0]
        case bool() | int():
            return [_INTEGER, int(argument)]
        case float():
            return [_REAL, struct.unpack("<q", struct.pack("<d", argument))[0]]
        case str():
            return [_NAME, _NAMES.index(argument)]
        case Value(index):
            return [_VALUE, index]
        case Constant(index):
            return [_CONSTANT, index]
        case list() | tuple():
            return [_LIST, len(argument), *(word for item in argument for word in _words(item))]
    raise TypeError(f"a block has no argument {argument!r}")


def _places(steps: Sequence[Step], first: int) -> tuple[list[list[int]], tuple[int, int]]:
    """Where each thing that a step writes lies in the memory of a row; how large those of a slice and a thread are.

    What no later step reads makes room again: in the memory of a thread for the next step, in that of a slice for the
    next run, as other rows are elsewhere in this one. first: the number of the first step's value.
    """
    runs = _runs(steps)
    readers = _readers(steps, first)
    homes: list[list[tuple[bool, int]]] = []  # whether in the slice's memory, and where there
    held: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]] = ([], [])  # begin, end, the last step reading
    sizes = [0, 0]
    for i, step in enumerate(steps):
        held = [h for h in held[0] if h[2] >= i], [h for h in held[1] if runs[h[2]] >= runs[i]]
        homes.append([])
        for part, written in enumerate(step.writes):
            reading = readers.get((i, part), [])
            shared = any(runs[reader] != runs[i] for reader in reading)
            begin, length = 0, -(-written.width * (4 if written.is_float else 1) // _LINE) * _LINE
            for other, end, _ in sorted(held[shared]):
                if other < begin + length and begin < end:
                    begin = end
            homes[-1].append((shared, begin))
            if written.result is None:
                held[shared].append((begin, begin + length, max(reading, default=i)))
                sizes[shared] = max(sizes[shared], begin + length)
    own, slice_ = sizes
    return [[begin if shared else slice_ + begin for shared, begin in written] for written in homes], (slice_, own)


def _runs(steps: Sequence[Step]) -> list[int]:
    """The number of the run that each step stands in; an attention is one by itself."""
    numbers: list[int] = []
    for i, step in enumerate(steps):
        begins = i > 0 and "qattention" in (step.op, steps[i - 1].op)
        numbers.append(numbers[-1] + begins if numbers else 0)
    return numbers


def _readers(steps: Sequence[Step], first: int) -> dict[tuple[int, int], list[int]]:
    """For each step and thing that it writes, the steps that read it."""
    shown = {first + i: (i, 0) for i, step in enumerate(steps)}  # what each value is, as step and thing
    readers: dict[tuple[int, int], list[int]] = {}
    for i, step in enumerate(steps):
        if step.op == "part":
            shown[first + i] = (shown[step.args[0].index][0], step.args[1])
            continue
        for value in _values(step.args):
            if value in shown:
                readers.setdefault(shown[value], []).append(i)
    return readers


def _values(argument: Any) -> list[int]:
    if isinstance(argument, list | tuple):
        return [index for item in argument for index in _values(item)]
    return [argument.index] if isinstance(argument, Value) else []


@dataclass(frozen=True)
class Program:
    """What `decode` reads; results: for each result of the block, the step and which of the things that it writes."""

    steps: tuple[Step, ...]
    inputs: int
    constants: tuple[Place, ...]
    results: tuple[tuple[int, int], ...]


class _Reader:
    def __init__(self, program: Tensor) -> None:
        self.words = program.tolist()
        self.at = 0

    def word(self) -> int:
        if self.at == len(self.words):
            raise ValueError(f"fxq: a block's program of {self.at} words is cut off")
        self.at += 1
        found = self.words[self.at - 1]
        assert isinstance(found, int)
        return found

    def place(self) -> Place:
        begin, dtype, count = (self.word() for _ in range(3))
        if not 0 <= dtype < len(_DTYPES):
            raise ValueError(f"fxq: a block's program has a constant of dtype {dtype}")
        return Place(begin, _DTYPES[dtype], count)

    def argument(self, type_: str) -> Any:
        tag, word = self.word(), self.word()
        match tag:
            case 0:
                return None
            case 1:
                return bool(word) if type_ == "bool" else word
            case 2:
                return struct.unpack("<d", struct.pack("<q", word))[0]
            case 3 if 0 <= word < len(_NAMES):
                return _NAMES[word]
            case 4:
                return Value(word)
            case 5:
                return Constant(word)
            case 6:
                return [self.argument(type_) for _ in range(word)]
        raise ValueError(f"fxq: a block's program has an argument {tag}, {word}")


def decode(program: Tensor) -> Program:
    """What `encode` wrote, without widths; raises ValueError where it is damaged."""
    reader = _Reader(program)
    magic = reader.word()
    if magic != _MAGIC:
        raise ValueError(f"fxq: a block's program begins with {magic}, expected {_MAGIC}")
    places = tuple(reader.place() for _ in range(reader.word()))
    count, inputs, _, _ = (reader.word() for _ in range(4))
    steps: list[Step] = []
    results: dict[int, tuple[int, int]] = {}
    for i in range(count):
        code = reader.word()
        if not 0 <= code < len(STEPS):
            raise ValueError(f"fxq: a block's program has step {code}")
        if code == 0:
            steps.append(Step("part", (reader.argument("Tensor"), reader.argument("int"))))
            continue
        schema = overload(STEPS[code])._schema
        args = tuple(reader.argument(str(argument.type)) for argument in schema.arguments)
        writes = len(args[1]) if STEPS[code] == "qlinears" else len(schema.returns)
        for part in range(writes):
            place = reader.word()
            if place < 0:
                results[-1 - place] = (i, part)
        steps.append(Step(STEPS[code], args))
    if sorted(results) != list(range(len(results))):
        raise ValueError(f"fxq: a block's program writes the results {sorted(results)}")
    return Program(tuple(steps), inputs, places, tuple(results[i] for i in range(len(results))))


def _qblock(inputs: list[Tensor], program: Tensor, constants: Tensor, widths: list[int]) -> list[Tensor]:
    """Step by step, through the portable ops."""
    read = decode(program)
    values: list[Any] = list(inputs)
    tensors = [place.of(constants) for place in read.constants]
    if any(x.dim() != 3 or x.shape[:2] != inputs[0].shape[:2] for x in inputs[: read.inputs]):
        raise ValueError(f"fxq::qblock: inputs {[list(x.shape) for x in inputs]}, expected [B, T, K], B and T alike")

    def of(argument: Any) -> Any:
        if isinstance(argument, list):
            return [of(item) for item in argument]
        if not isinstance(argument, Value | Constant):
            return argument
        held = values if isinstance(argument, Value) else tensors
        if not 0 <= argument.index < len(held):
            raise ValueError(f"fxq::qblock: the program reads {argument} of {len(held)}")
        return held[argument.index]

    for step in read.steps:
        args = [of(argument) for argument in step.args]
        values.append(args[0][args[1]] if step.op == "part" else kernels.portable(step.op)(*args))
    steps = values[len(inputs) :]
    results = [steps[i][part] if isinstance(steps[i], list | tuple) else steps[i] for i, part in read.results]
    if [x.shape[-1] * (-1 if x.dtype == torch.float32 else 1) for x in results] != widths:
        raise ValueError(f"fxq::qblock: results {[list(x.shape) for x in results]}, expected widths {widths}")
    return results


def _empty(inputs: list[Tensor], widths: list[int]) -> list[Tensor]:
    batch, tokens, _ = inputs[0].shape
    return [
        inputs[0].new_empty(batch, tokens, abs(width), dtype=torch.float32 if width < 0 else torch.uint8)
        for width in widths
    ]


qblock = kernels.define(
    "qblock(Tensor[] inputs, Tensor program, Tensor constants, int[] widths) -> Tensor[]",
    _qblock,
    lambda inputs, program, constants, widths: _empty(inputs, widths),
)
"""widths: of the results, that of a float32 one negative."""
