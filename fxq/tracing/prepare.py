"""The copy of the user's model that is traced: out of its wrappers, in eval mode, its weights as they are used.

It shares the memory of the model's parameters and buffers.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxq.errors import InputError
from fxq.tracing.graph_functions import TracingWarning
from fxq.tracing.sharing import aliases, tensors_of


def prepare(model: nn.Module) -> nn.Module:
    """Copy the model, in eval mode, out of its wrappers, with the effective value of each reparametrized weight."""
    model = _unwrapped(model)
    if any(module.training for module in model.modules()):
        warnings.warn("the model is in training mode; it is traced as in eval mode", TracingWarning, stacklevel=3)
    # deepcopy refuses tensors with a history, such as the weight that the old weight_norm leaves on its module.
    values = (value for module in model.modules() for value in module.__dict__.values())
    memo = aliases(tensors_of(model)) | {
        id(value): value.detach().clone() for value in values if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        prepared = copy.deepcopy(model, memo).eval()
    except Exception as error:
        raise InputError(
            f"{type(model).__name__} cannot be copied: {error}; give a model that copy.deepcopy takes"
        ) from error
    with torch.no_grad():
        for module in list(prepared.modules()):
            module._compiled_call_impl = None
            for name, child in module._modules.items():
                module._modules[name] = child if child is None else _unwrapped(child)
            _materialize(module)
    return prepared


def _unwrapped(model: nn.Module) -> nn.Module:
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif type(model).__name__ == "OptimizedModule":
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model


def _materialize(module: nn.Module) -> None:
    """Replace each reparametrized tensor (weight_norm, pruning, parametrize, ...) by the value that it has."""
    if parametrize.is_parametrized(module):
        # `remove_parametrizations` would edit the class, which the copy shares with the user's module.
        values = {name: getattr(module, name) for name in module.parametrizations}  # type: ignore[union-attr]
        learned = {name for name, chain in module.parametrizations.items() if list(chain.parameters())}  # type: ignore
        del module._modules["parametrizations"]
        module.__class__ = type(module).__bases__[0]
        module._load_state_dict_pre_hooks.clear()  # weight_norm's speaks of the parametrization, and cannot be pickled.
        for name, value in values.items():
            if name in learned:
                module.register_parameter(name, nn.Parameter(value.detach().clone()))
            else:
                module.register_buffer(name, value.detach().clone())
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)  # type: ignore[no-untyped-call]
