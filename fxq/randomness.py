"""Random numbers that are drawn apart: who draws others meanwhile or afterwards, draws what they would have."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

_GENERATORS: tuple[tuple[Callable[[], Any], Callable[[Any], None]], ...] = (
    (torch.random.get_rng_state, torch.random.set_rng_state),
    (np.random.get_state, np.random.set_state),
    (random.getstate, random.setstate),
)
"""The global generators, on the CPU, of torch, NumPy and Python: how each state is read, and set."""
States = list[Any]
"""Of each of them."""


def states() -> States:
    """Where all of them are."""
    return [read() for read, _ in _GENERATORS]


def same_states(before: States, after: States) -> bool:
    """Whether nothing has been drawn between the two."""
    (torch_before, numpy_before, python_before), (torch_after, numpy_after, python_after) = before, after
    same = torch.equal(torch_before, torch_after) and python_before == python_after
    return same and all(map(np.array_equal, numpy_before, numpy_after))


def set_states(wanted: States) -> None:
    """Let them draw what they have drawn from there."""
    for (_, write), state in zip(_GENERATORS, wanted, strict=True):
        write(state)


class Randomness:
    """What is drawn while it is entered leaves the global generators as they were.

    The first time it begins at their states, and from then on where it was left: several blocks with one object draw
    on, whatever is drawn between them.
    """

    def __init__(self) -> None:
        self._other: States | None = None

    def __enter__(self) -> None:
        self._swap()

    def __exit__(self, *error: object) -> None:
        self._swap()

    def _swap(self) -> None:
        now = states()
        set_states(self._other or now)
        self._other = now


def seed() -> None:
    """Let all of them begin anew, with the numbers that every run has which is held against another."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)
