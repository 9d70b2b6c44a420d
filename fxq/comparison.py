"""Where accuracy is lost: the findings for each layer and for the output, as text and as a picture.

    SQNR = 10 log10( sum x^2 / sum (x - y)^2 )  in dB; x the float value, y the dequantized one; inf for equal ones

*alone*: the layer is given the exact float inputs, quantized; *accumulated*: what reaches it in the quantized model.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fxq.errors import InputError
from fxq.tracing.values import tensors


def sqnr(expected: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio in dB, in float64; inf for equal tensors, nan for empty ones.

    And for those of different shapes, as there may be where values decide on sizes.
    """
    if not expected.numel() or expected.shape != actual.shape:
        return math.nan
    x, y = expected.detach().double(), actual.detach().double()
    noise, signal = (float(np.sum(part.numpy())) for part in ((x - y) ** 2, x**2))  # torch's sum depends on the threads
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf


def output_sqnr(expected: Any, actual: Any) -> float:
    """The worst SQNR over the float tensors of an output, NaN the worst of all; inf where there are none."""
    pairs = zip(tensors(expected), tensors(actual), strict=True)
    values = [sqnr(x.to_dense(), y.to_dense()) for x, y in pairs if x.is_floating_point() and x.numel()]
    return min(values, key=lambda value: -math.inf if math.isnan(value) else value, default=math.inf)


@dataclass(frozen=True)
class Spread:
    """How the float values of a layer lie in the range of its integers.

    low, high: the smallest and largest value; counts: of `BINS` equal bins between them; range: what uint8 can hold.
    clipped: the share of values outside of it; used: the share of the 256 integers between the smallest and largest.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    range: tuple[float, float]
    clipped: float
    used: float


BINS = 64
ANOTHER_MODEL = "compare it with the model that it was quantized from, on inputs which that takes"
FLOAT_ROUNDING = 100.0
"""dB. What is above rounds no integers: float32 alone, as a norm does; it has no place in a picture of noise."""
EQUAL = 0.1
"""dB. Of remedies as good as that, the first is taken; float is the last."""
CANDIDATES = 64
"""Of so many of the noisiest layers the effect on the output is looked for: each is one more run in float."""
FOUND_BY = f"""suspects: of the {CANDIDATES} noisiest layers those without whose own noise, all else as it is, the
output gains most (layers inside of leaves, whose effect is not known, come last)"""


@dataclass(frozen=True)
class Remedy:
    """A recipe with one rule more, as Python text; output: the SQNR in dB that the model reaches with it."""

    recipe: str
    output: float


@dataclass(frozen=True)
class Suspect:
    """A module whose own noise costs the output much; SQNR in dB.

    alone: as of its noisiest layer; before: of the model's output; without: of the output without the module's own
    noise, None inside of a leaf; tried: float last.
    """

    module: str
    alone: float
    before: float
    without: float | None
    tried: tuple[Remedy, ...]

    @property
    def best(self) -> Remedy | None:
        """The remedy that helps most; None where none helps."""
        most = max((remedy.output for remedy in self.tried), default=self.before)
        found = (remedy for remedy in self.tried if remedy.output >= most - EQUAL)  # of infinite ones as well
        return next(found) if most > self.before + EQUAL else None

    def __str__(self) -> str:
        head = f"{self.module}: {self.alone:.1f} dB alone; "
        if self.without is not None:
            head += f"without its own noise the output would be at {self.without:.1f} dB; "
        if not self.tried:
            return f"{head}no remedy was tried, for lack of time: give fxq.compare more `seconds`"
        if self.best is None:
            left = self.tried[-1].output
            return f"{head}none of {len(self.tried)} remedies helps, in float it leaves the output at {left:.1f} dB"
        return f"{head}the output goes from {self.before:.1f} to {self.best.output:.1f} dB with\n  {self.best.recipe}"


@dataclass(frozen=True)
class Layer:
    """One operation of the quantized model against its float counterpart; SQNR in dB; spread: where it gives uint8."""

    module: str
    op: str
    node: str
    alone: float
    accumulated: float
    spread: Spread | None = None

    def __str__(self) -> str:
        text = f"{self.module or '(root)'}  {self.op}  {self.alone:.1f} dB alone, {self.accumulated:.1f} dB accumulated"
        if self.spread is None:
            return text
        return f"{text}, {100 * self.spread.clipped:.2g} % clipped, {100 * self.spread.used:.0f} % of the range used"


@dataclass(frozen=True)
class Comparison:
    """All layers in graph order, and the output's SQNR in dB."""

    layers: list[Layer]
    output: float
    suspects: list[Suspect] = field(default_factory=list)
    """Those that cost the output most, with what was tried for them: `fxq.compare(..., calibration_data=...)`."""

    def worst(self, count: int) -> list[Layer]:
        """The layers that lose most by themselves."""
        return sorted(self.layers, key=lambda layer: layer.alone)[:count]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def plot(self, path: str | Path) -> Path:
        """Noise along the depth, and for the three worst layers their values in their range; needs matplotlib.

        Layers are numbered from 0, as they come in `layers`; what only rounds floats has no noise of its own.
        path: of a picture, svg, png or pdf. Raises `InputError` where matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import MaxNLocator
        except ImportError as error:
            raise InputError("a plot needs matplotlib: pip install 'fxq[plots]'") from error
        numbers = {id(layer): i for i, layer in enumerate(self.layers)}
        spread = [layer for layer in self.worst(len(self.layers)) if layer.spread is not None][:3]
        figure = Figure(figsize=(9, 4 if not spread else 6.5), layout="constrained")
        grid = figure.add_gridspec(2 if spread else 1, max(1, len(spread)))
        depth = figure.add_subplot(grid[0, :])
        rounded = [(i, layer.alone) for i, layer in enumerate(self.layers) if layer.alone < FLOAT_ROUNDING]
        reached = [(i, layer.accumulated) for i, layer in enumerate(self.layers) if math.isfinite(layer.accumulated)]
        for points, style, label in ((rounded, "o-", "alone"), (reached, "s-", "accumulated")):
            depth.plot([i for i, _ in points], [noise for _, noise in points], style, label=label, markersize=4)
        depth.set(ylabel="SQNR, dB", xlabel="layer, in the order of the graph")
        depth.xaxis.set_major_locator(MaxNLocator(integer=True))
        depth.legend()
        for column, layer in enumerate(spread):
            assert layer.spread is not None
            axes, found = figure.add_subplot(grid[1, column]), layer.spread
            width = (found.high - found.low) / BINS or 1.0
            axes.bar([found.low + (i + 0.5) * width for i in range(BINS)], found.counts, width, log=True)
            for bound in found.range:
                axes.axvline(bound, color="#a86a00", linestyle=":")
            axes.set(xlabel="float value; dotted: what uint8 holds", ylabel="" if column else "how many")
            place = _shortened(layer.module or layer.op)
            axes.set_title(f"layer {numbers[id(layer)]}: {layer.alone:.1f} dB alone\n{place}", fontsize=9)
        figure.savefig(Path(path))
        return Path(path)

    def __str__(self) -> str:
        rows = [("module", "op", "alone dB", "accumulated dB", "clipped", "range used")]
        for layer in self.layers:
            found = layer.spread
            shares = ("", "") if found is None else (f"{100 * found.clipped:.2g} %", f"{100 * found.used:.0f} %")
            place = layer.module or "(root)"
            rows.append((place, layer.op, f"{layer.alone:.1f}", f"{layer.accumulated:.1f}", *shares))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join([*map(str.ljust, row[:2], widths), *map(str.rjust, row[2:], widths[2:])]).rstrip() for row in rows
        ]
        suspects = [FOUND_BY, *map(str, self.suspects)] if self.suspects else []
        return "\n".join([*lines, f"output: {self.output:.1f} dB", *suspects])


def _shortened(path: str) -> str:
    """The end of a module's path that fits over a third of a picture."""
    return path if len(path) <= 36 else f"...{path[-33:]}"
