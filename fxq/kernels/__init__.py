"""The machine code behind the integer ops: built for this machine, or portable torch code where there is no compiler.

`define` is the only door: an op family hands in its schema with a portable and a fake implementation. Where the C++
library (ops_*.cpp) has a kernel of that name, it serves the CPU from the first call on, with no Python in between;
it is compiled then, for the best instruction set of this processor or the one that FXQ_ISA names, unless a binary lies
ready (binary.py). Both return the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxq.errors import KernelError
from fxq.kernels.binary import ALL, cache, compiler, find, processor_isas
from fxq.kernels.binary import build as build

_library = torch.library.Library("fxq", "DEF")  # type: ignore[no-untyped-call]
_portable: dict[str, Callable[..., Any]] = {}
_resolving = threading.RLock()
_resolved = _called = False
_native: _Native | None = None
_why_portable = ""


class PortableKernelWarning(UserWarning):
    """The integer ops run as portable torch code, with the same results, many times slower."""


def define(schema: str, portable: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register the op `fxq::<schema>` and return its overload.

    portable: exact torch implementation, used where no native kernel serves; fake: shapes and dtypes only.
    """
    name = schema.partition("(")[0]
    _portable[name] = portable
    _library.define(schema, tags=[torch.Tag.pt2_compliant_tag])  # type: ignore[no-untyped-call]
    overload = getattr(torch.ops.fxq, name).default
    assert isinstance(overload, torch._ops.OpOverload)

    def serve(*args: Any, **kwargs: Any) -> Any:
        """Where a call lands for which no native kernel is registered: the first one, or all of them."""
        if _called:
            return portable(*args, **kwargs)
        _first_call()
        return overload(*args, **kwargs)

    def shapes(*args: Any) -> Any:
        """What a call on the meta device gives; torch also comes here with tensors of which only some are there."""
        devices = {value.device.type for value in pytree.tree_leaves(args) if isinstance(value, Tensor)}
        if len(devices) > 1:
            places = " and ".join(sorted(devices))
            raise RuntimeError(f"fxq::{name}: operands on the devices {places}; move model and inputs to one of them")
        return fake(*args)

    # A kernel registered for the CPU, as the native ones are, goes before this one.
    _library.impl(name, serve, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fxq::{name}", shapes, lib=_library)
    return overload


def portable(name: str) -> Callable[..., Any]:
    """The portable implementation of the op `fxq::<name>`."""
    return _portable[name]


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the native kernels with one instruction set of `info().available`, in all threads of this process.

    Raises `KernelError` where it is not available. For tests and bug reports; FXQ_ISA does the same from outside, and
    compiles what the binary lacks.
    """
    _resolve()
    if _native is None:
        raise KernelError(f"instruction set {name!r} is not available: {_why_portable}")
    before = _native.isa
    _native.use(name)
    try:
        yield
    finally:
        _native.use(before)


@dataclass(frozen=True)
class Info:
    """What serves the integer ops here.

    isa: 'portable' or one of available; lacking: what this processor has beside those, and FXQ_ISA would compile; path:
    the binary in use.
    """

    cpu: str
    isa: str
    available: tuple[str, ...]
    lacking: tuple[str, ...]
    state: str
    path: Path | None
    compiler: str | None
    torch: str
    threads: int


def info() -> Info:
    """What serves the integer ops here; compiles the kernels if that has not been done."""
    _resolve()
    command = compiler()
    return Info(
        cpu=_cpu_name(),
        isa=_native.isa if _native else "portable",
        available=_native.available if _native else (),
        lacking=_native.lacking if _native else (),
        state="native" if _native else f"portable: {_why_portable}",
        path=_native.path if _native else None,
        compiler=" ".join(command) if command else None,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )


class _Native:
    """The loaded binary. Loading it registers its kernels for the CPU."""

    def __init__(self, path: Path) -> None:
        self.path = path
        torch.ops.load_library(path)  # type: ignore[no-untyped-call]
        self._library = ctypes.CDLL(str(path))
        self._library.fxq_isa.restype = self._library.fxq_isas.restype = ctypes.c_char_p
        self.available = tuple(self._library.fxq_isas().decode().split(","))
        self.lacking = tuple(isa for isa in processor_isas() if isa not in self.available)

    @property
    def isa(self) -> str:
        name = self._library.fxq_isa()
        assert isinstance(name, bytes)
        return name.decode()

    def use(self, name: str) -> None:
        if name in self.lacking:
            raise KernelError(
                f"instruction set {name!r} is not available in this process: {self.path.name} holds "
                f"{', '.join(self.available)}; set FXQ_ISA={name} before it starts, or compile all with "
                "python -m fxq build"
            )
        if not self._library.fxq_use_isa(name.encode()):
            raise _unavailable(name, self.available)


def _resolve() -> None:
    """Decide once what serves the ops: load the native kernels, compiling them if need be, or find out why not."""
    global _resolved, _native, _why_portable
    with _resolving:
        if _resolved:
            return
        forced = os.environ.get("FXQ_ISA", "")
        if forced == "portable":
            _why_portable = "FXQ_ISA=portable"
        else:
            isas = processor_isas()
            if forced and isas and forced not in isas:
                raise _unavailable(forced, isas)
            wanted = forced or isas[0] if isas else ALL
            try:
                native = _Native(find(wanted) or build(cache(), wanted))
            except (KernelError, OSError) as error:
                if forced:
                    raise KernelError(f"FXQ_ISA={forced}, but there are no native kernels: {error}") from error
                _why_portable = str(error)
            else:
                if forced:
                    native.use(forced)
                _native = native
        _resolved = True


def _unavailable(name: str, isas: tuple[str, ...]) -> KernelError:
    return KernelError(
        f"instruction set {name!r} is not available: this processor ({_cpu_name()}) has {', '.join(isas)}"
    )


def _first_call() -> None:
    """Say so where the portable kernels serve without having been asked for."""
    global _called
    _resolve()
    _called = True
    if _native is None and os.environ.get("FXQ_ISA") != "portable":
        message = f"fxq runs its portable kernels, exact but many times slower: {_why_portable}"
        warnings.warn(message, PortableKernelWarning, stacklevel=3)


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
