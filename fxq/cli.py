"""The command line: `python -m fxq info` and `python -m fxq build`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fxq import __version__, kernels
from fxq.errors import FxqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0, or 1 after an error of the user's)."""
    parser = argparse.ArgumentParser(prog="fxq", description="int8 for PyTorch: exact, readable, never silently float")
    parser.add_argument("--version", action="version", version=f"fxq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="the processor, the instruction set in use, the state of the native kernels")
    build = commands.add_parser(
        "build", help="compile the native kernels ahead of time, for images and read-only systems"
    )
    build.add_argument("directory", nargs="?", type=Path, help="where to (default: beside the installed package)")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            print(kernels.build(options.directory))
        else:
            _info()
    except FxqError as error:
        print(f"fxq: {error}", file=sys.stderr)
        return 1
    return 0


def _info() -> None:
    info = kernels.info()
    rows = {
        "fxq": __version__,
        "torch": info.torch,
        "processor": info.cpu,
        "instruction set": f"{info.isa} (available: {', '.join(('portable', *info.available))})",
        "kernels": f"{info.state}{f', {info.path}' if info.path else ''}",
        "compiler": info.compiler or "none found",
        "threads": str(info.threads),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.ljust(width)}  {value}")
