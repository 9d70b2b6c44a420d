"""scale_rows: rows find their own scales as the model runs, where one static range is hopeless for most of them.

A few tokens of a transformer are tens of times larger than the rest behind the feed-forward activation. Their range
leaves the others a handful of steps, and no factors per channel help (`balance`), as it is rows that differ. Each row
of a linear's output counts alike here,

    quality = mean over rows of the SQNR of x w^T, in dB

for the next norm divides every row by its own size; the SQNR of all rows together would see the large ones only. It is
measured on the half of the calibration rows that `balance` has not chosen by. An edge below 30 dB is given to its rows
where they gain at least 2 dB: the linears that read it then are those of the scheme "w8a8-dynamic", which cost a
float32 activation in memory and a pass over it. Factors that `balance` has put there go again. The rows that it chooses
by go in any case: nobody reads them behind it.

Only where float islands read the linears, under `requant="float"`, and where no one else reads their weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.graph import bypass, constant, exclusive_constants, submodule
from fxq.observers import Edge, Fixed, Observer, Rows, WeightObserver, forget_rows
from fxq.ops.activation import activation_of
from fxq.pipeline import Context, Numbers
from fxq.qdq import dequantize, dequantize_weight, fake_quantize_rows, integers_of, quantize
from fxq.spelling import LINEAR, float_bounds
from fxq.stages import Stage

HOPELESS = 30.0
"""dB. MiniLM's hopeless edges are at 25 to 28, its others at 35 and above, as are normally distributed rows."""
LEAST_GAIN = 2.0
"""dB. It costs time, and a few hundred rows do not tell less (`passes.balance`)."""


@dataclass(frozen=True)
class ScaleRows:
    """See the module's docstring."""

    name: str = "scale-rows"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.ROUNDING  # as in `balance`

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of edges given to their rows; the report tells what that gains."""
        count = self._scale(gm, ctx) if ctx.recipe.scale_rows and ctx.recipe.requant == "float" else 0
        forget_rows(gm)
        return count

    def _scale(self, gm: GraphModule, ctx: Context) -> int:
        exclusive = exclusive_constants(gm)
        effects: dict[str, str] = {}
        edges = {n: submodule(gm, n) for n in gm.graph.nodes if n.op == "call_module"}
        found = {n: edge for n, edge in edges.items() if isinstance(edge, Edge | Fixed) and edge.rows.numel()}
        with ctx.bar("scaling rows", len(found)) as bar:
            for node, edge in found.items():
                readers = list(node.users)
                if all(_is_free(gm, reader, exclusive) for reader in readers):
                    static, dynamic = _qualities(gm, edge, readers)
                    if static < HOPELESS and dynamic >= static + LEAST_GAIN:
                        _apply(gm, node, readers)
                        effect = f"rows by themselves: {static:.1f} -> {dynamic:.1f} dB"
                        effects |= dict.fromkeys((reader.name for reader in readers), effect)
                bar.update()
        ctx.report.decisions = [
            replace(d, scheme="w8a8-dynamic", detail=effects[d.node]) if d.node in effects else d
            for d in ctx.report.decisions
        ]
        return len(effects)


def _is_free(gm: GraphModule, reader: Node, exclusive: set[Node]) -> bool:
    """Whether `reader` is a linear with a weight of its own, whose result is read in float."""
    if reader.target is not LINEAR or _is_quantized(gm, reader):
        return False
    observed = reader.args[1]
    assert isinstance(observed, Node)
    return isinstance(submodule(gm, observed), WeightObserver) and observed.args[0] in exclusive


def _is_quantized(gm: GraphModule, node: Node) -> bool:
    """Whether `node`, or a clamp or activation of it, is written as integers with a range of its own."""
    return any(
        isinstance(submodule(gm, user), Observer) and not isinstance(submodule(gm, user), Edge | Fixed)
        if user.op == "call_module"
        else (float_bounds(user) is not None or activation_of(gm, user) is not None) and _is_quantized(gm, user)
        for user in node.users
    )


def _weight(gm: GraphModule, reader: Node) -> tuple[Tensor, WeightObserver]:
    """The constant that the linear `reader` reads, and its observer."""
    observed = reader.args[1]
    assert isinstance(observed, Node) and isinstance(observed.args[0], Node)
    observer = submodule(gm, observed)
    assert isinstance(observer, WeightObserver)
    return constant(gm, observed.args[0]).detach(), observer


def _qualities(gm: GraphModule, edge: Edge | Fixed, readers: list[Node]) -> tuple[float, float]:
    """In dB, as the edge stands and with scales for its rows; on every second row."""
    rows = edge.rows[1::2] if len(edge.rows) > 1 else edge.rows
    qparams = edge.qparams()
    operands = (qparams.scale, qparams.zero_point)
    factors = _weight(gm, readers[0])[1].factors
    scaled = rows if factors is None else rows * factors
    static = dequantize(quantize(scaled, *operands), *operands)
    dynamic = fake_quantize_rows(rows.contiguous())
    exact, signal = rows.double(), torch.zeros(())
    errors = [torch.zeros(()), torch.zeros(())]
    for reader in readers:
        w, observer = _weight(gm, reader)
        expected = exact @ w.double().t()
        signal = signal + expected.square().sum(1)
        for i, (x, weight) in enumerate(((static, observer), (dynamic, _unscaled(observer)))):
            integers = dequantize_weight(*integers_of(weight, w)).double()
            errors[i] = errors[i] + (x.double() @ integers.t() - expected).square().sum(1)
    loud = signal > 0
    a, b = (float(10 * torch.log10(signal / error.clamp(min=1e-30))[loud].mean()) for error in errors)
    return a, b


def _unscaled(observer: WeightObserver) -> WeightObserver:
    """Of the weight as it is where nothing is multiplied into the rows."""
    return observer if observer.factors is None else WeightObserver(observer.where, observer.granularity)


def _apply(gm: GraphModule, node: Node, readers: list[Node]) -> None:
    gm.set_submodule(str(node.target), Rows())
    if _weight(gm, readers[0])[1].factors is None:
        return
    for reader in readers:
        observed = reader.args[1]
        assert isinstance(observed, Node)
        gm.set_submodule(str(observed.target), _unscaled(_weight(gm, reader)[1]))
    scaled = node.args[0]
    assert isinstance(scaled, Node) and isinstance(scaled.args[0], Node)
    bypass(gm, scaled, scaled.args[0])


PASS = ScaleRows()
