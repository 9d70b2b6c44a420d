"""Memory of this process that is free goes back to the system."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable


def _trim() -> Callable[[int], int] | None:
    """glibc's `malloc_trim`; None where the C library has none."""
    found: Callable[[int], int] | None = None
    if sys.platform == "linux":
        found = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return found


_TRIM = _trim()


def give_back() -> None:
    """Return what malloc keeps of freed memory, wherever in its heap it lies.

    After freeing large tensors malloc serves such from its heap, where small ones that live on hold the pages between
    them: without this, converting a model would hold twice what is in use.
    """
    if _TRIM is not None:
        _TRIM(0)
