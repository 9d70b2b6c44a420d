"""Observers: modules that stand in the graph, pass their input on, and learn what range a tensor takes.

`min_max`, `moving_average`, `percentile` and `histogram` (minimal squared error), the default because it is within
0.2 dB of the best on small classifiers and, with `passes.balance`, 4 dB ahead on a transformer, whose outliers
`percentile` cuts off (`make observers` measures it). Statistics live in buffers, so a `state_dict` carries them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from fxq.errors import CalibrationError
from fxq.numerics import activation_qparams, weight_scales
from fxq.qtypes import Granularity, QParams
from fxq.ranges import best_range

BINS = 4096
AT_ONCE = 1 << 16
"""Values that are sorted into bins together: what that takes stays in a cache."""


class KeepsDtypes(nn.Module):
    """A module whose buffers stay what they are where a model is converted to another floating-point type."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self


class Observer(KeepsDtypes):
    """Watches one activation; `where` names it in the user's terms."""

    low: Tensor
    high: Tensor
    learning = True

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.register_buffer("low", torch.tensor(torch.inf, dtype=torch.float64))
        self.register_buffer("high", torch.tensor(-torch.inf, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        """Learn from `x` (float32 or float64) and return it; raises `CalibrationError` on NaN or infinity."""
        if self.learning and x.numel():
            self._observe(x.detach(), *self.extremes(x))
        return x

    def extremes(self, x: Tensor) -> tuple[float, float]:
        """The smallest and the largest value of `x`; raises `CalibrationError` on NaN or infinity."""
        low, high = (bound.item() for bound in torch.aminmax(x.detach()))
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CalibrationError(f"{self.where} holds NaN or infinity (min {low}, max {high})")
        return low, high

    @property
    def seen(self) -> bool:
        """Whether any data has passed."""
        return bool(self.low <= self.high)

    def range(self) -> tuple[float, float]:
        """The range to quantize, low <= high, in real units."""
        return self.low.item(), self.high.item()

    def qparams(self) -> QParams:
        """Scale and zero point of `range()`; raises `CalibrationError` where no data has passed."""
        if not self.seen:
            raise CalibrationError(
                f"{self.where} was never computed while calibrating; give calibration data that reaches it, or keep "
                "its module float in the recipe"
            )
        return activation_qparams(*self.range())

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        self.low.fill_(min(self.low.item(), low))
        self.high.fill_(max(self.high.item(), high))

    def extra_repr(self) -> str:
        return f"{self.where!r}, low={self.low.item():.6g}, high={self.high.item():.6g}"


@contextlib.contextmanager
def _set_learning(module: nn.Module, learning: bool) -> Iterator[None]:
    before = {m: m.learning for m in module.modules() if isinstance(m, Observer)}
    for observer in before:
        observer.learning = learning
    try:
        yield
    finally:
        for observer, was in before.items():
            observer.learning = was


def paused(module: nn.Module) -> contextlib.AbstractContextManager[None]:
    """Run `module` without its observers learning from what passes: it is not calibration data."""
    return _set_learning(module, False)


@contextlib.contextmanager
def learning(module: nn.Module) -> Iterator[None]:
    """Run `module` in eval mode, its observers learning from what passes, fake quantizers included."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with _set_learning(module, True):
            yield
    finally:
        for m, training in modes:
            m.training = training


class MinMax(Observer):
    """The smallest and the largest value seen."""


class MovingAverage(Observer):
    """Exponential moving averages of each batch's minimum and maximum: r += (batch - r) * 0.1."""

    momentum = 0.1

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        if not self.seen:
            super()._observe(x, low, high)
            return
        self.low += (low - self.low) * self.momentum
        self.high += (high - self.high) * self.momentum


class Histogram(Observer):
    """The range with the smallest squared quantization error (`fxq.ranges`), over a histogram of all values seen.

    4096 bins; when a batch leaves their range, the range doubles and bins merge in pairs, so counts stay exact. Zeros
    are left out: they are exact in every affine quantization.
    """

    counts: Tensor
    start: Tensor
    width: Tensor

    def __init__(self, where: str) -> None:
        super().__init__(where)
        self.register_buffer("counts", torch.zeros(BINS, dtype=torch.float64))
        self.register_buffer("start", torch.zeros((), dtype=torch.float64))
        self.register_buffer("width", torch.zeros((), dtype=torch.float64))
        self._found: tuple[Tensor, tuple[float, float]] | None = None

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        super()._observe(x, low, high)
        zeros = x.numel() - int(torch.count_nonzero(x))
        if zeros == x.numel():
            return
        if self.width == 0:
            # A little wider than the data, so that the largest value falls inside the last bin.
            span = (max(high, 0.0) - min(low, 0.0)) * (1 + 1e-6)
            self.start.fill_(min(low, 0.0))
            self.width.fill_(span)
        self._cover(low, high)
        step = self.width.item() / BINS
        for values in torch.split(x.reshape(-1), AT_ONCE):
            index = values.to(torch.float64, copy=True).sub_(self.start).div_(step).to(torch.int64).clamp_(0, BINS - 1)
            self.counts += torch.bincount(index, minlength=BINS)
        self.counts[int(min(max(-self.start.item() / step, 0), BINS - 1))] -= zeros

    def _cover(self, low: float, high: float) -> None:
        """Double the range until it holds [low, high]."""
        empty = torch.zeros(BINS // 2, dtype=torch.float64)
        while low < self.start or high >= self.start + self.width:
            merged = self.counts.reshape(-1, 2).sum(1)
            if low < self.start:
                self.start -= self.width
                self.counts.copy_(torch.cat([empty, merged]))
            else:
                self.counts.copy_(torch.cat([merged, empty]))
            self.width *= 2

    def _values(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Centres and counts of the bins that hold anything."""
        counts = self.counts.numpy()
        used = np.flatnonzero(counts)
        centres = self.start.item() + (used.astype(np.float64) + 0.5) * (self.width.item() / BINS)
        return centres, counts[used].astype(np.float64)

    def range(self) -> tuple[float, float]:
        """`best_range` of all that has been seen."""
        seen = torch.cat([self.counts, torch.stack([self.low, self.high, self.start, self.width])])
        if self._found is None or not torch.equal(self._found[0], seen):
            values, counts = self._values()
            self._found = seen, best_range(values, counts, min(self.low.item(), 0.0), max(self.high.item(), 0.0))
        return self._found[1]


class Percentile(Histogram):
    """The central 99.99 % of all values seen, found in the histogram."""

    tail = 0.5e-4

    def range(self) -> tuple[float, float]:
        """The range between the two tails, widened to whole bins and held inside [low, high]."""
        values, counts = self._values()
        if not len(values):
            return super().range()
        share = np.cumsum(counts) / counts.sum()
        half = self.width.item() / BINS / 2
        first, last = int(np.searchsorted(share, self.tail)), int(np.searchsorted(share, 1 - self.tail))
        return max(values[first] - half, self.low.item()), min(
            values[min(last, len(values) - 1)] + half, self.high.item()
        )


class Edge(Histogram):
    """What a product reads where a float island ends: the histogram, each channel's extremes and a sample of rows.

    From these `balance` can try scales per channel and ranges on the products themselves. Rows are drawn at random with
    a fixed seed (a stride could fall in step with the sequence length): at most 128 of a batch, 1024 in all.
    """

    channel_low: Tensor
    channel_high: Tensor
    rows: Tensor
    from_batch, most = 128, 1024

    def __init__(self, where: str) -> None:
        super().__init__(where)
        for name in ("channel_low", "channel_high", "rows"):
            self.register_buffer(name, torch.zeros(0))

    def _load_from_state_dict(self, state: dict[str, Tensor], prefix: str, *args: Any) -> None:
        for name in ("channel_low", "channel_high", "rows"):  # their shapes are those of the data
            if f"{prefix}{name}" in state:
                setattr(self, name, torch.empty_like(state[f"{prefix}{name}"]))
        super()._load_from_state_dict(state, prefix, *args)

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        super()._observe(x, low, high)
        rows = x.reshape(-1, x.shape[-1])
        lows, highs = torch.aminmax(rows, dim=0)
        first = not self.rows.numel()
        self.channel_low = lows if first else torch.minimum(self.channel_low, lows)
        self.channel_high = highs if first else torch.maximum(self.channel_high, highs)
        drawn = _draw(rows, self.from_batch).float()
        self.rows = _draw(drawn if first else torch.cat([self.rows, drawn]), self.most)


def _draw(rows: Tensor, most: int) -> Tensor:
    """At most `most` of the rows, at random with a fixed seed, in memory of their own."""
    chosen = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:most]
    return rows[chosen]


class Fixed(Observer):
    """A range that is settled; rows: a sample of what is quantized, float32 [rows, K], before any factors."""

    def __init__(self, where: str, low: float, high: float, rows: Tensor) -> None:
        super().__init__(where)
        self.register_buffer("rows", rows)
        self.low.fill_(low)
        self.high.fill_(high)

    rows: Tensor

    def _observe(self, x: Tensor, low: float, high: float) -> None:
        pass


def forget_rows(module: nn.Module) -> None:
    """Let go of the samples of rows in `module`: whoever chooses by them has done so."""
    for observer in module.modules():
        if isinstance(observer, Edge | Fixed):
            observer.rows = torch.zeros(0)


OBSERVERS: dict[str, type[Observer]] = {
    "min_max": MinMax,
    "moving_average": MovingAverage,
    "percentile": Percentile,
    "histogram": Histogram,
}


class Rows(nn.Module):
    """Stands on the edge of a product whose rows find their scales as it runs: there is nothing to learn."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x`."""
        return x


HOLDER = "observers"
"""The submodule of a graph that holds its observers."""


class WeightObserver(KeepsDtypes):
    """Stands on a weight's edge; its scales follow from the weight alone.

    factors: what each input channel is multiplied by before it comes to the product, powers of two, float32 [K]; None
    where by nothing. The weight is divided by them whenever it is read, so that it is in memory once.
    """

    factors: Tensor | None

    def __init__(self, where: str, granularity: Granularity, factors: Tensor | None = None) -> None:
        super().__init__()
        self.where = where
        self.granularity = granularity
        self.register_buffer("factors", factors)

    def forward(self, w: Tensor) -> Tensor:
        """What the product reads of the weight `w` (floating-point [N, ...])."""
        return self.scaled(w)

    def scaled(self, w: Tensor) -> Tensor:
        """`w` by the factors."""
        return w if self.factors is None else w / self.factors

    def scales_of(self, w: Tensor) -> Tensor:
        """The scales that the largest magnitudes of `scaled(w)` have: float32 [N], or [1] per tensor."""
        rows = self.scaled(w.detach()).float().reshape(len(w), w[:1].numel())
        low, high = torch.aminmax(rows, dim=1) if rows.numel() else (rows.new_zeros(len(w)),) * 2
        peak = torch.maximum(-low, high)
        if self.granularity == "per_tensor":
            peak = peak.amax().reshape(1) if len(peak) else peak.new_zeros(1)
        return torch.from_numpy(weight_scales(peak.numpy()))

    def extra_repr(self) -> str:
        return f"{self.where!r}, {self.granularity}"


class RoundedWeight(WeightObserver):
    """Integers that are settled: `integers` (int8, of the weight's shape), and their `scales`."""

    integers: Tensor
    scales: Tensor

    def __init__(self, before: WeightObserver, integers: Tensor, scales: Tensor) -> None:
        super().__init__(before.where, before.granularity, before.factors)
        self.register_buffer("integers", integers)
        self.register_buffer("scales", scales)

    def scales_of(self, w: Tensor) -> Tensor:
        """The scales that are settled."""
        return self.scales
