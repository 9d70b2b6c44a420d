"""How users hand over inputs: a tensor, a tuple of positional arguments, a dict of keyword arguments, or both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from fxq.errors import CalibrationError, InputError
from fxq.tracing.values import map_tensors


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the model."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def clone(self) -> Call:
        """The same arguments in memory of their own, so that an in-place op cannot reach the user's."""
        return Call(*map_tensors((self.args, self.kwargs), lambda tensor: tensor.detach().clone()))

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Each tensor with a name for messages: `input 0`, `input 'mask'`, `input 0['ids']`."""
        named: list[tuple[object, Any]] = [*enumerate(self.args), *self.kwargs.items()]
        for name, value in named:
            yield from _named(value, f"input {name!r}")


def _named(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """Each tensor in `value`, with its path behind `name`."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _named(item, f"{name}[{key!r}]")
    elif is_dataclass(value) and not isinstance(value, type):
        for known in fields(value):
            yield from _named(getattr(value, known.name), f"{name}.{known.name}")
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        for key in value._fields:
            yield from _named(getattr(value, key), f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _named(item, f"{name}[{i}]")


def as_call(example: object, kwargs: Mapping[str, Any] | None = None) -> Call:
    """One call from what the user gave: a tensor, a tuple or list of positional arguments, a dict of keyword ones."""
    if isinstance(example, Mapping):
        if not all(isinstance(key, str) for key in example):
            raise InputError(
                f"example_inputs is a dict with keys {list(example)}: a dict means keyword arguments, whose keys are "
                "names; wrap a dict that is itself an argument in a tuple"
            )
        return Call((), {**example, **(kwargs or {})})
    if type(example) in (tuple, list):
        assert isinstance(example, tuple | list)
        return Call(tuple(example), dict(kwargs or {}))
    if example is None:
        return Call((), dict(kwargs or {}))
    return Call((example,), dict(kwargs or {}))


def check_kind(name: str, tensor: torch.Tensor) -> None:
    """Raise `InputError` for a tensor of a kind that no graph of fxq takes."""
    if tensor.is_nested:
        raise InputError(f"{name} is a nested tensor; pad it with torch.nested.to_padded_tensor")
    if tensor.layout is not torch.strided:
        raise InputError(f"{name} is sparse ({tensor.layout}); give it dense, by .to_dense()")
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        kind = type(tensor).__name__
        raise InputError(f"{name} is a tensor of the class {kind}; give a plain one: tensor.as_subclass(torch.Tensor)")


def check_finite(call: Call, what: str) -> None:
    """Raise `CalibrationError` when a float tensor of `call` holds NaN or infinity; a mask of 0 and -inf may."""
    for name, tensor in call.tensors():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            if bool(((tensor == 0) | (tensor == -torch.inf)).all()):
                continue
            bad = torch.nonzero(~torch.isfinite(tensor.reshape(-1)))[0].item()
            value = tensor.reshape(-1)[int(bad)].item()
            raise CalibrationError(
                f"{what}: {name} holds {value} at flat index {bad} (shape {list(tensor.shape)}); "
                "remove or repair that sample"
            )


def calibration_calls(data: Iterable[Any] | Tensor, example: Call) -> Iterator[Call]:
    """Calls from calibration data: batches like the example inputs, or (inputs..., labels) as DataLoaders yield.

    A batch with more positional entries than the example has (labels and the like) is cut to the example's.
    Raises `InputError` where a batch has fewer, or is of another kind.
    """
    if isinstance(data, Tensor):
        raise InputError(
            f"calibration_data is one tensor of shape {list(data.shape)}; give an iterable of batches: [tensor]"
        )
    if isinstance(data, Mapping):
        raise InputError("calibration_data is a dict, as one batch may be; give an iterable of batches: [batch]")
    try:
        batches = iter(data)
    except TypeError:
        raise InputError(f"calibration_data is a {type(data).__name__}; give an iterable of batches") from None
    arity = len(example.args)
    for index, batch in enumerate(batches):
        call = as_call(batch)
        if arity and not call.args and isinstance(batch, Mapping) and arity == 1:
            # The model takes one dict: a DataLoader of such a model yields the dict itself.
            call = Call((batch,)) if isinstance(example.args[0], Mapping) else call
        if len(call.args) < arity or (not arity and call.args):
            raise InputError(
                f"calibration batch {index} has {len(call.args)} positional inputs, the examples have {arity}; "
                "each batch must look like example_inputs (labels may follow)"
            )
        call = Call(call.args[:arity], call.kwargs or example.kwargs)
        _check_like(call, example, f"calibration batch {index}")
        yield call


def _check_like(call: Call, example: Call, what: str) -> None:
    """Raise `InputError` for what is no tensor on the CPU where the example has one."""
    given, wanted = ({**dict(enumerate(each.args)), **each.kwargs} for each in (call, example))
    for key, value in given.items():
        if isinstance(wanted.get(key), Tensor) and not isinstance(value, Tensor | int | float | complex):
            kind = type(value).__name__
            raise InputError(f"{what}: input {key!r} is a {kind}, where the examples have a tensor; make it one")
    for name, tensor in call.tensors():
        if tensor.device.type != "cpu":
            raise InputError(f"{what}: {name} is on the device {tensor.device}, the model on cpu; move it with .cpu()")
