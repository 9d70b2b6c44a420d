"""A graph as text: deterministic, one line a node, with dtype, shape, scale, zero point and where it comes from.

    %fc1_qlinear : uint8[2, 8] = fxq.qlinear(%quantize, %fc1_weight_packed, ...)  # 0.0312, 125  fc1  model.py:42

fx's own printers leak memory addresses and know no values. `Folder` writes such a text after every pass, the difference
from the one before, and a picture.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch.fx import GraphModule, Node

from fxq.errors import FileError
from fxq.expansion import summary
from fxq.graph import Value, constant, is_tensor, line_of, module_of, submodule, target_name
from fxq.observers import Observer, WeightObserver

NUMBERED = re.compile(r"\d\d-[\w-]+\.(txt|diff|dot|svg)")
LONGEST = 160
"""Characters of a line's value, and of its operands, before they are cut short."""

Render = Callable[[GraphModule, Path], object]


def text(gm: GraphModule, title: str = "") -> str:
    """All of a graph, headed by `title`; ends in a newline."""
    head = [f"# {title}"] if title else []
    return "\n".join([*head, *_lines(gm, list(gm.graph.nodes)), ""])


def neighbourhood(gm: GraphModule, node: Node) -> str:
    """`node` between what it reads and who reads it, marked with `>`."""
    near = {node, *node.all_input_nodes, *node.users}
    nodes = [other for other in gm.graph.nodes if other in near]
    lines = [line.replace("\n", "\n  ") for line in _lines(gm, nodes)]
    return "\n".join(f"{'>' if n is node else ' '} {line}" for n, line in zip(nodes, lines, strict=True))


def _lines(gm: GraphModule, nodes: list[Node]) -> list[str]:
    """One entry a node; that of a chain goes on with a line for each operation inside."""
    rows = [(_call(gm, node), _comment(gm, node)) for node in nodes]
    width = min(100, max((len(call) for call, _ in rows), default=0))
    lines = []
    for node, (call, comment) in zip(nodes, rows, strict=True):
        line = f"{call.ljust(width)}  # {comment}" if comment else call
        inside = summary(gm, node) if "inside" in node.meta else []
        lines.append("\n".join([line, *(f"    # {name}: {op} {text}" for name, op, text in inside)]))
    return lines


def _call(gm: GraphModule, node: Node) -> str:
    if node.op == "output":
        return f"return {_short(_show(node.args[0]))}"
    if node.op == "placeholder":
        called = f"input {node.target}" + (f" = {_short(_show(node.args[0]))}" if node.args else "")
    elif node.op == "get_attr":
        called = f"constant {node.target}"
    else:
        named = [f"{key}={_show(value)}" for key, value in node.kwargs.items()]
        called = f"{_callee(gm, node)}({_short(', '.join([*map(_show, node.args), *named]))})"
    value = f" : {_short(_show(node.meta['value']))}" if "value" in node.meta else ""
    return f"%{node.name}{value} = {called}"


def _callee(gm: GraphModule, node: Node) -> str:
    if node.op == "call_module":
        return f"{type(submodule(gm, node)).__name__}[{node.target}]"
    return f".{node.target}" if node.op == "call_method" else target_name(node.target)


def _comment(gm: GraphModule, node: Node) -> str:
    parts = []
    if "qparams" in node.meta:
        scale, zero_point = node.meta["qparams"]
        parts.append(f"{scale:.6g}, {zero_point}")
    if node.op == "call_module":
        module = submodule(gm, node)
        if isinstance(module, Observer):
            seen = f"{module.low.item():.6g}..{module.high.item():.6g}" if module.seen else "no data yet"
            parts.append(f"{module.where}: {seen}")
        elif isinstance(module, WeightObserver):
            parts.append(f"{module.where}, {module.granularity}")
    if node.op not in ("placeholder", "get_attr", "output"):
        parts += [part for part in (module_of(node), line_of(node)) if part]
    if node.op == "get_attr" and is_tensor(node) and constant(gm, node).numel() == 1:
        parts.append(f"{constant(gm, node).item():.6g}")
    return "  ".join(parts)


def _short(shown: str) -> str:
    return shown if len(shown) <= LONGEST else f"{shown[: LONGEST - 4]} ..."


def _show(value: Any) -> str:
    """A value without memory addresses."""
    if isinstance(value, Node):
        return f"%{value.name}"
    if isinstance(value, Value):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, torch.Size):
        return f"Size{list(value)}"
    if isinstance(value, tuple):
        return f"({', '.join(map(_show, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_show(item)}' for key, item in value.items())}}}"
    if isinstance(value, slice):
        return ":".join("" if part is None else _show(part) for part in (value.start, value.stop, value.step))
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout):
        return str(value).removeprefix("torch.")
    return str(getattr(value, "__name__", None) or re.sub(r" at 0x[0-9a-f]+", "", repr(value)))


class Folder:
    """A folder of dumps: `NN-pass.txt`, `.diff`, and what `render` draws. Numbered files of an earlier run are removed.

    Raises `FileError` where the folder cannot be made or written.
    """

    def __init__(self, path: str | Path, render: Render) -> None:
        self.path = Path(path)
        self.render = render
        self.count = 0
        self.before: list[str] = []
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            TemporaryFile(dir=self.path).close()  # permission bits do not tell: read-only mounts, the super-user
            for file in self.path.iterdir():
                if NUMBERED.fullmatch(file.name):
                    file.unlink()
        except OSError as error:
            raise FileError(f"dump={str(path)!r} cannot be used: {error}; give a folder that can be written") from error

    def write(self, gm: GraphModule, name: str, provenance: str) -> None:
        """The text, difference and picture of `gm` after the pass `name`."""
        # A dot would be taken for the start of the suffix, and other signs are not for file names.
        stem = self.path / f"{self.count:02}-{re.sub(r'[^A-Za-z0-9_-]+', '-', name)}"
        lines = text(gm, f"{name}: {provenance}").splitlines(keepends=True)
        stem.with_suffix(".txt").write_text("".join(lines), encoding="utf-8")
        if self.count:
            delta = difflib.unified_diff(self.before, lines, "before", f"after {name}")
            stem.with_suffix(".diff").write_text("".join(delta), encoding="utf-8")
        self.before = lines
        self.render(gm, stem)
        self.count += 1

    def write_text(self, name: str, content: str) -> None:
        """One more file."""
        (self.path / name).write_text(content.rstrip("\n") + "\n", encoding="utf-8")
