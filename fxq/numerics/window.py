"""How the windows of a convolution lie on its input, as one short text: `3x3 stride 2 pad 1 groups 16`.

First the size of the kernel, then what is not as usual (stride 1, no padding, dilation 1, one group), each as a number
for all spatial dimensions or as one for each: `7x3 stride 2x1 pad 3,3,0,1`; padding has two for each, before and after.
It is text, and not lists of integers, as each list costs an operator half a microsecond.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

Ints = Sequence[int]

_NUMBER = r"-?\d+"
_TEXT = re.compile(
    rf"(?P<kernel>{_NUMBER}(?:x{_NUMBER})*)"
    rf"(?: stride (?P<stride>{_NUMBER}(?:x{_NUMBER})*))?"
    rf"(?: pad (?P<pad>{_NUMBER}(?:,{_NUMBER})*))?"
    rf"(?: output pad (?P<output>{_NUMBER}(?:x{_NUMBER})*))?"
    rf"(?: dilation (?P<dilation>{_NUMBER}(?:x{_NUMBER})*))?"
    rf"(?: groups (?P<groups>{_NUMBER}))?"
)


@dataclass(frozen=True)
class Window:
    """padding: two numbers per spatial dimension, before and after; all others have one. `str` and `parse` are inverse.

    output_padding: of a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    output_padding: tuple[int, ...] = ()

    def __str__(self) -> str:
        parts = ["x".join(map(str, self.kernel))]
        usual = {"stride": (self.stride, 1, "x"), "pad": (self.padding, 0, ","),
                 "output pad": (self.output_padding, 0, "x"), "dilation": (self.dilation, 1, "x")}  # fmt: skip
        for word, (values, default, between) in usual.items():
            if any(value != default for value in values):
                parts.append(f"{word} {between.join(map(str, values[:1] if len(set(values)) == 1 else values))}")
        return " ".join([*parts, f"groups {self.groups}"] if self.groups != 1 else parts)

    @classmethod
    def parse(cls, text: str) -> Window:
        """Raises `ValueError` for any other text."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ValueError(f"window {text!r}, expected one like '3x3 stride 2 pad 1 dilation 1 groups 16'")
        kernel = _ints(match["kernel"])
        rank = len(kernel)

        def entries(name: str, default: int, count: int, least: int) -> tuple[int, ...]:
            values = _ints(match[name] or str(default))
            values = values * count if len(values) == 1 else values
            if len(values) != count or min(values) < least:
                raise ValueError(f"window {text!r}: {name} {list(values)}, expected {count}, each at least {least}")
            return values

        return cls(
            entries("kernel", 1, rank, 1),
            entries("stride", 1, rank, 1),
            entries("pad", 0, 2 * rank, -(2**31)),
            entries("dilation", 1, rank, 1),
            entries("groups", 1, 1, 1)[0],
            entries("output", 0, rank, 0),
        )


def _ints(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.split("[x,]", text)))
