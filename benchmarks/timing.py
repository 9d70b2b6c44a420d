"""Fair timing on a machine that is never quite quiet: contestants in turns, medians, ratios within a round."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Call = Callable[[], object]

BLOCK, PARTS = 5e-4, 4
"""A contestant's turn is `PARTS` blocks of this many seconds, at least one call each, the fastest of which counts: an
interruption by another process is not its fault."""
LONG = 20e-3
"""Seconds; a call that takes longer is timed once a turn, and depends little on what its predecessor left in caches."""
PAUSE = 3e-3
"""Seconds between two contestants, in which the idle threads of one library stop spinning beside the next."""
ROUNDS = (5, 60)


def interleave(
    calls: Mapping[Key, Call], seconds: float, before: Callable[[Key], None] = lambda key: None
) -> dict[Key, list[float]]:
    """Seconds per call of each contestant, one number a round; every second round runs backwards.

    seconds: what all rounds take together, within `ROUNDS`. before: called ahead of a contestant's turn, untimed, as is
    one call that brings its data back into the caches (not for a long one).
    """
    with torch.inference_mode():
        turns: dict[Key, _Turn] = {}
        for key, call in calls.items():
            before(key)
            turns[key] = _Turn.of(call)
        times: dict[Key, list[float]] = {key: [] for key in calls}
        keys, end, most = list(calls), time.perf_counter() + seconds, ROUNDS[1]
        gc.collect()
        gc.disable()
        try:
            for done in range(most):
                if done >= ROUNDS[0] and time.perf_counter() > end:
                    break
                for key in reversed(keys) if done % 2 else keys:
                    before(key)
                    time.sleep(PAUSE)
                    times[key].append(turns[key].time(calls[key]))
        finally:
            gc.enable()
    return times


@dataclass(frozen=True)
class _Turn:
    """How one contestant is timed: after `warm` calls, `parts` blocks of `repeats` calls each."""

    warm: int
    parts: int
    repeats: int

    @staticmethod
    def of(call: Call) -> _Turn:
        call()
        once = _Turn(0, 3, 1).time(call) if _Turn(0, 1, 1).time(call) < LONG else LONG
        return _Turn(1, PARTS, max(1, int(BLOCK / once))) if once < LONG else _Turn(0, 1, 1)

    def time(self, call: Call) -> float:
        """Seconds per call, from the fastest block."""
        for _ in range(self.warm):
            call()
        fastest = float("inf")
        for _ in range(self.parts):
            start = time.perf_counter()
            for _ in range(self.repeats):
                call()
            fastest = min(fastest, time.perf_counter() - start)
        return fastest / self.repeats


def median_us(times: list[float]) -> float:
    """The median in microseconds, four digits."""
    return float(f"{statistics.median(times) * 1e6:.4g}")


def ratio(times: list[float], base: list[float]) -> float:
    """The median over the rounds of times / base: what disturbs a whole round falls out."""
    return float(f"{statistics.median(a / b for a, b in zip(times, base, strict=True)):.4g}")
