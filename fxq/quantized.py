"""The result: a GraphModule that keeps its report, its graph and its provenance through pickle and deepcopy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.graph import PythonCode
from torch.jit import _trace as jit
from torch.nn.modules import module as hooks

from fxq.codegen import Source
from fxq.decisions import Report
from fxq.encoding import decode, encode
from fxq.expansion import summary
from fxq.gradients import asking, refuse_gradients, refuse_tangents
from fxq.graph import STATE
from fxq.outputs import dequantized, output_qparams
from fxq.qtypes import QParams
from fxq.refusals import without_gradients, wrong_dtype


class QuantizedModule(GraphModule):
    """A GraphModule made by fxq; `report` says what became of every operation."""

    report: Report
    line_names: ClassVar[list[str]]
    _run: Callable[..., Any]

    @classmethod
    def of(cls, gm: GraphModule, report: Report) -> QuantizedModule:
        """Take over a graph and its constants."""
        module = cls(gm, gm.graph)
        module.report = report
        module.meta[STATE] = gm.meta.get(STATE, ())
        for parameter in module.parameters():
            if parameter.is_leaf:  # those of a scripted module are computed
                parameter.requires_grad_(False)
        module.eval()
        return module

    @property
    def output_qparams(self) -> list[QParams | None]:
        """For each tensor that a call returns, in order: scale and zero point, None where it is not quantized.

        There are such tensors under `Recipe(outputs="uint8")`: x = scale * (q - zero_point).
        """
        return output_qparams(self.graph)

    def dequantize(self, outputs: Any) -> Any:
        """What a call returned, in its structure, with float32 for all that is quantized (`output_qparams`)."""
        return dequantized(outputs, self.output_qparams)

    @property
    def code(self) -> str:
        """The Python code of `forward`; the layers inside a chain stand above its call as comments."""
        lines = []
        chains = {node.name: node for node in self.graph.nodes if "inside" in node.meta}
        for line in super().code.splitlines():
            node = chains.get(line.partition("=")[0].strip())
            if node is not None:
                indent = line[: len(line) - len(line.lstrip())]
                lines += [f"{indent}# {name}: {op} {text}" for name, op, text in summary(self, node)]
            lines.append(line)
        return "\n".join(lines)

    def recompile(self) -> PythonCode:
        """As fx does it, but what runs has a shorter way to operations and constants: of a small model, half the time.

        How they are reached and called stands in `fxq.codegen`; `code` shows them as fx does.
        """
        code = super().recompile()
        plain, direct = (Source(self, direct=direct) for direct in (False, True))
        type(self).forward, type(self).line_names = plain.compile(f"<fxq {id(self)}>"), plain.names
        type(self)._run = direct.compile(f"<fxq {id(self)}, direct>")
        # torch.compile counts compilations per code object and stops at eight: each model has its own.
        call = FunctionType(_call.__code__.replace(), globals(), "__call__")
        type(self).__call__ = call  # type: ignore[method-assign]
        return code

    def __reduce__(self) -> Any:
        return QuantizedModule._restored, (encode(self), self.report.to_dict(), dict(self.named_modules_called()))

    @classmethod
    def _restored(cls, graph: dict[str, Any], report: dict[str, Any], modules: dict[str, nn.Module]) -> QuantizedModule:
        return cls.of(decode(graph, modules, trust=True), Report.from_dict(report))

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedModule:
        copied = super().__deepcopy__(memo)
        assert isinstance(copied, QuantizedModule)
        copied.report = Report.from_dict(self.report.to_dict())
        return copied

    def named_modules_called(self) -> list[tuple[str, nn.Module]]:
        """The modules that the graph calls as they are, by path."""
        paths = dict.fromkeys(str(node.target) for node in self.graph.nodes if node.op == "call_module")
        return [(path, self.get_submodule(path)) for path in paths]


_module_call = nn.Module.__call__
_is_compiling, _is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled


def _call(self: QuantizedModule, *args: Any, **kwargs: Any) -> Any:
    """What `nn.Module.__call__` does; the way through it only where a hook or a tracer may stand on it.

    A failure costs nothing where there is none: it is told in the user's terms where an input's dtype is its cause.
    """
    own = self.__dict__
    try:
        if (
            own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "forward" in own
            or "_compiled_call_impl" in own
            or nn.Module.__call__ is not _module_call
            or hooks._global_forward_hooks
            or hooks._global_forward_pre_hooks
            or jit._trace_module_map is not None  # torch.jit.trace: what is called so becomes a module in it
        ):
            run: Callable[..., Any] = partial(nn.Module.__call__, self)
        else:
            run = self.forward if _is_compiling() else self._run
        if forward_ad._current_level >= 0:
            refuse_tangents((args, kwargs), partial(without_gradients, self, args, kwargs))
        if _is_grad_enabled():
            for value in (*args, *kwargs.values()) if kwargs else args:
                if getattr(value, "requires_grad", True):  # a container may hold tensors that do
                    cause = asking((args, kwargs))
                    if cause is None:
                        break
                    what = "an integer model" if _is_compiling() else without_gradients(self, args, kwargs, cause)
                    return refuse_gradients(run(*args, **kwargs), cause, what)
        return run(*args, **kwargs) if kwargs else run(*args)
    except (RuntimeError, TypeError, ValueError) as error:
        told = wrong_dtype(self, args, kwargs, error.__traceback__, self.report.recipe)
        if told is None:
            raise
        raise told from error


def weight_bytes(gm: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory counted once."""
    strided = [t if t.layout is torch.strided else t.coalesce().values() for t in (*gm.parameters(), *gm.buffers())]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in strided}
    return sum(storages.values())
