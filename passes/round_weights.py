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
drawn with a fixed seed. Three quarters fit; the result is kept if it is at least 0.3 dB better on the rest, and
`fit_products` takes all back if the output of the network loses by it. In float the network computes with the weights
as they were.
"feedback" takes some 20 ms for 384 x 384 weights and 100 ms for 1536 inputs, "adaround" 0.7 s and 6 s.

Left alone: products of more than 1536 inputs, transposed convolutions, whose places see different taps, and weights
with other readers.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.graph import constant, exclusive_constants, submodule
from fxq.observers import RoundedWeight, WeightObserver
from fxq.pipeline import Context
from fxq.qdq import quantize_weight
from fxq.qtypes import WEIGHT_QMAX
from fxq.recipe import WeightRounding
from fxq.reconstruction import reconstructed
from fxq.simulation import Change, Simulation, calibrated_products
from fxq.spelling import CONV_TRANSPOSE, LINEAR

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
    """The integers of a weight, their scales, and the SQNR in dB on rows that it was not fitted to: before, and now."""

    integers: Tensor
    scales: Tensor
    was: float
    now: float


@dataclass(frozen=True)
class RoundWeights:
    """See the module's docstring."""

    name: str = "round-weights"
    what: str = "weights"

    def begin(self, gm: GraphModule, ctx: Context) -> _Rounding | None:
        """None where the recipe does not want it."""
        how = ctx.recipe.round_weights
        if how is None:
            return None
        exclusive = exclusive_constants(gm)
        return _Rounding(gm, {n for n in calibrated_products(gm, ctx.recipe) if _may_round(gm, n, exclusive)}, how)


@dataclass(frozen=True)
class _Rounding:
    """At work on one graph. ahead: of products that are yet to come, and read what one before them has read."""

    gm: GraphModule
    products: Set[Node]
    how: WeightRounding
    ahead: dict[Node, Rounded] = field(default_factory=dict)

    def fit(self, product: Node, simulation: Simulation) -> Change | None:
        if product not in self.ahead:
            readers = (reader for reader in product.all_input_nodes[0].users if reader in self.products)
            alike = [reader for reader in readers if _reads_alike(self.gm, product, reader)]
            self.ahead.update(_round(self.gm, alike, simulation, self.how))
        integers, scales, was, now = self.ahead.pop(product)
        if not now - was >= LEAST_GAIN:
            return None
        path, (_, observer) = str(_observed(product).target), _weight(self.gm, product)
        self.gm.set_submodule(path, RoundedWeight(observer, integers, scales))
        undo = partial(self.gm.set_submodule, path, observer)
        return Change(f"{TITLES[self.how]}: {was:.1f} -> {now:.1f} dB", undo)


def _observed(product: Node) -> Node:
    observed = product.args[1]
    assert isinstance(observed, Node)
    return observed


def _weight(gm: GraphModule, product: Node) -> tuple[Node, WeightObserver]:
    """The constant that `product` reads, and its observer."""
    observed = _observed(product)
    observer, source = submodule(gm, observed), observed.args[0]
    assert isinstance(observer, WeightObserver) and isinstance(source, Node)
    return source, observer


def _may_round(gm: GraphModule, product: Node, exclusive: set[Node]) -> bool:
    source, observer = _weight(gm, product)
    w = constant(gm, source)
    short = 1 < w[0].numel() <= MAX_K and product.target is not CONV_TRANSPOSE
    alone = source in exclusive and len(_observed(product).users) == 1
    return short and alone and not isinstance(observer, RoundedWeight)


def _grouped(product: Node, w: Tensor) -> Tensor:
    """The weight as [groups, N / groups, K]."""
    groups = 1 if product.target is LINEAR else product.args[6]
    assert isinstance(groups, int)
    return w.reshape(groups, -1, w[0].numel())


def _windows(product: Node, w: Tensor, simulation: Simulation) -> tuple[Tensor, Tensor]:
    """What `product` multiplies by, [groups, rows, K], in float and in integers: the same rows of each call.

    Both in the precision that the float network runs in.
    """
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
            rows = view[index].reshape(len(drawn), groups, w[0].numel())
            side.append(rows.transpose(0, 1))
    exact, rounded = (torch.cat(side, 1) for side in sides)
    return exact, rounded.to(exact.dtype)


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
        weights.append(observer(constant(gm, source).detach()))
        scales.append(observer.scales_of(constant(gm, source)))
    exact, rounded = _windows(products[0], weights[0], simulation)
    fit = 3 * exact.shape[1] // 4
    if not 0 < fit < exact.shape[1]:
        return {node: Rounded(w, s, 0.0, 0.0) for node, w, s in zip(products, weights, scales, strict=True)}
    grouped = [_grouped(node, w).to(exact.dtype) for node, w in zip(products, weights, strict=True)]
    own = [s.to(w.dtype).expand(w.shape[:2].numel()).reshape(w.shape[:2]) for s, w in zip(scales, grouped, strict=True)]
    method = compensated if how == "feedback" else reconstructed
    found = method(torch.cat(grouped, 1), torch.cat(own, 1), damped_hessian(rounded[:, :fit]))
    results = {}
    parts = torch.split(found, [w.shape[1] for w in grouped], 1)
    for node, weight, w, s, grid, new in zip(products, weights, grouped, scales, own, parts, strict=True):
        expected, judged = exact[:, fit:] @ w.mT, rounded[:, fit:]
        nearest = quantize_weight(w.reshape(-1, w.shape[2]), grid.flatten()).reshape(w.shape)
        was, now = (sqnr(expected, judged @ (q * grid[:, :, None]).mT) for q in (nearest, new))
        results[node] = Rounded(new.reshape(weight.shape).contiguous(), s, was, now)
    return results


def damped_hessian(x: Tensor) -> Tensor:
    """H of the module's docstring, [G, K, K], the identity where x is all 0; x: [G, rows, K].

    In units of a power of two near the largest |x|, which `compensated` does not see: no square overflows.
    """
    if x.numel():
        exponent = torch.frexp(torch.stack(torch.aminmax(x)).abs().amax()).exponent
        x = torch.ldexp(x, -exponent.clamp(-100, 100))  # 2 ** 128 is no float32
    hessian = (x.mT @ x).div_(max(1, x.shape[1]))
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    mean = diagonal.mean(1, keepdim=True)
    diagonal.add_(torch.where(mean > 0, DAMPING * mean, 1.0))
    return hessian


def compensated(w: Tensor, scales: Tensor, hessian: Tensor) -> Tensor:
    """The integers of `w` on the grid of its scales, int8, by the feedback of errors.

    w: [G, n, K]; scales: [G, n]; hessian: [G, K, K]; all float32 or all float64.
    """
    order = torch.argsort(hessian.diagonal(dim1=1, dim2=2), 1)
    hessian = hessian.gather(1, order[:, :, None].expand_as(hessian)).gather(2, order[:, None].expand_as(hessian))
    share = torch.linalg.cholesky(hessian, upper=True)  # [G, k, j]: of the error at j, what k takes over
    del hessian  # K x K is the most that is held here
    share.div_(share.diagonal(dim1=1, dim2=2)[:, :, None].clone())
    places = order[:, :, None].expand(-1, -1, w.shape[1])
    wanted = w.mT.gather(1, places)  # [G, K, n]: the weights of a column lie side by side
    q, errors, grid = torch.empty_like(wanted), torch.empty_like(wanted), scales[:, None]
    inverse, size = 1 / grid, wanted.shape[1]
    for stop in range(size, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block = torch.baddbmm(wanted[:, start:stop], share[:, start:stop, stop:], errors[:, stop:])
        parts = (wanted[:, start:stop], block, q[:, start:stop], errors[:, start:stop])
        rows = zip(*(torch.split(part, 1, 1) for part in parts), strict=True)
        for k, (exact, row, rounded, left) in reversed(list(enumerate(rows, start))):
            if k + 1 < stop:
                row = torch.baddbmm(row, share[:, k : k + 1, k + 1 : stop], errors[:, k + 1 : stop])
            torch.mul(row, inverse, out=rounded).round_().clamp_(-WEIGHT_QMAX, WEIGHT_QMAX)
            torch.addcmul(exact, rounded, grid, value=-1, out=left)
    return torch.empty_like(q, dtype=torch.int8).scatter_(1, places, q.to(torch.int8)).mT


METHOD = RoundWeights()
