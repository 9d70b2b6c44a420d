"""The calls of one module in one run, told apart by their order, where no graph shows them: inside a leaf."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


class Calls:
    """How often each module has been called in the run that a thread is in; runs: how many have begun."""

    def __init__(self) -> None:
        self.runs = 0
        self._counts: dict[int, dict[str, int]] = {}

    def __reduce__(self) -> Any:
        return Calls, ()  # what is counted belongs to this process

    def begin(self) -> None:
        """This thread begins a run."""
        self.runs += 1
        self._counts[threading.get_ident()] = {}

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def turn(self, path: str) -> int:
        """Count one more call of the module at `path`; how many there were before it in this run."""
        counts = self._counts.setdefault(threading.get_ident(), {})
        counts[path] = counts.get(path, 0) + 1
        return counts[path] - 1


class Begin(nn.Module):
    """Stands first in a graph: a run begins, so that each module's next call is its first."""

    _is_impure = True  # so that fx keeps the call

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self) -> None:
        """Begin a run."""
        self.calls.begin()


class PerCall(nn.ModuleList):
    """Stands in the place of a module that is called several times in a run: one module for each call, in order.

    The last one is for all calls that there were no data for.
    """

    def __init__(self, calls: Calls, path: str, modules: Sequence[nn.Module]) -> None:
        super().__init__(modules)
        self.calls, self.path = calls, path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the one whose turn it is."""
        return self[min(self.calls.turn(self.path), len(self) - 1)](*args, **kwargs)


def share_equal(modules: Sequence[nn.Module]) -> None:
    """Let the parameters and buffers of the modules that have one path, dtype and value share one memory."""
    first: dict[str, list[torch.Tensor]] = {}
    for module in modules:
        for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
            known = first.setdefault(path, [])
            twin = next((t for t in known if t.dtype == tensor.dtype and torch.equal(t, tensor)), None)
            if twin is None:
                known.append(tensor)
            else:
                tensor.data = twin.data
