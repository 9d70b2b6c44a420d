"""balance: where a product reads from a float island, choose range and channel factors by the product's own error.

    y = (x * f) (w / f)^T = x w^T        f: a power of two for each input channel

Static int8 has one scale for all channels of x, and a few large channels spoil it for the rest, as in transformers.
Dividing them out of x and into w moves the difficulty to the weight, whose scales are per output channel. For channel
peaks x_k, w_k and a in 0.5..1, f_k = w_k**(1 - a) / x_k**a, rounded to a power of two so that both products above are
exact (Xiao et al., SmoothQuant, 2022, with a sought per layer). Where a handful of channels is large, such factors cost
every weight; so factors that only lower peaks to a part of the largest are tried as well. Of no factors, each a and
each part, on half of a sample of calibration rows, the smallest squared error of the products' outputs wins, if it is
at least 0.5 dB better on the other half as well. Ranges hold all values seen, and with factors, where few rows were
seen, reach further: what is clipped belongs to few rows, but to those that others attend to, and on MiniLM narrower
ranges that gain 1 dB in a product lose 10 dB behind the attention.

A weight with other readers is not scaled; its product still gets its range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.graph import call, constant, exclusive_constants, get_attr, set_constant, submodule
from fxq.numerics import activation_qparams
from fxq.observers import Edge, Fixed, WeightObserver
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, dequantize_weight, integers_of, quantize
from fxq.qtypes import Granularity
from fxq.spelling import LINEAR, MUL
from fxq.stages import Stage

LEAST_GAIN = 0.5
"""dB. Smaller gains on a few hundred rows do not carry over to other data (`make observers`)."""
MOST_OUTPUTS = 128
"""Of each product, by which the error is measured; they are alike, and each costs a row of weights at each attempt."""
MANY = 1024
"""Rows after which the largest value of a channel is taken for the largest there is. Of n normally distributed values
it lies near (2 ln n)**0.5, and with factors every channel comes close to the end of the range: after 32 rows, four
values in a hundred would be clipped."""
EXPONENTS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
CEILINGS = (0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.0625)


@dataclass(frozen=True)
class Choice:
    """A way to quantize an edge: factors per channel or none, the range of x * factors, the products' SQNR in dB."""

    factors: Tensor | None
    low: float
    high: float
    sqnr: float


@dataclass(frozen=True)
class Balance:
    """See the module's docstring."""

    name: str = "balance"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.ROUNDING  # x * f has strides of its own, for which torch may take another kernel

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Settles every `Edge`; the effect goes into the decisions of the report."""
        if not ctx.recipe.balance:
            return 0
        exclusive = exclusive_constants(gm)
        edges = [n for n in gm.graph.nodes if n.op == "call_module" and isinstance(submodule(gm, n), Edge)]
        effects: dict[str, str] = {}
        with ctx.bar("balancing", len(edges)) as bar:
            for node in edges:
                observer = submodule(gm, node)
                assert isinstance(observer, Edge)
                if observer.rows.numel():
                    readers = [user for user in node.users if user.target is LINEAR]
                    plain, best = _choose(gm, observer, readers, exclusive)
                    _apply(gm, node, observer, readers, best)
                    effects |= {reader.name: _effect(plain, best) for reader in readers}
                bar.update()
        ctx.report.add_details(effects)
        return len(effects)


def _effect(plain: Choice, best: Choice) -> str:
    how = "balanced" if best.factors is not None else "range by error"
    return f"{how}: {plain.sqnr:.1f} -> {best.sqnr:.1f} dB" if best is not plain else ""


def _choose(gm: GraphModule, observer: Edge, readers: list[Node], exclusive: set[Node]) -> tuple[Choice, Choice]:
    """The edge as its observer alone would have it, and the best way found; exclusive: constants with one reader."""
    whole = [_weight(gm, reader) for reader in readers]
    weights = [(w[_some(len(w))], granularity) for w, granularity in whole]
    together = torch.cat([w for w, _ in weights]).double().t()
    seen, unseen = observer.rows[::2], observer.rows[1::2] if len(observer.rows) > 1 else observer.rows
    products = seen.double() @ together

    def attempt(
        factors: Tensor | None, low: float, high: float, x: Tensor = seen, expected: Tensor = products
    ) -> Choice:
        qparams = activation_qparams(low, high)
        operands = (qparams.scale, qparams.zero_point)
        q_x = dequantize(quantize(x if factors is None else x * factors, *operands), *operands)
        q_w = []
        for w, granularity in weights:
            q_w.append(dequantize_weight(*integers_of(WeightObserver("", granularity, factors), w)))
        return Choice(factors, low, high, sqnr(expected, q_x.double() @ torch.cat(q_w).double().t()))

    low, high = observer.range()
    plain = attempt(None, low, high)
    choices = [plain, attempt(None, min(low, observer.low.item()), max(high, observer.high.item()))]
    if all(_exclusive(reader, exclusive) for reader in readers):
        for exponent in EXPONENTS:
            factors = _factors(observer, [w for w, _ in whole], exponent)
            choices.append(attempt(factors, *_scaled_range(observer, factors)))
        for ceiling in CEILINGS:
            factors = _lowered(observer, ceiling)
            choices.append(attempt(factors, *_scaled_range(observer, factors)))
    best = max(choices, key=_quality)
    expected = unseen.double() @ together
    plain, best = (attempt(choice.factors, choice.low, choice.high, unseen, expected) for choice in (plain, best))
    return plain, best if _quality(best) >= _quality(plain) + LEAST_GAIN else plain


def _some(count: int) -> Tensor:
    """Indices of at most `MOST_OUTPUTS` of `count` outputs, at equal distances."""
    return torch.linspace(0, count - 1, min(count, MOST_OUTPUTS)).long()


def _quality(choice: Choice) -> float:
    """The SQNR, with what cannot be measured (no signal) last."""
    return choice.sqnr if choice.sqnr == choice.sqnr else -torch.inf


def _scaled_range(observer: Edge, factors: Tensor) -> tuple[float, float]:
    """That of x * factors, reaching as far beyond what was seen as ever more rows of a normal distribution would.

    And no less than the range of x does, which it is compared with.
    """
    seen = float(observer.counts.sum()) / len(factors)  # values of a channel
    margin = max(1.0, math.log(MANY) / math.log(max(2.0, seen))) ** 0.5
    scaled = float((observer.channel_low * factors).min()), float((observer.channel_high * factors).max())
    extremes = observer.low.item(), observer.high.item()
    margins = (
        max(margin, end / extreme) if extreme else margin
        for end, extreme in zip(observer.range(), extremes, strict=True)
    )
    low, high = (m * end for m, end in zip(margins, scaled, strict=True))
    return low, high


def _peaks(observer: Edge) -> Tensor:
    return torch.maximum(-observer.channel_low, observer.channel_high).double()


def _lowered(observer: Edge, ceiling: float) -> Tensor:
    """Powers of two that bring each channel's peak below `ceiling` times the largest; 1 for a channel that is."""
    peaks = _peaks(observer)
    wanted = torch.where(peaks > 0, peaks.max() * ceiling / peaks, 1.0).clamp(max=1)
    exponents = torch.frexp(wanted).exponent - 1  # floor(log2(wanted)), of powers of two as well
    return torch.exp2(exponents.clamp(-20, 0).float())


def _factors(observer: Edge, weights: list[Tensor], exponent: float) -> Tensor:
    """Powers of two, with a geometric mean near 1; 1 for a channel that is dead in x or in every weight."""
    x_peak = _peaks(observer)
    w_peak = torch.stack([w.abs().amax(0) for w in weights]).amax(0).double()
    alive = (x_peak > 0) & (w_peak > 0)
    logs = (1 - exponent) * torch.log2(w_peak) - exponent * torch.log2(x_peak)
    logs = torch.where(alive, logs - logs[alive].mean(), torch.zeros_like(logs)) if bool(alive.any()) else logs * 0
    return torch.exp2(torch.round(logs.nan_to_num(0)).clamp(-20, 20).float())


def _source(reader: Node) -> Node:
    """The constant whose observer a linear reads as its weight."""
    observed = reader.args[1]
    assert isinstance(observed, Node) and isinstance(observed.args[0], Node)
    return observed.args[0]


def _weight(gm: GraphModule, reader: Node) -> tuple[Tensor, Granularity]:
    """The weight of a linear, and the granularity of its scales."""
    observed = reader.args[1]
    assert isinstance(observed, Node)
    observer = submodule(gm, observed)
    assert isinstance(observer, WeightObserver)
    return constant(gm, _source(reader)).detach(), observer.granularity


def _exclusive(reader: Node, exclusive: set[Node]) -> bool:
    """Whether the weight of `reader` is read nowhere else, under any name."""
    observed = reader.args[1]
    assert isinstance(observed, Node)
    return _source(reader) in exclusive and len(observed.users) == 1


def _apply(gm: GraphModule, node: Node, observer: Edge, readers: list[Node], choice: Choice) -> None:
    gm.set_submodule(str(node.target), Fixed(observer.where, choice.low, choice.high, observer.rows))
    if choice.factors is None:
        return
    x = node.args[0]
    assert isinstance(x, Node)
    for reader in readers:
        observed = reader.args[1]
        assert isinstance(observed, Node)
        old = submodule(gm, observed)
        assert isinstance(old, WeightObserver)
        gm.set_submodule(str(observed.target), WeightObserver(old.where, old.granularity, choice.factors))
    path = set_constant(gm, f"{_source(readers[0]).target}_factors", choice.factors)
    with gm.graph.inserting_before(node):
        factors = get_attr(gm, path, readers[0])
        scaled = call(gm, MUL, (x, factors), node)
    scaled.meta.pop("source", None)
    node.meta.pop("source", None)
    node.replace_input_with(x, scaled)


PASS = Balance()
