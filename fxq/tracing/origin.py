"""Where in the user's program a node comes from."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from traceback import extract_tb
from typing import Any

import numpy as np
import torch

_FOLDERS = (Path(torch.__file__).parent, Path(np.__file__).parent, Path(__file__).parents[1])
_OWN = (*(f"{folder}{os.sep}" for folder in _FOLDERS), "<eval_with_key", "<frozen")
_LIBRARY = f"{Path(os.__file__).parent}{os.sep}"


@dataclass(frozen=True)
class Origin:
    """Where in the user's program a node comes from; `node.meta["origin"]`."""

    module: str
    """The user's module path, "" for the root."""
    line: str
    """"model.py:42", the innermost line of the user's code; "" if there is none."""


def is_internal(filename: str) -> bool:
    """Tell the code of torch, NumPy, fxq and Python itself from the user's."""
    return filename.startswith(_OWN) or (filename.startswith(_LIBRARY) and "site-packages" not in filename)


def line_of(error: BaseException) -> str:
    """Return the innermost line of the user's code that an exception passed."""
    frames = [frame for frame in extract_tb(error.__traceback__) if not is_internal(frame.filename)]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "the model"


def enter(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function, outside of which there is none of the user's code that `user_line` speaks of."""
    return function(*args, **kwargs)


def user_line() -> str:
    """Return file:line of the user's innermost line since `enter`, "" if there is none."""
    line = ""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is enter.__code__:
            return line
        if not line and not is_internal(frame.f_code.co_filename):
            line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""
