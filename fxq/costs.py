"""What an operation costs on this machine: timed once by itself, kept in a file, looked up from then on.

A key is the operation with the dtypes and shapes of its tensors and what else shapes its work; scales and zero points
do not. Beside it stands what happens between two calls of the operation in a model: how much other data passes, since
the weights of a large model do not stay in the caches, and whether many other operations run, since their code does not
stay there either. The file is JSON (key -> seconds) in the
cache folder of the kernels, one per fxq, torch, processor, instruction set and number of threads: read it, delete it,
or look at it with `python -m fxq costs`.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import kernels
from fxq.errors import FileError
from fxq.graph import submodule, target_name
from fxq.kernels.binary import cache

VERSION = 5
"""Of the file's format and of the way of timing."""
_ROUNDS, _SECONDS = (3, 25), 0.03
"""Calls of one operation that are timed: as many as fill these seconds, within the first."""
MANY = 24
"""Operations."""
AMONG = 1 << 20, 1 << 25
"""Bytes of a model's constants: below the first they stay in the caches; more than the second make no difference."""
_SMALL = frozenset({"zero_point", "low", "high", "z_x", "z_a", "z_b"})
"""Arguments of fxq's operators that set values, not work."""


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

    def of(self, key: str, run: Callable[[], object], between: Callable[[], object] = lambda: None) -> float:
        """The seconds of the operation behind `key`; `run` does it once, and is timed where the key is new.

        between: what happens, untimed, between two calls.
        """
        if key not in self.seconds:
            self.seconds[key] = self._fresh[key] = _time(run, between)
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
        given = {i: value for i, value in given.items() if not (isinstance(i, int) and names[i] in _SMALL)}
    return f"{name}({', '.join(filter(None, (_describe(value) for value in given.values())))})"


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        layout = "" if value.is_contiguous() else f"/{list(value.stride())}"
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}{layout}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_describe, value))}]"
    return "" if isinstance(value, float) else repr(value)


class Others:
    """What stands beside an operation in a graph, to be done between two calls so that they take what they do there.

    size: the bytes of the graph's constants, as a power of two within `AMONG`; 0 where the caches hold them. many:
    whether there are `MANY` operations, so that the code of one does not stay in the caches.
    """

    def __init__(self, gm: GraphModule) -> None:
        least, most = AMONG
        size = sum(tensor.nbytes for tensor in (*gm.parameters(), *gm.buffers()) if tensor.layout is torch.strided)
        self.size = min(1 << (size.bit_length() - 1), most) if size >= least else 0
        self.many = sum(node.op.startswith("call") for node in gm.graph.nodes) >= MANY
        self._data = torch.empty(self.size, dtype=torch.uint8)
        self._x = torch.rand(32, 32)

    def __str__(self) -> str:
        parts = [f"{self.size >> 20} MB"] * bool(self.size) + ["many operations"] * self.many
        return f" among {' and '.join(parts)}" if parts else ""

    def run(self) -> None:
        """Let the caches forget what a call in a model does not find there."""
        self._data.add_(1)
        if self.many:
            torch.cat([F.layer_norm(self._x, (32,)).softmax(-1), self._x]).relu()


def _time(run: Callable[[], object], between: Callable[[], object]) -> float:
    """Seconds of one call: the median of a few, each with something else before it, as operations have in a model."""

    def once() -> float:
        between()
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    once()
    start = time.perf_counter()
    once()
    least, most = _ROUNDS
    rounds = max(least, min(most, int(_SECONDS / (time.perf_counter() - start))))
    return median(once() for _ in range(rounds))
