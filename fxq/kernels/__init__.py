"""The machine code behind the integer ops: built for this machine, or portable torch code where there is no compiler.

`define` is the only door: an op family hands in its schema with a portable and a fake implementation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_library = torch.library.Library("fxq", "DEF")


def define(schema: str, portable: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register the op `fxq::<schema>` and return its overload.

    portable: exact torch implementation, used where no native kernel serves; fake: shapes and dtypes only.
    """
    name = schema.partition("(")[0]
    _library.define(schema, tags=[torch.Tag.pt2_compliant_tag])
    _library.impl(name, portable, "CPU")
    torch.library.register_fake(f"fxq::{name}", fake, lib=_library)
    overload = getattr(torch.ops.fxq, name).default
    assert isinstance(overload, torch._ops.OpOverload)
    return overload
