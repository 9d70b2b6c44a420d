"""fit_products: what calibration data tells of the constants of products, each method product by product, in one run.

The network runs in float and in integers side by side (`fxq.simulation`). At each product the methods change its
constants in their order, and everything behind it sees what it then gives. Where the output of the network loses by all
of it, all is taken back, and the network runs again with fewer of the methods, without the last one first: what one has
made of a product was fitted to what the others had made of those before.

The methods have files of their own: `round_weights`, `correct_bias`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import combinations

from torch.fx import GraphModule, Node

from fxq.pipeline import Context, Numbers
from fxq.simulation import Change, Method, Simulation
from fxq.stages import Stage


@dataclass(frozen=True)
class FitProducts:
    """See the module's docstring. methods: in the order in which they come to a product."""

    methods: tuple[Method, ...]
    name: str = "fit-products"
    takes: Stage = Stage.OBSERVED
    gives: Stage = Stage.OBSERVED
    numbers: Numbers = Numbers.APPROXIMATE

    def run(self, gm: GraphModule, ctx: Context) -> int:
        """Returns the number of constants changed; effects and times go into the report."""
        losses: dict[Method, float] = {}
        tried: list[set[Method]] = [set()]
        for size in range(len(self.methods), 0, -1):
            for methods in combinations(self.methods, size):
                if set(methods) in tried:
                    continue
                fit = _fit(methods, gm, ctx)
                if fit.gain >= 0:
                    _report(fit, losses, ctx)
                    return sum(map(len, fit.changes.values()))
                for change in (change for changes in fit.changes.values() for change in changes.values()):
                    change.undo()
                tried.append(set(fit.changes))  # where the others have changed nothing, these have lost by themselves
                losses |= dict.fromkeys(fit.changes, -fit.gain)
        _report(_Fit(), losses, ctx)
        return 0


@dataclass
class _Fit:
    """One run of the network: what the methods that changed anything did, by name of the product, and the seconds that
    each took; gain: of the output, in dB."""

    changes: dict[Method, dict[str, Change]] = field(default_factory=dict)
    seconds: dict[Method, float] = field(default_factory=dict)
    gain: float = 0.0


def _fit(methods: tuple[Method, ...], gm: GraphModule, ctx: Context) -> _Fit:
    begun = [(method, fitter) for method in methods if (fitter := method.begin(gm, ctx)) is not None]
    products = set[Node]().union(*(fitter.products for _, fitter in begun))
    if not products:
        return _Fit()
    simulation = Simulation(gm, ctx)
    fit = _Fit(seconds={method: 0.0 for method, _ in begun})
    for node in simulation.stops(products, f"fitting {' and '.join(method.what for method in fit.seconds)}"):
        for method, fitter in begun:
            start = time.perf_counter()
            fits = node in fitter.products and simulation.is_comparable(node)
            change = fitter.fit(node, simulation) if fits else None
            if change is not None:
                fit.changes.setdefault(method, {})[node.name] = change
                simulation.rerun(node)
            fit.seconds[method] += time.perf_counter() - start
    fit.gain = simulation.gain
    return fit


def _report(fit: _Fit, losses: dict[Method, float], ctx: Context) -> None:
    """losses: of the output, in dB, by each method that was tried in vain before."""
    for method, changes in fit.changes.items():
        ctx.report.add_details({name: change.effect for name, change in changes.items()})
        ctx.report.seconds[method.name] = len(changes), fit.seconds[method]
    ctx.report.notes += (
        f"{method.name}: all {method.what} stay as they were, since the output would lose {loss:.2f} dB"
        for method, loss in losses.items()
        if method not in fit.changes
    )
