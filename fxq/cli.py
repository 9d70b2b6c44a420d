"""The command line: `python -m fxq info`, `build` and `costs`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from fxq import __version__, kernels
from fxq.costs import Costs, costs_path
from fxq.errors import FileError, FxqError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (0, or 1 after an error of the user's)."""
    parser = argparse.ArgumentParser(prog="fxq", description="int8 for PyTorch: exact, readable, never silently float")
    parser.add_argument("--version", action="version", version=f"fxq {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="the processor, the instruction set in use, the state of the native kernels")
    build = commands.add_parser(
        "build",
        help="compile the native kernels for all instruction sets ahead of time, for images and read-only systems",
    )
    build.add_argument(
        "directory",
        nargs="?",
        type=Path,
        help="where to (default: beside the installed package); FXQ_CACHE must name it when models run",
    )
    costs = commands.add_parser("costs", help="the measured times of operations on this machine")
    costs.add_argument("--clear", action="store_true", help="delete the file: everything is measured anew")
    options = parser.parse_args(arguments)
    try:
        if options.command == "build":
            print(kernels.build(options.directory))
        elif options.command == "costs":
            _costs(options.clear)
        else:
            _info()
    except FxqError as error:
        print(f"fxq: {error}", file=sys.stderr)
        return 1
    return 0


def _info() -> None:
    info = kernels.info()
    lacking = f"; FXQ_ISA compiles: {', '.join(info.lacking)}" if info.lacking else ""
    rows = {
        "fxq": __version__,
        "torch": info.torch,
        "processor": info.cpu,
        "instruction set": f"{info.isa} (available: {', '.join(('portable', *info.available))}{lacking})",
        "kernels": f"{info.state}{f', {info.path}' if info.path else ''}",
        "compiler": info.compiler or "none found",
        "threads": str(info.threads),
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name.ljust(width)}  {value}")


def _costs(clear: bool) -> None:
    path = costs_path()
    if clear:
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise FileError(f"cannot delete {path} ({error})") from error
        print(f"{path} is deleted")
        return
    print(path)
    for key, seconds in sorted(Costs(path).seconds.items()):
        print(f"{1e6 * seconds:12.1f} us  {key}")
