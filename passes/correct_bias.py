"""correct_bias: the mean error that integers make in each output channel of a product goes into its bias.

    empirical   b'[n] = b[n] + mean(y[n] - y^[n])                   y, y^: what the product gives in float, in integers
    analytic    b'[n] = b[n] + sum_k (w[n, k] - w^[n, k]) E[x_k]    of a convolution: w with its taps summed up

(Nagel et al., Data-Free Quantization, 2019). "empirical" takes y^ from the integer network as it runs on calibration
data, all products before it corrected already, so it sees what comes from above, what is clipped and what rounding does
to x; "analytic" sees the rounding of the weight alone. Errors have a mean where x is far from 0, where products are
short (depthwise convolutions), and where values are clipped. Means are taken over rows and places alike: where a
convolution reads padding at the border, the error is a little another one, and stays.

Half of the data fits; the bias changes where that lowers the squared error of the product on the other half by 0.05 dB,
and all stay as they were if the output of the network loses by it. A bias may have other readers: each product gets one
of its own. What was trained with fake quantizers has learned its biases.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import Argument

from fxq.comparison import sqnr
from fxq.graph import constant, get_attr, set_constant
from fxq.pipeline import Context
from fxq.recipe import BiasCorrection
from fxq.simulation import Change, Simulation, calibrated_products, halves, rows_of
from fxq.spelling import CONV_TRANSPOSE, LINEAR

LEAST_GAIN = 0.05
"""dB, of a product: what gains less is the noise of the means themselves."""
CORRECTED = "corrected"
"""In the `meta` of a product: that its bias is."""


@dataclass(frozen=True)
class CorrectBias:
    """See the module's docstring."""

    name: str = "correct-bias"
    what: str = "biases"

    def begin(self, gm: GraphModule, ctx: Context) -> _Correcting | None:
        """None where the recipe does not want it."""
        how = ctx.recipe.correct_bias
        if how is None:
            return None
        products = {node for node in calibrated_products(gm, ctx.recipe) if CORRECTED not in node.meta}
        return _Correcting(gm, products, how)


@dataclass(frozen=True)
class _Correcting:
    """At work on one graph."""

    gm: GraphModule
    products: Set[Node]
    how: BiasCorrection

    def fit(self, product: Node, simulation: Simulation) -> Change | None:
        outputs, rounded = ([rows_of(product, y) for y in values] for values in simulation.values(product))
        errors = [y - z for y, z in zip(outputs, rounded, strict=True)]
        (fit, judged), (_, signal) = halves(errors), halves(outputs)
        if self.how == "empirical":
            tried, shift = fit.mean(0), torch.cat(errors).mean(0)
        else:
            tried = shift = _expected(product, simulation)
        was, now = (sqnr(signal, signal - error) for error in (judged, judged - tried))
        if not now - was >= LEAST_GAIN:  # nor where both are exact
            return None
        undo = partial(_restore, product, product.args)
        _correct(self.gm, product, shift)
        return Change(f"bias corrected: {was:.1f} -> {now:.1f} dB", undo)


def _expected(product: Node, simulation: Simulation) -> Tensor:
    """(w - w^) E[x]: [N]."""
    x, w = product.args[:2]
    assert isinstance(x, Node) and isinstance(w, Node)
    mean = torch.cat([rows_of(product, value) for value in simulation.values(x)[0]]).mean(0)
    exact, rounded = (values[0] for values in simulation.values(w))
    error = (exact - rounded).to(mean.dtype)
    if product.target is LINEAR:
        return error @ mean
    stride, groups = product.args[3], product.args[6]
    assert isinstance(stride, tuple | list) and isinstance(groups, int)
    # Of a transposed convolution, each place sees one of so many taps.
    share = math.prod(map(int, stride)) if product.target is CONV_TRANSPOSE else 1
    taps = error.flatten(2).sum(2).reshape(groups, -1, error.shape[1])
    return (taps @ mean.reshape(groups, -1, 1)).flatten() / share


def _correct(gm: GraphModule, product: Node, shift: Tensor) -> None:
    x, w, b, *rest = product.args
    assert isinstance(w, Node) and isinstance(b, Node | None)
    bias = (shift if b is None else constant(gm, b).detach() + shift).float()
    source = w.args[0]
    assert isinstance(source, Node)
    owner, _, leaf = str(source.target).rpartition(".")
    with gm.graph.inserting_before(product):
        path = f"{owner}.{leaf}_bias_corrected" if owner else f"{leaf}_bias_corrected"
        corrected = get_attr(gm, set_constant(gm, path, bias), product)
    product.args = (x, w, corrected, *rest)
    product.meta[CORRECTED] = True


def _restore(product: Node, args: tuple[Argument, ...]) -> None:
    corrected, product.args = product.args[2], args
    assert isinstance(corrected, Node)
    product.graph.erase_node(corrected)
    del product.meta[CORRECTED]


METHOD = CorrectBias()
