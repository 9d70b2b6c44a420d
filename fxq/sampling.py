"""A sample of the calibration data, which travels with a graph's observers."""

from __future__ import annotations

import random
from typing import Any

from torch import nn

from fxq.inputs import Call

SAMPLE = "calibration_sample"
"""The submodule of a graph with observers that holds its `Sample`."""


class Sample(nn.Module):
    """A few calls of the calibration data, drawn evenly with a fixed seed, in memory of their own.

    At most `most`, and as many as `most_bytes` hold, but one at least. seen: how many calls were offered. All of it
    travels in a state_dict.
    """

    most, most_bytes = 8, 16 * 2**20

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.seen = 0

    def offer(self, call: Call) -> None:
        """Reservoir sampling: each call seen so far is as likely to be kept."""
        size = sum(tensor.nbytes for _, tensor in call.tensors())
        most = max(1, min(self.most, self.most_bytes // max(1, size)))
        place = random.Random(self.seen).randrange(self.seen + 1)
        self.seen += 1
        if len(self.calls) < most:
            self.calls.append(call.clone())
        elif place < len(self.calls):
            self.calls[place] = call.clone()

    def get_extra_state(self) -> tuple[int, list[tuple[Any, ...]]]:
        """Plain data."""
        return self.seen, [(call.args, call.kwargs) for call in self.calls]

    def set_extra_state(self, state: tuple[int, list[tuple[Any, ...]]]) -> None:
        """The inverse of `get_extra_state`."""
        self.seen, self.calls = state[0], [Call(*call).clone() for call in state[1]]

    def extra_repr(self) -> str:
        return f"{len(self.calls)} of {self.seen} calls"


def sample_of(prepared: nn.Module) -> Sample | None:
    """The sample of a graph with observers; None where there is nothing to observe, or it is trained."""
    found = getattr(prepared, SAMPLE, None)
    return found if isinstance(found, Sample) else None
