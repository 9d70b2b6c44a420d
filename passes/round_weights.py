"""round_weights: round the weights of a product together, so that their errors cancel on the calibration rows.

Rounding each weight to its nearest integer is best for that weight, not for the product x w^T. Column by column, the
error that a weight's rounding makes is taken over by the columns that follow, as far as x holds the same there:

    H = x^T x / rows + damping,  U^T U = H^-1 (U upper),  e_k = (w_k - s q_k) / U_kk,  w_j -= e_k U_kj for j > k

(Frantar et al., GPTQ, 2022), the columns with the largest inputs first, at the scales that the weight has. Only where a
product of at most 4096 channels reads from a float island, of which `observe` keeps rows, and where no one else reads
its weight. Three of four rows fit; the result is kept if it is at least 0.3 dB better on the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.comparison import sqnr
from fxq.graph import constant, exclusive_constants, get_attr, set_constant, submodule
from fxq.observers import Edge, Fixed, FixedScales, Rows, WeightObserver
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, quantize, quantize_weight
from fxq.qtypes import WEIGHT_QMAX
from fxq.spelling import LINEAR
from fxq.stages import Stage

LEAST_GAIN = 0.3
"""dB."""
DAMPING = 0.1
"""Of the mean of H's diagonal: a few hundred rows say little of what the products' other inputs have in common. It also
keeps H's condition below 10 K, so that float32 serves."""
MAX_K = 4096
"""H and what is made of it are K x K; a longer product keeps its nearest integers."""
BLOCK = 64
"""Columns whose errors are passed on together to those behind them."""


@dataclass(frozen=True)
class RoundWeights:
    """See the module's docstring."""

    name: str = "round-weights"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """The effect goes into the decisions of the report."""
        if not ctx.recipe.round_weights:
            return 0
        exclusive, effects = exclusive_constants(gm), {}
        for node in list(gm.graph.nodes):
            edge = submodule(gm, node) if node.op == "call_module" else None
            if not isinstance(edge, Edge | Fixed | Rows) or not edge.rows.numel():
                continue
            if isinstance(edge, Rows):
                x = fake_quantize_rows(edge.rows)
            else:
                qparams = edge.qparams()
                q = quantize(edge.rows, qparams.scale, qparams.zero_point)
                x = dequantize(q, qparams.scale, qparams.zero_point)
            for reader in [user for user in node.users if user.target is LINEAR]:
                effect = _round(gm, reader, exclusive, edge.rows, x)
                if effect:
                    effects[reader.name] = effect
        ctx.report.add_details(effects)
        return len(effects)


def _round(gm: GraphModule, reader: Node, exclusive: set[Node], rows: Tensor, x: Tensor) -> str:
    """Round the weight of `reader` and say what that gains; "" where it stays. x: the rows as integers hold them."""
    observed = reader.args[1]
    assert isinstance(observed, Node)
    observer, source = submodule(gm, observed), observed.args[0]
    assert isinstance(observer, WeightObserver) and isinstance(source, Node)
    long = x.shape[1] > MAX_K
    if long or isinstance(observer, FixedScales) or source not in exclusive or len(observed.users) != 1:
        return ""
    w = constant(gm, source).detach()
    scales, judged = observer.scales_of(w), torch.arange(len(x)) % 4 == 3
    rounded = compensated(w, scales, x[~judged])
    expected = rows[judged] @ w.t()
    nearest = dequantize_weight(quantize_weight(w, scales), scales)
    before, after = (sqnr(expected, x[judged] @ candidate.t()) for candidate in (nearest, rounded))
    if not after >= before + LEAST_GAIN:
        return ""
    path = set_constant(gm, f"{source.target}_rounded", rounded)
    with gm.graph.inserting_before(observed):
        observed.replace_input_with(source, get_attr(gm, path, source))
    gm.graph.erase_node(source)
    gm.set_submodule(str(observed.target), FixedScales(f"weight {path}", observer.granularity, scales))
    return f"rounded together: {before:.1f} -> {after:.1f} dB"


def compensated(w: Tensor, scales: Tensor, x: Tensor) -> Tensor:
    """`w` on the grid of its scales, integers times scales; `w` itself where x is all 0.

    w: float32 [N, K]; scales: [N] or [1]; x: [rows, K].
    """
    hessian = x.t() @ x / max(1, len(x))
    power = hessian.diagonal().mean()
    if not power > 0:
        return w
    order = torch.argsort(hessian.diagonal(), descending=True)
    hessian = hessian[order][:, order]
    hessian.diagonal().add_(DAMPING * power)
    upper = _upper_of_inverse(hessian)
    rest = w.t()[order]  # [K, N]: the weights of a column lie side by side
    q = torch.empty_like(rest)
    inverse = 1 / scales
    for start in range(0, len(rest), BLOCK):
        stop = min(start + BLOCK, len(rest))
        block, row = rest[start:stop], upper[start:stop, start:stop]
        errors = torch.empty_like(block)
        for k in range(stop - start):
            q[start + k] = torch.clamp(torch.round(block[k] * inverse), -WEIGHT_QMAX, WEIGHT_QMAX)
            errors[k] = (block[k] - q[start + k] * scales) / row[k, k]
            block[k + 1 :] -= row[k, k + 1 :, None] * errors[k]
        rest[stop:] -= upper[start:stop, stop:].t() @ errors
    integers = torch.empty_like(q)
    integers[order] = q
    result: Tensor = dequantize_weight(integers.t().to(torch.int8).contiguous(), scales)
    return result


def _upper_of_inverse(h: Tensor) -> Tensor:
    """The upper U with U^T U = h^-1: flipped, h is L L^T, so h = R R^T with R = L flipped, upper, and U = R^-1.

    On one thread: from 384 columns on, LAPACK rounds differently on more, and that decides which way a weight rounds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        r = torch.linalg.cholesky(h.flip(0, 1)).flip(0, 1)
        u: Tensor = torch.linalg.solve_triangular(r, torch.eye(len(h), dtype=h.dtype), upper=True)
    finally:
        torch.set_num_threads(threads)
    return u


PASS = RoundWeights()
