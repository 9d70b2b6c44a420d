"""equalize: bring the channels of a value between two products to like ranges, where that lowers the second's error.

    w2 relu(w1 x + b1) = (w2 s) relu((w1 / s) x + b1 / s)        s > 0: a factor for each channel in between

The value in between has one scale for all channels, so that small ones get few steps. For the channels' peaks x_k and
those of the second weight w_k, and a in 0.25..1, s_k = x_k**a / w_k**(1 - a) (Nagel et al., Data-Free Quantization,
2019, have a = 1/2 and the peaks of the first weight for x_k). Of these and none, on half of a sample of the calibration
data, the smallest squared error of the second product wins, if it is at least 0.3 dB better on the other half as well.
The first weight has a scale for each channel, so it rounds as before. What the channels reach in all of the data is
known of the sample only: the range of the scaled value goes a quarter beyond, which its gain has to pay for. All stays
as it was if the output of the network loses by it.

Off by default: weights have a scale for each channel, and batch norms leave the values' channels alike, so that no
network of `make accuracy` gains by it. It is for networks whose channels differ, and for weights with one scale in all.

Not where a clamp has an upper bound or another activation stands in between, which no factor passes; where something
else reads the value, or the value shares its range; nor where a weight has other readers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.graph import constant, erase_unused, exclusive_constants, get_attr, set_constant, submodule
from fxq.observers import OBSERVERS, MinMax, Observer, WeightObserver
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, dequantize_weight, quantize, quantize_weight
from fxq.sampling import sample_of
from fxq.simulation import Simulation, calibrated_products, rows_of
from fxq.spelling import LINEAR, RELU
from fxq.stages import Stage

Option = tuple[Tensor | None, Observer]
"""Factors or none, and the observer of the value with them."""
LEAST_GAIN = 0.3
"""dB."""
MARGIN = 1.25
EXPONENTS = (0.25, 0.5, 0.75, 1.0)
MOST_ROWS, MOST_IMAGES = 256, 2
"""Of each call, by which the error is measured."""


@dataclass(frozen=True)
class Pair:
    """A product, the observer of what it gives, and the product that alone reads that."""

    first: Node
    between: Node
    second: Node


@dataclass(frozen=True)
class Equalize:
    """See the module's docstring."""

    name: str = "equalize"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.ROUNDING

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of pairs equalized; the effect goes into the decisions of the report."""
        pairs = _pairs(gm, ctx) if ctx.recipe.equalize else {}
        if not pairs:
            return 0
        before = GraphModule(gm, copy.deepcopy(gm.graph))  # with the constants and observers that now are
        simulation, effects = Simulation(gm, ctx, exact_only=True), {}
        divided: dict[str, tuple[int, list[float]]] = {}
        for node in simulation.stops(set(pairs), "equalizing channels"):
            pair = pairs[node]
            values, _ = simulation.values(node)
            best, was, now = _choose(gm, pair, values)
            if best is not None and now - was >= LEAST_GAIN:
                _apply(gm, pair, best, values)
                observed = pair.second.args[1]
                assert isinstance(observed, Node)
                for run in simulation.exact:
                    run.env[node] = run.env[node] / _column(best, pair.first)
                    run.step(_source(pair.second))
                    run.step(observed)
                effects[pair.second.name] = f"equalized: {was:.1f} -> {now:.1f} dB"
                value = pair.between.args[0]
                assert isinstance(value, Node)
                channels = -1 if pair.first.target is LINEAR else 1, best.tolist()
                divided |= {node.meta["source"]: channels for node in (pair.first, value) if "source" in node.meta}
        loss = _reached(before, gm, ctx) - _reached(gm, gm, ctx) if effects else 0.0
        if loss > 0:
            ctx.report.notes.append(f"{self.name}: all channels stay as they were: the output would lose {loss:.2f} dB")
            _restore(gm, before)
            return 0
        ctx.report.add_details(effects)
        ctx.report.equalized |= divided
        return len(effects)


def _reached(graph: GraphModule, gm: GraphModule, ctx: Context) -> float:
    """The SQNR in dB of the output of `graph` in integers, on the calibration data that `gm` holds."""
    simulation = Simulation(graph, ctx, sample=sample_of(gm))
    for _ in simulation.stops(set(), "judging equalized channels"):
        pass
    return simulation.reached


def _restore(gm: GraphModule, before: GraphModule) -> None:
    """Take back the graph, and the observers that were replaced."""
    for node in before.graph.nodes:
        if node.op == "call_module":
            gm.set_submodule(str(node.target), submodule(before, node))
    gm.graph = before.graph


def _pairs(gm: GraphModule, ctx: Context) -> dict[Node, Pair]:
    """By the node between them."""
    products, exclusive = calibrated_products(gm, ctx.recipe), exclusive_constants(gm)
    found = {}
    for second in products:
        between = second.args[0]
        assert isinstance(between, Node)
        observer, first = submodule(gm, between), between.args[0]
        if type(observer) not in OBSERVERS.values() or len(between.users) != 1:
            continue
        if any(n.target == between.target and n is not between for n in gm.graph.nodes):
            continue  # others share the range
        if isinstance(first, Node) and first.target is RELU and len(first.users) == 1:
            first = first.args[0]
        if isinstance(first, Node) and first in products and len(first.users) == 1:
            pair = Pair(first, between, second)
            if all(_source(product) in exclusive for product in (pair.first, pair.second)):
                found[between] = pair
    return found


def _source(product: Node) -> Node:
    """The constant whose observer `product` reads as its weight."""
    observed = product.args[1]
    assert isinstance(observed, Node) and isinstance(observed.args[0], Node)
    return observed.args[0]


def _column(factors: Tensor, product: Node) -> Tensor:
    """Factors of the channels of what `product` gives, to multiply that by."""
    return factors if product.target is LINEAR else factors.reshape(-1, *[1] * (len(product.meta["value"].shape) - 2))


def _by_input(product: Node, w: Tensor, factors: Tensor) -> Tensor:
    """`factors` of the input channels, to multiply the weight [N, C / groups, ...] by."""
    groups = 1 if product.target is LINEAR else product.args[6]
    assert isinstance(groups, int)
    split = factors.reshape(groups, 1, -1).expand(-1, len(w) // groups, -1)
    return split.reshape(len(w), w.shape[1], *[1] * (w.dim() - 2))


def _choose(gm: GraphModule, pair: Pair, values: list[Tensor]) -> tuple[Tensor | None, float, float]:
    """The best factors on half of the data or None; of the second product on the other, the SQNR without and with."""
    if pair.second.target is LINEAR:
        few = [value.reshape(-1, value.shape[-1])[:MOST_ROWS] for value in values]
    else:
        few = [value[:MOST_IMAGES] for value in values]
    seen, unseen = (few[::2], few[1::2]) if len(few) > 1 else _cut(few[0])
    if not all(value.numel() for value in (*seen, *unseen)):
        return None, 0.0, 0.0
    w, observer = constant(gm, _source(pair.second)).detach().to(seen[0].dtype), submodule(gm, pair.between)
    observed = pair.second.args[1]
    assert isinstance(observed, Node) and isinstance(observer, Observer)
    weights = submodule(gm, observed)
    assert isinstance(weights, WeightObserver)

    def reached(option: Option, data: list[Tensor]) -> float:
        factors, settled = option
        scaled = w if factors is None else w * _by_input(pair.second, w, factors)
        q, scales = settled.qparams(), weights.scales_of(scaled)
        integers = dequantize_weight(quantize_weight(scaled, scales), scales).to(w.dtype)
        exact, rounded = [], []
        for x in data:
            own = x if factors is None else x / _column(factors, pair.first)
            own = dequantize(quantize(own.float(), q.scale, q.zero_point), q.scale, q.zero_point).to(w.dtype)
            exact.append(_run(pair.second, x, w).flatten())
            rounded.append(_run(pair.second, own, integers).flatten())
        return sqnr(torch.cat(exact), torch.cat(rounded))

    x_peak = torch.cat([rows_of(pair.first, value).abs().amax(0, keepdim=True) for value in values]).amax(0)
    groups = len(x_peak) // w.shape[1]
    w_peak = w.abs().reshape(groups, -1, w.shape[1], w[0, 0].numel()).amax((1, 3)).flatten()
    plain: Option = None, observer
    tried = [_factors(x_peak, w_peak, exponent) for exponent in EXPONENTS]
    options = [plain, *((factors, _settled(observer, seen, factors, pair)) for factors in tried)]
    best = max(options, key=lambda option: reached(option, seen))
    return best[0], reached(plain, unseen), reached(best, unseen)


def _cut(value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    first, second = value.tensor_split(2)
    return [first], [second]


def _run(product: Node, x: Tensor, w: Tensor) -> Tensor:
    target: Any = product.target
    y: Tensor = target(x, w, None, *product.args[3:])
    return y


def _factors(x_peak: Tensor, w_peak: Tensor, exponent: float) -> Tensor:
    """With a geometric mean of 1; 1 for a channel that is dead in x or in the weight."""
    alive = (x_peak > 0) & (w_peak > 0)
    if not bool(alive.any()):
        return torch.ones_like(x_peak)
    logs = exponent * torch.log2(x_peak) - (1 - exponent) * torch.log2(w_peak)
    return torch.exp2(torch.where(alive, logs - logs[alive].mean(), 0.0).clamp(-20, 20))


def _settled(old: Observer, values: list[Tensor], factors: Tensor, pair: Pair) -> Observer:
    """The range of `values` scaled, reaching `MARGIN` times as far, or as far as `old` saw or wants beyond them."""
    new = MinMax(old.where)
    scaled = [value / _column(factors, pair.first) for value in values]
    low, high = old.range()
    least, most = min(low, old.low.item()), max(high, old.high.item())
    for end, reach, bound in ((new.low, least, torch.amin), (new.high, most, torch.amax)):
        own, now = (bound(torch.stack([bound(value) for value in some])) for some in (values, scaled))
        end.copy_(now * (reach / own).clamp(min=MARGIN) if own != 0 else now)
    return new


def _apply(gm: GraphModule, pair: Pair, factors: Tensor, values: list[Tensor]) -> None:
    observer = submodule(gm, pair.between)
    assert isinstance(observer, Observer)
    gm.set_submodule(str(pair.between.target), _settled(observer, values, factors, pair))
    first, second = (constant(gm, _source(product)).detach() for product in (pair.first, pair.second))
    _replace(gm, pair.first, (first / factors.reshape(-1, *[1] * (first.dim() - 1))).float())
    _replace(gm, pair.second, (second * _by_input(pair.second, second, factors)).float())
    x, w, b, *rest = pair.first.args
    if isinstance(b, Node):
        with gm.graph.inserting_before(pair.first):
            path = set_constant(gm, f"{b.target}_equalized", (constant(gm, b).detach() / factors).float())
            pair.first.args = (x, w, get_attr(gm, path, pair.first), *rest)
        erase_unused(gm, b)


def _replace(gm: GraphModule, product: Node, weight: Tensor) -> None:
    """Let `product` read another weight, through an observer that names it."""
    source, observed = _source(product), product.args[1]
    assert isinstance(observed, Node)
    observer = submodule(gm, observed)
    assert isinstance(observer, WeightObserver)
    path = set_constant(gm, f"{str(source.target).removesuffix('_equalized')}_equalized", weight)
    with gm.graph.inserting_before(observed):
        observed.replace_input_with(source, get_attr(gm, path, source))
    gm.graph.erase_node(source)
    gm.set_submodule(str(observed.target), WeightObserver(f"weight {path}", observer.granularity))


PASS = Equalize()
