"""Files of quantized models: plain data and tensors, so that to read one runs no code from it."""

from __future__ import annotations

import copy
import pickle
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fxq.calls import Begin, Calls, PerCall
from fxq.decisions import Report
from fxq.encoding import decode, encode
from fxq.errors import FileError
from fxq.quantized import QuantizedModule

FORMAT, VERSION = "fxq", 4
_ELSEWHERE = (AssertionError, AttributeError, LookupError, RuntimeError, SyntaxError, TypeError, ValueError)
"""What is raised where a part is missing, of another type, or no part of a graph."""


def save(qmodel: nn.Module, path: str | Path) -> None:
    """Write a quantized model to a file that `load` reads without running code from it.

    Raises `FileError` where the graph holds what cannot be written down, or the file cannot be.
    """
    if not isinstance(qmodel, QuantizedModule):
        raise FileError(f"fxq.save writes what fxq.quantize returns, not a {type(qmodel).__name__}")
    plain = _plain(qmodel)
    try:
        torch.save({"format": FORMAT, "version": VERSION, **plain}, path)
    except (OSError, RuntimeError) as error:  # torch's own where it is a folder, or in none
        raise FileError(f"cannot write {path}: {error}") from error


def _plain(qmodel: QuantizedModule) -> dict[str, Any]:
    """`encode`, with the modules that it calls, out of which those that fxq made are taken and encoded likewise."""
    called = dict(qmodel.named_modules_called())
    made = {
        name: m
        for path, module in called.items()
        for name, m in module.named_modules(prefix=path, remove_duplicate=False)
        if isinstance(m, QuantizedModule)
    }
    outermost = {name: m for name, m in made.items() if not any(name.startswith(f"{other}.") for other in made)}
    modules = copy.deepcopy(called, {id(m): nn.Module() for m in outermost.values()})
    plain = {id(m): _plain(m) for m in outermost.values()}
    inner = {name: plain[id(m)] for name, m in outermost.items()}
    return {**encode(qmodel), "report": qmodel.report.to_dict(), "modules": modules, "inner": inner}


def _from_plain(data: dict[str, Any], trust: bool) -> QuantizedModule:
    parts = data.get("inner", {})
    read = {id(part): _from_plain(part, trust) for part in parts.values()}
    inner = {path: read[id(part)] for path, part in parts.items()}
    modules = {path: inner.get(path, module) for path, module in data["modules"].items()}
    qmodel = QuantizedModule.of(decode(data, modules, trust=trust), Report.from_dict(data["report"]))
    for path in inner.keys() - modules.keys():
        qmodel.set_submodule(path, inner[path])
    return qmodel


def load(path: str | Path, *, trust: bool = False) -> QuantizedModule:
    """Read a model that `save` wrote. trust: also unpickle modules and call functions that are not torch's.

    Raises `FileError` for a missing, damaged or foreign file, and for one that needs trust.
    """
    if not Path(path).is_file():
        raise FileError(f"{path}: no such file")
    _check_archive(path)
    classes = [c for c in vars(nn.modules).values() if isinstance(c, type) and issubclass(c, nn.Module)]
    try:
        with torch.serialization.safe_globals([*classes, set, Begin, Calls, PerCall]):
            data = torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise FileError(
                f"{path} holds modules that are not torch's own; pass trust=True if you trust it: {error}"
            ) from error
        raise FileError(f"{path} is damaged or not an fxq file: {error}") from error
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        raise FileError(f"{path} is damaged or not an fxq file: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise FileError(f"{path} is not an fxq file")
    if data.get("version") != VERSION:
        raise FileError(
            f"{path} has format version {data.get('version')}, this fxq reads {VERSION}; write it again with fxq.save"
        )
    try:
        return _from_plain(data, trust)
    except _ELSEWHERE as error:
        raise FileError(f"{path} does not hold what fxq.save writes; it is damaged: {error!r}") from error


def _check_archive(path: str | Path) -> None:
    """Raise `FileError` unless the file is an archive all of whose checksums are right."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, OSError, EOFError) as error:
        raise FileError(f"{path} is damaged or not an fxq file: {error}") from error
    if broken is not None:
        raise FileError(f"{path} is damaged: the checksum of {broken} is wrong")
