"""round_weights: round the weights of a product together, so that their errors cancel on the calibration data.

Rounding each weight to its nearest integer is best for that weight, not for the product x w^T. With "feedback", column
by column, the error that a weight's rounding makes is taken over by the columns that come after it, as far as x holds
the same there:

    H = x^T x / rows + damping = L L^T (L lower),  q_k = round((w_k + sum_{j > k} (w_j - s q_j) L_jk / L_kk) / s)

(Frantar et al., GPTQ, 2022, in the form of Chee et al., QuIP, 2023, which needs no inverse of H) from the last column
to the first, those with the largest inputs last, at the scales that the weight has. With "adaround" an optimizer finds
which weights go up and which down (`fxq.reconstruction`).

x: what the product reads in the integer network, all products before it rounded already; of a convolution its windows,
of one with groups each group by itself. Products that read the same x are rounded at once. 1024 rows or windows are
drawn with a fixed seed. Three quarters fit; the result is kept if it is at least 0.3 dB better on the rest, and all
weights stay as they were if the output of the network loses by it.
"feedback" takes some 20 ms for 384 x 384 weights and 100 ms for 1536 inputs, "adaround" 1.3 s and 12 s.

Left alone: products of more than 1536 inputs, transposed convolutions, whose places see different taps, and weights
with other readers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.graph import constant, erase_unused, exclusive_constants, get_attr, set_constant, submodule
from fxq.observers import FixedScales, WeightObserver
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize_weight, quantize_weight
from fxq.qtypes import WEIGHT_QMAX
from fxq.recipe import WeightRounding
from fxq.reconstruction import reconstructed
from fxq.simulation import Simulation, calibrated_products
from fxq.spelling import CONV_TRANSPOSE, LINEAR
from fxq.stages import Stage

LEAST_GAIN = 0.3
"""dB."""
DAMPING = 0.1
"""Of the mean of H's diagonal: a few hundred rows say little of what the products' other inputs have in common. It also
keeps H's condition below 10 K, so that float32 serves."""
MAX_K = 1536
"""H and what is made of it are K x K. A longer product keeps its nearest integers: it would take seconds, and rows
enough to tell its inputs apart (up to 4608, no network of `make accuracy` gained 0.1 dB by it)."""
ROWS = 1024
BLOCK = 64
"""Columns whose errors are passed on together to those behind them."""
TITLES: dict[WeightRounding, str] = {"feedback": "rounded together", "adaround": "rounded by reconstruction"}
"""In reports."""


class Rounded(NamedTuple):
    """A weight on the grid of its scales, and the SQNR in dB on rows that it was not fitted to: before, and with it."""

    weight: Tensor
    scales: Tensor
    was: float
    now: float


@dataclass(frozen=True)
class RoundWeights:
    """See the module's docstring."""

    name: str = "round-weights"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of weights rounded; the effect goes into the decisions of the report."""
        how = ctx.recipe.round_weights
        if how is None:
            return 0
        exclusive = exclusive_constants(gm)
        products = {node for node in calibrated_products(gm, ctx.recipe) if _may_round(gm, node, exclusive)}
        if not products:
            return 0
        simulation, effects, before = Simulation(gm, ctx), {}, {}
        done: dict[Node, Rounded] = {}
        for node in simulation.stops(products, "rounding weights"):
            if node not in done:
                done |= _round(gm, [other for other in products if _reads_alike(gm, node, other)], simulation, how)
            found, scales, was, now = done.pop(node)
            if now - was >= LEAST_GAIN:
                before[node] = _weight(gm, node)
                _put(gm, node, found, scales)
                simulation.rerun(node)
                effects[node.name] = f"{TITLES[how]}: {was:.1f} -> {now:.1f} dB"
        if simulation.gain < 0:
            loss = f"the output would lose {-simulation.gain:.2f} dB"
            ctx.report.notes.append(f"{self.name}: all weights stay as they were, since {loss}")
            effects = {}
        for node, (source, observer) in before.items():
            observed, (rounded_weight, _) = node.args[1], _weight(gm, node)
            assert isinstance(observed, Node)
            if not effects:
                observed.replace_input_with(rounded_weight, source)
                gm.set_submodule(str(observed.target), observer)
            erase_unused(gm, source if effects else rounded_weight)
        ctx.report.add_details(effects)
        return len(effects)


def _weight(gm: GraphModule, product: Node) -> tuple[Node, WeightObserver]:
    """The constant that `product` reads, and its observer."""
    observed = product.args[1]
    assert isinstance(observed, Node) and isinstance(observed.args[0], Node)
    observer = submodule(gm, observed)
    assert isinstance(observer, WeightObserver)
    return observed.args[0], observer


def _may_round(gm: GraphModule, product: Node, exclusive: set[Node]) -> bool:
    source, observer = _weight(gm, product)
    observed = product.args[1]
    assert isinstance(observed, Node)
    w = constant(gm, source)
    short = 1 < w[0].numel() <= MAX_K and product.target is not CONV_TRANSPOSE
    return short and source in exclusive and len(observed.users) == 1 and not isinstance(observer, FixedScales)


def _put(gm: GraphModule, product: Node, w: Tensor, scales: Tensor) -> None:
    """Let `product` read `w`, which lies on the grid of `scales`."""
    source, observer = _weight(gm, product)
    observed = product.args[1]
    assert isinstance(observed, Node)
    path = set_constant(gm, f"{source.target}_rounded", w)
    with gm.graph.inserting_before(observed):
        observed.replace_input_with(source, get_attr(gm, path, source))
    gm.set_submodule(str(observed.target), FixedScales(f"weight {path}", observer.granularity, scales))


def _grouped(product: Node, w: Tensor) -> Tensor:
    """The weight as [groups, N / groups, K]."""
    groups = 1 if product.target is LINEAR else product.args[6]
    assert isinstance(groups, int)
    return w.reshape(groups, -1, w[0].numel())


def _windows(product: Node, w: Tensor, simulation: Simulation) -> tuple[Tensor, Tensor]:
    """What `product` multiplies by, [groups, rows, K], in float and in integers: the same rows of each call."""
    x = product.args[0]
    assert isinstance(x, Node)
    generator = torch.Generator().manual_seed(0)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    calls = list(zip(*simulation.values(x), strict=True))
    for values in calls:
        views = [_view(product, w, value) for value in values]
        places = views[0].shape[: -(w.dim() - 1)]
        total = places.numel()
        drawn = torch.randperm(total, generator=generator)[: ROWS // len(calls)].sort().values
        index = torch.unravel_index(drawn, places)
        for side, view in zip(sides, views, strict=True):
            groups = view.shape[len(places)] // w.shape[1]
            rows = view[index].reshape(len(drawn), groups, -1)
            side.append(rows.transpose(0, 1))
    exact, rounded = (torch.cat(side, 1) for side in sides)
    return exact, rounded


def _view(product: Node, w: Tensor, x: Tensor) -> Tensor:
    """The operand of a linear [..., K]; of a convolution its windows, [B, *places, C, *kernel], not copied."""
    if product.target is LINEAR:
        return x
    settings: tuple[Any, ...] = product.args[3:6]
    stride, padding, dilation = settings
    view = F.pad(x, [width for size in reversed(padding) for width in (size, size)])
    rank = len(stride)
    for i in range(rank):
        span = (w.shape[2 + i] - 1) * dilation[i] + 1
        view = view.unfold(2 + i, span, stride[i])[..., :: dilation[i]]
    return view.movedim(1, 1 + rank)


def _reads_alike(gm: GraphModule, product: Node, other: Node) -> bool:
    """Whether `other` multiplies by what `product` does."""
    shapes = [constant(gm, _weight(gm, node)[0]).shape[1:] for node in (product, other)]
    same = (product.target, product.args[0], product.args[3:]) == (other.target, other.args[0], other.args[3:])
    return same and shapes[0] == shapes[1]


def _round(gm: GraphModule, products: list[Node], simulation: Simulation, how: WeightRounding) -> dict[Node, Rounded]:
    """The weights of `products`, which multiply by the same, rounded together."""
    weights, scales = [], []
    for node in products:
        source, observer = _weight(gm, node)
        weights.append(constant(gm, source).detach())
        scales.append(observer.scales_of(weights[-1]))
    exact, rounded = _windows(products[0], weights[0], simulation)
    fit = 3 * exact.shape[1] // 4
    if not 0 < fit < exact.shape[1]:
        return {node: Rounded(w, s, 0.0, 0.0) for node, w, s in zip(products, weights, scales, strict=True)}
    grouped = [_grouped(node, w) for node, w in zip(products, weights, strict=True)]
    own = [s.expand(w.shape[0] * w.shape[1]).reshape(w.shape[:2]) for s, w in zip(scales, grouped, strict=True)]
    method = compensated if how == "feedback" else reconstructed
    found = method(torch.cat(grouped, 1), torch.cat(own, 1), damped_hessian(rounded[:, :fit]))
    results = {}
    parts = torch.split(found, [w.shape[1] for w in grouped], 1)
    for node, w, s, grid, new in zip(products, grouped, scales, own, parts, strict=True):
        flat = w.reshape(-1, w.shape[2])
        nearest = dequantize_weight(quantize_weight(flat, grid.flatten()), grid.flatten()).reshape(w.shape)
        expected = exact[:, fit:] @ w.mT
        was, now = (sqnr(expected, rounded[:, fit:] @ candidate.mT) for candidate in (nearest, new))
        results[node] = Rounded(new.reshape(constant(gm, _weight(gm, node)[0]).shape).contiguous(), s, was, now)
    return results


def damped_hessian(x: Tensor) -> Tensor:
    """H of the module's docstring, [G, K, K], the identity where x is all 0; x: [G, rows, K]."""
    hessian = x.mT @ x / max(1, x.shape[1])
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return hessian


def compensated(w: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """`w` on the grid of its scales, integers times scales, by the feedback of errors.

    w: float32 [G, n, K]; scales: [G, n]; hessian: [G, K, K].
    """
    order = torch.argsort(hessian.diagonal(dim1=1, dim2=2), 1)
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    lower = torch.linalg.cholesky(hessian)
    share = lower.mT / lower.diagonal(dim1=1, dim2=2)[:, :, None]  # [G, k, j]: of the error at j, what k takes over
    places = order[:, :, None].expand(-1, -1, w.shape[1])
    wanted = w.mT.gather(1, places)  # [G, K, n]: the weights of a column lie side by side
    q, errors, grid = torch.empty_like(wanted), torch.empty_like(wanted), scales[:, None]
    exact, rounded, left = (list(torch.split(values, 1, 1)) for values in (wanted, q, errors))
    inverse, size = 1 / grid, wanted.shape[1]
    for stop in range(size, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block = torch.baddbmm(wanted[:, start:stop], share[:, start:stop, stop:], errors[:, stop:])
        for k in range(stop - 1, start - 1, -1):
            row = block[:, k - start, None]
            if k + 1 < stop:
                row = torch.baddbmm(row, share[:, k : k + 1, k + 1 : stop], errors[:, k + 1 : stop])
            torch.mul(row, inverse, out=rounded[k]).round_().clamp_(-WEIGHT_QMAX, WEIGHT_QMAX)
            torch.addcmul(exact[k], rounded[k], grid, value=-1, out=left[k])
    integers = torch.empty_like(q).scatter_(1, places, q)
    return integers.mT * scales[:, :, None]


PASS = RoundWeights()
