"""What an operation costs on this machine: timed once, where it was first met, kept in a file, looked up from then on.

A key is the operation with the dtypes and shapes of its tensors and what else shapes its work; scales and zero points
do not. Beside it stands what is done between two calls of the operation in a graph: how much other data passes, since
the weights of a large model do not stay in the caches, and whether many other operations run, since their code does not
stay there either. The file is JSON (key -> seconds) in the cache folder of the kernels, one per fxq, torch, processor,
instruction set and number of threads: read it, delete it, or look at it with `python -m fxq costs`.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.errors import FileError
from fxq.graph import submodule, target_name
from fxq.kernels.binary import cache

VERSION = 7
"""Of the file's format and of the way of timing."""
MANY = 24
"""Operations."""
AMONG = 1 << 20, 1 << 25
"""Bytes of a model's constants: below the first they stay in the caches; more than the second make no difference."""
_VALUES = re.compile(r"(zero_point|low|high)s?(_\w+)?|[zm]_\w+|shift|masked")
"""Arguments of fxq's operators that set values, not work: layers that differ in them share a key, and their timings."""


def costs_path() -> Path:
    """The file for this machine, this fxq and the number of threads in use."""
    info = kernels.info()
    machine = repr((VERSION, info.cpu, info.isa, info.torch, info.path.name if info.path else ""))
    digest = hashlib.sha256(machine.encode()).hexdigest()[:12]
    return cache() / f"costs-{info.isa}-{info.threads}threads-{digest}.json"


class Costs:
    """Seconds by key, those of the file and those measured since.

    path: the file, by default `costs_path()`. Raises `FileError` where it is there and cannot be read.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = costs_path() if path is None else path
        self.seconds = self._read()
        self._fresh: dict[str, float] = {}

    def of(self, key: str, measure: Callable[[], float]) -> float:
        """The seconds of the operation behind `key`; `measure` finds them out where the key is new."""
        if key not in self.seconds:
            self.seconds[key] = self._fresh[key] = measure()
        return self.seconds[key]

    def save(self) -> None:
        """Add what was measured to the file; it is there complete or not at all, also between processes."""
        if not self._fresh:
            return
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False, encoding="utf-8") as file:
                json.dump({"version": VERSION, "seconds": self._read() | self._fresh}, file, indent=1, sort_keys=True)
            Path(file.name).replace(self.path)
        except OSError as error:
            raise FileError(f"cannot write {self.path} ({error}); set FXQ_CACHE to a writable folder") from error
        self._fresh = {}

    def _read(self) -> dict[str, float]:
        try:
            plain = json.loads(self.path.read_text(encoding="utf-8"))
            return {str(key): float(value) for key, value in plain["seconds"].items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise FileError(f"{self.path} is not a file of costs ({error}); delete it, it is measured anew") from error


def key_of(gm: GraphModule, node: Node, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The key of what `node` does with these operands."""
    if node.op == "call_module":
        module = submodule(gm, node)
        name = f"{type(module).__module__}.{type(module).__name__}({module.extra_repr()})"
    else:
        name = target_name(node.target)
    given = dict(enumerate(args)) | dict(kwargs)
    if isinstance(node.target, torch._ops.OpOverload):
        names = [argument.name for argument in node.target._schema.arguments]
        given = {i: value for i, value in given.items() if not (isinstance(i, int) and _VALUES.fullmatch(names[i]))}
    return f"{name}({', '.join(filter(None, (_describe(value) for value in given.values())))})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.is_contiguous() else f"/{list(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{layout}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe, value))}]"
    return "" if isinstance(value, float) else repr(value)


def beside(gm: GraphModule) -> str:
    """What stands beside each operation of a graph, as a part of its key.

    The bytes of the graph's constants, as a power of two within `AMONG`, nothing where the caches hold them, and
    whether there are `MANY` operations.
    """
    least, most = AMONG
    size = sum(tensor.nbytes for tensor in (*gm.parameters(), *gm.buffers()) if tensor.layout is torch.strided)
    parts = [f"{min(1 << (size.bit_length() - 1), most) >> 20} MB"] if size >= least else []
    if sum(node.op.startswith("call") for node in gm.graph.nodes) >= MANY:
        parts.append("many operations")
    return f" among {' and '.join(parts)}" if parts else ""
