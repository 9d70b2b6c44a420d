"""Copies of modules that share the memory of their tensors, so that a large model is in memory once."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import nn

from fxq.tracing.values import storage

M = TypeVar("M", bound=nn.Module)
_PLAIN = (torch.Tensor, nn.Parameter, nn.Buffer)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The parameters and buffers of a module, each once."""
    return [*module.parameters(), *module.buffers()]


def aliases(tensors: Iterable[torch.Tensor]) -> dict[int, torch.Tensor]:
    """A memo for `copy.deepcopy` by which copies of these tensors share their memory; those of odd kinds do not."""
    memo = {}
    for tensor in tensors:
        if type(tensor) in _PLAIN and tensor.layout is torch.strided and not tensor.is_inference():
            alias = tensor.data
            memo[id(tensor)] = nn.Parameter(alias, tensor.requires_grad) if type(tensor) is nn.Parameter else alias
    return memo


def shared(module: M) -> M:
    """A copy of a module on the memory of its parameters and buffers. Nobody may write to it."""
    return copy.deepcopy(module, aliases(tensors_of(module)))


def own(module: nn.Module, others: Iterable[torch.Tensor]) -> None:
    """Give the parameters and buffers of a module that share memory with `others` memory of their own."""
    foreign = {storage(tensor) for tensor in others}
    made: dict[int, torch.UntypedStorage] = {}
    for tensor in tensors_of(module):
        key = storage(tensor)
        if key in foreign:
            if key not in made:
                made[key] = tensor.untyped_storage().clone()  # type: ignore[no-untyped-call]
            offset, shape, strides = tensor.storage_offset(), tensor.shape, tensor.stride()
            tensor.data = tensor.detach().new_empty(0).set_(made[key], offset, shape, strides)


def empty(module: nn.Module) -> None:
    """Free the memory of the parameters and buffers of a module: it may be in a cycle, which Python keeps for long."""
    for tensor in tensors_of(module):
        if tensor.layout is torch.strided:
            tensor.data = tensor.data.new_empty(0)


class Writes:
    """Whether anything has written to the tensors of `called`, a copy of `model` that has memory of its own."""

    def __init__(self, model: nn.Module, called: nn.Module) -> None:
        self._pairs = [
            (tensor, other, other._version)
            for tensor, other in zip(tensors_of(model), tensors_of(called), strict=True)
            if not other.is_inference()
        ]
        self._called = called

    def seen(self) -> bool:
        """By the tensors' versions, and by their bits, since `.data` has a version of its own."""
        now = {id(tensor) for tensor in tensors_of(self._called)}
        return any(
            id(other) not in now
            or other._version != version
            or (tensor.layout is torch.strided and not torch.equal(tensor, other))
            for tensor, other, version in self._pairs
        )
