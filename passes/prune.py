"""prune: dead nodes and orphan parameters, buffers and submodules go.

What has a side effect stays: guards, and operations that modify memory in place.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule

from fxq.graph import drop_unread, erase_unread
from fxq.pipeline import Context, Numbers
from fxq.stages import Stage


@dataclass(frozen=True)
class Prune:
    """See the module's docstring."""

    name: str = "prune"
    takes: Stage = Stage.INTEGER
    gives: Stage = Stage.INTEGER
    numbers: Numbers = Numbers.SAME

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of nodes and constants removed."""
        before = _constants(gm)
        nodes = erase_unread(gm)
        gm.delete_all_unused_submodules()
        drop_unread(gm)
        _delete_empty_submodules(gm)
        return nodes + before - _constants(gm)


def _constants(gm: GraphModule) -> int:
    return len(list(gm.named_parameters(remove_duplicate=False))) + len(list(gm.named_buffers(remove_duplicate=False)))


def _delete_empty_submodules(gm: GraphModule) -> None:
    """Modules that hold nothing any more and are not called."""
    called = {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}
    for path, module in reversed(list(gm.named_modules())):
        holds = bool(module._parameters or module._buffers or module._modules)
        inside = any(path == name or path.startswith(f"{name}.") for name in called)
        if path and not holds and not inside:
            gm.delete_submodule(path)


PASS = Prune()
